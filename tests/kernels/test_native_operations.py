"""C++ of csrc/train.cpp against the references: the float64 one for its values, that of the same dtype for how NaN and infinity spread.

Memory from torch.empty is filled with NaN throughout, so that nothing may be left unwritten.
"""

import math
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nanotrain.kernels import attention_reference, runtime, token_loss
from nanotrain.kernels.attention import flash_attention
from nanotrain.kernels.cpu import call
from nanotrain.kernels.gated import geglu, swiglu
from nanotrain.kernels.native import library
from nanotrain.kernels.norm import rms_norm
from nanotrain.kernels.optimizers import adamw_
from nanotrain.kernels.rotary import rope
from nanotrain.kernels.token_loss import linear_cross_entropy
from torch._subclasses.fake_tensor import FakeTensorMode

pytestmark = pytest.mark.skipif(library("train") is None, reason="no C++ compiler")

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True, scope="module")
def poison():
    """Memory without values holds NaN."""
    with pytest.MonkeyPatch.context() as patch:
        for make in (torch.empty, torch.empty_like):

            def poisoned(*args, make=make, **kwargs):
                made = make(*args, **kwargs)
                return made.fill_(math.nan) if made.is_floating_point() else made

            patch.setattr(torch, make.__name__, poisoned)
        yield


@contextmanager
def took(*names, path="native"):
    """Within, each of these C++ functions is called; none at all where the path is another."""
    before = runtime.launches.copy()
    yield
    called = set(runtime.launches - before)
    assert called == (set(names) if path == "native" else set()), called


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def strided(x):
    """The same values, every second element of memory, in an order of its own."""
    if x.dim() < 2:
        return x
    other = torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2].copy_(x)
    return other.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 2 else other


def run(function, tensors, impl, backward=True):
    """Results of function(*tensors, impl=impl), and gradients of the floating tensors under a non-uniform upstream."""
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in tensors]
    results = function(*leaves, impl=impl)
    results = [r for r in (results if isinstance(results, tuple) else (results,)) if r is not None]
    given_up = [r for r in results if r.requires_grad]
    ups = [normal(*r.shape, seed=5 + i).to(r.dtype) for i, r in enumerate(given_up)]
    leaves = [leaf for leaf in leaves if leaf.is_floating_point()]
    gradients = torch.autograd.grad(given_up, leaves, ups) if backward else ()
    return [*(r.detach() for r in results), *gradients]


def close(function, tensors, dtype, functions, terms=0.0):
    """Native results err within twice what the reference of that dtype does and a rounding, or the few that fp32 takes, relative to the result
    and, where it is a difference, to the size of its terms. Only the functions named are called."""
    tensors = [t.to(dtype) if t.is_floating_point() else t for t in tensors]
    with took(*functions):
        got = run(function, tensors, "auto")
    with took(path="reference"):
        same = run(function, tensors, "reference")
        exact = run(function, [t.double() if t.is_floating_point() else t for t in tensors], "auto")
    for g, s, e in zip(got, same, exact, strict=True):
        assert g.dtype == s.dtype and g.shape == s.shape
        rounding = 2**-20 * (e.norm() + terms) if dtype == torch.float32 else 2**-7 * e.norm()
        assert (g.double() - e).norm() <= 2 * (s.double() - e).norm() + rounding
    return got


dtypes, sizes = st.sampled_from(DTYPES), st.sampled_from([1, 2, 15, 16, 17, 31, 33, 100, 257])
drawn = settings(max_examples=25, deadline=None)


@drawn
@given(dtype=dtypes, rows=st.integers(0, 9), width=sizes, op=st.sampled_from([swiglu, geglu]), odd=st.booleans())
def test_gated(dtype, rows, width, op, odd):
    tensors = [3 * normal(rows, width), normal(rows, width, seed=1)]
    names = (op.__name__, f"{op.__name__}_back")
    close(op, [strided(t) for t in tensors] if odd else tensors, dtype, names)


@drawn
@given(
    dtype=dtypes, rows=st.integers(0, 70), width=st.sampled_from([7, 15, 16, 17, 33, 257]), residual=st.booleans(),
    offset=st.sampled_from([0.0, 1.0]), odd=st.booleans(),
)  # fmt: skip
def test_rms_norm(dtype, rows, width, residual, offset, odd):
    def function(x, w, *r, impl):
        return rms_norm(x, w, offset=offset, residual=r[0] if r else None, impl=impl)

    tensors = [normal(1, rows, width), normal(width, seed=1), *([normal(1, rows, width, seed=2)] if residual else [])]
    close(function, [strided(t) for t in tensors] if odd else tensors, dtype, ("norm", "norm_back"))


def tables(rows, half, dtype=torch.float32):
    angles = torch.arange(rows, dtype=torch.float64)[:, None] * 10 ** -torch.linspace(0, 2, half, dtype=torch.float64)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@drawn
@given(
    dtype=dtypes, shape=st.tuples(st.integers(1, 2), st.integers(0, 9), st.integers(1, 3), st.integers(1, 2), st.sampled_from([2, 10, 32, 66])),
    part=st.booleans(), positions=st.sampled_from(["none", "drawn", "negative"]), odd=st.booleans(),
)  # fmt: skip
def test_rope(dtype, shape, part, positions, odd):
    B, T, H, K, D = shape
    places = torch.randint(0, 12, (B, T), generator=torch.Generator().manual_seed(3)) - (12 if positions == "negative" else 0)

    def function(q, k, impl):
        return rope(q, k, *tables(12, max(1, D // 4) if part else D // 2), positions=None if positions == "none" else places, impl=impl)

    tensors = [normal(B, T, H, D), normal(B, T, K, D, seed=1)]
    close(function, [strided(t) for t in tensors] if odd else tensors, dtype, ("rope",))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T,documents", [(1, 1), (5, 1), (127, 1), (128, 1), (129, 1), (300, 1), (40, 3), (129, 2)])
def test_attention(T, documents, causal, dtype):
    """Rows short of and across the blocks of 128 queries; alone, or as documents of one length, which are a batch."""
    N = T * documents
    ends = torch.arange(0, N + 1, T, dtype=torch.int32)
    tensors = [normal(1, N, 4, 20), normal(1, N, 2, 20, seed=1), normal(1, N, 2, 20, seed=2)]
    function = partial(flash_attention, causal=causal, cu_seqlens=ends if documents > 1 else None)
    got = close(function, tensors, dtype, ("softmax", "softmax_back"))
    if documents > 1:
        alone = [run(partial(flash_attention, causal=causal), [t[:, i : i + T].to(dtype) for t in tensors], "auto", False)[0] for i in range(0, N, T)]
        assert torch.equal(got[0], torch.cat(alone, 1))
    again = run(function, [strided(t.to(dtype)) for t in tensors], "auto")
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_documents_of_one_length_take_what_is_given_for_each():
    q, k, v = (normal(1, 15, 2, 4, seed=i).requires_grad_() for i in range(3))
    ends, bias = torch.tensor([0, 5, 10, 15], dtype=torch.int32), normal(3, 2, 5, 6, seed=4)
    each = dict(alibi_slopes=normal(3, 2, seed=5).abs(), prefix_len=torch.tensor([1, 2, 3]), seed=torch.arange(3))
    out, lse = flash_attention(q, k, v, cu_seqlens=ends, bias=bias, dropout_p=0.3, return_lse=True, **each)
    for n in range(3):
        part, own = slice(5 * n, 5 * n + 5), {name: value[n : n + 1] for name, value in each.items()}
        alone = flash_attention(q[:, part], k[:, part], v[:, part], bias=bias[n : n + 1, :, :, :5], dropout_p=0.3, return_lse=True, **own)
        torch.testing.assert_close((out[:, part], lse[..., part]), alone)


@drawn
@given(
    dtype=dtypes, N=st.integers(0, 40), C=st.integers(1, 20), V=sizes, weighted=st.booleans(), use_rows=st.booleans(),
    ignore=st.sampled_from([-100, 0]),
)  # fmt: skip
def test_linear_cross_entropy(dtype, N, C, V, weighted, use_rows, ignore):
    labels = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))
    labels[1::5] = ignore
    rows = (labels != ignore).nonzero()[:, 0] if use_rows else None
    options = dict(ignore_index=ignore, rows=rows, token_weight_N=torch.linspace(-1, 2, 2 * N)[::2] if weighted else None)

    def function(hidden, weight, impl):
        if hidden.dtype == torch.float64 and weighted:
            options["token_weight_N"] = options["token_weight_N"].double()
        return linear_cross_entropy(hidden, weight, labels, impl=impl, **options)[: 1 if weighted else 2]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_loss, "_CHUNK", 1)  # chunks of 16 rows
        count = N if rows is None else len(rows)
        close(function, [normal(N, C), normal(V, C, seed=2)], dtype, ("cross_entropy",) if count else (), terms=1.0)


def test_without_gradients_the_losses_are_the_same_bits():
    hidden, weight, labels = normal(9, 4).bfloat16().requires_grad_(), normal(50, 4, seed=1).bfloat16(), torch.arange(9)
    for options in ({}, {"token_weight_N": torch.linspace(0, 1, 9)}):
        with_gradients = linear_cross_entropy(hidden, weight, labels, **options)
        with torch.inference_mode():
            without = linear_cross_entropy(hidden, weight, labels, **options)
        assert torch.equal(with_gradients[0], without[0]) and torch.equal(with_gradients[1], without[1])


HYPER = dict(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


@drawn
@given(dtype=dtypes, size=sizes, rows=st.integers(0, 3), wide_gradients=st.booleans(), odd=st.booleans(), as_tensors=st.booleans())
def test_adamw(dtype, size, rows, wide_gradients, odd, as_tensors):
    number = torch.tensor if as_tensors else float
    shapes = [(rows, size), (size,)]
    start = [normal(*s, seed=i).to(dtype) for i, s in enumerate(shapes)]
    grads = [normal(*s, seed=2 + i).to(torch.float32 if wide_gradients else dtype) for i, s in enumerate(shapes)]
    states = {}
    for path, wide in (("auto", torch.float32), ("reference", torch.float32), ("exact", torch.float64)):
        params = [p.to(wide if path == "exact" else dtype).clone() for p in start]
        masters = [p.to(wide) for p in start] if dtype == torch.bfloat16 and path != "exact" else None
        m, v = ([torch.zeros_like(p, dtype=wide) for p in params] for _ in range(2))
        with took("adamw_wide" if dtype != grads[0].dtype else "adamw", path="native" if path == "auto" else path):
            for step in (1, 2, 3):
                own = [strided(g) if odd else g for g in ([g.double() for g in grads] if path == "exact" else grads)]
                adamw_(params, own, m, v, lr=number(0.01), step=number(float(step)), grad_scale=number(0.5), masters=masters,
                       found_nonfinite=torch.tensor(False), impl="reference" if path == "reference" else "auto", **HYPER)  # fmt: skip
        states[path] = [*(masters or params), *m, *v]
        if masters is not None:
            assert all(torch.equal(p, w.bfloat16()) for p, w in zip(params, masters, strict=True))
    for got, same, exact in zip(*states.values(), strict=True):
        assert (got.double() - exact).norm() <= 2 * (same.double() - exact).norm() + 1.2e-7 * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw_writes_nothing_where_the_step_is_refused(dtype):
    params = [normal(40).to(dtype)]
    masters = [p.float() for p in params] if dtype == torch.bfloat16 else None
    m, v = [torch.ones(40)], [torch.ones(40)]
    before = [t.clone() for t in (*params, *m, *v, *(masters or ()))]
    adamw_(params, [torch.full((40,), math.nan, dtype=dtype)], m, v, lr=0.1, step=torch.tensor(0.0), masters=masters,
           found_nonfinite=torch.tensor(True), impl="native", **HYPER)  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip((*params, *m, *v, *(masters or ())), before, strict=True))


LONG = 70_001
"""Longer than a row of probabilities that could lie on a stack."""


def large(dtype):
    """Each operation that has a native form on tensors large enough for two threads, one row very long: (name, call)."""
    rows, long = normal(130, 300).to(dtype), normal(3, LONG).to(dtype)
    labels = torch.randint(0, 300, (130,), generator=torch.Generator().manual_seed(0))

    def products(op, *tensors, **kwargs):
        return lambda: run(partial(op, **kwargs), tensors, "native")

    def softmax(first, shape):
        scores = 3 * normal(*shape).float()
        p = attention_reference._softmax(scores.clone(), 0.3, first, dtype, True)
        return [p, attention_reference._softmax_backward(scores.clone(), p, 0.3, True)]

    def losses():
        z, logprobs = rows.clone(), torch.empty(130)
        call("cross_entropy", dtype, z, labels, torch.linspace(-1, 1, 130), logprobs, -100, *z.shape)
        return [z, logprobs]

    def update():
        p, m, v = normal(40_000).to(dtype), torch.zeros(40_000), torch.ones(40_000)
        masters = [p.float()] if dtype == torch.bfloat16 else None
        adamw_([p], [normal(40_000, seed=1).to(dtype)], [m], [v], lr=0.1, step=2, masters=masters, impl="native", **HYPER)
        return [p, m, v]

    return {
        "swiglu": products(swiglu, rows, rows.flip(0)), "geglu": products(geglu, rows, rows.flip(0)),
        "norm": products(rms_norm, rows, rows[0]), "long norm": products(rms_norm, long, long[0]),
        "rope": products(lambda q, k, impl: rope(q, k, *tables(130, 50), impl=impl), rows.view(1, 130, 3, 100), rows.view(1, 130, 3, 100)),
        "softmax": partial(softmax, 7, (3, 80, 87)), "long softmax": partial(softmax, None, (1, 2, LONG)), "losses": losses, "adamw": update,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", large(torch.float32))
def test_bits_depend_neither_on_threads_nor_on_the_run(name, dtype):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(large(dtype)[name]())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert all(torch.isfinite(a).all() for a in results[0])


def turned(q, k, impl):
    return rope(q, k, *tables(q.shape[1], q.shape[3] // 2), impl=impl)


@pytest.mark.parametrize("op", [swiglu, geglu, rms_norm, turned])
def test_results_are_rounded_once(op):
    """bf16 results are the rounded fp32 ones of the same inputs."""
    x = 3 * normal(1, 9, 2, 20).bfloat16()
    tensors = [x, x[0, 0, 0].clone() if op is rms_norm else x.flip(1)]
    got, wide = (run(op, [t.to(dtype) for t in tensors], "native", False) for dtype in (torch.bfloat16, torch.float32))
    assert all(torch.equal(g, w.bfloat16()) for g, w in zip(got, wide, strict=True))


def test_probabilities_and_logit_gradients_are_rounded_once():
    scores, labels, factors = normal(2, 30, 41).float(), torch.arange(60) % 41, torch.linspace(-1, 1, 60)
    for narrow, wide in zip(*([attention_reference._softmax(scores.clone(), 0.5, 11, d, True)] for d in reversed(DTYPES)), strict=True):
        assert torch.equal(narrow, wide.bfloat16())
    z = scores.view(60, 41).bfloat16()
    made = []
    for logits in (z.clone(), z.float()):
        call("cross_entropy", logits.dtype, logits, labels, factors, torch.empty(60), -100, 60, 41)
        made.append(logits)
    assert torch.equal(made[0], made[1].bfloat16())


LABELS = torch.tensor([1, -100, 2])

SPREAD = {
    "swiglu": (swiglu, [(3, 20), (3, 20)]), "geglu": (geglu, [(3, 20), (3, 20)]), "norm": (rms_norm, [(3, 20), (20,)]),
    "norm of a sum": (lambda x, w, r, impl: rms_norm(x, w, residual=r, impl=impl), [(3, 20), (20,), (3, 20)]),
    "rope": (turned, [(1, 3, 2, 12), (1, 3, 2, 12)]),
    "causal": (flash_attention, [(1, 140, 1, 8)] * 3), "full": (partial(flash_attention, causal=False), [(1, 20, 1, 8)] * 3),
    "losses": (lambda h, w, impl: linear_cross_entropy(h, w, LABELS, impl=impl)[:2], [(3, 4), (20, 4)]),
    "weighted": (lambda h, w, impl: linear_cross_entropy(h, w, LABELS, token_weight_N=torch.ones(3), impl=impl)[0], [(3, 4), (20, 4)]),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("name", SPREAD)
def test_nan_and_infinity_spread_as_in_the_reference(name, value, dtype):
    """So a step that is not finite is found by its loss or its gradients whichever path made it."""
    function, shapes = SPREAD[name]
    for poisoned in range(len(shapes)):
        tensors = [normal(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]
        tensors[poisoned].view(-1)[tensors[poisoned].numel() // 2] = value
        for got, want in zip(run(function, tensors, "native"), run(function, tensors, "reference"), strict=True):
            assert torch.equal(torch.isnan(got), torch.isnan(want)), poisoned
            assert torch.equal(torch.isfinite(got), torch.isfinite(want)), poisoned


def test_scores_of_minus_infinity_are_probability_0_and_a_row_of_them_is_nan():
    scores = normal(1, 2, 40).float()
    scores[0, 0, 3:30], scores[0, 1] = -math.inf, -math.inf
    p = attention_reference._softmax(scores.clone(), 1.0, None, torch.float32, True)
    torch.testing.assert_close(p, torch.softmax(scores, -1), equal_nan=True)
    assert (p[0, 0, 3:30] == 0).all() and torch.isnan(p[0, 1]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_graph_that_is_kept_gives_the_same_gradients_again(dtype):
    q, k, v = (normal(1, 140, 2, 8, seed=i).to(dtype).requires_grad_() for i in range(3))
    out = flash_attention(q, k, v, impl="native")
    up = normal(*out.shape, seed=4).to(dtype)
    first, second = (torch.autograd.grad(out, (q, k, v), up, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", SPREAD)
def test_a_second_derivative_is_refused(name):
    function, shapes = SPREAD[name]
    leaves = [normal(*shape, seed=i).float().requires_grad_() for i, shape in enumerate(shapes)]
    results = function(*leaves, impl="native")
    first = (results[0] if isinstance(results, tuple) else results).square().sum()
    gradient = torch.autograd.grad(first, leaves, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_unused_results_and_expanded_gradients():
    x, w, r = (normal(*s).requires_grad_() for s in ((5, 16), (16,), (5, 16)))
    for pick in (lambda n, s: n.sum(), lambda n, s: s.sum(), lambda n, s: n.sum() + s.sum()):
        got, want = (
            torch.autograd.grad(pick(*rms_norm(a, b, residual=c)), (a, b, c), allow_unused=True)
            for a, b, c in ([t.detach().to(d).requires_grad_() for t in (x, w, r)] for d in (torch.float32, torch.float64))
        )
        for g, e in zip(got, want, strict=True):
            torch.testing.assert_close(g.double(), torch.zeros_like(g, dtype=torch.float64) if e is None else e, rtol=1e-5, atol=1e-5)


def test_positions_outside_the_tables_are_refused():
    q = normal(1, 3, 1, 4).float()
    for place in (5, -6):
        with pytest.raises(IndexError, match="rope: positions lie between .* tables have 5 rows"):
            rope(q, q, *tables(5, 2), positions=torch.tensor([[0, place, 1]]))


def test_signs_that_torch_keeps_aside_are_read():
    x = torch.complex(normal(4, 20), normal(4, 20, seed=1)).to(torch.complex64)
    kept_aside = x.conj().imag
    assert kept_aside.is_neg()
    assert torch.equal(swiglu(kept_aside, kept_aside, impl="native"), swiglu(-x.imag, -x.imag, impl="native"))


class Subclass(torch.Tensor):
    """A tensor that may hold anything."""


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Sees every operator of PyTorch, as a tracer does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_what_has_no_plain_memory_in_fp32_or_bf16_is_left_to_the_reference():
    x = normal(2, 20).float()
    fake = FakeTensorMode()

    def under(mode):
        def function(impl):
            with mode:
                return swiglu(x, x, impl=impl)

        return function

    calls = {
        "float64": lambda impl: swiglu(x.double(), x.double(), impl=impl),
        "float16": lambda impl: swiglu(x.half(), x.half(), impl=impl),
        "on meta": lambda impl: swiglu(x.to("meta"), x.to("meta"), impl=impl),
        "FakeTensor": lambda impl: swiglu(fake.from_tensor(x), fake.from_tensor(x), impl=impl),
        "Subclass": lambda impl: swiglu(x.as_subclass(Subclass), x.as_subclass(Subclass), impl=impl),
        "traces or transforms": under(Watch()),
    }
    for message, function in calls.items():
        with took(path="reference"):
            function("auto")
            with pytest.raises(RuntimeError, match=f"swiglu: impl='native' asked for, but .*{message}.*; use impl='auto'"):
                function("native")
    with took("swiglu"):
        swiglu(x, x)
    with took(path="reference"):
        swiglu(x, x, impl="reference")


def test_under_functorch_memory_is_not_read():
    x = normal(2, 20).float()
    for impl, message in (("auto", "setup_context"), ("native", "traces or transforms")):
        with took(path="reference"), pytest.raises(RuntimeError, match=message):
            torch.func.grad(lambda x, impl=impl: swiglu(x, x, impl=impl).sum())(x)


def test_without_the_library_auto_is_the_reference_and_native_is_refused(monkeypatch):
    monkeypatch.setattr(runtime, "library", lambda name: None)
    x = normal(2, 20).float()
    with took(path="reference"):
        assert torch.equal(swiglu(x, x), swiglu(x, x, impl="reference"))
    with pytest.raises(RuntimeError, match="its library cannot be had"):
        swiglu(x, x, impl="native")


q = normal(1, 4, 2, 8).float()
hidden, matrix, numbers = normal(3, 4).float(), normal(5, 4).float(), torch.arange(3)
narrow, zeros = [torch.ones(4, dtype=torch.bfloat16)], [torch.zeros(4)]


@pytest.mark.parametrize(
    "function",
    [
        partial(rms_norm, hidden, torch.ones(4, dtype=torch.bfloat16)),
        partial(rope, q, q, *tables(4, 4, torch.float64)),
        partial(flash_attention, q, q, q, window=2),
        partial(flash_attention, q, q, q, return_lse=True),
        partial(flash_attention, q, q, q, scale=-1.0),
        partial(flash_attention, q, q[:, :2], q[:, :2]),
        *(partial(linear_cross_entropy, hidden, matrix, numbers, **{name: value}) for name, value in
          dict(label_smoothing=0.1, z_loss=0.1, softcap=2.0, temperature=0.5, return_entropy=True).items()),
        partial(linear_cross_entropy, hidden, matrix, numbers, token_weight_N=torch.ones(3, dtype=torch.float64)),
        partial(token_loss.cross_entropy, hidden, numbers),
        partial(adamw_, narrow, narrow, zeros, zeros, lr=0.1, step=1, seed=1, counter_starts=[0], **HYPER),
        partial(adamw_, narrow, narrow, narrow, narrow, lr=0.1, step=1, masters=zeros, **HYPER),
        partial(adamw_, [torch.ones(8)[::2]], zeros, zeros, zeros, lr=0.1, step=1, **HYPER),
    ],
)  # fmt: skip
def test_arguments_that_it_does_not_know_are_left_to_the_reference(function):
    with took(path="reference"):
        with pytest.raises(RuntimeError, match="there is no C\\+\\+ for these arguments|neither float32 nor bfloat16"):
            function(impl="native")
        function(impl="auto")


def test_rows_too_long_to_keep_are_no_native_attention(monkeypatch):
    monkeypatch.setattr(attention_reference, "_SCORES", 31)
    with took(path="reference"):
        flash_attention(q, q, q)
        with pytest.raises(RuntimeError, match="no C"):
            flash_attention(q, q, q, impl="native")
