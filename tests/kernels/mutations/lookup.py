"""Mistakes in kernels/lookup.py that its tests must catch."""

TESTS = ["tests/kernels/test_lookup.py"]

MUTATIONS = [
    ("embedding", "total.to(grad_weight.dtype.element_ty), mask)", "total.to(grad_weight.dtype.element_ty))"),
    ("embedding", "tl.store(chunk_sums + chunk * width + column, total, mask)", "tl.store(chunk_sums + chunk * COLUMNS + column, total, mask)"),
    ("embedding", "tl.load(tokens) == tl.load(tokens + (CHUNK - 1))", "tl.load(tokens) != tl.load(tokens + (CHUNK - 1))"),
    ("embedding", "for start in range(0, CHUNK, ROWS)", "for start in range(ROWS, CHUNK, ROWS)"),
    ("embedding", "first = (begin + CHUNK - 1) // CHUNK", "first = begin // CHUNK"),
    ("embedding", "last = tl.maximum(first, end // CHUNK)", "last = end // CHUNK"),
    ("embedding", "(chunk < last) & mask", "(chunk <= last) & mask"),
    ("embedding", "place < first * CHUNK, place,", "place <= first * CHUNK, place,"),
    ("embedding", "place, place + (last - first) * CHUNK)", "place, place + (last - first + 1) * CHUNK)"),
    ("embedding", "(place < end)[:, None] & mask", "(place <= end)[:, None] & mask"),
    ("embedding", "            row = tl.load(order + start + tl.arange(0, ROWS))[:, None]\n            values = tl.load(grad + row * grad_stride + column * grad_column_stride", "            row = tl.load(order + start + tl.arange(0, ROWS))[:, None]\n            values = tl.load(grad + row * grad_stride + column"),
    ("embedding", "        row = tl.load(order + place, place < end, 0)[:, None]\n        values = tl.load(grad + row * grad_stride", "        row = tl.load(order + place, place < end, 0)[:, None]\n        values = tl.load(grad + row * width"),
    ("embedding", "        total += tl.sum(sums, 0, keep_dims=True)", "        total = tl.sum(sums, 0, keep_dims=True)"),
    ("embedding", "        total += tl.sum(values.to(tl.float32), 0, keep_dims=True)\n    tl.store", "        total += tl.sum(values, 0, keep_dims=True)\n    tl.store"),
    ("embedding", "torch.arange(vocabulary + 1, dtype", "torch.arange(1, vocabulary + 2, dtype"),
    ("embedding", "    if chunks:\n", "    if chunks > 1:\n"),
]  # fmt: skip
