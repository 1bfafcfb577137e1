"""Plain eager calls go past the operators' own autograd (seqkern/eager.py) and give the same, to the bit."""

from unittest import mock

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import seqkern
from seqkern import eager, functional

LAYERS = {
    "resets": (seqkern.LSTM, {}),
    "zoneout": (seqkern.GRU, {"zoneout": 0.2}),
    "layer_norm": (seqkern.LSTM, {"layer_norm": True, "bidirectional": True}),
    "reset_before": (seqkern.GRU, {"reset_after": False}),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def problem(name):
    cls, options = LAYERS[name]
    m = cls(5, 7, **options)
    return m, torch.randn(6, 3, 5, requires_grad=True), torch.rand(6, 3) < 0.3


def call(m, x, resets):
    """y, h_n and, for the LSTM, c_n."""
    y, last = m(x, resets=resets, generator=torch.Generator().manual_seed(1))
    return [y, *(last if isinstance(last, tuple) else (last,))]


def both(run):
    """run() on plain eager calls, and on the operators' own autograd."""
    with mock.patch.object(eager._Call, "apply", wraps=eager._Call.apply) as used:
        ours = run()
    assert used.called
    with mock.patch.object(functional, "_plain_eager", lambda _: False):
        return ours, run()


@each_layer
@pytest.mark.parametrize("frozen", [(), ("x",), ("weight_hh_l0", "bias_ih_l0")], ids=["all", "no_x", "frozen"])
def test_same_as_the_operators_autograd(name, frozen):
    m, x, resets = problem(name)
    leaves = {"x": x} | dict(m.named_parameters())
    for leaf in frozen:
        leaves[leaf].requires_grad_(False)
    wanted = [t for t in leaves.values() if t.requires_grad]

    def run():
        outputs = call(m, x, resets)
        return [*outputs, *torch.autograd.grad([t.square().sum() for t in outputs], wanted)]

    ours, theirs = both(run)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@each_layer
@pytest.mark.parametrize("used", [0, 1])
def test_one_result_alone(name, used):
    m, x, resets = problem(name)
    run = lambda: torch.autograd.grad(call(m, x, resets)[used].sum(), [x, *m.parameters()])  # noqa: E731
    ours, theirs = both(run)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@each_layer
def test_second_derivatives_and_checkpoints(name):
    m, x, resets = problem(name)
    m, x = m.double(), x.detach().double().requires_grad_()

    def second(forward):
        def run():
            (first,) = torch.autograd.grad(forward()[0].square().sum(), x, create_graph=True)
            return torch.autograd.grad(first.square().sum(), [x, m.weight_hh_l0])

        return run

    ours, theirs = both(second(lambda: call(m, x, resets)))
    torch.testing.assert_close(ours, theirs)
    again, _ = both(second(lambda: checkpoint(call, m, x, resets, use_reentrant=False)))
    torch.testing.assert_close(again, ours)


@pytest.mark.parametrize("cls", [seqkern.GRU, lambda i, h: seqkern.GRU(i, h, zoneout=0.2)], ids=["plain", "zoneout"])
def test_a_checkpoint_that_begins_before_the_layer(cls):
    """Its forward runs again inside the layer's backward, where what stands before the layer is recorded too."""
    m, x = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Tanh(), cls(5, 7)), torch.randn(6, 3, 5)
    m.eval()
    want = torch.autograd.grad(m(x)[0].sum(), list(m.parameters()))
    got = torch.autograd.grad(checkpoint(m, x, use_reentrant=False)[0].sum(), list(m.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_without_gradients_nothing_is_kept():
    m, x, resets = problem("layer_norm")
    want = call(m, x, resets)
    with torch.no_grad(), mock.patch.object(eager._Call, "apply", side_effect=AssertionError):
        got = call(m, x, resets)
    assert not got[0].requires_grad and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
