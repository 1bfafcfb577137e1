"""The tests of test_host_step.py can fail: faults put into a copy of the sources are seen, each as it should be."""

import host
import host_options
import pytest
import torch
from cases import CASES, Case, make_cotangents, make_inputs
from host_layer import run
from oracle import faults

SUMS = Case("sums", "rnn_tanh", T=3, B=9, I=2, H=33)
PACKED, TAIL = CASES["packed-gru"], CASES["h_tail-lstm"]


def outcome(case: Case) -> str:
    """What is wrong with a run, a line for each tensor; or the Fault that ended it."""
    inputs, cotangents = make_inputs(case, torch.float32), make_cotangents(case, torch.float32)
    try:
        return "\n".join(faults(case, torch.float32, run(case, inputs, cotangents, 1)[0]))
    except host.load("step").Fault as fault:
        return f"Fault: {fault}"


def outcome_with(variant: str, name: str, old: str, new: str, case: Case) -> str:
    """`outcome` of a build in which csrc/cuda/`name` has `new` in place of `old`."""
    texts = host.compiled_for(host.edited((f"cuda/{name}", old, new)), ["F32"])
    with host.changed("step", variant, texts):
        return outcome(case)


@pytest.mark.parametrize("case", [SUMS, PACKED, TAIL], ids=lambda case: case.name)
def test_nothing_is_wrong_as_it_is(case):
    assert outcome(case) == ""


def test_a_removed_barrier_is_a_race():
    found = outcome_with("barrier", "step_sums.cuh", "\n  block_sync();\n", "\n", SUMS)
    assert found.startswith("Fault: ") and "part" in found


def test_a_flipped_sign_is_wrong_in_the_gradients_alone():
    found = outcome_with("sign", "step.cuh", "dh[i] += dy[i];", "dh[i] -= dy[i];", TAIL)
    assert "dweight_hh is off by" in found
    assert " y is off" not in found and "h_n is off" not in found


def test_a_late_row_that_reads_what_was_not_computed_is_a_fault():
    """Rows of a packed sequence that begin late, in backward's order, start from dh_n."""
    old = "b.known[d] = projected ? step.rows[d] : min(before.rows[d], step.rows[d]);"
    found = outcome_with("late_row", "layer.h", old, "b.known[d] = step.rows[d];", PACKED)
    assert found.startswith("Fault: ") and "workspace" in found


def test_a_reset_that_lets_a_gradient_pass_is_wrong_in_the_gradients_alone():
    case = Case("reset-gru", "gru", T=5, B=4, I=3, H=8)
    assert host_options.outcome(case, torch.float64, "keep") == []
    edit = ("cuda/step_options.cuh", "  keep_state<S>(s.o, row, dh);\n", "  (void)row;\n")
    with host.changed("step", "reset", host.compiled_for(host.edited(edit), ["F64"])):
        found = "\n".join(host_options.outcome(case, torch.float64, "keep"))
    assert "dx is off by" in found and "dweight_hh is off by" in found
    assert " y is off" not in found and "h_n is off" not in found
