"""Mistakes in kernels/attention_forward.py that its tests must catch."""

_FILE = "tests/kernels/test_attention.py"
_GROUPS = (
    "window-bias-prefix", "slopes-documents-groups", "window-groups-wide", "offsets-dropout-wide", "window-sinks-shorter",
    "bias of rows-dropout-documents",
)  # fmt: skip
TESTS = [
    f"{_FILE}::test_programs_that_make_the_most_products_come_first",
    f"{_FILE}::test_a_bias_may_hide_keys",
    f"{_FILE}::test_a_query_that_sees_no_key_gives_zeros_and_zero_gradients",
    *(f"{_FILE}::test_features_together[{group}]" for group in _GROUPS),
]

MUTATIONS = [
    ("flash_attention", "above if phase == 1 and f.bias is None else", "above if phase == 1 else"),
    ("flash_attention", "                p = tl.exp2((y - base[:, None]) * LOG2E)", "                p = tl.exp2(y * LOG2E - (base * LOG2E)[:, None])"),
    ("flash_attention", "order_of((T, S), c.block_m, c.block_n, f)", "order_of((S, T), c.block_m, c.block_n, f)"),
    ("flash_attention", "heads, units, blocks, together, False)", "heads, units, blocks, together, True)"),
    ("flash_attention", "origin(k, k_strides, document, first_k, head // GROUP, f)", "origin(k, k_strides, document, first_k, head % GROUP, f)"),
    ("flash_attention", "    lse += unit.to(tl.int64) * T + first_q\n", "    lse += unit.to(tl.int64) * T\n"),
    ("flash_attention", "tl.load(f.seeds + document * f.seeds_stride)", "tl.load(f.seeds)"),
    ("flash_attention", "tl.load(f.sinks + head)\n        total = tl.full((BLOCK_M,), 1.0, tl.float32)\n", "tl.load(f.sinks + head)\n        total = tl.zeros((BLOCK_M,), tl.float32)\n"),
    ("flash_attention", "2 if SPECIALIZED else 1 if f.window is None else 0, 3", "2 if SPECIALIZED else 1, 3"),
    ("flash_attention", "begin, end = low_full, high_full\n", "begin, end = low, high_full\n"),
    ("flash_attention", "            begin, end = low, high - gap\n", "            begin, end = low, high_full - gap\n"),
    ("flash_attention", "at >= gap_at, gap, 0", "at > gap_at, gap, 0"),
    ("flash_attention", "                y = tl.where((j < s)[None, :], hidden(y, i[:, None], j[None, :], shift, prefix, f, float(\"-inf\")), float(\"-inf\"))", "                y = hidden(y, i[:, None], j[None, :], shift, prefix, f, float(\"-inf\"))"),
    ("flash_attention", "base = above if phase == 1 and f.bias is None else tl.where(above == float(\"-inf\"), 0.0, above)", "base = above"),
    ("flash_attention", "            acc = scaled(acc, shrink[:, None])\n", ""),
    ("flash_attention", "kept(start + i, f.k_start + at,", "kept(start + i, at,"),
    ("flash_attention", "        factor *= f.kept\n", "        factor *= 1.0\n"),
    ("flash_attention", "factor = 1.0 / tl.where(empty, 1.0, total)", "factor = 1.0 / total"),
    ("flash_attention", "peak + tl.log(tl.where(empty, 1.0, total))", "peak"),
    ("flash_attention", "tl.where(empty, float(\"-inf\"), peak + ", "tl.where(empty, 0.0, peak + "),
]  # fmt: skip
