"""What a drop-in is judged by besides its numbers: autocast, modes, transforms, layouts, and the functions below."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import seqkern
from seqkern import functional, ops

LAYERS = ("RNN", "LSTM", "GRU")
each_layer = pytest.mark.parametrize("cls", LAYERS)


def twins(cls, *arguments, **options):
    ours = getattr(seqkern, cls)(*arguments, **options)
    theirs = getattr(nn, cls)(*arguments, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def flat(result) -> list[torch.Tensor]:
    """All tensors of nested tuples."""
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in flat(part)]


@each_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_covers_every_layer(cls, dtype):
    layer, x = getattr(seqkern, cls)(3, 4, 2, bidirectional=True), torch.randn(5, 2, 3)
    with torch.autocast("cpu", dtype):
        y, last = layer(x)
        low = layer(x.to(dtype))[0]
        hx = last if cls == "LSTM" else last.float()
        again = layer(x, hx)[0]
    assert {t.dtype for t in flat((y, last, low, again))} == {dtype}
    torch.testing.assert_close(y.float(), layer(x)[0], rtol=0.05, atol=0.05)
    assert torch.equal(y, low)
    y.float().sum().backward()
    assert layer.weight_hh_l0.grad.dtype == torch.float32
    with pytest.raises(ValueError, match="does not match weight dtype"):
        layer(x.to(dtype))


@each_layer
def test_autocast_leaves_float64(cls):
    layer = getattr(seqkern, cls)(3, 4, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(5, 2, 3, dtype=torch.float64))[0].dtype == torch.float64


@each_layer
def test_autocast_on_the_reference(cls, monkeypatch):
    """A device without kernels casts by the same rule."""
    layer, x = getattr(seqkern, cls)(3, 4, 2), torch.randn(5, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        want = layer(x)
        monkeypatch.setattr(functional, "KERNEL_DEVICES", frozenset())
        got = layer(x)
    assert {t.dtype for t in flat(got)} == {torch.bfloat16}
    torch.testing.assert_close(flat(got), flat(want), rtol=0.05, atol=0.05)


@each_layer
def test_gradient_modes(cls):
    layer, x = getattr(seqkern, cls)(3, 4, 2).eval(), torch.randn(5, 2, 3)
    want = layer(x)[0]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = layer(x)[0]
        assert not y.requires_grad
        torch.testing.assert_close(y, want)
    layer.requires_grad_(False)
    assert not layer(x)[0].requires_grad
    x.requires_grad_()
    layer(x)[0].sum().backward()
    assert x.grad.abs().sum() > 0
    hx = torch.zeros(2, 2, 4, requires_grad=True)
    y, _ = layer(x.detach(), (hx, hx) if cls == "LSTM" else hx)
    assert torch.autograd.grad(y.sum(), hx)[0].abs().sum() > 0


@each_layer
def test_second_backward_under_retain_graph(cls):
    layer, x = getattr(seqkern, cls)(3, 4, 2, bidirectional=True), torch.randn(5, 2, 3)
    loss = layer(x)[0].pow(2).sum()
    first = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(layer.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_layer
def test_runs_repeat_bit_for_bit(cls):
    torch.set_num_threads(2)
    layer, x = getattr(seqkern, cls)(24, 96, 2, bidirectional=True, dropout=0.2), torch.randn(40, 17, 24)
    runs = []
    for _ in range(2):
        torch.manual_seed(9)
        y, last = layer(x)
        runs.append([y, *flat(last), *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@each_layer
def test_gradient_penalty(cls):
    """Double backward through stacked, packed layers equals torch.nn's."""
    ours, theirs = twins(cls, 3, 4, 2, bidirectional=True, dtype=torch.float64)
    results = []
    for layer in (ours, theirs):
        x = torch.linspace(-1, 1, 30, dtype=torch.float64).view(5, 2, 3).requires_grad_()
        y, _ = layer(pack_padded_sequence(x, torch.tensor([3, 5]), enforce_sorted=False))
        (dx,) = torch.autograd.grad(y.data.sin().sum(), x, create_graph=True)
        penalty = (dx.flatten(1).norm(dim=1) - 1).pow(2).sum()
        results.append(
            torch.autograd.grad(penalty, list(layer.parameters()), allow_unused=True, materialize_grads=True)
        )
    torch.testing.assert_close(*results)


@each_layer
def test_a_nan_row_leaves_the_others_alone(cls):
    layer, x = getattr(seqkern, cls)(16, 32, 2, bidirectional=True), torch.randn(6, 9, 16)
    want = layer(x)[0]
    x[2, 4] = torch.nan
    y = layer(x)[0]
    assert y[:, 4].isnan().any()
    rest = [b for b in range(9) if b != 4]
    assert torch.equal(y[:, rest], want[:, rest])


@each_layer
def test_unsorted_packs_equal_single_sequences(cls):
    """The state comes in and goes out in the caller's order."""
    layer = getattr(seqkern, cls)(3, 4, 2, bidirectional=True)
    sequences = [torch.randn(n, 3) for n in (2, 6, 1, 4)]
    h = torch.randn(4, 4, 4)
    y, last = layer(pack_sequence(sequences, enforce_sorted=False), (h, h.sin()) if cls == "LSTM" else h)
    padded, lengths = pad_packed_sequence(y)
    assert lengths.tolist() == [2, 6, 1, 4]
    for b, x in enumerate(sequences):
        one = h[:, b], h[:, b].sin()
        y, state = layer(x, one if cls == "LSTM" else one[0])
        torch.testing.assert_close(padded[: len(x), b], y)
        torch.testing.assert_close([s[:, b] for s in flat(last)], flat(state))


@each_layer
def test_layouts_of_input_and_state(cls):
    ours, theirs = twins(cls, 3, 4, 2, batch_first=True)
    x = torch.randn(3, 1, 5).permute(1, 2, 0).expand(2, 5, 3)
    h = torch.randn(2, 1, 8)[..., ::2].expand(2, 2, 4)
    hx = (h, h) if cls == "LSTM" else h
    torch.testing.assert_close(ours(x, hx), theirs(x, hx))
    torch.testing.assert_close(ours(x, list(hx)) if cls == "LSTM" else ours(x, hx=h), theirs(x, hx))
    assert ours(x)[0].stride() == theirs(x)[0].stride()


def test_no_zeros_are_made_for_a_missing_state(monkeypatch):
    seen = []

    for module, name in ((ops, "rnn_layer"), (ops._C, "forward")):  # the operator, and what plain calls take
        original = getattr(module, name)

        def spy(x, h0, c0, *rest, original=original):
            seen.append((h0, c0))
            return original(x, h0, c0, *rest)

        monkeypatch.setattr(module, name, spy)
    seqkern.LSTM(3, 4, 2)(torch.randn(5, 2, 3))
    seqkern.LSTM(3, 4)(pack_sequence([torch.randn(5, 3)]))
    seqkern.LSTMCell(3, 4)(torch.randn(2, 3))
    assert seen == [(None, None)] * 4


@each_layer
def test_forward_mode_and_vmap(cls):
    """torch.nn's own layers lack the batching rules; these run on the reference."""
    ours, theirs = twins(cls, 3, 4, dtype=torch.float64)
    x, v = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(jvp(lambda t: ours(t)[0], (x,), (v,)), jvp(lambda t: theirs(t)[0], (x,), (v,)))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        tangent = torch.autograd.forward_ad.unpack_dual(ours(dual)[0]).tangent
    torch.testing.assert_close(tangent, jvp(lambda t: theirs(t)[0], (x,), (v,))[1])

    weights = dict(ours.named_parameters())
    per_sample = vmap(grad(lambda w, t: functional_call(ours, w, (t,))[0].pow(2).sum()), (None, 1))(weights, x)
    for b in range(2):
        want = torch.autograd.grad(theirs(x[:, b])[0].pow(2).sum(), list(theirs.parameters()))
        torch.testing.assert_close([g[b] for g in per_sample.values()], list(want))

    ensemble = [getattr(seqkern, cls)(3, 4, dtype=torch.float64) for _ in range(3)]
    stacked, _ = stack_module_state(ensemble)
    got = vmap(lambda w: functional_call(ours, w, (x,))[0])(stacked)
    torch.testing.assert_close(got, torch.stack([m(x)[0] for m in ensemble]))


@each_layer
@pytest.mark.parametrize("packed", [False, True])
def test_functions_equal_the_layers(cls, packed):
    layer = getattr(seqkern, cls)(3, 4, 2, bidirectional=True, batch_first=True, dropout=0.3)
    x, h = torch.randn(2, 5, 3), torch.randn(4, 2, 4)
    hx = (h, h.cos()) if cls == "LSTM" else h
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.3, "training": True}
    data = x
    if packed:
        x = pack_padded_sequence(x, torch.tensor([5, 3]), batch_first=True)
        data, options["batch_sizes"] = x.data, x.batch_sizes
    torch.manual_seed(1)
    want, want_last = layer(x, hx)
    torch.manual_seed(1)
    y, last = getattr(functional, cls.lower())(data, hx, layer._flat_weights, **options)
    assert torch.equal(y, want.data if packed else want)
    assert all(torch.equal(a, b) for a, b in zip(flat(last), flat(want_last), strict=True))


def test_the_reference_refuses_what_does_not_fit(monkeypatch):
    """Plain torch operations would broadcast a state, or promote a dtype."""
    monkeypatch.setattr(functional, "KERNEL_DEVICES", frozenset())
    w, x = seqkern.GRU(3, 4)._flat_weights, torch.zeros(5, 2, 3)
    for hx, match in ((torch.zeros(1, 1, 4), r"\[1, 2\].*got \[1, 1, 4\]"), (torch.zeros(1, 2, 4).double(), "float64")):
        with pytest.raises(RuntimeError, match=match):
            functional.gru(x, hx, w)


def test_functions_refuse_what_does_not_fit():
    w, x = seqkern.GRU(3, 4)._flat_weights, torch.zeros(5, 2, 3)
    for error, match, call in (
        (RuntimeError, "got 3", lambda: functional.gru(x, None, w[:3], bidirectional=True)),
        (RuntimeError, r"got \[2, 2, 4\]", lambda: functional.gru(x, torch.zeros(2, 2, 4), w)),
        (RuntimeError, r"3 dimensions, got \[5, 3\]", lambda: functional.gru(x[:, 0], None, w)),
        (RuntimeError, "larger than 0", lambda: functional.gru(x[:0], None, w)),
        (ValueError, "got 1.5", lambda: functional.gru(x, None, w, dropout=1.5)),
        (ValueError, "got 'elu'", lambda: functional.rnn(x, None, w, nonlinearity="elu")),
    ):
        with pytest.raises(error, match=match):
            call()
    y, (_, c) = functional.lstm(x, (None, torch.ones(1, 2, 4)), seqkern.LSTM(3, 4)._flat_weights)
    assert y.shape == (5, 2, 4)
    assert c.shape == (1, 2, 4)
