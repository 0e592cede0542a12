"""Mistakes of kernels/multi_tensor.py that the tests of the optimizers must notice."""

TESTS = ["tests/kernels/test_optimizers.py"]

MUTATIONS = [
    ("tile_map", "(device, counts), make", "(device, len(counts)), make"),
    ("tile_map", "tl.load(pair + 1).to(tl.int64)", "tl.load(pair + 1)"),
    ("by_dtype", "if row == dtypes]", "if row[0] == dtypes[0]]"),
    ("tensor_table", "if len(cache) > limit:", "if len(cache) > 2 * limit:"),
    ("read", "(values.to(tl.int32) << 16)", "(values.to(tl.int32) << 15)"),
    ("read", "tl.load(pointer, mask, 0)", "tl.load(pointer)"),
    ("write", "tl.store(pointer, values, mask)", "tl.store(pointer, values)"),
    ("write", "0x7FFF + odd", "0x8000 + odd * 0"),
    ("write", "0x7FFF + odd", "odd * 0"),
    ("write", "0x7FFFFFFF) < 0x7F800000", "0x7FFFFFFF) <= 0x7FFFFFFF"),
    ("write_stochastic", "word & 0xFFFF", "word & 0x7FFF"),
    ("write_stochastic", "(index >> 32).to(tl.uint32)", "none"),
    ("write_stochastic", "none + 1, none)", "none, none)"),
    ("given", "        otherwise = tl.load(scalar).to(DTYPE)\n", "        tl.load(scalar).to(DTYPE)\n"),
    ("allowed", "        size = tl.where(tl.load(found) != 0, 0, size)\n", "        size = tl.where(tl.load(found) == 0, 0, size)\n"),
    ("write_weight", "    if HAS_MASTERS:", "    if not HAS_MASTERS:"),
    ("write_weight", "values, mask, seed, counter, WHOLE)\n    else", "values, mask, seed, offsets * 0, WHOLE)\n    else"),
    ("write_weight", "        write(param, offsets, values, mask, PARAM, WHOLE)", "        write(param, offsets, values * 0.5, mask, PARAM, WHOLE)"),
]
