"""Mistakes in kernels/decode.py that its tests must catch."""

TESTS = ["tests/kernels/test_decode.py"]

MUTATIONS = [
    ("decode_attention", "    low = tl.maximum(0, length - cells)\n", "    low = 0\n"),
    ("decode_attention", "tl.maximum(low, length - T - window + 1)", "tl.maximum(low, length - window + 1)"),
    ("decode_attention", "            visible &= j > i - window\n", "            visible &= j >= i - window\n"),
    ("decode_attention", "(j >= low) & (j <= i)", "j <= i"),
    ("decode_attention", "(j >= low) & (j <= i)", "(j >= low) & (j < length)"),
    ("decode_attention", "tl.minimum(j, length - 1) - at", "j - at"),
    ("decode_attention", "tl.where(place < cells, place, place - cells)", "place % (cells + 1)"),
    ("decode_attention", "(at + BLOCK_N) % cells // PAGE", "(at + BLOCK_N) // PAGE"),
    ("decode_attention", "begin % cells // PAGE", "begin // PAGE % cells"),
    ("decode_attention", "tl.where(split == 0, tl.load(sinks + head, inside, 0.0) * LOG2E, peak)", "tl.load(sinks + head, inside, 0.0) * LOG2E"),
    ("decode_attention", "t, inside = row // GROUP, row < T * GROUP", "t, inside = row // GROUP, row <= T * GROUP"),
    ("decode_attention", "head.to(tl.int64) * q_strides[2], q_strides[3]", "head * q_strides[2], q_strides[3]"),
    ("decode_attention", "    k += tl.cast(key_head, tl.int64) * k_strides[2]\n", "    k += key_head * k_strides[2]\n"),
    ("decode_attention", "head * slopes_strides[1]", "head"),
    ("decode_attention", "tanh(y * (scale / softcap)) * (softcap * LOG2E)", "tanh(y * (scale / softcap)) * softcap"),
    ("decode_attention", "        peak = above\n        if PAGE:", "        if PAGE:"),
    ("decode_attention", "tl.where(empty, float(\"-inf\"), peak + tl.log2(total))", "peak"),
    ("decode_attention", "total = total * shrink + tl.sum(weight, 0)", "total += tl.sum(weight, 0)"),
    ("decode_attention", "acc = acc * shrink + tl.sum(values * weight[:, None], 0)", "acc += tl.sum(values * weight[:, None], 0)"),
    ("decode_attention", "            y -= slope * (i - j)", "            y += slope * (i - j)"),
    ("decode_attention", "min(block_n, page & -page) if page", "block_n if page"),
    ("decode_attention", "slopes + entry * slopes_strides[0]", "slopes"),
    ("decode_attention", "multiprocessors(device) // units, longest", "multiprocessors(device), longest"),
]  # fmt: skip
