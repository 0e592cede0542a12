"""Mistakes in kernels/attention.py that its tests must catch."""

_FILE = "tests/kernels/test_attention.py"
_GROUPS = (
    "slopes of each-shorter-atomics", "scale-slopes-atomics", "bias of rows-prefix-shorter", "slopes-documents-groups",
    "offsets-dropout-wide", "bias-prefix-groups", "window-sinks-shorter", "full-documents-wide",
)  # fmt: skip
TESTS = [
    *(f"{_FILE}::test_features_together[{group}]" for group in _GROUPS),
    f"{_FILE}::test_head_dims[160-96]",
    f"{_FILE}::test_biases_of_one_row",
    f"{_FILE}::test_backward_takes_any_layouts_and_gives_any_dtype",
    f"{_FILE}::test_only_what_is_asked_for_is_computed",
    f"{_FILE}::test_windows_that_hide_one_key_or_none",
    f"{_FILE}::test_documents_cut_by_every_other_number",
]

MUTATIONS = [
    ("flash_attention", "window if window <= last else None", "window if window < last else None"),
    ("flash_attention", "window if window <= last else None", "window"),
    ("flash_attention", "cu_q=None if cu_seqlens is None else cu_seqlens.contiguous()", "cu_q=cu_seqlens"),
    ("flash_attention", "return (value.contiguous(), 1) if value.dim()", "return (value.contiguous(), 0) if value.dim()"),
    ("flash_attention", "scale=float(q.shape[-1] ** -0.5 if scale is None else scale)", "scale=float(q.shape[-1] ** -0.5)"),
    ("flash_attention", "slopes_stride=slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0", "slopes_stride=0"),
    ("flash_attention", "tuple(0 if n == 1 else s for n, s in", "tuple(s for n, s in"),
    ("flash_attention", "threshold=int(dropout_p * 2**32)", "threshold=int((1.0 - dropout_p) * 2**32)"),
    ("flash_attention", "cu_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k", "cu_k = cu_seqlens"),
    ("flash_attention", "tl.constexpr(k_start % 4 == 0)", "tl.constexpr(True)"),
    ("flash_attention", "        delta = delta_of(grad, out, grad_lse)", "        delta = delta_of(grad, out, None)"),
    ("flash_attention", "            share = torch.exp(f.sinks[:, None] - lse)", "            share = torch.exp(f.sinks[:, None])"),
    ("flash_attention", "grad_sinks = -(share * delta)", "grad_sinks = (share * delta)"),
    ("flash_attention", "queries=need_q, keys=need_k or need_v", "queries=True, keys=need_k or need_v"),
    ("flash_attention", "(x.float().contiguous() for x in (lse_BHT, delta_BHT))", "(x.float() for x in (lse_BHT, delta_BHT))"),
    ("flash_attention", "bias_shape=None if bias is None else f.bias.shape, dtype=dtype,", "bias_shape=None if bias is None else f.bias.shape,"),
]  # fmt: skip
