"""Outputs and all gradients of the operator against the oracle: every case, every dtype, one to four threads.

The threads go by a Latin square: over the four dtypes each case meets each number of threads (four are more than many
machines have cores), and so does each dtype.
"""

import os

import pytest
import torch
from cases import CASES, CELLS, DTYPES, Case, make_cotangents, make_inputs
from oracle import check, engine, evaluate, truth

from seqkern import ops

LATIN_SQUARE = [
    pytest.param(case, dtype, 1 + (row + column) % 4, id=f"{case.name}-{str(dtype)[6:]}-{1 + (row + column) % 4}")
    for row, case in enumerate(CASES.values())
    for column, dtype in enumerate(DTYPES)
]


@pytest.mark.parametrize("case, dtype, threads", LATIN_SQUARE)
def test_matches_oracle(case, dtype, threads):
    torch.set_num_threads(threads)
    check(case, dtype, evaluate(engine, case, make_inputs(case, dtype), make_cotangents(case, dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("inputs, hidden", [(800, 64), (64, 416)])
def test_long_sums_in_one_product(cell, inputs, hidden, dtype):
    """Sums that go in blocks, of inputs and of states, where one product takes both (`joins` in csrc/cpu/forward.h)."""
    case = Case(f"long_{inputs}_{hidden}-{cell}", cell, T=2, B=13, I=inputs, H=hidden)
    check(case, dtype, evaluate(engine, case, make_inputs(case, dtype), make_cotangents(case, dtype)))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "shape",
    [
        {"T": 3, "B": 18, "I": 37, "H": 247},
        {"T": 2, "B": 130, "I": 5, "H": 95, "bias": False},
        {"lengths": (3,) * 11 + (2,) * 6 + (1,) * 6, "I": 70, "H": 220, "bidirectional": True},
        {"T": 2, "B": 40, "I": 8, "H": 330, "proj": 81},
    ],
    ids=lambda shape: "-".join(shape),
)
def test_float_where_a_tile_unit_takes_it(cell, shape):
    """float32 from the sizes on at which `float_on_tiles` in csrc/cpu/plan.h says so; the cases above are smaller."""
    if "proj" in shape and cell != "lstm":
        pytest.skip("the LSTM's alone")
    case = Case(f"float_on_tiles_{'_'.join(shape)}-{cell}", cell, **shape)
    made = make_inputs(case, torch.float32)
    check(case, torch.float32, evaluate(engine, case, made, make_cotangents(case, torch.float32)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["h_tail-lstm", "bidirectional-gru", "packed-rnn_relu", "proj-lstm", "one_row-rnn_tanh"]
)
def test_inference_gives_the_same_and_keeps_nothing(name, dtype):
    case = CASES[name]
    inputs = make_inputs(case, dtype)
    with torch.no_grad():
        y, h_n, c_n, reserve = ops.rnn_layer(*inputs, case.cell, case.bidirectional, False)
    assert reserve.numel() == 0
    found = {"y": y, "h_n": h_n} | ({"c_n": c_n} if case.cell == "lstm" else {})
    check(case, dtype, found)
    assert not y.requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell, elements", [("rnn_tanh", 0), ("rnn_relu", 0), ("gru", 4), ("lstm", 5)])
def test_reserve_stays_within_its_budget(cell, elements, dtype):
    case = Case(f"budget-{cell}", cell, T=7, B=5, I=3, H=64, bidirectional=True)
    reserve = ops.rnn_layer(*make_inputs(case, dtype), cell, True, True)[3]
    budget = elements * case.H * case.D * case.N * torch.finfo(dtype).bits // 8
    assert reserve.numel() * reserve.element_size() <= budget


@pytest.mark.parametrize("cell", CELLS)
def test_truth_is_torchs_own_definition(cell):
    """The oracle's reference and torch.nn agree in float64, so that the oracle judges by the right formula."""
    from oracle import torch_layer

    for case in (CASES[f"h_tail-{cell}"], CASES[f"packed_bidirectional-{cell}"], CASES[f"no_bias-{cell}"]):
        inputs, cotangents = make_inputs(case, torch.float64), make_cotangents(case, torch.float64)
        found = evaluate(torch_layer, case, inputs, cotangents)
        for name, want in truth(case, torch.float64).items():
            torch.testing.assert_close(found[name], want, rtol=1e-11, atol=1e-12)


def test_isa_in_use():
    """A forced ISA is the one in use; a run that does not force one says so by a known name."""
    isa = torch.ops.seqkern._cpu_isa()
    assert isa in ("generic", "avx2", "avx512", "avx512_bf16", "amx")
    assert isa == os.environ.get("SEQKERN_CPU_ISA", isa)
