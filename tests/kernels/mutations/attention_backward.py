"""Mistakes in kernels/attention_backward.py that its tests must catch."""

_FILE = "tests/kernels/test_attention.py"
_GROUPS = (
    "softcap-scale-groups", "slopes-documents-groups", "bias-prefix-groups", "full-slopes of each-bias of rows",
    "bias of rows-dropout-documents", "slopes of each-bias of rows-wide", "window-bias-prefix", "window-groups-wide",
    "slopes of each-dropout-groups", "offsets-dropout-wide", "scale-slopes-atomics", "sinks-groups-atomics", "offsets-documents-atomics",
    "bias of rows-prefix-atomics",
)  # fmt: skip
TESTS = [
    f"{_FILE}::test_programs_that_make_the_most_products_come_first",
    f"{_FILE}::test_keys_beyond_the_last_add_nothing_to_gradients_by_atomics",
    f"{_FILE}::test_a_query_that_sees_no_key_gives_zeros_and_zero_gradients",
    *(f"{_FILE}::test_features_together[{group}]" for group in _GROUPS),
    f"{_FILE}::test_head_dims",
    f"{_FILE}::test_biases_of_one_row",
]

MUTATIONS = [
    ("flash_attention", "mask = inside[:, None] & (column < W)[None, :]", "mask = inside[:, None]"),
    ("flash_attention", "        value -= tl.load(grad_lse", "        value += tl.load(grad_lse"),
    ("flash_attention", "head.to(tl.int64) * lse_strides[1] + row * lse_strides[2]", "head.to(tl.int64) * lse_strides[2] + row * lse_strides[1]"),
    ("flash_attention", "        p = tl.where(j < s, p, 0.0)\n", "        p = p\n"),
    ("flash_attention", "        met = tl.where(keep, p * f.kept, 0.0)\n", "        met = tl.where(keep, p, 0.0)\n"),
    ("flash_attention", "        dp = tl.where(keep, dp * f.kept, 0.0)\n", "        dp = dp * f.kept\n"),
    ("flash_attention", "return met, ds * slope, ds", "return met, ds, ds"),
    ("flash_attention", "tl.where(empty, float(\"inf\"), sums)", "sums"),
    ("flash_attention", "tl.where(empty, 0.0, deltas)", "deltas"),
    ("flash_attention", "c.block_n, c.block_m, f, keys=True)", "c.block_n, c.block_m, f)"),
    ("flash_attention", "first_head, tl.int64) * T + first_q\n", "first_head, tl.int64) * T + first_k\n"),
    ("flash_attention", "row + tl.cast(member, tl.int64) * T", "row"),
    ("flash_attention", "            first_head + member, document,", "            first_head, document,"),
    ("flash_attention", "first_k, key_head, f), j, grad_k_strides, inside, scaled(total_k, f.scale)", "first_k, key_head, f), j, grad_k_strides, inside, scaled(total_k, 1.0)"),
    ("flash_attention", "i < t, scaled(part_q, f.scale)", "i < t, scaled(part_q, 1.0)"),
    ("flash_attention", "document, first_q, first_head + member, f)\n            part_q", "document, first_q, first_head, f)\n            part_q"),
    ("flash_attention", "f.bias is None and f.seeds is None and max", "f.seeds is None and max"),
    ("flash_attention", "f, True, grad_q is not None, PRECISION", "f, True, False, PRECISION"),
    ("flash_attention", "1 if f.window is None else 0, 3", "1, 3"),
    ("flash_attention", "at >= gap_at, gap, 0", "at > gap_at, gap, 0"),
    ("flash_attention", "phase != 1, phase != 1, PRECISION,", "False, phase != 1, PRECISION,"),
    ("flash_attention", "document_end = documents if bias_shape[0] == 1 else document_at + 1", "document_end = document_at + 1"),
    ("flash_attention", "head_end = heads if bias_shape[1] == 1 else head_of + 1", "head_end = head_of + 1"),
    ("flash_attention", "row_end = t if ONE_ROW else tl.minimum(t, (row_block + 1) * BLOCK_M)", "row_end = tl.minimum(t, (row_block + 1) * BLOCK_M)"),
    ("flash_attention", "column_end = s if ONE_COLUMN else tl.minimum(s, (column_block + 1) * BLOCK_N)", "column_end = s"),
    ("flash_attention", "(at < high) & (at + BLOCK_N > low)", "(at < high) & (at > low)"),
    ("flash_attention", "head_of) * bias_shape[2] * bias_shape[3]", "head_of) * bias_shape[3] * bias_shape[3]"),
    ("flash_attention", "tl.where(i[:, None] == 0, tl.sum(total, 0)[None, :], 0.0)", "tl.where(i[:, None] == 0, total, 0.0)"),
]  # fmt: skip
