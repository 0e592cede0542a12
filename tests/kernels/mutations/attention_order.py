"""Mistakes in kernels/attention_order.py that its tests must catch."""

_FILE = "tests/kernels/test_attention.py"
TESTS = [
    f"{_FILE}::test_blocks_that_read_the_most_come_first",
    f"{_FILE}::test_the_order_of_hundreds_of_documents",
    f"{_FILE}::test_programs_that_make_the_most_products_come_first",
    f"{_FILE}::test_programs_take_turns",
    f"{_FILE}::test_features_together[slopes-documents-groups]",
]

MUTATIONS = [
    ("flash_attention", "    members = tl.minimum(together, units - group * together)\n", "    members = together\n"),
    ("flash_attention", "return unit, unit, tl.load(order + 2 * place), tl.load(order + 2 * place + 1)", "return unit, unit, tl.load(order + 2 * place), place"),
    ("flash_attention", "(further < documents) & (begins <= place)", "(further < documents) & (begins < place)"),
    ("flash_attention", "cu = f.cu_k if KEYS else f.cu_q", "cu = f.cu_q"),
    ("flash_attention", "1 << (steps - 1 - step)", "1 << (steps - step)"),
    ("flash_attention", "return document, block, high - low - gap", "return document, block, high - low"),
    ("flash_attention", "        return document, block, high - low\n    else", "        return document, block, high\n    else"),
    ("flash_attention", "others[None, :] > reads[:, None]", "others[None, :] < reads[:, None]"),
    ("flash_attention", "other[None, :] < place[:, None]", "other[None, :] <= place[:, None]"),
    ("flash_attention", "        rank += tl.sum((ahead & (other < blocks)[None, :])", "        rank = tl.sum((ahead & (other < blocks)[None, :])"),
    ("flash_attention", "blocks = (S if keys else T) // block + documents", "blocks = T // block + documents"),
]  # fmt: skip
