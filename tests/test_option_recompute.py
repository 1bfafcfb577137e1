"""recompute: the same results and gradients from the states of every k-th step alone, in less memory."""

import pytest
import torch
from loops import LAYERS, call, make, state
from torch.nn.utils.rnn import pack_padded_sequence

T, B, I, H = 11, 4, 3, 6  # noqa: E741
each_layer = pytest.mark.parametrize("kind", LAYERS)


def twins(kind, k, **options):
    m, plain = make(kind, I, H, recompute=k, **options), make(kind, I, H, **options)
    plain.load_state_dict(m.state_dict())
    return m, plain


@each_layer
@pytest.mark.parametrize("k", [1, 4, 11, 100])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["one", "stack"])
def test_equals_the_plain_layer(kind, k, options):
    m, plain = twins(kind, k, **options)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    hx = state(m, B)
    for given in (hx, None):
        got, want = call(m, x, given), call(plain, x, given)
        got_grads, want_grads = (
            torch.autograd.grad([o[n].square().sum() for n in o], [x, *p.parameters()])
            for o, p in ((got, m), (want, plain))
        )
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(got_grads, want_grads)


@each_layer
def test_with_other_options(kind):
    zoneout = (0.2, 0.3) if kind in ("LSTM", "proj") else 0.2
    m, plain = twins(kind, 3, zoneout=zoneout, recurrent_dropout=0.2, weight_dropout=0.1)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    resets = torch.rand(T, B) < 0.2
    for lengths in (None, [11, 2, 0, 7]):
        generators = [torch.Generator().manual_seed(2) for _ in range(2)]
        options = {"resets": resets, "lengths": lengths, "return_all_states": True}
        got = call(m, x, **options, generator=generators[0])
        want = call(plain, x, **options, generator=generators[1])
        torch.testing.assert_close(got, want)
        a, b = (torch.autograd.grad(o["hs"].square().sum(), x) for o in (got, want))
        torch.testing.assert_close(a, b)


@each_layer
def test_packed_and_second_derivatives(kind):
    m, plain = twins(kind, 2)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    packed = pack_padded_sequence(x, torch.tensor([2, 11, 5, 5]), enforce_sorted=False)
    torch.testing.assert_close(m(packed), plain(packed))
    second = []
    for layer in (m, plain):
        (first,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), [x, *layer.parameters()], allow_unused=True))
    torch.testing.assert_close(second[0], second[1])


@each_layer
def test_autocast_and_16_bits(kind):
    m, plain = twins(kind, 3, dtype=torch.float32)
    x = torch.randn(T, B, I, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = m(x)[0], plain(x)[0]
    assert got.dtype == torch.bfloat16
    # The state between pieces is rounded to 16 bits.
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.01)
    grads = [torch.autograd.grad(y.float().sum(), [x, *p.parameters()]) for y, p in ((got, m), (want, plain))]
    torch.testing.assert_close(*grads, rtol=0.05, atol=0.05)
    m, plain = m.bfloat16(), plain.bfloat16()
    x = x.detach().bfloat16().requires_grad_()
    grads = [torch.autograd.grad(p(x)[0].float().sum(), [x, *p.parameters()]) for p in (m, plain)]
    torch.testing.assert_close(*grads, rtol=0.05, atol=0.05)


class Kept:
    """Bytes that autograd keeps for backward, each storage once, parameters and inputs left out."""

    def __init__(self, *ours):
        self.known, self.bytes = {t.untyped_storage().data_ptr() for t in ours}, 0

    def pack(self, t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.known.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return t


@pytest.mark.parametrize("kind, elements", [("RNN", 1), ("LSTM", 2), ("GRU", 1)])
def test_memory(kind, elements):
    """At most H (LSTM: 2H) elements for a step and row, with the states between chunks and the output."""
    T, B, H, k = 512, 4, 32, 32
    m = make(kind, 8, H, recompute=k, dtype=torch.float32)
    x = torch.randn(T, B, 8, requires_grad=True)
    kept = Kept(x, *m.parameters())
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda t: t):
        y, _ = m(x)
    # The output itself lives as long as its user wants it.
    assert kept.bytes + y.nbytes <= elements * T * B * H * 4 + 2 * (T // k) * B * H * 4 * elements
    plain = make(kind, 8, H, dtype=torch.float32)
    much = Kept(x, *plain.parameters())
    with torch.autograd.graph.saved_tensors_hooks(much.pack, lambda t: t):
        plain(x)
    assert much.bytes > kept.bytes
    m.eval()
    with torch.no_grad():
        assert m(x)[0].shape == (T, B, H)
