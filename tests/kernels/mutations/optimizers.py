"""Mistakes of kernels/optimizers.py that its tests must notice."""

TESTS = ["tests/kernels/test_optimizers.py"]

MUTATIONS = [
    ("adamw_", "FIRST, WHOLE) + rest1 * g", "FIRST, WHOLE) + g"),
    ("adamw_", "rest2 * g * g", "rest2 * g"),
    ("adamw_", "(tl.sqrt(v) * spread + eps)", "(tl.sqrt(v) * spread)"),
    ("adamw_", "w -= decay * w + rate * m", "w -= rate * m"),
    ("adamw_", "rate = rate / _unbiased(time, log_beta1)", "rate = rate"),
    ("adamw_", "_unbiased(time, log_beta2)", "_unbiased(time, log_beta1)"),
    ("adamw_", "time.to(tl.float64) * log_beta", "time.to(tl.float32) * log_beta"),
    ("adamw_", "number(row + 8)", "number(row + 7)"),
    ("adamw_", "if (start + TILE <= size) & (((weight | grad | first | second", "if (start <= size) & (((weight | grad | first | second"),
    ("adamw_", "size = tl.where(tl.load(found) != 0, 0, size)", "size = tl.where(tl.load(found) != 0, size, size)"),
    ("adamw_", "scale = tl.load(grad_scale).to(tl.float32)", "scale = tl.load(grad_scale).to(tl.float32) * 0 + 1"),
    ("adamw_", "    if HAS_MASTERS:", "    if not HAS_MASTERS:"),
    ("adamw_", "mask, noise, counter, WHOLE)\n    else", "mask, noise, index * 0, WHOLE)\n    else"),
    ("adamw_", "[-(-size // _TILE) for size in sizes]", "[size // _TILE for size in sizes]"),
    ("lion_", "turn = beta1 * m + rest1 * g", "turn = beta2 * m + rest2 * g"),
    ("lion_", "tl.where(turn < 0, -rate, 0.0)", "-rate"),
    ("lion_", "beta2 * m + rest2 * g, mask", "beta1 * m + rest1 * g, mask"),
    ("lion_", "w -= decay * w + tl.where(", "w -= tl.where("),
    ("lion_", "decay = rate * number(row + 7)", "decay = rate * number(row + 6)"),
    ("lion_", "for beta in betas for number in (beta, 1 - beta)", "for beta in betas for number in (beta, beta)"),
    ("grad_norm_", "tl.load(sums + index, index < count, 0.0)", "tl.load(sums + index)"),
    ("grad_norm_", "tl.sqrt_rn(tl.sum(total, 0))", "tl.sum(total, 0)"),
    ("grad_norm_", "read(grad, index, index < size, GRAD, False)", "read(grad, index, index <= size, GRAD, False)"),
    ("grad_norm_", "GRAD, True)\n            total += g * g", "GRAD, True)\n            total = g * g"),
    ("grad_norm_", "first += programs", "first = programs"),
    ("grad_norm_", "sums[first : first + programs]", "sums[:programs]"),
]
