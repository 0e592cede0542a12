"""Mistakes in kernels/gated.py that its tests must catch."""

TESTS = ["tests/kernels/test_gated.py"]

MUTATIONS = [
    ("swiglu", "    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask)", "    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), row < rows)"),
    ("swiglu", "    up = tl.load(up_ptr + row * stride_up + column, mask, 0.0).to(tl.float32)\n    out", "    up = tl.load(up_ptr + row * stride_gate + column, mask, 0.0).to(tl.float32)\n    out"),
    ("swiglu", "    out = gate * tl.sigmoid(_sigmoid_argument(gate, GELU)) * up", "    out = tl.sigmoid(_sigmoid_argument(gate, GELU)) * up"),
    ("swiglu", "grad_ptr + row * stride_grad + column", "grad_ptr + row * width + column"),
    ("swiglu", "    slope = share + gate * share * (1.0 - share)", "    slope = share + share * (1.0 - share)"),
    ("swiglu", "(grad * up * slope).to", "(up * slope).to"),
    ("swiglu", "(grad * gate * share).to", "(gate * share).to"),
    ("swiglu", "    row = (program // column_blocks).to(tl.int64) * ROWS", "    row = (program // column_blocks) * ROWS"),
    ("swiglu", "    column = (program % column_blocks).to(tl.int64) * COLUMNS", "    column = (program % column_blocks).to(tl.int64) * (COLUMNS - 1)"),
    ("swiglu", "    blocks = -(-width // columns)", "    blocks = max(1, width // columns)"),
    ("swiglu", "kernel, (-(-count // rows) * blocks,)", "kernel, (max(1, count // rows) * blocks,)"),
    ("swiglu", "    return [tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in tensors]", "    return tensors"),
    ("geglu", "(1.0 + 0.044715 * gate * gate)", "(1.0 + 0.044715 * gate)"),
    ("geglu", "    return 1.5957691216057308 * gate", "    return 0.7978845608028654 * gate"),
    ("geglu", "(1.0 + 0.134145 * gate * gate) if GELU", "(1.0 + 0.044715 * gate * gate) if GELU"),
    ("geglu", "GELU=op == \"geglu\"", "GELU=False"),
]
