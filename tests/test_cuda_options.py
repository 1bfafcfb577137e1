"""Layers with options on a GPU against the same layers on the CPU, with the same masks: outputs and all gradients.

The kernels themselves are held to float64 on the host, in test_host_step_options.py.
"""

import cuda_checks  # skips this file where there is no GPU
import pytest
import torch
from cuda_checks import tf32
from loops import call, gradients, make, state

import seqkern
from seqkern import functional, masks, recurrence

T, B, I, H = 9, 6, 5, 12  # noqa: E741
LENGTHS = [3, 0, 9, 1, 4, 9]
LAYERS = ("RNN", "relu", "LSTM", "GRU", "proj")
SETTINGS = {
    "none": {},
    "zoneout": {"zoneout": 0.3},
    "dropouts": {"recurrent_dropout": 0.3, "weight_dropout": 0.2},
    "clip": {"grad_clip": 0.5},
    "clip_norm": {"grad_clip": ("norm", 0.5)},
    "recompute": {"recompute": 4, "zoneout": 0.2},
    "all": {"zoneout": 0.3, "recurrent_dropout": 0.3, "weight_dropout": 0.2, "grad_clip": 0.5},
}


def both(monkeypatch, kind: str, dtype: torch.dtype, lengths, resets: bool, **settings):
    """Outputs and gradients on the CPU and on the GPU."""
    torch.manual_seed(3)
    m = make(kind, I, H, dtype=dtype, num_layers=2, bidirectional=True, **settings)
    x, hx, cleared = torch.randn(T, B, I, dtype=dtype), state(m, B), torch.rand(T, B) < 0.3
    found = []
    for device in ("cpu", "cuda"):
        if device == "cuda":  # the kernels are what runs
            monkeypatch.setattr(functional, "reference_layer", None)
        m, moved = m.to(device), cuda_checks.to(device, [x, *(hx if isinstance(hx, tuple) else (hx,))])
        x_there, *states = [t.detach().requires_grad_() for t in moved]
        options = {"resets": cleared.to(device)} if resets else {}
        if lengths is not None:
            options["lengths"] = torch.tensor(lengths, device=device)
        generator = torch.Generator().manual_seed(5)  # the CPU's for both
        hx_there = tuple(states) if len(states) == 2 else states[0]
        got = call(m, x_there, hx_there, generator=generator, return_all_states=True, **options)
        on_cpu = {n: t.cpu() for n, t in got.items()}
        grads = gradients(on_cpu, [x_there, *states, *m.parameters()])
        found.append([*on_cpu.values(), *(g.cpu() for g in grads)])
    return zip(*found, strict=True)


@pytest.mark.parametrize("lengths, resets", [(None, False), (LENGTHS, False), (None, True), (LENGTHS, True)])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", LAYERS)
def test_as_on_the_cpu(kind, settings, lengths, resets, monkeypatch):
    for want, got in both(monkeypatch, kind, torch.float64, lengths, resets, **SETTINGS[settings]):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


VARIANTS = {
    "lstm-layer_norm": ("LSTM", {"layer_norm": True}),
    "lstm-all": ("LSTM", {"coupled": True, "peephole": True, "layer_norm": True, "zoneout": (0.3, 0.2)}),
    "lstm-clip_norm": ("LSTM", {"peephole": True, "gate_activation": "hard_sigmoid", "grad_clip": ("norm", 0.3)}),
    "gru-layer_norm": ("GRU", {"layer_norm": True, "recurrent_dropout": 0.3, "weight_dropout": 0.2}),
    "gru-reset_before": ("GRU", {"reset_after": False, "recurrent_dropout": 0.3, "grad_clip": 0.3}),
    "gru-hard": ("GRU", {"gate_activation": "hard_sigmoid", "recompute": 4}),
}


@pytest.mark.parametrize("lengths, resets", [(None, False), (LENGTHS, True)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_cells_as_on_the_cpu(variant, lengths, resets, monkeypatch):
    kind, settings = VARIANTS[variant]
    for want, got in both(monkeypatch, kind, torch.float64, lengths, resets, **settings):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    with tf32(False):
        for want, got in both(monkeypatch, kind, torch.float32, lengths, resets, **settings):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_cells_in_16_bit(variant, monkeypatch):
    kind, settings = VARIANTS[variant]
    for want, got in both(monkeypatch, kind, torch.bfloat16, LENGTHS, True, **settings):
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05 * max(1.0, want.abs().max().item()))


@pytest.mark.parametrize("hidden", [600, 2700])
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_cells_repeat_and_take_wide_rows(variant, hidden, monkeypatch):
    """More units than a block has threads, and a row of gates that its shared memory does not hold; the same to the
    bit, and as the reference within float32's rounding."""
    kind, settings = VARIANTS[variant]
    torch.manual_seed(4)
    m = make(kind, I, hidden, dtype=torch.float32, bidirectional=True, device="cuda", **settings).eval()
    x = torch.randn(4, 37, I, device="cuda")
    with tf32(False):
        found = [gradients(call(m, x), list(m.parameters())) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        monkeypatch.setattr(recurrence, "covers", lambda *_: False)
        for got, want in zip(found[0], gradients(call(m, x), list(m.parameters())), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * max(1.0, want.abs().max().item()))


@pytest.mark.parametrize("kind", LAYERS)
def test_float32(kind, monkeypatch):
    with tf32(False):
        for want, got in both(monkeypatch, kind, torch.float32, LENGTHS, True, **SETTINGS["zoneout"]):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(9, 6, 12), (24, 70, 272)], ids=["small", "two rows a thread"])
@pytest.mark.parametrize("lengths, resets", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("settings", [name for name in SETTINGS if name != "clip_norm"])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_the_engines_agree(kind, settings, lengths, resets, shape, dtype):
    """Outputs and gradients; float32 with operands rounded to TF32 on both."""
    if settings == "none" and not (lengths or resets):
        return
    torch.manual_seed(3)
    steps, batch, hidden = shape
    m = make(kind, I, hidden, dtype=dtype, bidirectional=True, device="cuda", **SETTINGS[settings])
    x, hx = torch.randn(steps, batch, I, dtype=dtype, device="cuda"), state(m, batch)
    options = {"resets": torch.rand(steps, batch, device="cuda") < 0.1} if resets else {}
    if lengths:
        options["lengths"] = torch.randint(0, steps + 1, (batch,), device="cuda")
    found = []
    for engine in ("step", "grid"):
        begin = (x, *(hx if isinstance(hx, tuple) else (hx,)))
        x, *states = leaves = [t.detach().cuda().requires_grad_() for t in begin]
        generator = torch.Generator().manual_seed(5)
        with cuda_checks.forced(engine), tf32(True):
            entering = tuple(states) if len(states) == 2 else states[0]
            got = call(m, x, entering, generator=generator, return_all_states=kind == "LSTM", **options)
            found.append([*got.values(), *gradients(got, [*leaves, *m.parameters()])])
    tolerance = 0.05 if dtype == torch.bfloat16 else 0.01
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * max(1.0, want.abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_random_masks_are_the_cpus(dtype):
    seed = torch.tensor([2**61 + 12345])
    want = masks.bernoulli(torch.empty(0, dtype=dtype), (7, 100_003), seed, 9, 0.3, 1 / 0.7)
    like = torch.empty(0, dtype=dtype, device="cuda")
    assert torch.equal(masks.bernoulli(like, (7, 100_003), seed.cuda(), 9, 0.3, 1 / 0.7).cpu(), want)


def test_lengths_and_resets_in_a_graph():
    """Nothing waits for the host: captured, and replayed with other lengths and resets."""
    layer = seqkern.GRU(I, H, bidirectional=True, device="cuda")
    x, lengths = torch.randn(T, B, I, device="cuda"), torch.tensor(LENGTHS, device="cuda")
    resets = torch.rand(T, B, device="cuda") < 0.3

    def step():
        y = layer(x, lengths=lengths, resets=resets)[0]
        return y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    lengths.copy_(lengths.flip(0))
    resets.logical_not_()
    graph.replay()
    for got, want in zip(found, step(), strict=True):
        assert torch.equal(got, want)


def test_explain():
    layer = seqkern.LSTM(64, 256, zoneout=0.1, device="cuda", dtype=torch.bfloat16)
    plan = seqkern.explain(layer, batch=16, time=50)
    assert plan.engine == "cuda-grid" and "step" not in str(plan)
    layer = seqkern.LSTM(64, 256, grad_clip=("norm", 1.0), device="cuda", dtype=torch.bfloat16)
    assert "backward: step: gradients are clipped by norm" in str(seqkern.explain(layer, batch=16, time=50))


def test_explain_other_cells():
    plan = seqkern.explain(seqkern.GRU(8, 8, reset_after=False, device="cuda"), batch=4, time=5)
    assert plan.engine == "cuda-step" and "reset_after=False: the recurrence" in str(plan)


def test_gradient_flow():
    flows = []
    torch.manual_seed(1)
    layer, x = seqkern.LSTM(I, H, dtype=torch.float64), torch.randn(T, B, I, dtype=torch.float64)
    for device in ("cpu", "cuda"):
        layer, there = layer.to(device), x.to(device)
        with seqkern.diagnostics.gradient_flow(layer) as flow:
            layer(there)[0][-1].square().sum().backward()
        flows.append(flow.records[0])
    torch.testing.assert_close(flows[1].h, flows[0].h)
    torch.testing.assert_close(flows[1].c, flows[0].c)
