"""Mistakes in kernels/dropout.py that its tests must catch."""

TESTS = ["tests/kernels/test_dropout.py"]

MUTATIONS = [
    ("dropout_add", "    tl.store(y + row * width + column, values.to(y.dtype.element_ty), mask)", "    tl.store(y + row * width + column, values.to(y.dtype.element_ty), row < rows)"),
    ("dropout_add", "    mask = (row < rows) & (column < width)", "    mask = (row <= rows) & (column < width)"),
    ("dropout_add", "word >= threshold.to(tl.uint32)", "word.to(tl.int32) >= threshold.to(tl.int32)"),
    ("dropout_add", "values * scale, 0.0)", "values, 0.0)"),
    ("dropout_add", "tl.interleave(tl.interleave(a, c), tl.interleave(b, d))", "tl.interleave(tl.interleave(a, b), tl.interleave(c, d))"),
    ("dropout_add", "(counter >> 32).to(tl.uint32)", "(counter >> 31).to(tl.uint32)"),
    ("dropout_add", "group = (first // 4 + ", "group = (first + "),
    ("dropout_add", "residual + row * residual_stride + column", "residual + row * x_stride + column"),
    ("dropout_add", "column * residual_column_stride", "column * x_column_stride"),
    ("dropout_add", "counters + row * counter_stride", "counters + row"),
    ("dropout_add", "(program // column_blocks).to(tl.int64) * ROWS", "(program // column_blocks) * ROWS"),
    ("dropout_add", "int(p * 2**32), 1.0 / (1.0 - p)", "int((1.0 - p) * 2**32), 1.0 / (1.0 - p)"),
    ("dropout_add", "ctx.seed if seed is None else seed, counters)", "0 if seed is None else seed, counters)"),
    ("dropout_add", "        return grad_x, grad if ctx.needs_input_grad[1] else None", "        return grad_x, grad_x if ctx.needs_input_grad[1] else None"),
    ("dropout_add", "_dropout(grad, None, ctx.p", "_dropout(grad, grad, ctx.p"),
]  # fmt: skip
