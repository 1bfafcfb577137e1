"""MinGRU's and MinLSTM's CUDA scan against float64, run on the host: its kernels' own source, a fiber a thread."""

import zlib

import host
import numpy as np
import oracle
import pytest
import torch

from seqkern import scan

CELLS = tuple(scan.GATES)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # as enum Dtype
# T, B, H and pieces of time: one step, odd and even H, more units than a block, pieces that are not whole batches.
SHAPES = [(1, 2, 3, 1), (21, 2, 8, 3), (33, 3, 46, 5), (40, 1, 2, 19)]
SEEDS = (0, 1)


def as_array(t: torch.Tensor) -> np.ndarray:
    t = t.detach().contiguous()
    return (t.view(torch.int16) if t.element_size() == 2 else t).numpy()


def problem(cell: str, shape: tuple, dtype: torch.dtype, with_h0: bool, with_keep: bool):
    steps, batch, hidden, _ = shape
    g = torch.Generator().manual_seed(zlib.crc32(repr((cell, shape, dtype)).encode()))
    p = (2 * torch.randn(steps, batch, scan.GATES[cell] * hidden, generator=g, dtype=torch.float64)).to(dtype)
    h0 = torch.randn(batch, hidden, generator=g, dtype=torch.float64).to(dtype) if with_h0 else None
    keep = torch.rand(steps, batch, generator=g, dtype=torch.float64) if with_keep else None
    if with_keep:
        keep[torch.rand(steps, batch, generator=g) < 0.3] = 0
        keep[torch.rand(steps, batch, generator=g) < 0.3] = 1
        keep = keep.to(torch.float64 if dtype == torch.float64 else torch.float32)
    dh = torch.randn(steps, batch, hidden, generator=g, dtype=torch.float64).to(dtype)
    return p, h0, keep, dh


def by_kernels(cell: str, shape: tuple, p, h0, keep, dh, seed: int, module=None) -> dict[str, torch.Tensor]:
    module = module or host.load("scan")
    *sizes, pieces = shape
    call = [CELLS.index(cell), DTYPES.index(p.dtype), sizes, pieces, seed]
    given = {name: as_array(t) for name, t in {"p": p, "h0": h0, "keep": keep}.items() if t is not None}
    found = {"h": torch.empty_like(dh), "dp": torch.empty_like(p), "dh0": torch.empty_like(dh[0])}
    launches = module.scan(*call, given, {"h": as_array(found["h"])})
    assert launches == (1 if pieces == 1 else 3)
    given |= {"dh": as_array(dh), "h": as_array(found["h"])}
    module.scan(*call, given, {name: as_array(found[name]) for name in ("dp", "dh0")})
    return found


def by_reference(cell: str, p, h0, keep, dh, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """h and the gradients in `dtype`, of what was rounded to p's."""
    p, dh = p.to(dtype).requires_grad_(), dh.to(dtype)
    start = (torch.zeros_like(dh[0]) if h0 is None else h0.to(dtype)).requires_grad_()
    h = scan.reference(p, start, keep, cell)
    dp, dh0 = torch.autograd.grad(h, (p, start), dh)
    return {"h": h.detach(), "dp": dp, "dh0": dh0}


def faults(found, cell, p, h0, keep, dh) -> list[str]:
    truth = by_reference(cell, p, h0, keep, dh, torch.float64)
    native = by_reference(cell, p, h0, keep, dh, torch.float32 if p.dtype == torch.float64 else p.dtype)
    shrink = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps if p.dtype == torch.float64 else 1
    wrong = {n: oracle.fault(found[n], t, shrink * oracle.distance(native[n], t)) for n, t in truth.items()}
    return [f"{name} {text}" for name, text in wrong.items() if text]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_forward_and_backward(cell, shape, dtype):
    """Within the oracle's bound with and without h0 and keep, and bit for bit the same in two orders of the threads."""
    for with_h0, with_keep in ((True, True), (False, False)):
        arguments = problem(cell, shape, dtype, with_h0, with_keep)
        first, *others = [by_kernels(cell, shape, *arguments, seed) for seed in SEEDS]
        wrong = faults(first, cell, *arguments)
        assert not wrong, "\n".join(wrong)
        for other in others:
            assert all(torch.equal(other[name], t) for name, t in first.items())


@pytest.mark.parametrize("cell", CELLS)
def test_a_reset_clears_what_is_not_a_number(cell):
    """And nothing else does, however small what is left of it."""
    shape = (300, 1, 4, 3)
    p, h0, keep, dh = problem(cell, shape, torch.float32, True, True)
    keep.fill_(1)
    keep[170] = keep[250] = 0
    h0.fill_(float("nan"))
    found = by_kernels(cell, shape, p, h0, keep, dh, 0)
    assert found["h"][:170].isnan().all() and found["h"][170:].isfinite().all()


def test_pieces_fill_the_gpu_and_are_not_too_short():
    pieces = host.load("scan").pieces
    assert pieces([4096, 8, 256], 132) == 33  # 512 threads to an SM
    assert pieces([4096, 128, 1024], 132) == 1  # the units alone fill it
    assert pieces([64, 1, 16], 132) == 2  # 32 steps at least
    assert pieces([63, 1, 16], 132) == 1
    assert pieces([10**9, 1, 1], 132) <= 65535


MUTATIONS = {  # of scan.cuh: text, what takes its place
    "order_of_pieces": ("kBackward ? s.pieces - 1 - k - u : k + u) * count + q] =", "k + u) * count + q] ="),
    "keep_of_the_factor": ("const W before = kept(step[u].keep, factor[v]);", "const W before = factor[v];"),
    "state_before": ("load<V>(s.a.h, (t - 1) * row + mine,", "load<V>(s.a.h, t * row + mine,"),
    "no_first_state": ("W state = !kBackward && s.a.h0 ? W(widen(((const S*)s.a.h0)[q])) : W(0);", "W state = W(0);"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_change_is_seen(name):
    texts = host.compiled_for(host.edited(("cuda/scan.cuh", *MUTATIONS[name])), ["F32"])
    with host.changed("scan", name, texts):
        shape, wrong = (33, 3, 46, 5), []
        arguments = problem("mingru", shape, torch.float32, True, True)
        wrong = faults(by_kernels("mingru", shape, *arguments, 0, host.load("scan")), "mingru", *arguments)
        assert wrong
