"""Mistakes in kernels/adafactor.py that its tests must catch."""

TESTS = ["tests/kernels/test_adafactor.py"]

MUTATIONS = [
    ("adafactor_", "write_weight(weight, param, index, w, mask, noise, counter,", "write_weight(weight, param, index, w, mask, noise, counter * 0,"),
    ("adafactor_", "write_weight(weight, param, index, w, mask,", "write_weight(weight, param, index, w - pace * update, mask,"),
    ("adafactor_", "        columns += square\n", "        columns += g\n"),
    ("adafactor_", "tl.store(by_row + line, tl.sum(square, 1, keep_dims=True), line * width < limit)", "tl.store(by_row + line, tl.sum(square, 1, keep_dims=True))"),
    ("adafactor_", "        tl.store(by_column + column, tl.sum(columns, 0, keep_dims=True), column < width)", "        tl.store(by_column + column, tl.sum(columns, 0, keep_dims=True), column < limit)"),
    ("adafactor_", "    by_row = scratch + by_row + tile % column_tiles * rows\n", "    by_row = scratch + by_row + tile % column_tiles * ROWS\n"),
    ("adafactor_", "    by_column = scratch + by_column + tile // column_tiles * width\n", "    by_column = scratch + by_column\n"),
    ("adafactor_", "            write(moment, index, (1.0 - mix) * v + mix * square, mask", "            write(moment, index, mix * v + (1.0 - mix) * square, mask"),
    ("adafactor_", "    length = tl.where(along, width, rows).to(tl.float32)", "    length = tl.where(along, rows, width).to(tl.float32)"),
    ("adafactor_", "    mask = index < tl.minimum(count, allowed(size, found))", "    mask = index < count"),
    ("adafactor_", "first + part * count + index[None, :], (part < parts) & mask[None, :]", "first + part * count + index[None, :], (part <= parts) & mask[None, :]"),
    ("adafactor_", "    inside = ((top + ROWS) * width <= limit) & (left + COLUMNS <= width)", "    inside = ((top + ROWS) * width <= limit) & (left < width)"),
    ("adafactor_", "v = read(first, line, line * width < limit, MOMENT, False) * columns", "v = read(first, line, line * width < limit, MOMENT, False)"),
    ("adafactor_", "    pace = tl.minimum(rate, tl.rsqrt(tl.load(step).to(tl.float32)))", "    pace = tl.minimum(rate, 1.0)"),
    ("adafactor_", " / tl.maximum(updates / clip_threshold, 1.0)\n", " / tl.maximum(updates, clip_threshold)\n"),
    ("adafactor_", "    rate = tl.load(lr).to(tl.float32) * number(row + 10)", "    rate = tl.load(lr).to(tl.float32)"),
    ("adafactor_", "        w -= decay * w + pace * update\n", "        w -= pace * update\n"),
    ("adafactor_", "    first = scratch + tl.where(which == 0, chunks, tiles)\n", "    first = scratch + chunks\n"),
    ("adafactor_", "    weights = tl.sqrt(tl.load(total + 1) / size.to(tl.float32))", "    weights = tl.sqrt(tl.load(total + 1) / rows.to(tl.float32))"),
    ("adafactor_", "    least = max(eps1 * eps1, torch.finfo(torch.float32).tiny)", "    least = max(eps1, torch.finfo(torch.float32).tiny)"),
    ("adafactor_", "        chunks.append(-(-rows // _CHUNK) - (-width // _CHUNK) if factored else 0)", "        chunks.append(-(-rows // _CHUNK) + width // _CHUNK if factored else 0)"),
]  # fmt: skip
