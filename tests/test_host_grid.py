"""The CUDA `grid` engine against the float64 oracle, run on the host: its kernels' own source, a fiber for each thread.

Small problems on made-up devices, whose number of SMs decides how the planner cuts: units over blocks, batch over
tiles, several passes in a tile, directions side by side or one after the other.
"""

import host
import host_grid
import oracle
import pytest
import tf32
import torch
from cases import CELLS, Case, make_cotangents, make_inputs
from torch.nn.functional import linear

SEEDS = (0, 1, 2)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}

# name: SMs, options of the case
SHAPES = {
    "one_block": (4, {"T": 4, "B": 2, "I": 3, "H": 5}),
    "blocks": (3, {"T": 5, "B": 9, "I": 4, "H": 48}),
    "no_h0": (8, {"T": 4, "B": 3, "I": 4, "H": 40, "h0": False}),
    "tiles_of_8": (6, {"T": 3, "B": 17, "I": 3, "H": 20, "c0": False}),
    "passes": (2, {"T": 3, "B": 35, "I": 3, "H": 24, "bias": False}),
    "bidirectional": (4, {"T": 4, "B": 5, "I": 4, "H": 32, "bidirectional": True}),
    "directions_in_turn": (3, {"T": 3, "B": 3, "I": 4, "H": 33, "bidirectional": True, "h0": False, "c0": False}),
    "packed": (2, {"lengths": (6, 6, 4, 4, 3, 2, 2, 1, 1), "I": 4, "H": 24}),
    "packed_reverse": (8, {"lengths": (5, 4, 4, 2, 1), "I": 4, "H": 18, "bidirectional": True}),
    "packed_passes": (4, {"lengths": (4,) * 3 + (3,) * 14 + (1,) * 3, "I": 3, "H": 20, "bidirectional": True}),
}


def case_of(shape: str, cell: str) -> Case:
    return Case(f"grid_{shape}_{cell}", cell, **SHAPES[shape][1])


def faults(case: Case, dtype: torch.dtype, found: dict) -> list[str]:
    if dtype != torch.float32:
        return oracle.faults(case, dtype, found)
    figures, beside = tf32.native(case), oracle.truth_beside(case, dtype, found)
    wrong = {name: oracle.fault(got, beside[name], figures[name]) for name, got in found.items()}
    return [f"{case.name} tf32: {name} {text}" for name, text in wrong.items() if text]


def evaluate(module, case: Case, dtype: torch.dtype, sms: int, seed: int = 0, plans: list | None = None) -> dict:
    layer = host_grid.layer(module, host_grid.device(sms), seed, plans)
    return oracle.evaluate(layer, case, make_inputs(case, dtype), make_cotangents(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients(shape, cell, dtype):
    """Within the bound, and bit for bit the same in three orders of the threads."""
    case, dtype, first = case_of(shape, cell), DTYPES[dtype], None
    for seed in SEEDS:
        found = evaluate(host.load("grid"), case, dtype, SHAPES[shape][0], seed)
        if first is None:
            wrong = faults(case, dtype, found)
            assert not wrong, "\n".join(wrong)
            first = found
        assert all(torch.equal(found[name], want) for name, want in first.items()), f"seed {seed} differs from seed 0"


def test_shapes_reach_what_they_are_named_for():
    """Several tiles, several passes, and directions in turn, as planned for the shapes above."""
    seen = {}
    for shape, (sms, _) in SHAPES.items():
        case = case_of(shape, "lstm")
        problem = {"cell": 2, "dtype": 2, "tf32": False, "steps": case.T, "batch": case.B, "hidden": case.H}
        problem |= {"output": case.H, "directions": case.D, "packed": case.lengths is not None}
        seen[shape] = host.load("grid").plan(problem, host_grid.device(sms), False)
        assert seen[shape]["engine"] == "grid", seen[shape]
    assert seen["blocks"]["ctas"] == 3
    assert seen["tiles_of_8"]["tiles"] == 3 and seen["tiles_of_8"]["batch_tile"] == 8
    assert seen["passes"]["batch_tile"] == 48 and seen["packed_passes"]["batch_tile"] == 32
    assert seen["bidirectional"]["directions"] == 2 and seen["directions_in_turn"]["directions"] == 1


def test_tf32_stands_for_its_rounding():
    """The reference with TF32 products differs from float32's by far more than float32 does from float64."""
    x, w = torch.randn(8, 64), torch.randn(16, 64)
    error = (tf32.Linear.apply(x, w) - linear(x, w)).abs().max()
    assert 1e-4 < error < 0.1
