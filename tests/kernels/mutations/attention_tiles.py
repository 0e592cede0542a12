"""Mistakes in kernels/attention_tiles.py that its tests must catch."""

_FILE = "tests/kernels/test_attention.py"
_GROUPS = (
    "window-bias-prefix", "full-slopes of each-bias of rows", "full-wide-atomics", "scale-bias-offsets", "softcap-scale-groups",
    "slopes-documents-groups", "slopes-bias-wide", "bias of rows-prefix-shorter", "slopes-prefix-offsets", "offsets-dropout-wide",
    "slopes of each-shorter-atomics",
)  # fmt: skip
TESTS = [
    f"{_FILE}::test_packed_documents_make_no_more_products_than_each_alone",
    *(f"{_FILE}::test_features_together[{group}]" for group in _GROUPS),
    f"{_FILE}::test_head_dims",
    f"{_FILE}::test_a_query_that_sees_no_key_gives_zeros_and_zero_gradients",
    f"{_FILE}::test_rows_further_apart_than_32_bits_reach",
]

MUTATIONS = [
    ("flash_attention", "        s = tl.where(first <= last, s, 0)", "        s = s"),
    ("flash_attention", "        t = tl.where(first <= last, t, 0)", "        t = t"),
    ("flash_attention", "        values = tl.load(pointers, inside[:, None] & (columns < WIDTH)[None, :], 0.0)", "        values = tl.load(pointers, inside[:, None], 0.0)"),
    ("flash_attention", "        values = tl.load(pointers, (columns < WIDTH)[None, :], 0.0)", "        values = tl.load(pointers)"),
    ("flash_attention", "    pointers = base + rows.to(tl.int64)[:, None] * stride +", "    pointers = base + rows[:, None] * stride +"),
    ("flash_attention", "(source.load([at, member * WIDTH]),)", "(source.load([at, member * 0]),)"),
    ("flash_attention", "strides[1], strides[3], rows < end, P0, P1, WIDTH", "strides[1], strides[3], rows < end, 0, P1, WIDTH"),
    ("flash_attention", "inside[:, None] & (columns < WIDTH)[None, :])\n", "inside[:, None])\n"),
    ("flash_attention", "        total = tl.dot(a[1], tl.trans(b[1]), total, input_precision=PRECISION)\n", "        total = tl.dot(a[1], tl.trans(b[1]), input_precision=PRECISION)\n"),
    ("flash_attention", "y, slope = capped * f.softcap, 1.0 - capped * capped", "y, slope = capped * f.softcap, 1.0"),
    ("flash_attention", "i.to(tl.int64) * f.bias_strides[2] + j.to(tl.int64) * f.bias_strides[3]", "i.to(tl.int64) * f.bias_strides[3] + j.to(tl.int64) * f.bias_strides[2]"),
    ("flash_attention", "tl.cast(document, tl.int64) * f.slopes_stride + head", "head"),
    ("flash_attention", "tl.abs(i + shift - j)", "(i + shift - j)"),
    ("flash_attention", "        reached = j <= i + shift", "        reached = j < i + shift"),
    ("flash_attention", "j > i + shift - f.window", "j >= i + shift - f.window"),
    ("flash_attention", "reached |= j < prefix", "reached |= j <= prefix"),
    ("flash_attention", "tl.cast(f.head_start + head, tl.int64)", "tl.cast(head, tl.int64)"),
    ("flash_attention", "which = column & 3", "which = column & 1"),
    ("flash_attention", "first_k, start - f.k_start, prefix", "first_k, start, prefix"),
    ("flash_attention", "tl.load(f.prefix + document * f.prefix_stride)", "tl.load(f.prefix)"),
    ("flash_attention", "high, high_full = last + shift + 1, first + shift + 1", "high, high_full = last + shift, first + shift + 1"),
    ("flash_attention", "high, high_full = last + shift + 1, first + shift + 1", "high, high_full = last + shift + 1, last + shift + 1"),
    ("flash_attention", "            low = tl.maximum(0, first + shift - f.window + 1) // BLOCK * BLOCK", "            low = tl.cdiv(tl.maximum(0, first + shift - f.window + 1), BLOCK) * BLOCK"),
    ("flash_attention", "                gap_at = tl.cdiv(tl.maximum(0, prefix), BLOCK) * BLOCK", "                gap_at = tl.maximum(0, prefix) // BLOCK * BLOCK"),
    ("flash_attention", "tl.maximum(high, prefix), tl.maximum(high_full, prefix)", "high, high_full"),
    ("flash_attention", "            high = tl.minimum(t, last - shift + f.window)", "            high = tl.minimum(t, first - shift + f.window)"),
    ("flash_attention", "tl.where(first < prefix, 0, low), tl.where(first < prefix, t, high)", "tl.where(first < prefix, 0, low), high"),
    ("flash_attention", "[tl.maximum(rows, 1), HEADS * WIDTH]", "[tl.maximum(rows, 1), WIDTH]"),
]  # fmt: skip
