"""Mistakes in kernels/orthogonal.py that its tests must catch."""

TESTS = ["tests/kernels/test_orthogonal.py"]

MUTATIONS = [
    ("orthogonalize", "    if i != j:\n", "    if i > j + 1:\n"),
    ("orthogonalize", "tl.trans(values), mirrored)", "values, mirrored)"),
    ("orthogonalize", "(row[:, None] < rows) & (k[None, :] < depth - start)", "row[:, None] < rows"),
    ("orthogonalize", "(column[None, :] < rows) & (k[:, None] < depth - start)", "(column[None, :] < rows) & (k[:, None] <= depth - start)"),
    ("orthogonalize", "        right += BLOCK_K * x_column_stride", "        right += BLOCK_K"),
    ("orthogonalize", "column[None, :] * x_row_stride + k[:, None]", "column[None, :] * depth + k[:, None]"),
    ("orthogonalize", "mirrored = (column[:, None] < rows) & (row[None, :] < rows)", "mirrored = row[None, :] < rows * BLOCK"),
    ("orthogonalize", "(total * alpha).to(out", "total.to(out"),
    ("orthogonalize", "own.to(tl.float32) * ratio", "own.to(tl.float32)"),
    ("orthogonalize", "    i += ((i + 1) * (i + 2) // 2 <= tile).to(tl.int32)\n", "    i += (tile > 30).to(tl.int32)\n"),
    ("orthogonalize", "out += matrix * rows * rows", "out += matrix * rows * depth"),
    ("orthogonalize", "    x += matrix * x_stride", "    x += matrix * rows * depth"),
    ("orthogonalize", "matrix = (tl.program_id(0) // tiles).to(tl.int64)", "matrix = tl.program_id(0) // tiles"),
    ("orthogonalize", "for start in range(0, depth, BLOCK_K)", "for start in range(0, depth - BLOCK_K, BLOCK_K)"),
    ("orthogonalize", "out + (j.to(tl.int64) * rows + i) * BLOCK", "out + (j.to(tl.int64) * rows + i) * BLOCK_K"),
    ("orthogonalize", "return _steps(matrices, torch.bfloat16, _symmetric_product)", "return _steps(matrices, torch.bfloat16, _product_reference)"),
]  # fmt: skip
