"""cross_entropy, linear_cross_entropy and their kin against float64 autograd through materialised logits, and their kernels against them."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nanotrain.kernels import token_loss
from nanotrain.kernels.token_loss import EXAMPLES, cross_entropy, linear_cross_entropy, token_logprobs, top_logprobs
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.kit import DEVICE, DTYPES, check, drawn, dtypes, far, layouts, place, poisoned, repeatable, seeds, values


def oracle(hidden, weight, labels, *, label_smoothing=0.0, z_loss=0.0, softcap=None, temperature=1.0):
    z = hidden.double() @ weight.double().T
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z / temperature
    log_p = torch.log_softmax(z, 1)
    ignored = labels == -100
    logprob = log_p.gather(1, labels.masked_fill(ignored, 0)[:, None])[:, 0]
    loss = -(1 - label_smoothing) * logprob - label_smoothing * log_p.mean(1) + z_loss * torch.logsumexp(z, 1) ** 2
    entropy = -(log_p.exp() * log_p).sum(1)
    return [x.masked_fill(ignored, 0.0) for x in (loss, logprob, entropy)]


def draw(N, C, V, dtype=torch.float64, ignored=(1,), seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(N, C, generator=g, dtype=torch.float64) / C**0.25).to(dtype).requires_grad_()
    weight = torch.randn(V, C, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (N,), generator=g)
    labels[[i for i in ignored if i < N]] = -100
    return hidden, weight, labels


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(token_loss, "_CHUNK", 1)  # chunks of 16 rows


options = dict(
    label_smoothing=st.sampled_from([0.0, 0.1]),
    z_loss=st.sampled_from([0.0, 0.01]),
    softcap=st.sampled_from([None, 3.0]),
    temperature=st.sampled_from([1.0, 0.7]),
)


@settings(max_examples=40, deadline=None)
@given(shape=st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(2, 60)), small=st.booleans(), use_rows=st.booleans(), **options)
def test_all_three_results_have_true_per_token_gradients(shape, small, use_rows, **kwargs):
    hidden, weight, labels = draw(*shape, ignored=(1, 5, 20))
    g = torch.Generator().manual_seed(9)
    ups = [torch.randn(shape[0], generator=g, dtype=torch.float64) for _ in range(3)]
    want = oracle(hidden, weight, labels, **kwargs)
    want_gradients = torch.autograd.grad(sum((u * x).sum() for u, x in zip(ups, want, strict=True)), (hidden, weight))
    rows = (labels != -100).nonzero()[:, 0] if use_rows else None
    size = token_loss._CHUNK
    try:
        token_loss._CHUNK = 1 if small else size
        got = linear_cross_entropy(hidden, weight, labels, return_entropy=True, rows=rows, **kwargs)
        gradients = torch.autograd.grad(sum((u * x).sum() for u, x in zip(ups, got, strict=True)), (hidden, weight))
    finally:
        token_loss._CHUNK = size
    for a, b in zip((*got, *gradients), (*want, *want_gradients), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(shape=st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(2, 60)), use_rows=st.booleans(), **options)
def test_weights_given_up_front_equal_the_general_path(shape, use_rows, **kwargs):
    hidden, weight, labels = draw(*shape, ignored=(0, 2, 20))
    token_weight = torch.linspace(-1, 2, shape[0], dtype=torch.float64)
    loss, logprob, entropy = linear_cross_entropy(hidden, weight, labels, **kwargs, return_entropy=True)
    want = torch.autograd.grad((loss * token_weight).sum() * 3, (hidden, weight))
    rows = (labels != -100).nonzero()[:, 0] if use_rows else None
    total, detached, detached_entropy = linear_cross_entropy(
        hidden, weight, labels, token_weight_N=token_weight, rows=rows, return_entropy=True, **kwargs
    )
    got = torch.autograd.grad(total * 3, (hidden, weight))
    torch.testing.assert_close(total, (loss * token_weight).sum(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(detached, logprob.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(detached_entropy, entropy.detach(), rtol=1e-10, atol=1e-10)
    assert not detached.requires_grad
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("N,C,V", EXAMPLES)
@pytest.mark.parametrize(
    "dtype,impl", [*((dtype, "auto") for dtype in (torch.float32, torch.float16, torch.bfloat16)), *((dtype, "triton") for dtype in DTYPES)]
)
def test_low_precision_stays_near_the_exact_result(N, C, V, dtype, impl):
    hidden, weight, labels = (x.detach().to(DEVICE).requires_grad_(x.is_floating_point()) for x in draw(N, C, V, dtype))
    exact = oracle(hidden, weight, labels)[0]
    want = torch.autograd.grad(exact.sum(), (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, labels, impl=impl)[0]
    got = torch.autograd.grad(loss.sum(), (hidden, weight))
    assert loss.dtype == torch.float32
    plain_logits = hidden @ weight.T  # what the same dtype can give at all
    plain = torch.nn.functional.cross_entropy(plain_logits.float(), labels, reduction="none")
    assert (loss.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max() + 1e-6
    plain_gradients = torch.autograd.grad(plain.sum(), (hidden, weight))
    for g, w, p in zip(got, want, plain_gradients, strict=True):
        assert (g.double() - w.double()).norm() <= 2 * (p.double() - w.double()).norm() + 1e-5 * w.double().norm()


def weighted_gradients(hidden, weight, labels, token_weight, upstream):
    """Of the weighted loss times upstream: (ours, those of the float64 definition)."""
    ours = linear_cross_entropy(hidden, weight, labels, token_weight_N=token_weight)[0] * upstream
    exact = (oracle(hidden, weight, labels)[0] * token_weight.double()).sum() * upstream
    return [torch.autograd.grad(loss, (hidden, weight)) for loss in (ours, exact)]


def test_fp16_gradients_are_exact_to_rounding_with_the_loss_scale_in_the_weights():
    hidden, weight, labels = draw(2048, 64, 256, torch.float16)
    token_weight = torch.full((2048,), 2.0**15 / 2048)
    for got, want in zip(*weighted_gradients(hidden, weight, labels, token_weight, 1.0), strict=True):
        assert (got.double() - want).norm() < 1e-3 * want.norm()


def test_an_upstream_gradient_beyond_fp16_does_not_overflow_where_the_result_fits():
    hidden, weight, labels = draw(32, 16, 50, torch.float16)
    for got, want in zip(*weighted_gradients(hidden, weight, labels, torch.full((32,), 2.0**-5), 2.0**16), strict=True):
        assert (got.double() - want).norm() < 2e-3 * want.norm()


def test_gradients_made_in_the_forward_serve_one_backward():
    hidden, weight, labels = draw(5, 4, 7)
    total = linear_cross_entropy(hidden, weight, labels, token_weight_N=torch.ones(5, dtype=torch.float64))[0]
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward with token_weight_N"):
        total.backward()


def test_upstream_gradient_of_each_token_counts(small_chunks):
    """Liger-Kernel issue 968: a per-token upstream gradient must not be replaced by its mean or by one."""
    hidden, weight, labels = draw(20, 4, 11, ignored=())
    loss = linear_cross_entropy(hidden, weight, labels)[0]
    (gradient,) = torch.autograd.grad(loss, hidden, torch.eye(20, dtype=torch.float64)[3])
    assert (gradient[3] != 0).any() and (gradient[[*range(3), *range(4, 20)]] == 0).all()


def test_all_ignored_gives_zero_loss_and_zero_gradient():
    hidden, weight, labels = draw(5, 4, 7, ignored=range(5))
    for kwargs in ({}, {"token_weight_N": torch.ones(5, dtype=torch.float64)}, {"rows": torch.empty(0, dtype=torch.int64)}):
        loss = linear_cross_entropy(hidden, weight, labels, **kwargs)[0]
        gradients = torch.autograd.grad(loss.sum(), (hidden, weight))
        assert (loss == 0).all() and all((g == 0).all() for g in gradients)


def two_ranks(call):
    """[call(rank, reduce)] of two ranks that each hold half of the vocabulary: threads of which one runs at a time until both meet in `reduce`."""
    barrier, slots, results, turn = threading.Barrier(2, timeout=20), [None, None], [None, None], threading.Lock()

    def work(rank):
        def reduce(tensor, op):
            slots[rank] = tensor.clone()
            turn.release()
            barrier.wait()
            result = torch.maximum(*slots) if op == "max" else slots[0] + slots[1]
            barrier.wait()
            turn.acquire()
            return result

        with turn:
            results[rank] = call(rank, reduce)

    threads = [threading.Thread(target=work, args=(r,)) for r in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    assert all(r is not None for r in results)
    return results


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU's backwards share a thread, in which two ranks cannot wait for each other")
@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 4.0}])
def test_vocabulary_parallel_halves_equal_the_whole(kwargs, weighted, impl):
    dtype = torch.float64 if impl == "reference" else torch.float32
    hidden, weight, labels = (x.detach().to(DEVICE).requires_grad_(x.is_floating_point()) for x in draw(18, 5, 12, dtype))
    extra = {"token_weight_N": torch.linspace(0.5, 1, 18, dtype=dtype, device=DEVICE)} if weighted else {"return_entropy": True}
    tokens = torch.arange(36, device=DEVICE).view(18, 2) % 12

    def results(h, w, **options):
        loss, _, entropy = linear_cross_entropy(h, w, labels, **kwargs, **extra, impl=impl, **options)
        softcap = {"softcap": kwargs["softcap"]} if kwargs else {}
        logprobs = token_logprobs(h, w, tokens, **softcap, impl=impl, **options)
        total = loss.sum() + logprobs.square().sum() + (0.0 if weighted else entropy.square().sum())
        return (loss.detach(), logprobs.detach()), torch.autograd.grad(total, (h, w))

    def half(rank, reduce):
        h, w = hidden.detach().clone().requires_grad_(), weight.detach()[rank * 6 : rank * 6 + 6].clone().requires_grad_()
        # autograd runs CPU backwards in the calling thread, so both ranks meet in the backward too
        return results(h, w, vocab_start=rank * 6, reduce=reduce)

    outs, (grad_hidden, grad_weight) = results(hidden, weight)
    halves = two_ranks(half)
    close = dict(rtol=1e-4, atol=1e-5) if impl == "triton" else {}
    for found, grads in halves:
        for got, want in zip(found, outs, strict=True):
            torch.testing.assert_close(got, want, **close)
        torch.testing.assert_close(grads[0], grad_hidden, **close)
    torch.testing.assert_close(torch.cat([grads[1] for _, grads in halves]), grad_weight, **close)


@settings(max_examples=25, deadline=None)
@given(label_smoothing=st.sampled_from([0.0, 0.1]), z_loss=st.sampled_from([0.0, 0.01]), softcap=st.sampled_from([None, 3.0]))
def test_cross_entropy_on_logits(**kwargs):
    logits = torch.randn(7, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([0, 12, 3, -100, 5, 6, -100])
    want = oracle(logits, torch.eye(13, dtype=torch.float64), labels, **kwargs)[0]
    got = cross_entropy(logits, labels, **kwargs)
    torch.testing.assert_close(got, want)
    up = torch.linspace(-1, 1, 7, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad((got * up).sum(), logits), torch.autograd.grad((want * up).sum(), logits))


def test_logits_are_never_held_whole():
    hidden, weight, labels = draw(4096, 4, 1024, torch.float32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            largest = max(largest, result.numel()) if isinstance(result, torch.Tensor) else largest
            return result

    with Watch():
        linear_cross_entropy(hidden, weight, labels)[0].sum().backward()
    assert largest <= token_loss._CHUNK < 4096 * 1024


def test_bad_arguments_are_named():
    hidden, weight, labels = draw(3, 4, 5)
    for change, message in (
        (dict(labels_N=labels[:2]), "labels"),
        (dict(labels_N=labels.int()), "int64"),
        (dict(weight_VC=weight[:, :3]), "do not fit"),
        (dict(weight_VC=weight.float()), "differ"),
        (dict(temperature=0.0), "temperature"),
        (dict(softcap=0.0), "softcap=0.0"),
        (dict(token_weight_N=torch.ones(2)), "token_weight"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(**(dict(hidden_NC=hidden, weight_VC=weight, labels_N=labels) | change))
    with pytest.raises(ValueError, match="do not fit"):
        cross_entropy(hidden, labels[:2])


@pytest.mark.parametrize("label", [5, -1])
def test_a_label_outside_the_vocabulary_is_named_with_its_index(label):
    hidden, weight, labels = draw(3, 4, 5)
    labels[2] = label
    message = rf"label {label} at index 2 is not in \[0, 5\), nor ignore_index=-100"
    with pytest.raises(ValueError, match="linear_cross_entropy: " + message):
        linear_cross_entropy(hidden, weight, labels)
    with pytest.raises(ValueError, match="cross_entropy: " + message):
        cross_entropy(hidden @ weight.T, labels)
    labels[1] = label  # no -100 is left, and so this one may stand for it
    assert (linear_cross_entropy(hidden, weight, labels, ignore_index=label)[0][1:] == 0).all()


def test_labels_without_values_are_not_read():
    """The memory plan runs the head on fake tensors."""
    with FakeTensorMode():
        hidden, weight, labels = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)
        assert linear_cross_entropy(hidden, weight, labels)[0].shape == cross_entropy(hidden, labels).shape == (3,)


# Kernels, in Triton's interpreter or on a GPU.

# Rows enough that the error of PyTorch's results is no matter of luck: one probability near 1 can be right by chance.
shapes = st.tuples(st.integers(12, 40), st.sampled_from([4, 16, 33]), st.sampled_from([3, 64, 127, 131, 300]))
choices = dict(shape=shapes, dtype=dtypes, layout=layouts, seed=seeds, **options)
SUMS, GRADIENT = "_token_sums_kernel", "_token_gradient_kernel"


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """So that rows have several blocks, as real ones have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_loss, "_SUMS_BLOCK", 64)
        patch.setattr(token_loss, "_GRADIENT_BLOCK", 64)
        yield


@pytest.fixture(scope="module")
def many_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_loss, "_CHUNK", 1)
        patch.setattr(token_loss, "_GPU_CHUNK", 1)
        yield


def head(shape, dtype, layout, seed):
    """Tensors for `check`, and labels, of which every third is ignored."""
    N, C, V = shape
    hidden, weight = place(values((N, C), seed, dtype), layout), place(values((V, C), seed + 1, dtype), layout)
    labels = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    labels[1::3] = -100
    return dict(hidden=hidden, weight=weight), labels


@pytest.mark.usefixtures("many_chunks")
@given(entropy=st.booleans(), **choices)
@drawn(30)
def test_kernels_of_the_head(shape, dtype, layout, seed, entropy, **kwargs):
    tensors, labels = head(shape, dtype, layout, seed)

    def call(impl):
        def losses(hidden, weight):
            return linear_cross_entropy(hidden, weight, labels, return_entropy=entropy, impl=impl, **kwargs)[: 2 + entropy]

        return losses

    chunks = -(-shape[0] // token_loss._chunk_rows(shape[2], shape[1], dtype, DEVICE, "triton"))
    check(call("triton"), call("reference"), tensors, {SUMS: chunks, GRADIENT: chunks}, layout=layout)


@pytest.mark.usefixtures("many_chunks")
@given(**choices)
@drawn(15)
def test_kernels_with_weights_given_up_front(shape, dtype, layout, seed, **kwargs):
    tensors, labels = head(shape, dtype, layout, seed)
    token_weight = torch.linspace(-1, 2, shape[0], device=DEVICE)

    def call(impl):
        return lambda hidden, weight: linear_cross_entropy(
            hidden, weight, labels, token_weight_N=token_weight.to(torch.promote_types(hidden.dtype, torch.float32)), impl=impl, **kwargs
        )[0]

    chunks = -(-shape[0] // token_loss._chunk_rows(shape[2], shape[1], dtype, DEVICE, "triton"))
    check(call("triton"), call("reference"), tensors, {SUMS: chunks, GRADIENT: chunks}, layout=layout)


@given(**choices)
@drawn(20)
def test_kernels_on_logits(shape, dtype, layout, seed, temperature, **kwargs):
    (N, _, V), (_, labels) = shape, head(shape, dtype, layout, seed)
    tensors = dict(logits=place(values((N, V), seed, dtype), layout))
    call = lambda impl, inplace: lambda logits: cross_entropy(logits, labels, inplace=inplace, impl=impl, **kwargs)  # noqa: E731
    for inplace in (False, True):
        changed = ("logits",) if inplace else ()
        check(call("triton", inplace), call("reference", False), dict(tensors), {SUMS: 1, GRADIENT: 1}, layout=layout, changed=changed)


@pytest.mark.usefixtures("many_chunks")
@given(k=st.integers(1, 3), softcap=options["softcap"], temperature=options["temperature"], shape=shapes, dtype=dtypes, layout=layouts, seed=seeds)
@drawn(15)
def test_kernels_of_several_tokens(shape, dtype, layout, seed, k, **kwargs):
    """Of a row, all different: what a teacher found likely."""
    tensors, _ = head(shape, dtype, layout, seed)
    tokens = torch.rand(shape[0], shape[2], generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :k].to(DEVICE)
    call = lambda impl: lambda hidden, weight: token_logprobs(hidden, weight, tokens, impl=impl, **kwargs)  # noqa: E731
    chunks = -(-shape[0] // token_loss._chunk_rows(shape[2], shape[1], dtype, DEVICE, "triton"))
    check(call("triton"), call("reference"), tensors, {SUMS: chunks, GRADIENT: chunks}, layout=layout)


@pytest.mark.parametrize("kwargs", [{}, dict(softcap=3.0, temperature=0.7)])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_log_probabilities_of_tokens_given_and_of_the_likeliest(kwargs, impl):
    hidden, weight, _ = draw(21, 8, 50)
    z = hidden @ weight.T
    z = 3.0 * torch.tanh(z / 3.0) / 0.7 if kwargs else z
    want = torch.log_softmax(z, 1)
    tokens = torch.rand(21, 50, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :4]
    up = torch.linspace(-1, 1, 84, dtype=torch.float64).view(21, 4)
    exact = torch.autograd.grad((want.gather(1, tokens) * up).sum(), (hidden, weight), retain_graph=True)
    if impl == "triton":
        hidden, weight = (x.detach().float().to(DEVICE).requires_grad_() for x in (hidden, weight))
    close = dict(rtol=1e-4, atol=1e-5) if impl == "triton" else dict(rtol=1e-9, atol=1e-9)
    got = token_logprobs(hidden, weight, tokens.to(DEVICE), impl=impl, **kwargs)
    torch.testing.assert_close(got.cpu().double(), want.gather(1, tokens), **close)
    for g, w in zip(torch.autograd.grad((got * up.to(got)).sum(), (hidden, weight)), exact, strict=True):
        torch.testing.assert_close(g.cpu().double(), w, **close)
    likeliest, places = top_logprobs(hidden, weight, 5, impl=impl, **kwargs)
    assert torch.equal(places.cpu(), want.topk(5).indices) and not likeliest.requires_grad
    torch.testing.assert_close(likeliest.cpu().double(), want.topk(5).values, **close)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_logits_too_large_for_fp16_count_as_its_largest(impl):
    """Liger and others give NaN: inf - inf."""
    hidden = torch.tensor([[200.0, 0.0], [200.0, 0.0], [1.0, 1.0]], dtype=torch.float16, device=DEVICE).requires_grad_()
    weight = torch.tensor([[400.0, 1.0], [1.0, 2.0], [-400.0, 3.0]], dtype=torch.float16, device=DEVICE).requires_grad_()
    labels = torch.tensor([0, 1, 2], device=DEVICE)
    assert (hidden @ weight.T).isinf().any()
    loss = linear_cross_entropy(hidden, weight, labels, impl=impl)[0]
    assert loss[0] == 0 and loss[1] == 65504 - 200 and loss.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), (hidden, weight)))
    hidden = hidden.detach().clone()
    hidden[0, 0] = torch.nan  # and what is no number stays that
    assert linear_cross_entropy(hidden, weight, labels, impl=impl)[0][0].isnan()


@pytest.mark.filterwarnings("ignore:overflow")  # beyond the last logit
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_logits_may_hide_tokens(impl):
    """Whole blocks of them, as a list of allowed tokens does. The others lie far below 0."""
    logits = torch.randn(2, 200, generator=torch.Generator().manual_seed(0)).to(DEVICE) - 1000.0
    logits[:, :150] = -torch.inf
    labels = torch.tensor([199, 150], device=DEVICE)
    leaves = [logits.clone().requires_grad_(), logits[:, 150:].clone().requires_grad_()]
    hidden, alone = cross_entropy(leaves[0], labels, impl=impl), cross_entropy(leaves[1], labels - 150, impl="reference")
    torch.testing.assert_close(hidden, alone)
    got, want = torch.autograd.grad(hidden.sum(), leaves[0])[0], torch.autograd.grad(alone.sum(), leaves[1])[0]
    torch.testing.assert_close(got[:, 150:], want)
    assert (got[:, :150] == 0).all()


def test_a_gradient_over_its_logits_is_made_once():
    logits = torch.randn(4, 9, device=DEVICE).requires_grad_()
    for impl in ("reference", "triton"):
        leaf = logits.detach().clone().requires_grad_()
        loss = cross_entropy(leaf, torch.arange(4, device=DEVICE), inplace=True, impl=impl).sum()
        (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        assert torch.equal(gradient, leaf) and not gradient.requires_grad and leaf._version
        with pytest.raises(RuntimeError, match="inplace=True has overwritten"):
            loss.backward()


def test_expanded_logits_have_no_place_for_a_gradient():
    with pytest.raises(ValueError, match="cross_entropy: inplace=True needs logits of their own memory"):
        cross_entropy(torch.zeros(1, 5).expand(3, 5), torch.arange(3), inplace=True)


def test_rows_of_logits_further_apart_than_32_bits_reach():
    tensors = dict(logits=far(values((3, 70), 0, torch.float16)))
    labels = torch.tensor([0, 69, 5], device=DEVICE)
    call = lambda impl: lambda logits: cross_entropy(logits, labels, impl=impl)  # noqa: E731
    check(call("triton"), call("reference"), tensors, {SUMS: 1, GRADIENT: 1})


def test_ignored_rows_are_not_read():
    """Their logits may be anything, NaN too, and so may what comes from above."""
    logits = torch.full((3, 100), torch.nan, device=DEVICE)
    logits[1] = 0.0
    logits.requires_grad_()
    with poisoned():
        loss = cross_entropy(logits, torch.tensor([-100, 7, -100], device=DEVICE), impl="triton")
        (gradient,) = torch.autograd.grad(loss, logits, torch.tensor([torch.nan, 1.0, torch.nan], device=DEVICE))
    assert loss[::2].eq(0).all() and gradient[::2].eq(0).all() and gradient[1].isfinite().all()


@pytest.mark.parametrize("impl", ["reference", "triton", "auto"])
def test_weights_of_ignored_rows_are_not_read(impl):
    hidden, weight = torch.ones(3, 4, device=DEVICE).requires_grad_(), torch.ones(6, 4, device=DEVICE).requires_grad_()
    labels, weights = torch.tensor([-100, 2, -100], device=DEVICE), torch.tensor([torch.nan, 1.0, torch.nan], device=DEVICE)
    loss = linear_cross_entropy(hidden, weight, labels, token_weight_N=weights, impl=impl)[0]
    assert loss.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.filterwarnings("ignore:overflow")  # beyond the last logit
@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("shift", [0.0, 300.0, -300.0])
def test_small_losses_of_large_logits_are_exact(impl, shift):
    """A log-sum-exp rounded as large logits are would leave nothing of them."""
    logits = torch.randn(8, 100, generator=torch.Generator().manual_seed(0)) * 3 + shift
    logits[:, 7] += 20.0
    labels = torch.full((8,), 7)
    wide = logits.double().requires_grad_()
    want = torch.nn.functional.cross_entropy(wide, labels, reduction="none")
    (exact,) = torch.autograd.grad(want.sum(), wide)
    leaf = logits.to(DEVICE).requires_grad_()
    eye, all_results = torch.eye(100, device=DEVICE), []
    all_results.append(cross_entropy(leaf, labels.to(DEVICE), impl=impl))
    all_results.append(linear_cross_entropy(leaf, eye, labels.to(DEVICE), impl=impl)[0])
    all_results.append(-token_logprobs(leaf, eye, labels.to(DEVICE)[:, None], impl=impl)[:, 0])
    for loss in all_results:
        torch.testing.assert_close(loss.cpu().double(), want, rtol=0.01, atol=1e-7)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        torch.testing.assert_close(gradient.cpu().double(), exact, rtol=0.01, atol=1e-7)


def test_no_gradients_are_made_where_none_are_wanted(monkeypatch):
    hidden, weight, labels = draw(5, 4, 7, torch.float32)
    monkeypatch.setattr(token_loss, "_WeightGradient", None)
    with torch.no_grad():
        for impl in ("reference", "auto"):
            linear_cross_entropy(hidden, weight, labels, token_weight_N=torch.ones(5), impl=impl)


def test_references_take_what_the_functions_do():
    hidden, weight, labels = draw(5, 4, 7)
    for name, arguments in (("linear_cross_entropy", (hidden, weight, labels)), ("cross_entropy", (hidden, labels.clamp(max=3))),
                            ("token_logprobs", (hidden, weight, labels.clamp(min=0)[:, None])), ("top_logprobs", (hidden, weight, 3))):  # fmt: skip
        want, got = (getattr(token_loss, name + kind)(*arguments) for kind in ("", "_reference"))
        for a, b in zip(*((x,) if isinstance(x, torch.Tensor) else x[:2] for x in (want, got)), strict=True):
            assert torch.equal(a, b)


def test_no_rows():
    hidden, weight = torch.empty(0, 8, device=DEVICE).requires_grad_(), torch.ones(5, 8, device=DEVICE).requires_grad_()
    for impl in ("reference", "triton"):
        loss = linear_cross_entropy(hidden, weight, torch.empty(0, dtype=torch.int64, device=DEVICE), impl=impl)[0]
        assert loss.shape == (0,) and all((g == 0).all() for g in torch.autograd.grad(loss.sum(), (hidden, weight)))
        assert top_logprobs(hidden, weight, 2, impl=impl)[0].shape == (0, 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_losses_and_gradients_repeat(dtype):
    tensors, labels = head((40, 16, 300), dtype, "contiguous", 0)
    leaves = [t.requires_grad_() for t in tensors.values()]

    def results():
        loss, logprob, entropy = linear_cross_entropy(*leaves, labels, return_entropy=True, impl="triton")
        return loss, logprob, entropy, *torch.autograd.grad(loss.sum() + entropy.sum(), leaves)

    repeatable(results, 1)


def test_bad_tokens_and_counts_are_named():
    hidden, weight, labels = draw(3, 4, 5)
    for tokens, message in (
        (labels, r"tokens \(3,\) torch.int64 must be \(3, K\)"),
        (torch.zeros(3, 0, dtype=torch.int64), "K >= 1"),
        (torch.tensor([[0, 1], [2, 5], [0, 0]]), r"label 5 at index \[1, 1\] is not in \[0, 5\)$"),
    ):
        with pytest.raises(ValueError, match="token_logprobs: .*" + message):
            token_logprobs(hidden, weight, tokens)
    for k in (0, 6):
        with pytest.raises(ValueError, match=rf"top_logprobs: k={k} is not in \[1, 5\]"):
            top_logprobs(hidden, weight, k)
