"""Mistakes in kernels/token_loss.py that its tests must catch."""

_FILE = "tests/kernels/test_token_loss.py"
TESTS = [
    f"{_FILE}::test_all_three_results_have_true_per_token_gradients",
    f"{_FILE}::test_vocabulary_parallel_halves_equal_the_whole",
    f"{_FILE}::test_ignored_rows_are_not_read",
    f"{_FILE}::test_logits_may_hide_tokens",
    f"{_FILE}::test_logits_too_large_for_fp16_count_as_its_largest",
    f"{_FILE}::test_rows_of_logits_further_apart_than_32_bits_reach",
    f"{_FILE}::test_log_probabilities_of_tokens_given_and_of_the_likeliest",
    f"{_FILE}::test_weights_given_up_front_equal_the_general_path",
    f"{_FILE}::test_kernels_with_weights_given_up_front",
    f"{_FILE}::test_kernels_of_the_head",
    f"{_FILE}::test_kernels_on_logits",
]

_HEAD, _LOGITS, _TOKENS = "linear_cross_entropy", "cross_entropy", "token_logprobs"

MUTATIONS = [
    (_LOGITS, "        z = tl.where(z == float(\"inf\"), 65504.0, tl.where(z == float(\"-inf\"), -65504.0, z))\n", "        z = z\n"),
    (_LOGITS, "tanh(ratio) * softcap, 4.0 * e / ((1.0 + e) * (1.0 + e))", "tanh(ratio) * softcap, 1.0"),
    (_HEAD, "z, slope = z / temperature, slope / temperature", "z, slope = z / temperature, slope"),
    (_LOGITS, "    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)", "    row, rows = tl.program_id(0), tl.num_programs(0)"),
    (_LOGITS, "tl.max(z if PART == 0 else tl.where(inside, z, float(\"-inf\")), 0)", "tl.max(z, 0)"),
    (_LOGITS, "            base = tl.where(above == float(\"-inf\"), 0.0, above)", "            base = above"),
    (_LOGITS, "                e = tl.where(inside, e, 0.0)\n", "                e = e\n"),
    (_LOGITS, "            total = total * shrink + e\n", "            total = total + e\n"),
    (_HEAD, "tl.where(peak == float(\"-inf\"), 0.0, peak - base)) * shrink", "0.0) * shrink"),
    (_HEAD, "    column = label - vocab_start\n", "    column = label\n"),
    (_HEAD, "    here = (column >= 0) & (column < end)", "    here = column < end"),
    (_LOGITS, "+ whole * 2.12194440e-4", "- whole * 2.12194440e-4"),
    (_HEAD, "        factor += by_entropy * (z - level - middle)\n", "        factor += by_entropy * (z - level)\n"),
    (_LOGITS, "    value = _exp(z - level, x.dtype) * factor - share\n", "    value = _exp(z - level, x.dtype) * factor\n"),
    (_LOGITS, "tl.where(column == own_column, own, 0.0)) * slope", "tl.where(column == own_column, own, 0.0))"),
    (_LOGITS, "    gradient += row * gradient_stride + column\n", "    gradient += row * stride + column\n"),
    (_LOGITS, "    if label == ignore_index:\n", "    if label == ignore_index - 1:\n"),
    (_LOGITS, "    elif at + BLOCK <= columns:\n", "    elif at + BLOCK <= columns + 1:\n"),
    (_HEAD, "    share = (peak - most).exp()\n", "    share = torch.ones_like(most)\n"),
    (_HEAD, "        a = a + (2.0 * o.z_loss) * grad_loss *", "        a = a + o.z_loss * grad_loss *"),
    (_HEAD, "    b = b if grad_logprob is None else b + grad_logprob\n", "    b = b\n"),
    (_HEAD, "ctx.save_for_backward(o.reduce(grad_hidden, \"sum\") if o.reduce else grad_hidden)", "ctx.save_for_backward(grad_hidden)"),
    (_TOKENS, "own = grad[part] * here / o.temperature", "own = grad[part] * here"),
    (_TOKENS, "factors = -grad[part].sum(1) / ", "factors = -grad[part, 0] / "),
    ("top_logprobs", "_capped(likeliest, o)[0] - peak", "likeliest - peak"),
]  # fmt: skip
