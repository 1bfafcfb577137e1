"""Numbers that recurrent kernels get wrong: NaN that spreads, infinities, saturation, drift over long sequences."""

import itertools
from dataclasses import replace

import pytest
import torch
from cases import CELLS, DTYPES, Case, make_cotangents, make_inputs
from oracle import engine, evaluate, fault

from seqkern import reference

dtypes = pytest.mark.parametrize("dtype", DTYPES)


def run(case: Case, inputs, cotangents) -> dict[str, torch.Tensor]:
    return evaluate(engine, case, inputs, cotangents)


POISONED = [
    Case("padded", "lstm", T=4, B=21, H=40),
    Case("units", "lstm", T=4, B=3, H=256),
    Case("packed", "lstm", lengths=(5, 5, 4, 4, 4, 3, 2, 2, 1), H=40, bidirectional=True),
    Case("proj", "lstm", T=4, B=7, H=40, proj=9),
]


def poison(case: Case, inputs, cotangents, where: str, row: int) -> None:
    """Puts NaN into one row of the batch: in the first step of x or dy, or in the whole state."""
    target = {"x": inputs.x, "h0": inputs.h0, "c0": inputs.c0, "dy": cotangents[0], "dh_n": cotangents[1]}[where]
    if where in ("x", "dy"):
        target.view(-1, target.size(-1))[row] = float("nan")
    else:
        target[:, row] = float("nan")


def of_others(case: Case, t: torch.Tensor, name: str, row: int) -> torch.Tensor:
    """The part of a result that belongs to all rows of the batch but one."""
    if name in ("h_n", "c_n", "dh0", "dc0"):
        return torch.cat([t[:, :row], t[:, row + 1 :]], 1)
    if case.lengths is None:
        return torch.cat([t[:, :row], t[:, row + 1 :]], 1)
    owner = torch.cat([torch.arange(n) for n in case.batch_sizes.tolist()])
    return t[owner != row]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cell, where", [*itertools.product(CELLS, ["x", "h0", "dy", "dh_n"]), ("lstm", "c0")])
@pytest.mark.parametrize("shape", POISONED, ids=lambda case: case.name)
def test_nan_stays_in_its_row(shape, cell, where, dtype):
    """Outputs and gradients of the other rows are the same bits as without the NaN; its own row shows it."""
    case = replace(shape, name=f"nan-{shape.name}-{cell}", cell=cell, proj=shape.proj if cell == "lstm" else 0)
    rowwise = ("y", "h_n", "c_n", "dx", "dh0", "dc0")
    clean = run(case, make_inputs(case, dtype), make_cotangents(case, dtype))
    for row in {0, case.B // 2, case.B - 1}:
        inputs, cotangents = make_inputs(case, dtype), [d.clone() for d in make_cotangents(case, dtype)]
        poison(case, inputs, cotangents, where, row)
        found = run(case, inputs, cotangents)
        for name in rowwise:
            if name in found:
                assert torch.equal(of_others(case, found[name], name, row), of_others(case, clean[name], name, row)), (
                    name
                )
        spoilt = found["dx"] if where in ("dy", "dh_n") else found["y"]
        assert spoilt.isnan().any()


# relu has no limit for a huge input to saturate to.
EXTREMES = [(c, s) for c in CELLS for s in ("infinite", "huge") if (c, s) != ("rnn_relu", "huge")]


@pytest.mark.parametrize("cell, size", EXTREMES)
@dtypes
@pytest.mark.parametrize("sign", [1, -1])
def test_infinite_and_huge_inputs_reach_exact_limits(cell, dtype, size, sign):
    """Gates saturate to exactly 0, 1 or -1, and their gradients to 0: no NaN from inf - inf or 0 * inf."""
    case = Case(f"limits-{cell}", cell, T=1, B=5, I=4, H=19)
    inputs = make_inputs(case, dtype)
    inputs.x[:, :, 2] = sign * (float("inf") if size == "infinite" else torch.finfo(dtype).max / 2)
    for w in inputs.weights[:1]:
        w[:, 2] = torch.where(w[:, 2] >= 0, 1.0, -1.0)
    cotangents = make_cotangents(case, dtype)
    got = run(case, inputs, cotangents)
    wide = inputs._replace(
        x=inputs.x.double(),
        h0=inputs.h0.double(),
        c0=None if inputs.c0 is None else inputs.c0.double(),
        weights=[w.double() for w in inputs.weights],
    )
    want = evaluate(reference.layer, case, wide, [d.double() for d in cotangents])
    for name in ("y", "h_n", "c_n", "dx", "dh0", "dc0"):
        if name in want:
            wrong = fault(got[name], want[name], 0.0)
            assert wrong is None, f"{name} {wrong}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cell_state_does_not_drift(dtype):
    """c grows by less than half an eps of itself per step: kept in 16 bits it stops growing, in fp32 it does not."""
    case = Case("drift", "lstm", T=1536, B=3, I=2, H=17)
    inputs = make_inputs(case, dtype)
    inputs.x.fill_(1)
    inputs.c0.fill_(3)
    w_ih, w_hh, b_ih, b_hh = inputs.weights
    for t in (w_ih, w_hh, b_hh):
        t.zero_()
    i, f, g, o = b_ih.chunk(4)
    i.fill_(-4.0 if dtype == torch.bfloat16 else -7.0), f.fill_(12.0), g.fill_(0.5), o.fill_(0.0)
    c_n = engine(*inputs, "lstm", False)[2]
    gain = torch.sigmoid(i.double()) * torch.tanh(g.double())
    keep = torch.sigmoid(f.double())
    want = 3 * keep**case.T + gain * (1 - keep**case.T) / (1 - keep)
    eps = torch.finfo(dtype).eps
    assert (gain < 3 * eps / 2).all() and (want - 3 > 16 * eps * want).all(), "the problem must tell the two apart"
    wrong = fault(c_n, want.expand(1, case.B, -1), 0.0)
    assert wrong is None, f"c_n {wrong}"
