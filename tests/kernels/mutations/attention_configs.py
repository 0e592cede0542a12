"""Mistakes in kernels/attention_configs.py that its tests must catch."""

_FILE = "tests/kernels/test_attention.py"
_GROUPS = (
    "softcap-scale-groups", "slopes-documents-groups", "scale-bias-offsets", "sinks-groups-atomics",
)  # fmt: skip
TESTS = [
    f"{_FILE}::test_both_ways_of_reading_are_taken",
    f"{_FILE}::test_backward_takes_any_layouts_and_gives_any_dtype",
    *(f"{_FILE}::test_features_together[{group}]" for group in _GROUPS),
]

MUTATIONS = [
    ("flash_attention", "    if (half or target == \"interpreter\") and _serves(kernel, tensors, f):", "    if False:"),
    ("flash_attention", "!= (x.shape[3], 0) or x.stride(3) != 1 or", "!= (x.shape[3], 0) or"),
    ("flash_attention", "q.shape[2] == k.shape[2] or all(x.stride(2) == x.shape[3] for x in (q, *tensors[3:]))", "True"),
    ("flash_attention", "x.shape[3] for x in (q, *tensors[3:]))", "x.shape[3] for x in (q,))"),
]  # fmt: skip
