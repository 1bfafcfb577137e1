"""The tests of test_host_step.py can fail: faults put into a copy of the sources are seen, each as it should be."""

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import host
import pytest
import torch
from cases import CASES, Case, make_cotangents, make_inputs
from host_layer import run
from oracle import faults

SUMS = Case("sums", "rnn_tanh", T=3, B=9, I=2, H=33)
CHILD = """
    import sys
    from pathlib import Path
    import host
    root = Path(sys.argv[1])
    host.ROOT, host.TESTING, host.BUILD = root, root / "csrc" / "testing", root / "build"
    from test_host_step_mutation import outcome, {case} as case
    print(outcome(case))
"""


def outcome(case: Case) -> str:
    """What is wrong with a run, a line for each tensor; or the Fault that ended it."""
    inputs, cotangents = make_inputs(case, torch.float32), make_cotangents(case, torch.float32)
    try:
        return "\n".join(faults(case, torch.float32, run(case, inputs, cotangents, 1)[0]))
    except host.load("step").Fault as fault:
        return f"Fault: {fault}"


def outcome_with(folder: Path, name: str, old: str, new: str, case: str) -> str:
    """`outcome` of a build in which csrc/cuda/`name` has `new` in place of `old`; in a process of its own."""
    shutil.copytree(host.ROOT / "csrc", folder / "csrc")
    source = folder / "csrc" / "cuda" / name
    text = source.read_text()
    assert text.count(old) == 1, f"{name} must have one {old!r}, has {text.count(old)}"
    source.write_text(text.replace(old, new))
    host.build("step")
    (folder / "build").mkdir()
    for made in host.BUILD.glob("*.o"):  # the rest is as it was
        if not made.name.startswith("step_module"):
            shutil.copy(made, folder / "build")
    tests = str(Path(__file__).parent)
    code = f"import sys; sys.path[:0] = [{tests!r}, {str(host.ROOT)!r}]\n" + textwrap.dedent(CHILD.format(case=case))
    child = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    return child.stdout


PACKED, TAIL = CASES["packed-gru"], CASES["h_tail-lstm"]


@pytest.mark.parametrize("case", [SUMS, PACKED, TAIL], ids=lambda case: case.name)
def test_nothing_is_wrong_as_it_is(case):
    assert outcome(case) == ""


def test_a_removed_barrier_is_a_race(tmp_path):
    found = outcome_with(tmp_path, "step.cuh", "  block_sync();\n", "", "SUMS")
    assert found.startswith("Fault: ") and "part" in found


def test_a_flipped_sign_is_wrong_in_the_gradients_alone(tmp_path):
    found = outcome_with(tmp_path, "step.cuh", "dh[i] += dy[i];", "dh[i] -= dy[i];", "TAIL")
    assert "dweight_hh is off by" in found
    assert " y is off" not in found and "h_n is off" not in found


def test_a_late_row_that_reads_what_was_not_computed_is_a_fault(tmp_path):
    """Rows of a packed sequence that begin late, in backward's order, start from dh_n."""
    old = "b.known[d] = projected ? step.rows[d] : min(before.rows[d], step.rows[d]);"
    found = outcome_with(tmp_path, "layer.h", old, "b.known[d] = step.rows[d];", "PACKED")
    assert found.startswith("Fault: ") and "workspace" in found
