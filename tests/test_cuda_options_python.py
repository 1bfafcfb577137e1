"""Layers with options as on CUDA, as far as it goes without a GPU: Python's side of the operators around their kernels,
which run on the host (csrc/testing); and on fake tensors, whose calls show what is called and that nothing is read.
"""

from contextlib import nullcontext

import host_operator
import pytest
import torch
from loops import LAYERS, call, check, gradients, make, run, state
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import seqkern
from seqkern import functional, masks
from seqkern.recurrence import NORMAL
from seqkern.reference import Extra

T, B, I, H = 6, 4, 3, 8  # noqa: E741
LENGTHS = [3, 0, 6, 1]
SETTINGS = {
    "none": {},
    "zoneout": {"zoneout": 0.3},
    "dropouts": {"recurrent_dropout": 0.3, "weight_dropout": 0.2, "grad_clip": 0.3},
    "clip_norm": {"grad_clip": ("norm", 0.3)},
    "recompute": {"recompute": 4, "zoneout": 0.2, "grad_clip": 0.3},
}


def problem(kind: str, **options):
    m = make(kind, I, H, **options)
    return m, torch.randn(T, B, I, dtype=torch.float64, requires_grad=True), state(m, B)


@pytest.fixture
def as_cuda(monkeypatch):
    """CPU tensors take CUDA's ways and kernels; the reference must not run."""
    monkeypatch.setattr(functional, "takes_lengths", lambda _: True)
    monkeypatch.setattr(functional, "reference_layer", None)
    with host_operator.installed():
        host_operator.plans.clear()
        yield


@pytest.mark.parametrize("kind", LAYERS)
def test_lengths_and_resets_equal_a_loop_of_cells(as_cuda, kind):
    m, x, hx = problem(kind, bidirectional=True)
    keep = torch.rand(T, B, dtype=torch.float64).round()

    def before(h, c, t, *_):
        return h * keep[t].unsqueeze(-1), None if c is None else c * keep[t].unsqueeze(-1)

    got = call(m, x, hx, lengths=LENGTHS, resets=keep == 0, return_all_states=True)
    check(m, got, run(m, x, hx, LENGTHS, before=before), [x, hx])
    check(m, call(m, x, None, lengths=LENGTHS), run(m, x, None, LENGTHS), [x])
    assert len(host_operator.plans) == 4


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU", "proj"])
def test_as_on_the_cpu(kind, settings, monkeypatch):
    """The same masks from the same seed: everything that a stack gives, and gradients."""
    m, x, hx = problem(kind, num_layers=2, bidirectional=settings != "recompute", **SETTINGS[settings])
    options = {"lengths": LENGTHS, "resets": torch.rand(T, B) < 0.3, "return_all_states": True}
    want = call(m, x, hx, generator=torch.Generator().manual_seed(3), **options)
    leaves = [x, *(hx if isinstance(hx, tuple) else (hx,)), *m.parameters()]
    wanted = gradients(want, leaves)
    monkeypatch.setattr(functional, "takes_lengths", lambda _: True)
    monkeypatch.setattr(functional, "reference_layer", None)
    with host_operator.installed():
        got = call(m, x, hx, generator=torch.Generator().manual_seed(3), **options)
        found = gradients(got, leaves)
    for a, b in [*((got[n], want[n]) for n in want), *zip(found, wanted, strict=True)]:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("settings", [{}, {"layer_norm": True}, {"gate_activation": "hard_sigmoid"}])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_derivatives(as_cuda, kind, settings):
    """The first by the kernels, the second by the reference."""
    m = make(kind, 2, 2, bidirectional=True, grad_clip=100.0, zoneout=0.3, **settings)
    x = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)

    def function(x, *hx):
        generator = torch.Generator().manual_seed(3)
        resets = torch.tensor([[0, 0, 1], [0, 1, 0], [0, 0, 0]]).bool()
        y, last = m(x, hx if kind == "LSTM" else hx[0], lengths=[2, 0, 3], resets=resets, generator=generator)
        return y, *(last if kind == "LSTM" else (last,))

    hx = state(m, 3)
    leaves = (x, *(hx if kind == "LSTM" else (hx,)))
    assert gradcheck(function, leaves, fast_mode=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("kind", ["LSTM", "RNN"])
def test_gradient_flow(kind, monkeypatch):
    m, x, _ = problem(kind, num_layers=2)
    flows = []
    for kernels in (False, True):
        monkeypatch.setattr(functional, "takes_lengths", lambda _, kernels=kernels: kernels)
        where = host_operator.installed() if kernels else nullcontext()
        with where, seqkern.diagnostics.gradient_flow(m) as flow:
            m(x, lengths=LENGTHS)[0].square().sum().backward()
        flows.append(flow.records)
    for want, got in zip(*flows, strict=True):
        torch.testing.assert_close(got.h, want.h)
        torch.testing.assert_close(got.c, want.c)


class Calls(TorchDispatchMode):
    """The calls of seqkern's operators: name, and arguments by their names."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, dict]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "seqkern":
            names = [a.name for a in func._schema.arguments]
            self.seen.append((func._schema.name.removeprefix("seqkern::"), dict(zip(names, args, strict=False))))
        return func(*args, **(kwargs or {}))

    def names(self) -> list[str]:
        return [name for name, _ in self.seen]


@pytest.fixture
def fake(monkeypatch):
    """Fake CUDA tensors, in a build with CUDA. Without a GPU nothing can be written there, nor autograd run."""
    monkeypatch.setattr(functional, "KERNEL_DEVICES", frozenset({"cpu", "meta", "cuda"}))
    monkeypatch.setattr(masks, "_KERNEL_DEVICES", frozenset({"cpu", "cuda"}))
    monkeypatch.setattr(functional, "reference_layer", None)
    with torch.no_grad(), FakeTensorMode(), Calls() as calls:
        yield calls


def fake_call(kind: str, layers: int, directions: int, **options):
    gates = {"rnn": 1, "lstm": 4, "gru": 3}[kind] * H
    weights = []
    for k in range(layers * directions):
        shapes = ((gates, I if k < directions else directions * H), (gates, H), (gates,), (gates,))
        weights += [torch.empty(shape, device="cuda") for shape in shapes]
    x = torch.empty(T, B, I, device="cuda")
    options |= {"num_layers": layers, "bidirectional": directions == 2}
    return getattr(functional, kind)(x, None, weights, **options)


@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"])
def test_lengths_and_resets_are_not_read_by_the_host(fake, kind):
    resets = torch.empty(T, B, dtype=torch.bool, device="cuda")
    lengths = torch.empty(B, dtype=torch.int64, device="cuda")
    y, last = fake_call(kind, 2, 2, lengths=lengths, resets=resets)
    assert fake.names() == ["option_layer"] * 2
    assert y.shape == (T, B, 2 * H) and (last[0] if kind == "lstm" else last).shape == (4, B, H)
    for _, arguments in fake.seen:
        assert arguments["batch_sizes"] is None and arguments["tf32"]
        assert arguments["lengths"].dtype == torch.int64 and arguments["lengths"].device.type == "cuda"
        assert arguments["keep"].shape == (T * B,) and arguments["keep"].dtype == torch.float32


def test_layer_norm_goes_to_the_recurrence(fake):
    extra = [Extra(None, *(torch.empty(n, device="cuda") for n in (4 * H, 4 * H, H, H)))]
    lengths = torch.empty(B, dtype=torch.int64, device="cuda")
    y, _ = fake_call("lstm", 1, 1, lengths=lengths, layer_norm=True, extra=extra)
    assert fake.names() == ["recurrence"] and y.shape == (T, B, H)
    arguments = fake.seen[0][1]
    assert arguments["lengths"].device.type == "cuda" and arguments["tf32"] and arguments["flags"] == NORMAL


@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"])
def test_a_plain_call_stays_plain(fake, kind):
    fake_call(kind, 1, 1)
    assert fake.names() == ["rnn_layer"]


@pytest.mark.parametrize(
    "options, left",
    [
        ({"layer_norm": True, "grad_clip": ("norm", 1.0)}, ""),
        ({"peephole": True, "proj_size": 3}, "peephole with proj_size"),
        ({"grad_clip": ("norm", 1.0), "proj_size": 3}, ""),
        ({"zoneout": 0.1, "recurrent_dropout": 0.2, "grad_clip": ("norm", 1.0), "recompute": 3}, ""),
    ],
)
def test_what_is_left_to_the_reference(options, left):
    projected = "proj_size" in options
    assert seqkern.options.unfused(seqkern.LSTM(I, H, **options)._settings, "cuda", projected) == left


def test_options_of_each_pass():
    """What a layer's planner is asked for: clipping is backward's, a mask on h is training's."""
    for options, training, want in (
        ({}, True, (False, False)),
        ({"zoneout": 0.1}, False, (True, True)),
        ({"grad_clip": 1.0}, True, (False, True)),
        ({"recurrent_dropout": 0.1}, True, (True, True)),
        ({"recurrent_dropout": 0.1}, False, (False, False)),
        ({"weight_dropout": 0.1, "recompute": 4}, True, (False, False)),
    ):
        settings = seqkern.GRU(I, H, **options)._settings
        assert tuple(seqkern.options.in_kernels(settings, training, backward) for backward in (False, True)) == want
