"""cross_entropy and linear_cross_entropy against float64 autograd through materialised logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nanotrain.kernels import token_loss
from nanotrain.kernels.token_loss import EXAMPLES, cross_entropy, linear_cross_entropy
from torch._subclasses.fake_tensor import FakeTensorMode


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_stays_near_the_exact_result(N, C, V, dtype):
    hidden, weight, labels = draw(N, C, V, dtype)
    exact = oracle(hidden, weight, labels)[0]
    want = torch.autograd.grad(exact.sum(), (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, labels)[0]
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


@pytest.mark.parametrize("kwargs", [{}, {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 4.0}])
@pytest.mark.parametrize("weighted", [False, True])
def test_vocabulary_parallel_halves_equal_the_whole(kwargs, weighted):
    """Two threads hold half of the vocabulary each and meet at every reduction."""
    import threading

    hidden, weight, labels = draw(18, 5, 12)
    extra = {"token_weight_N": torch.linspace(0.5, 1, 18, dtype=torch.float64)} if weighted else {}
    whole = linear_cross_entropy(hidden, weight, labels, **kwargs, **extra)[0]
    want = torch.autograd.grad(whole.sum(), (hidden, weight))
    barrier, slots, results = threading.Barrier(2, timeout=20), [None, None], [None, None]

    def work(rank):
        def reduce(tensor, op):
            slots[rank] = tensor.clone()
            barrier.wait()
            result = torch.maximum(*slots) if op == "max" else slots[0] + slots[1]
            barrier.wait()
            return result

        h, w = hidden.detach().clone().requires_grad_(), weight.detach()[rank * 6 : rank * 6 + 6].clone().requires_grad_()
        loss = linear_cross_entropy(h, w, labels, vocab_start=rank * 6, reduce=reduce, **kwargs, **extra)[0]
        # autograd runs CPU backwards in the calling thread, so both ranks meet in the backward too
        results[rank] = (loss.detach(), *torch.autograd.grad(loss.sum(), (h, w)))

    threads = [threading.Thread(target=work, args=(r,)) for r in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    assert all(r is not None for r in results)
    for loss, h, _ in results:
        torch.testing.assert_close(loss, whole.detach())
        torch.testing.assert_close(h, want[0])
    torch.testing.assert_close(torch.cat([r[2] for r in results]), want[1])


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
