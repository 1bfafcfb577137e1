"""The `step` engine's kernels, and the order of work of a whole layer, run on the host against the float64 oracle.

Every named case and dtype, each launch's threads in orders drawn from three seeds (one for the few large cases). A
barrier that not all reach, a race, a read of what nobody wrote and an access out of range end the run with a Fault
(csrc/testing). The matrix products between the launches are plain loops in place of cuBLAS.
"""

import host_layer
import pytest
import torch
from cases import CASES, DTYPES, Case, make_cotangents, make_inputs
from oracle import check

SEEDS = (1, 2, 3)
# Beside the named cases: more rows than a block of sum_rows takes, and more than one piece of the table of starts.
LONG = [
    Case("rows_900-lstm", "lstm", T=9, B=100, I=3, H=5),
    Case("t_500-gru", "gru", lengths=(500, 2), I=1, H=2, bidirectional=True),
    Case("rows_360-rnn_tanh", "rnn_tanh", T=6, B=60, I=2, H=33),
]
ALL = [case for case in [*CASES.values(), *LONG] if case.N]


def run(case: Case, dtype: torch.dtype, seed: int, **options):
    return host_layer.run(case, make_inputs(case, dtype), make_cotangents(case, dtype), seed, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_layer(case, dtype):
    first = None
    large = case.N * case.G * case.H * (case.I + case.P) > 500_000  # seconds a run
    for seed in SEEDS[:1] if large else SEEDS:
        found, plans = run(case, dtype, seed)
        assert [plan["engine"] for plan in plans] == ["step", "step"]
        if first is None:
            check(case, dtype, found)
            first = found
        assert all(torch.equal(t, first[name]) for name, t in found.items())  # whatever the order of the threads


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name", ["h_16-lstm", "h_16-gru", "h_tail-rnn_tanh", "packed_bidirectional-lstm", "no_bias-gru"]
)
def test_layer_on_the_grid_engine(name, dtype):
    """The same order of work around the other engine, as planned for a small GPU."""
    case = CASES[name]
    found, plans = run(case, dtype, 1, device=host_layer.DEVICE)
    assert [plan["engine"] for plan in plans] == ["grid", "grid"]
    check(case, dtype, found)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_relu"])
def test_one_product_and_one_launch_for_each_step(cell):
    """Of both directions together; everything else is once a call."""
    counts = []
    for steps in (5, 9):
        case = Case(f"count-{cell}", cell, T=steps, B=3, I=4, H=8, bidirectional=True)
        counts.append(run(case, torch.float32, 0)[1])
    for short, long in zip(*counts, strict=True):
        assert long["launches"] - short["launches"] == 4
        assert long["products"] - short["products"] == 4
