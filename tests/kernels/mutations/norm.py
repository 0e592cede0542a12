"""Mistakes in kernels/norm.py that its tests must catch."""

TESTS = ["tests/kernels/test_norm.py"]

MUTATIONS = [
    ("rms_norm", "    tl.store(y + column, normed.to(y.dtype.element_ty), mask)", "    tl.store(y + column, normed.to(y.dtype.element_ty))"),
    ("rms_norm", "    inverse = tl.rsqrt(square / width + eps)", "    inverse = tl.rsqrt(square / width + 1e-6)"),
    ("rms_norm", "    inverse = tl.rsqrt(square / width + eps)", "    inverse = tl.rsqrt(square / BLOCK + eps)"),
    ("rms_norm", "    residual += row * residual_stride\n", "    residual += row * x_stride\n"),
    ("rms_norm", "row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]", "row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]"),
    ("rms_norm", "    normed *= tl.load(weight + column, column < width, 0.0).to(tl.float32) + offset", "    normed *= tl.load(weight + column, column < width, 0.0).to(tl.float32)"),
    ("rms_norm", "        values = wide.to(values.dtype)\n", "        return wide\n"),
    ("rms_norm", "        weight_sum += up * unit\n        if HAS_BIAS:\n            bias_sum += up\n        up *= scale", "        up *= scale\n        weight_sum += up * unit\n        if HAS_BIAS:\n            bias_sum += up"),
    ("rms_norm", "tl.load(grad_total + row * grad_total_stride + column, mask, 0.0)", "tl.load(grad_total + row * grad_stride + column, mask, 0.0)"),
    ("rms_norm", "        return grad_x, grad_weight, grad_bias, None, None, grad_x if ctx.has_residual", "        return grad_x, grad_weight, grad_bias, None, None, grad_total if ctx.has_residual"),
    ("rms_norm", "        if HAS_TOTAL:\n            change += tl.load(grad_total + row * grad_total_stride + place", "        if False:\n            change += tl.load(grad_total + row * grad_total_stride + place"),
    ("rms_norm", "        change = (up - unit * along_mean - level_mean) * inverse", "        change = up - unit * along_mean - level_mean"),
    ("rms_norm", "(programs, -(-width // 512))", "(programs, width // 512)"),
    ("layer_norm", "        centred = tl.where(mask, values - mean, 0.0)\n", "        centred = values - mean\n"),
    ("layer_norm", "            change -= tl.sum(up, 1, keep_dims=True) / width\n", "            change -= tl.sum(up, 1, keep_dims=True) / BLOCK\n"),
    ("layer_norm", "                square += shift * shift * (start * count / (start + count))\n", ""),
    ("layer_norm", "                count = tl.minimum(BLOCK, width - start).to(tl.float32)", "                count = BLOCK"),
    ("layer_norm", "        if CENTRED:\n            level += up\n", "        level += up * 0\n"),
    ("layer_norm", "            bias_sum += up\n    _store_sums", "            bias_sum += up * unit\n    _store_sums"),
    ("layer_norm", "    unit = (tl.load(x + row * x_stride + column, mask, 0.0).to(tl.float32) - mean) * inverse", "    unit = tl.load(x + row * x_stride + column, mask, 0.0).to(tl.float32) - mean"),
    ("layer_norm", "        tl.store(means + row, mean, row < rows)", "        tl.store(means + row, mean, row < rows - 1)"),
    ("layer_norm", "        normed += tl.load(bias + column,", "        normed += tl.load(weight + column,"),
    ("layer_norm", "mean = tl.load(means + row, row < rows, 0.0)[:, None] if CENTRED", "mean = tl.load(inverses + row, row < rows, 0.0)[:, None] if CENTRED"),
]
