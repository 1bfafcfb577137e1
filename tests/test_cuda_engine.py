"""Outputs and all gradients on the GPU against the oracle: every case and dtype, on `step` and as planned.

float32 runs twice: without TF32 and, as `tf32`, with it.
"""

import json

import cuda_checks
import pytest
import torch
from cases import CASES, CELLS, DTYPES, Case
from cuda_checks import check, forced, run, tf32

KINDS = {str(dtype)[6:]: (dtype, False) for dtype in DTYPES} | {"tf32": (torch.float32, True)}
PLANNED = ("bfloat16", "float16", "tf32")  # what another engine than step covers

# Beside the named cases, which are small: whole tiles, more units and more rows than one block takes.
LARGE = [
    Case(f"{name}-{cell}", cell, **options)
    for name, cells, options in (
        ("h_256", CELLS, {"T": 20, "B": 16, "I": 32, "H": 256}),
        ("h_512_b_40", ("lstm", "gru"), {"T": 9, "B": 40, "I": 32, "H": 512}),
        ("h_1024", ("lstm", "gru"), {"T": 6, "B": 64, "I": 64, "H": 1024}),
        ("h_96_b_200", ("lstm", "rnn_tanh"), {"T": 7, "B": 200, "I": 16, "H": 96}),
        ("h_250_bidirectional", ("lstm", "gru"), {"T": 11, "B": 13, "I": 24, "H": 250, "bidirectional": True}),
        ("packed_256", ("lstm", "gru"), {"lengths": (19, 19, 12, 7, 7, 3, 1), "H": 256, "bidirectional": True}),
    )
    for cell in cells
]
ALL = [*CASES.values(), *LARGE]


def plans(case: Case, dtype: torch.dtype, with_tf32: bool) -> list[str]:
    """The engine of the forward and of the backward pass."""
    arguments = ([case.T, case.B, case.H, case.P], case.cell, str(dtype)[6:], with_tf32, case.bidirectional)
    return [json.loads(torch.ops.seqkern._cuda_plan(*arguments, backward, 0))["engine"] for backward in (False, True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_step(case, kind):
    dtype, with_tf32 = KINDS[kind]
    if dtype == torch.float64 and case.H >= 512:
        pytest.skip("the truth in long double takes half a minute; smaller cases reach the same kernels")
    with forced("step"), tf32(with_tf32):
        check(case, dtype, run(case, dtype))


@pytest.mark.parametrize("kind", PLANNED)
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_grid(case, kind):
    dtype, with_tf32 = KINDS[kind]
    if "grid" not in plans(case, dtype, with_tf32):
        pytest.skip("the planner takes step for both passes")
    with forced(None), tf32(with_tf32):
        check(case, dtype, run(case, dtype))


@pytest.mark.skipif(torch.cuda.get_device_capability() < (8, 0), reason="grid needs sm_80")
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", PLANNED)
def test_the_grid_tests_do_run_grid(cell, kind):
    """Not all of test_grid is skipped: a usual shape is planned for grid, both passes."""
    dtype, with_tf32 = KINDS[kind]
    case = next(c for c in LARGE if c.name == f"h_256-{cell}")
    assert plans(case, dtype, with_tf32) == ["grid", "grid"]


def test_forcing_an_engine_that_does_not_cover_the_call_says_why():
    case = CASES["h_tail-lstm"]
    with forced("grid"), pytest.raises(RuntimeError, match="SEQKERN_CUDA_ENGINE=grid, but .*float64"):
        run(case, torch.float64)
    with forced("cluster"), pytest.raises(RuntimeError, match="SEQKERN_CUDA_ENGINE must be step or grid, got cluster"):
        run(case, torch.float32)


@pytest.mark.parametrize("engine", ["step", None], ids=["step", "grid"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["h_256-lstm", "h_256-gru", "packed_256-lstm", "h_250_bidirectional-gru"])
def test_repeats_bit_for_bit(name, kind, engine):
    dtype, with_tf32 = KINDS[kind]
    case = next(c for c in LARGE if c.name == name)
    with forced(engine), tf32(with_tf32):
        first = run(case, dtype)
        for _ in range(5):
            assert all(torch.equal(first[key], t) for key, t in run(case, dtype).items())


@pytest.mark.parametrize("engine", ["step", None], ids=["step", "grid"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_long_sequence_in_bfloat16(cell, engine):
    """T = 1024: the carried state does not drift, forward and backward."""
    case = Case(f"t_1024-{cell}", cell, T=1024, B=3, I=4, H=48)
    with forced(engine):
        check(case, torch.bfloat16, run(case, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["h_tail-lstm", "bidirectional-gru", "packed-rnn_relu", "proj-lstm"])
def test_inference_gives_the_same_and_keeps_nothing(name, dtype):
    case = CASES[name]
    inputs = cuda_checks.inputs_on(case, dtype)
    with torch.no_grad(), tf32(False):
        y, h_n, c_n, reserve = torch.ops.seqkern.rnn_layer(*inputs, case.cell, case.bidirectional, False)
    assert reserve.numel() == 0
    check(case, dtype, {"y": y, "h_n": h_n} | ({"c_n": c_n} if case.cell == "lstm" else {}))
