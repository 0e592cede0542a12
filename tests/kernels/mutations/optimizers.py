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
    ("adamw_", "allowed(tl.load(row + 5), found)", "allowed(tl.load(row + 5), None)"),
    ("adamw_", "if (start + TILE <= size) & (((weight | grad | first | second", "if (start <= size) & (((weight | grad | first | second"),
    ("adamw_", "[-(-size // _TILE) for size in sizes]", "[size // _TILE for size in sizes]"),
    ("lion_", "turn = beta1 * m + rest1 * g", "turn = beta2 * m + rest2 * g"),
    ("lion_", "tl.where(turn < 0, -rate, 0.0)", "-rate"),
    ("lion_", "beta2 * m + rest2 * g, mask", "beta1 * m + rest1 * g, mask"),
    ("lion_", "w -= decay * w + tl.where(", "w -= tl.where("),
    ("lion_", "decay = rate * number(row + 7)", "decay = rate * number(row + 6)"),
    ("lion_", "for beta in betas for number in (beta, 1 - beta)", "for beta in betas for number in (beta, beta)"),
    ("lion_", "allowed(tl.load(row + 4), found)", "allowed(tl.load(row + 4), None)"),
    ("lion_", "rate = tl.load(lr).to(tl.float32) * number(row + 6)", "rate = tl.load(lr).to(tl.float32)"),
    ("lion_", "_lion_block(tensors, start + offset + tl.arange(0, BLOCK), size, counter, noise, numbers, DTYPES, HAS_MASTERS, False)", "_lion_block(tensors, start + tl.arange(0, BLOCK), size, counter, noise, numbers, DTYPES, HAS_MASTERS, False)"),
    ("lion_", "    GRAD: tl.constexpr = DTYPES[1]\n    FIRST: tl.constexpr = DTYPES[2]\n    PARAM", "    GRAD: tl.constexpr = DTYPES[0]\n    FIRST: tl.constexpr = DTYPES[2]\n    PARAM"),
    ("grad_norm_", "tl.store(sums + tl.program_id(0), tl.sum(total, 0))", "tl.store(sums + tl.program_id(0), tl.sum(total, 0), tl.program_id(0) > 0)"),
    ("grad_norm_", "tl.load(sums + index, index < count, 0.0)", "tl.load(sums + index)"),
    ("grad_norm_", "tl.sqrt_rn(tl.sum(total, 0))", "tl.sum(total, 0)"),
    ("grad_norm_", "read(grad, index, index < size, GRAD, False)", "read(grad, index, index <= size, GRAD, False)"),
    ("grad_norm_", "GRAD, True)\n            total += g * g", "GRAD, True)\n            total = g * g"),
    ("grad_norm_", "first += programs", "first = programs"),
    ("grad_norm_", "sums[first : first + programs]", "sums[:programs]"),
]
