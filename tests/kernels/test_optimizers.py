"""adamw_, lion_ and grad_norm_: references against formulas and torch.optim, kernels against references; bf16 to the bit, in the interpreter too."""

from __future__ import annotations

import gc
import math
import weakref
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nanotrain.kernels import multi_tensor, optimizers
from nanotrain.kernels.optimizers import EXAMPLES, adamw_, adamw_reference, grad_norm_, grad_norm_reference, lion_, lion_reference
from nanotrain.kernels.random import stochastic_round
from nanotrain.kernels.runtime import launches

from tests.kernels.kit import DEVICE, agree, drawn, on_gpu, poisoned, repeatable

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # NumPy's, of the interpreter

HYPER = dict(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def draw(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [[torch.randn(s, generator=g).to(dtype) for s in EXAMPLES] for _ in range(2)]


def moments(params, dtype=None):
    return [[torch.zeros_like(p, dtype=dtype) for p in params] for _ in range(2)]


def test_equals_the_formula_in_float64():
    params, grads = draw(torch.float64)
    expected = [p.clone() for p in params]
    m, v = moments(params)
    em, ev = moments(params)
    for step in (1, 2, 3):
        adamw_(params, grads, m, v, lr=0.01, step=step, grad_scale=0.5, **HYPER)
        for p, g, a, b in zip(expected, grads, em, ev, strict=True):
            g = g * 0.5
            a.mul_(0.9).add_(0.1 * g)
            b.mul_(0.95).add_(0.05 * g * g)
            p.mul_(1 - 0.01 * 0.1)
            p.sub_(0.01 * (a / (1 - 0.9**step)) / ((b / (1 - 0.95**step)).sqrt() + 1e-8))
    for a, b in zip((*params, *m, *v), (*expected, *em, *ev), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_lion_equals_its_formula_in_float64():
    params, grads = draw(torch.float64)
    expected, (m, em) = [p.clone() for p in params], moments(params)
    for _ in range(3):
        lion_(params, grads, m, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, grad_scale=0.5)
        for p, g, a in zip(expected, grads, em, strict=True):
            p.mul_(1 - 0.01 * 0.1).sub_(0.01 * torch.sign(0.9 * a + 0.1 * 0.5 * g))
            a.mul_(0.95).add_(0.05 * 0.5 * g)
    for a, b in zip((*params, *m), (*expected, *em), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_equals_torch_over_many_steps():
    params, grads = draw()
    theirs = [torch.nn.Parameter(p.clone()) for p in params]
    reference = torch.optim.AdamW(theirs, lr=0.01, fused=True, **HYPER)
    m, v = moments(params)
    for step in range(1, 11):
        adamw_(params, grads, m, v, lr=0.01, step=torch.tensor(float(step)), impl="reference", **HYPER)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        reference.step()
    assert all(torch.equal(p, t) for p, t in zip(params, theirs, strict=True))


def test_nothing_is_written_where_the_flag_is_set():
    for masters in (False, True):
        params, grads = draw(torch.bfloat16)
        wide = [p.float() for p in params] if masters else None
        m, v = moments(params, torch.float32)
        before = [t.clone() for t in (*params, *m, *v, *(wide or []))]
        extra = dict(masters=wide) if masters else dict(seed=1, counter_starts=[0, 100, 200, 300])
        adamw_(params, grads, m, v, lr=0.1, step=1, found_nonfinite=torch.tensor(True), **extra, **HYPER)
        assert all(torch.equal(a, b) for a, b in zip((*params, *m, *v, *(wide or [])), before, strict=True))
        adamw_(params, grads, m, v, lr=0.1, step=1, found_nonfinite=torch.tensor(False), **extra, **HYPER)
        assert not any(torch.equal(a, b) for a, b in zip(params, before, strict=False))


def test_masters_carry_what_bf16_cannot():
    params, grads = draw(torch.bfloat16)
    masters = [p.float() for p in params]
    exact = [p.double() for p in params]
    m, v = moments(params, torch.float32)
    em, ev = moments(exact)
    for step in range(1, 21):
        adamw_(params, grads, m, v, lr=1e-4, step=step, masters=masters, **HYPER)
        adamw_(exact, [g.double() for g in grads], em, ev, lr=1e-4, step=step, **HYPER)
    for p, w, e in zip(params, masters, exact, strict=True):
        torch.testing.assert_close(w.double(), e, rtol=1e-5, atol=1e-6)
        assert torch.equal(p, w.bfloat16())


def test_stochastic_rounding_follows_fp32_on_average():
    p = [torch.ones(20000, dtype=torch.bfloat16)]
    m, v = moments(p, torch.float32)
    for step in range(1, 11):  # each step is a 16th of a bf16 ulp: rounding to nearest would never move
        adamw_(
            p, [torch.ones_like(p[0])], m, v, lr=2.0**-12, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0, step=step, seed=step, counter_starts=[0]
        )
    assert abs(float(p[0].float().mean()) - (1 - 10 * 2.0**-12)) < 1e-4


def test_bad_arguments_are_named():
    params, grads = draw()
    m, v = moments(params)
    with pytest.raises(ValueError, match="shapes of grads"):
        adamw_(params, grads[:-1], m, v, lr=0.1, step=1, **HYPER)
    narrow = [p.bfloat16() for p in params]
    with pytest.raises(ValueError, match="need masters"):
        adamw_(narrow, grads, m, v, lr=0.1, step=1, **HYPER)
    with pytest.raises(ValueError, match="3 counter_starts for 4 params"):
        adamw_(narrow, grads, m, v, lr=0.1, step=1, seed=1, counter_starts=[0, 1, 2], **HYPER)
    with pytest.raises(ValueError, match="different devices"):
        adamw_(params, [g.to("meta") for g in grads], m, v, lr=0.1, step=1, **HYPER)
    with pytest.raises(ValueError, match="lion_: 2 lr_scales for 4 params"):
        lion_(params, grads, m, lr=0.1, betas=(0.9, 0.95), weight_decay=0.1, lr_scales=[1.0, 2.0])
    with pytest.raises(ValueError, match="5 weight_decay for 4 params"):
        adamw_(params, grads, m, v, lr=0.1, step=1, **HYPER | dict(weight_decay=[0.1] * 5))
    with pytest.raises(ValueError, match="grad_norm_: no grads"):
        grad_norm_([])
    with pytest.raises(RuntimeError, match="no Triton kernel"):
        adamw_(*([t.double() for t in ts] for ts in (params, grads, m, v)), lr=0.1, step=1, impl="triton", **HYPER)


# The kernels.

F32, F16, B16 = torch.float32, torch.float16, torch.bfloat16
KINDS = {  # dtypes of params, grads and moments, and whether there are masters
    "fp32": (F32, F32, F32, False),
    "narrow grads and moments": (F32, F16, B16, False),
    "fp16 with masters": (F16, F16, F32, True),
    "bf16 with masters": (B16, F32, F32, True),
    "bf16": (B16, B16, F32, False),
    "all bf16": (B16, B16, B16, False),
}
OPS = {
    adamw_: (adamw_reference, 2, "_adamw_kernel", dict(betas=(0.9, 0.99), eps=1e-3, step=3)),
    lion_: (lion_reference, 1, "_lion_kernel", dict(betas=(0.9, 0.95))),
}
ops = pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
kinds = pytest.mark.parametrize("kind", KINDS)

some_sizes = st.lists(st.sampled_from([0, 1, 3, 511, 512, 513, 4096, 4097]), min_size=1, max_size=3)
"""Around the edges of a block and of a tile."""


def apart(tensors, shift=0):
    """(memory, copies of the tensors in it): NaN before, between and after them; `shift` elements from an address that is a multiple of 16."""
    starts, end = [], 64 + shift
    for t in tensors:
        starts.append(end)
        end += -(-t.numel() // 64) * 64 + 64
    memory = torch.full((end + 8192,), math.nan, dtype=tensors[0].dtype, device=DEVICE)
    return memory, [memory[s : s + t.numel()].view(t.shape).copy_(t) for s, t in zip(starts, tensors, strict=True)]


def problem(op, kind, sizes, seed=0, shift=0, **options):
    """(lists of tensors, options of a call, all memory) for an op; bf16 params without masters get a seed."""
    dtype, grad, moment, has_masters = KINDS[kind]
    g = torch.Generator().manual_seed(seed)
    memories, lists = [], []
    for place, column in enumerate((dtype, grad, *[moment] * OPS[op][1])):
        values = [torch.randn(n, generator=g) for n in sizes]
        memory, tensors = apart([(v.square() if place == 3 else v).to(column) for v in values], shift)  # second moments are positive
        memories.append(memory)
        lists.append(tensors)
    options = dict(lr=0.01, weight_decay=0.1) | OPS[op][3] | options
    if has_masters:
        memory, options["masters"] = apart([p.float() + 2.0**-12 for p in lists[0]], shift)
        memories.append(memory)
    elif dtype == B16:
        options |= dict(seed=-12345678901234567, counter_starts=[(1 << 32) - 50 + 10_000 * i for i in range(len(sizes))])
    return lists, options, memories


def same(a, b):
    """Whether two tensors are equal to the bit, NaNs equal to each other."""
    return torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0))


def counted(function, *arguments, **options):
    """(launches by kernel, result) of a call."""
    before = Counter(launches)
    result = function(*arguments, **options)
    return {name: n for name, n in (launches - before).items() if name.endswith("_kernel")}, result


def call(op, lists, options):
    """One call of the kernel, launched once; nothing but what it writes has changed."""
    grads = [g.clone() for g in lists[1]]
    with poisoned():
        found, _ = counted(op, *lists, impl="triton", **options)
    assert found == ({OPS[op][2]: 1} if any(g.numel() for g in grads) else {}), found
    assert all(same(a, b) for a, b in zip(grads, lists[1], strict=True)), "a gradient was overwritten"


@ops
@kinds
@drawn(5)
@given(
    sizes=some_sizes, seed=st.integers(0, 99), shift=st.sampled_from([0, 0, 1, 8]), scaled=st.booleans(), each=st.booleans(),
    step=st.sampled_from([1, 2, 1000]),
)  # fmt: skip
def test_kernels_agree_with_the_references(op, kind, sizes, seed, shift, scaled, each, step):
    options = dict(step=step) if op is adamw_ else {}
    options |= dict(grad_scale=torch.tensor(0.5, device=DEVICE)) if scaled else {}
    options |= dict(lr_scales=[1.0 + i for i in range(len(sizes))], weight_decay=[0.3 * i for i in range(len(sizes))]) if each else {}
    lists, options, memories = problem(op, kind, sizes, seed, shift, **options)
    start = [[t.clone() for t in tensors] for tensors in (*lists, options.get("masters", ()))]
    narrow = "seed" in options  # what is drawn is compared in its own test
    call(op, lists, options)
    assert sum(int(m.isnan().sum()) for m in memories) == sum(m.numel() - sum(sizes) for m in memories), "written outside of a tensor"
    reference, results = OPS[op][0], {}
    for dtype in (None, torch.float64):
        own = [[t.to(dtype or t.dtype, copy=True) for t in tensors] for tensors in start]
        masters = dict(masters=own[-1] if dtype is None else None) if own[-1] else {}
        if dtype is not None and own[-1]:
            own[0] = own[-1]
        reference(*own[:-1], **options | masters)
        results[dtype] = [*(own[-1] or own[0]), *(t for tensors in own[2:-1] for t in tensors)]
    weights = options.get("masters", lists[0])
    got = [*weights, *(t for tensors in lists[2:] for t in tensors)]
    for index, (ours, theirs, exact) in enumerate(zip(got, results[None], results[torch.float64], strict=True)):
        if index >= len(sizes) or not narrow:
            agree(ours, exact, theirs, f"tensor {index}")
    if weights is not lists[0]:
        assert all(torch.equal(p, w.to(p.dtype)) for p, w in zip(lists[0], weights, strict=True)), "not the masters rounded"


@ops
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("kind", ["bf16", "all bf16"])
def test_bf16_is_rounded_as_the_references_do(op, kind, shift):
    """What fp32 gives from the same bits, moments rounded to the nearest and params by chance."""
    lists, options, _ = problem(op, kind, [3, 700, 4097], 1, shift, lr=0.003)
    lists[0][0][:] = torch.tensor([math.inf, -math.inf, math.nan])
    lists[0][1][:8] = torch.tensor([0.0, -0.0, 3.38e38, -3.38e38, 1e-40, -1e-40, 1.0, -1.0])
    lists[1][1][20:24] = torch.tensor([math.nan, math.inf, -math.inf, 0.0])
    wide = [[t.to(F32, copy=True) for t in tensors] for tensors in lists]
    call(op, wide, {**options, "seed": None, "counter_starts": None})
    call(op, lists, {**options, "seed": torch.tensor(options["seed"], device=DEVICE)})
    for p, w, first in zip(lists[0], wide[0], options["counter_starts"], strict=True):
        assert same(p, stochastic_round(w, B16, options["seed"], first)), "not rounded as stochastic_round does"
    for got, expected in zip(lists[2:], wide[2:], strict=True):
        assert all(same(a, b.to(a.dtype)) for a, b in zip(got, expected, strict=True)), "moments not rounded to the nearest"


def test_what_is_not_finite_stays_so():
    """Sums too large for fp32 are infinite, and a NaN of ones only, as GPUs give, is not rounded up to a zero."""
    p = [torch.tensor([3e38, -3e38], dtype=B16, device=DEVICE).repeat(50)]
    grads, m = [-p[0] / 1e38], [torch.zeros(100, device=DEVICE)]
    lion_(p, grads, m, lr=2e38, betas=(0.9, 0.9), weight_decay=0.0, seed=1, counter_starts=[0], impl="triton")
    assert same(p[0], torch.tensor([math.inf, -math.inf], dtype=B16, device=DEVICE).repeat(50))
    grads, m = [torch.full((3,), 0x7FFFFFFF, dtype=torch.int32, device=DEVICE).view(F32)], [torch.zeros(3, dtype=B16, device=DEVICE)]
    lion_([torch.zeros(3, device=DEVICE)], grads, m, lr=0.1, betas=(0.9, 0.9), weight_decay=0.0, impl="triton")
    assert m[0].isnan().all()


def test_moments_are_rounded_to_even_in_ties():
    """Of m = 0 and beta1 = 1/2, a gradient of two bf16 bits more than m can hold: half of it is a tie."""
    odd = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, -(1 + 2.0**-8), 2.0**-130 * (1 + 2.0**-8)], device=DEVICE)
    m = [torch.zeros(4, dtype=B16, device=DEVICE)]
    lion_([torch.zeros(4, device=DEVICE)], [2 * odd], m, lr=0.1, betas=(0.5, 0.5), weight_decay=0.0, impl="triton")
    assert torch.equal(m[0], odd.bfloat16()) and not torch.equal(m[0].float(), odd)


def test_lion_does_not_turn_where_nothing_pushes():
    p, m = [torch.tensor([2.0, -3.0, 1.0], device=DEVICE)], [torch.tensor([0.0, 0.0, -0.5], device=DEVICE)]
    lion_(p, [torch.tensor([0.0, -0.0, 0.5], device=DEVICE)], m, lr=0.5, betas=(0.5, 0.5), weight_decay=0.5, impl="triton")
    assert p[0].tolist() == [1.5, -2.25, 0.75] and m[0].tolist() == [0.0, 0.0, 0.0]


@ops
@kinds
@pytest.mark.parametrize("found", [torch.tensor(True), torch.tensor(1.0)], ids=["bool", "float"])
def test_a_step_refused_leaves_every_bit(op, kind, found):
    lists, options, memories = problem(op, kind, [5, 4600])
    for g in lists[1]:
        g.fill_(math.nan)
    options |= dict(found_nonfinite=found.to(DEVICE)) | (dict(step=0) if op is adamw_ else {})
    before = [m.clone() for m in memories]
    call(op, lists, options)
    assert all(same(a, b) for a, b in zip(memories, before, strict=True))
    call(op, lists, options | dict(found_nonfinite=torch.zeros_like(options["found_nonfinite"])))
    assert not same(memories[2], before[2])


@ops
def test_numbers_and_tensors_on_the_device_are_the_same(op):
    results = []
    for number in (lambda x, dtype: x, lambda x, dtype: torch.tensor(x, dtype=dtype, device=DEVICE)):
        options = dict(lr=number(0.0625, torch.float64), grad_scale=number(0.25, F16))
        options |= dict(step=number(7, torch.int64)) if op is adamw_ else {}
        lists, options, memories = problem(op, "bf16", [700, 9], **options)
        call(op, lists, {**options, "seed": number(77, torch.int64)})
        results.append(memories)
    assert all(same(a, b) for a, b in zip(*results, strict=True))


@ops
@pytest.mark.parametrize("impl", ["triton", "reference", "auto"])
@pytest.mark.parametrize("kind", ["fp32", "bf16 with masters", "bf16"])
def test_rates_and_decays_of_their_own_are_those_of_separate_calls(op, kind, impl):
    scales, decays = [1.0, 0.5, 1.0, 4.0], [0.0, 0.25, 0.5, 0.25]
    one, options, together = problem(op, kind, [9, 30, 1, 5])
    op(*one, impl=impl, **options | dict(lr_scales=scales, weight_decay=decays))
    each, options, apart = problem(op, kind, [9, 30, 1, 5])
    for i in range(4):
        own = {name: options[name][i : i + 1] for name in ("masters", "counter_starts") if name in options}
        op(*([tensors[i]] for tensors in each), impl=impl, **options | own | dict(lr=0.01 * scales[i], weight_decay=decays[i]))
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6 if a.dtype == F32 else 0, atol=0, equal_nan=True)


@ops
def test_one_launch_however_many_tensors(op):
    lists, options, _ = problem(op, "fp32", [7] * 20)
    call(op, lists, options)
    lists, options, _ = problem(op, "fp32", [0, 0])
    call(op, lists, options)
    assert counted(op, *([] for _ in lists), impl="triton", **options) == ({}, None)


@ops
def test_a_launch_for_each_combination_of_dtypes(op):
    results = []
    for together in (True, False):
        kinds = [problem(op, kind, sizes) for kind, sizes in (("fp32", [3, 5]), ("narrow grads and moments", [4]))]
        lists, options = [[*a, *b] for a, b in zip(*(k[0] for k in kinds), strict=True)], kinds[0][1]
        for each in [lists] if together else [k[0] for k in kinds]:
            assert counted(op, *each, impl="triton", **options)[0] == {OPS[op][2]: 1 + together}
        results.append([t for tensors in lists for t in tensors])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_first_and_late_steps_are_unbiased():
    """From zero, a first step is the rate and its relative error that of 1 - beta^t, which fp32 alone would get wrong by 3e-5."""
    for beta1, beta2, step in ((0.9, 0.999, 1), (0.999, 0.99999, 1), (0.5, 0.9999, 10), (0.99, 0.999999, 1e5), (0.0, 0.0, 1)):
        states = {}
        for dtype in (F32, torch.float64):
            p, g = torch.zeros(1, dtype=dtype, device=DEVICE), torch.full((1,), 0.25, dtype=dtype, device=DEVICE)
            m, v = torch.zeros_like(p), torch.zeros_like(p)
            adamw_([p], [g], [m], [v], lr=1.0, betas=(beta1, beta2), eps=0.0, weight_decay=0.0, step=step, impl="triton" if dtype == F32 else "auto")
            states[dtype] = p.double()
        torch.testing.assert_close(states[F32], states[torch.float64], rtol=1e-6, atol=0)


@ops
def test_addresses_that_come_again_mean_what_they_mean_now(op):
    """The memory of 700 elements, then of 40 of them and of others: as if each call were the first."""
    results = []
    for fresh in (False, True):
        (params, grads, *rest), options, memories = problem(op, "fp32", [700])
        for size, decay in ((700, 0.1), (40, 0.1), (40, 0.5), (700, 0.5)):
            if fresh:
                multi_tensor._tables.clear()
                multi_tensor._maps.clear()
            lists = [[tensors[0][:size]] for tensors in (params, grads, *rest)]
            call(op, lists, options | dict(weight_decay=decay))
            lists[1] = [lists[1][0] + 1.0]  # new gradients at every step
            call(op, lists, options)
            whole = [[t[0][:size].view(-1)[: size // 2], t[0][size // 2 : size]] for t in (params, grads, *rest)]
            call(op, whole, options)
        results.append(memories)
    assert all(same(a, b) for a, b in zip(*results, strict=True))


def test_tables_are_few_and_keep_no_tensor(monkeypatch):
    monkeypatch.setattr(multi_tensor, "_TABLES", 5)
    monkeypatch.setattr(multi_tensor, "_MAPS", 4)
    multi_tensor._tables.clear()
    multi_tensor._maps.clear()
    for size in range(1, 8):
        lists, options, memories = problem(lion_, "fp32", [size] * size)
        call(lion_, lists, options)
    assert len(multi_tensor._tables) == 5 and len(multi_tensor._maps) == 4
    gone = weakref.ref(lists[0][0])
    del lists, memories
    gc.collect()
    assert gone() is None


@ops
def test_what_is_written_must_be_contiguous(op):
    for place, name in enumerate(("params", "exp_avgs", "masters")):
        lists, options, _ = problem(op, "bf16 with masters", [6, 12])
        columns = [lists[0], lists[2], options["masters"]]
        columns[place][1] = torch.ones(24, device=DEVICE, dtype=columns[place][1].dtype)[::2]
        with pytest.raises(ValueError, match=rf"{op.__name__}: {name}\[1\] is not contiguous"):
            op(*lists, impl="triton", **options)
        assert counted(op, *lists, **options) == ({}, None)
    lists, options, _ = problem(op, "fp32", [24])
    dense, _, _ = problem(op, "fp32", [24])
    turned = [[t.view(4, 6) for t in tensors] for tensors in lists]
    turned[1] = [g.mT.contiguous().mT for g in turned[1]]
    call(op, turned, options)
    call(op, dense, options)
    assert all(torch.equal(a, b) for a, b in zip((t for x in lists for t in x), (t for x in dense for t in x), strict=True))


@ops
def test_calls_give_the_same_bits(op):
    def once():
        lists, options, memories = problem(op, "bf16", [700, 5])
        call(op, lists, options)
        return memories

    repeatable(once)


def test_offsets_past_32_bits(monkeypatch):
    """The last two tiles alone of a tensor of more than 2^31 elements, whose other memory is never touched."""
    size, tail = (1 << 31) + 5000, 5000
    few = torch.tensor([[0, (size - 1) // 4096 - 1], [0, (size - 1) // 4096]], dtype=torch.int32, device=DEVICE)
    start = size - tail
    lists, options, _ = problem(lion_, "all bf16", [tail], counter_starts=[start])
    options["counter_starts"] = [start]
    large = [[torch.empty(size, dtype=B16, device=DEVICE)] for _ in lists]
    for (big,), (small,) in zip(large, lists, strict=True):
        big[start:] = small
    call(lion_, lists, options)
    monkeypatch.setattr(optimizers, "tile_map", lambda counts, device: few)
    lion_(*large, impl="triton", **options | dict(counter_starts=[0]))
    done = size - int(few[0, 1]) * 4096
    for (big,), (small,) in zip(large, lists, strict=True):
        assert same(big[size - done :], small[tail - done :])


# The norm.


@drawn(12)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 3, 2047, 2048, 2049, 16384, 16385]), min_size=1, max_size=4), dtype=st.sampled_from([F32, F16, B16]),
    seed=st.integers(0, 99), shift=st.sampled_from([0, 0, 1, 8]),
)  # fmt: skip
def test_norm_agrees_with_the_reference(sizes, dtype, seed, shift):
    g = torch.Generator().manual_seed(seed)
    memory, grads = apart([(torch.randn(n, generator=g) * 3).to(dtype) for n in sizes], shift)
    before = memory.clone()
    with poisoned():
        found, norm = counted(grad_norm_, grads, impl="triton")
    assert found == ({"_square_sum_kernel": 1} if sum(sizes) else {}) | {"_norm_kernel": 1}
    assert same(memory, before)
    agree(norm, grad_norm_reference([g.double() for g in grads]), grad_norm_reference(grads), "norm")


def test_norm_of_many_tiles_and_dtypes(monkeypatch):
    """More tiles than the last program adds at once, and a launch for each dtype."""
    monkeypatch.setattr(optimizers, "_NORM_TILE", 32)
    monkeypatch.setattr(optimizers, "_NORM_BLOCK", 16)
    monkeypatch.setattr(optimizers, "_SUM_BLOCK", 8)
    g = torch.Generator().manual_seed(0)
    grads = [torch.randn(n, generator=g).to(DEVICE, dtype) for n, dtype in ((100, F32), (33, B16), (0, F16), (7, F32), (500, F16))]
    found, norm = counted(grad_norm_, grads, impl="triton")
    assert found == {"_square_sum_kernel": 3, "_norm_kernel": 1}
    agree(norm, grad_norm_reference([g.double() for g in grads]), grad_norm_reference(grads), "norm")
    repeatable(lambda: [grad_norm_(grads, impl="triton")])


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_norm_of_what_is_not_finite(impl):
    ones = torch.ones(5000, device=DEVICE)
    for value in (math.nan, math.inf, -math.inf):
        wrong = ones.clone()
        wrong[4099] = value
        assert same(grad_norm_([ones, wrong, ones], impl=impl), torch.tensor(abs(value), device=DEVICE))
    assert grad_norm_([ones * 1e20, ones], impl=impl).isinf()  # as the sum of squares in fp32
    assert grad_norm_([ones[:0]], impl=impl) == 0


def test_norm_takes_strided_gradients_and_float64():
    g = torch.randn(6, 10, device=DEVICE)
    assert torch.equal(grad_norm_([g[:, ::2]], impl="triton"), grad_norm_([g[:, ::2].contiguous()], impl="triton"))
    assert grad_norm_([g.double()]).dtype == torch.float64


@on_gpu
@ops
def test_replays_of_a_graph_step_as_calls_do(op):
    """Gradients have their memory in the graph; tables of the capture outlive what is remembered."""
    lists, options, _ = problem(op, "fp32", [4097, 30])
    twin, _, _ = problem(op, "fp32", [4097, 30])
    options |= dict(step=torch.full((), 3.0, device=DEVICE)) if op is adamw_ else {}
    base = [g.clone() for g in lists[1]]
    op(twin[0], [g * 2 for g in base], *twin[2:], **options)
    op(lists[0], [g * 2 for g in base], *lists[2:], **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        op(lists[0], [g * 2 for g in base], *lists[2:], **options)
    multi_tensor._tables.clear()
    multi_tensor._maps.clear()
    junk = [torch.full((1 << 12,), 7, device=DEVICE) for _ in range(64)]  # takes what memory the tables might have left
    for _ in range(3):
        graph.replay()
        op(twin[0], [g * 2 for g in base], *twin[2:], **options)
    assert all(torch.equal(a, b) for a, b in zip((*lists[0], *lists[2]), (*twin[0], *twin[2]), strict=True)) and len(junk) == 64
