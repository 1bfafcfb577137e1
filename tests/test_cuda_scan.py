"""MinGRU and MinLSTM on a GPU against the CPU: outputs and all gradients, resets, lengths, long sequences, graphs.

The kernels themselves are held to float64 on the host, in test_host_scan.py.
"""

import cuda_checks  # noqa: F401  skips this file where there is no GPU
import pytest
import torch

import seqkern
from seqkern import scan

CELLS = tuple(scan.GATES)
T, B, I, H = 37, 3, 5, 12  # noqa: E741
each_cell = pytest.mark.parametrize("cell", CELLS)
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 6e-3}


def layer(cell: str, **more):
    name, _, positive = cell.partition("_")
    cls = seqkern.MinGRU if name == "mingru" else seqkern.MinLSTM
    return cls(I, H, num_layers=2, positive=bool(positive), **more)


@pytest.fixture(autouse=True)
def kernels_alone(monkeypatch):
    def refuse(*_):
        raise AssertionError("the reference ran")

    monkeypatch.setattr(scan, "reference", refuse)


@each_cell
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("lengths", [None, [37, 0, 5]], ids=["whole", "lengths"])
def test_as_on_the_cpu(cell, dtype, lengths):
    torch.manual_seed(2)
    m, x, hx = layer(cell, dtype=torch.float64), torch.randn(T, B, I).double(), torch.randn(2, B, H).double()
    resets, found = torch.rand(T, B) < 0.2, []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        m = m.to(dtype).to(device, kind)
        there = [t.to(dtype).to(device, kind).requires_grad_() for t in (x, hx)]
        at = None if lengths is None else torch.tensor(lengths, device=device)
        outputs = m(*there, resets=resets.to(device), lengths=at)
        grads = torch.autograd.grad(sum((t * t.detach().cos()).sum() for t in outputs), [*there, *m.parameters()])
        found.append([t.cpu().double() for t in (*outputs, *grads)])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=BOUNDS[dtype], atol=BOUNDS[dtype] * max(1, want.abs().max().item()))


@each_cell
@pytest.mark.parametrize("shape", [(1, 2, 3), (65536, 1, 8), (4096, 8, 256), (50, 70, 1024), (333, 5, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operator_at_any_size(cell, shape, dtype):
    """Pieces of time and none; against the CPU's kernels, with weights that let states live long."""
    steps, batch, hidden = shape
    g = torch.Generator().manual_seed(1)
    p = torch.randn(steps, batch, scan.GATES[cell] * hidden, generator=g).to(dtype)
    p[..., :hidden] *= 3
    h0, keep = torch.randn(batch, hidden, generator=g).to(dtype), (torch.rand(steps, batch, generator=g) < 0.99).float()
    dh = torch.randn(steps, batch, hidden, generator=g).to(dtype)
    found = []
    for device in ("cpu", "cuda"):
        p_there, h0_there, keep_there, dh_there = (t.to(device) for t in (p, h0, keep, dh))
        h = torch.ops.seqkern.scan(p_there, h0_there, keep_there, cell)
        found.append([h, *torch.ops.seqkern.scan_backward(dh_there, p_there, h0_there, keep_there, h, cell)])
    bound = 1e-4 if dtype == torch.float32 else 0.02
    for name, want, got in zip(("h", "dp", "dh0"), *found, strict=True):
        error = (got.cpu().double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-6)
        assert error < bound, f"{name} is off by {error:.1e} of its largest"
    again = torch.ops.seqkern.scan(p_there, h0_there, keep_there, cell)
    assert torch.equal(h, again)


@each_cell
def test_gradcheck(cell):
    p = torch.randn(70, 2, scan.GATES[cell] * 2, dtype=torch.float64, device="cuda", requires_grad=True)
    h0 = torch.randn(2, 2, dtype=torch.float64, device="cuda", requires_grad=True)
    keep = (torch.rand(70, 2, device="cuda") < 0.8).double()
    assert torch.autograd.gradcheck(lambda p, h0: scan.scan(p, h0, keep, cell), (p, h0))


def test_capture_and_replay_on_a_side_stream():
    m = layer("minlstm", device="cuda")
    x, resets = torch.randn(200, B, I, device="cuda"), torch.rand(200, B, device="cuda") < 0.1
    lengths = torch.tensor([200, 3, 50], device="cuda")

    def step():
        y = m(x, resets=resets, lengths=lengths)[0]
        return y, *torch.autograd.grad(y.square().sum(), list(m.parameters()))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    x.copy_(x.flip(0))
    resets.logical_not_()
    graph.replay()
    for got, want in zip(found, step(), strict=True):
        assert torch.equal(got, want)


def test_unaligned_and_on_another_device():
    p = torch.randn(40 * 2 * 12 + 1, device="cuda", dtype=torch.bfloat16)[1:].view(40, 2, 12)
    want = torch.ops.seqkern.scan(p.clone(), None, None, "mingru")
    assert torch.equal(torch.ops.seqkern.scan(p, None, None, "mingru"), want)
    with pytest.raises(RuntimeError, match="must be on cuda:0 as x is, got one on"):
        torch.ops.seqkern.scan(p, torch.zeros(2, 6, dtype=torch.bfloat16), None, "mingru")
