"""Changed copies of the grid engine's sources: with planted faults, which must be seen, and with its sizes made small.

Then small problems reach what large ones do on a GPU: half units in a CTA, weights in shared memory.
"""

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import host
import pytest
import test_host_grid
import torch
from cases import Case

PRODUCT, FORWARD, BACKWARD, PLANNER = "grid_product.cuh", "grid.cuh", "grid_backward.cuh", "planner.h"
PUBLISH = "    block_sync();\n    if (threadIdx.x == 0) signal_release"
SUMS = "        block_sync();\n        cell(i, pass"
# name: file, text, what takes its place
FAULTS = {
    "no_wait": (PRODUCT, "    if (value == 0) return;\n", "    return;\n"),
    "no_barrier_before_flag": (PRODUCT, PUBLISH, PUBLISH.split("\n")[1]),
    "no_warp_sync_after_wait": (PRODUCT, "value);\n    warp_sync();\n", "value);\n"),
    "one_copy": (PRODUCT, "((i & 1) * passes + pass)", "int64_t(0 * i + pass)"),
    "forward_sums_early": (FORWARD, SUMS, SUMS.split("\n")[1]),
}
WRONG = {
    "swapped_fragment": (PRODUCT, "      a[s][1] = high.v[2 * s];\n", "      a[s][1] = low.v[2 * s + 1];\n"),
    "late_row_without_dh_n": (BACKWARD, "if (m.row >= known) v.dh_n =", "if (m.row > known) v.dh_n ="),
}
# One warp for all of K, and a quarter of the fragments in registers.
SMALL = [
    (PLANNER, "kProductWarps = kWarps;", "kProductWarps = 1;"),
    (PLANNER, "kHeldTiles = 16;", "kHeldTiles = 4;"),
]
CASE = Case("grid_builds", "lstm", lengths=(6, 5, 5, 2), I=3, H=40, bidirectional=True)
SMS = 6
CHILD = """
    import sys
    from pathlib import Path
    import host
    root = Path(sys.argv[1])
    host.ROOT, host.TESTING, host.BUILD = root, root / "csrc" / "testing", root / "build"
    import test_host_grid_builds as t
    print(t.{function}())
"""


def outcome() -> str:
    """What is wrong with CASE: a line for each tensor, or the Fault that ended it."""
    try:
        found = test_host_grid.evaluate(host.load("grid"), CASE, torch.bfloat16, SMS)
        return "\n".join(test_host_grid.faults(CASE, torch.bfloat16, found))
    except host.load("grid").Fault as fault:
        return f"Fault: {fault}"


def small_outcomes() -> str:
    """What is wrong with wide and narrow CTAs, both with most of their weights in shared memory."""
    lines, units = [], set()
    for cell in ("lstm", "gru", "rnn_tanh"):
        for hidden, sms, batch in ((72, 5, 9), (72, 9, 3), (100, 13, 17), (33, 8, 2)):
            for dtype in ("bf16", "tf32"):
                case = Case(f"grid_small_{cell}_{hidden}_{sms}", cell, T=3, B=batch, I=3, H=hidden)
                plans, module = [], host.load("grid")
                found = test_host_grid.evaluate(module, case, test_host_grid.DTYPES[dtype], sms, 0, plans)
                lines += test_host_grid.faults(case, test_host_grid.DTYPES[dtype], found)
                units |= {plan["units_per_cta"] for plan in plans}
    return "\n".join([*lines, f"units {sorted(units)}"])


def run_changed(folder: Path, changes, function: str, only: str | None = None) -> str:
    """What `function` of this file returns on a build with `changes`, in a process of its own; only: a cell in bf16."""
    shutil.copytree(host.ROOT / "csrc", folder / "csrc")
    for name, old, new in changes:
        source = folder / "csrc" / "cuda" / name
        text = source.read_text()
        assert text.count(old) == 1, f"{name} must have one {old!r}, has {text.count(old)}"
        source.write_text(text.replace(old, new))
    if only:
        entry = folder / "csrc" / "cuda" / "grid_entry.cuh"
        lines = entry.read_text().splitlines(keepends=True)
        kept = [line for line in lines if "case" not in line or "Dtype::kBf16" in line or f"Cell::k{only}:" in line]
        entry.write_text("".join(kept).replace("switch (cell) {", "switch (cell) {\n    default: break;"))
    host.build("grid")
    (folder / "build").mkdir()
    for made in host.BUILD.glob("*.o"):  # the rest is as it was
        if not made.name.startswith("grid_module"):
            shutil.copy(made, folder / "build")
    tests = str(Path(__file__).parent)
    code = textwrap.dedent(CHILD.format(function=function))
    code = f"import sys; sys.path[:0] = [{tests!r}, {str(host.ROOT)!r}]\n" + code
    child = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    return child.stdout.strip()


def test_nothing_is_wrong_as_it_is():
    assert outcome() == ""


@pytest.mark.parametrize("name", FAULTS)
def test_a_missing_order_between_threads_is_a_fault(name, tmp_path):
    found = run_changed(tmp_path, [FAULTS[name]], "outcome", only="Lstm")
    assert found.startswith("Fault: "), found


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_index_is_a_wrong_result(name, tmp_path):
    found = run_changed(tmp_path, [WRONG[name]], "outcome", only="Lstm")
    assert "is off by" in found, found


def test_small_sizes_reach_half_units_and_weights_in_shared_memory(tmp_path):
    assert run_changed(tmp_path, SMALL, "small_outcomes") == "units [8, 16]"
