"""Changed copies of the grid engine's sources: with planted faults, which must be seen, and with its sizes made small.

Then small problems reach what large ones do on a GPU: weights in shared memory, copies that are used again.
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
BARRIER = "        block_sync();  // the sums"
TURN = "        set = set == sums ? sums + set_size() : sums;\n"
EMPTY = "        empty(i + 1 + kEmptyAhead, pass);\n"
AHEAD = "kEmptyAhead = 2"
# So few copies that they are used again within the few steps here. That fences order what is emptied is not seen here:
# on the host every store is seen at once.
RING = (PLANNER, "kCopies = 32, kEmptyAhead = 16, kFenceSteps = 8", "kCopies = 4, kEmptyAhead = 2, kFenceSteps = 1")
TWO_ROWS = "                   : grid_kernel<kWithOptions, C, S, 2>(backward, options);\n"
# name: file, text, what takes its place
FAULTS = {
    "forward_sums_early": (FORWARD, BARRIER, "        // the sums"),
    "backward_sums_early": (BACKWARD, BARRIER, "        // the sums"),
    "forward_one_set_of_sums": (FORWARD, TURN, ""),
    "backward_one_set_of_sums": (BACKWARD, TURN, ""),
    "forward_never_emptied": (FORWARD, EMPTY, ""),
    "backward_never_emptied": (BACKWARD, EMPTY, ""),
    "emptied_when_stored": (PLANNER, AHEAD, "kEmptyAhead = 0"),
    "no_padding": (PRODUCT, "cta == 0 && q <", "cta < 0 && q <"),
    "late_rows_without_a_state": (FORWARD, "store(&h, row < next);", "store(&h, row < next && row < live);"),
}
WRONG = {
    "no_wait": (PRODUCT, "if (most != kEmptyWord) break;", "if (most || !most) break;"),
    "swapped_fragment": (PRODUCT, "      a[s][1] = high.v[2 * s];\n", "      a[s][1] = low.v[2 * s + 1];\n"),
    "late_row_without_dh_n": (BACKWARD, "bool with_after = row < known", "bool with_after = row <= known"),
}
# One warp for all of K, and a quarter of the fragments in registers.
SMALL = [
    (PLANNER, "kProductWarps = kWarps;", "kProductWarps = 1;"),
    (PLANNER, "kHeldTiles = 16,", "kHeldTiles = 4,"),
    RING,
]
CASE = Case("grid_builds", "lstm", lengths=(9, 8, 8, 5, 2), I=3, H=40, bidirectional=True)
SMS = 6
SEEDS = (0, 1)
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
    """What is wrong with CASE: a line for each tensor, or the Fault that ended it, in the first order with any."""
    lines = []
    for seed in SEEDS:
        try:
            found = test_host_grid.evaluate(host.load("grid"), CASE, torch.bfloat16, SMS, seed)
        except host.load("grid").Fault as fault:
            return f"Fault: {fault}"
        lines = lines or test_host_grid.faults(CASE, torch.bfloat16, found)
    return "\n".join(lines)


def small_outcomes() -> str:
    """What is wrong with CTAs that have most of their weights in shared memory."""
    lines = []
    for cell in ("lstm", "gru", "rnn_tanh"):
        for hidden, sms, batch in ((72, 5, 9), (72, 9, 3), (100, 13, 17), (33, 8, 2)):
            for dtype in ("bf16", "tf32"):
                case = Case(f"grid_small_{cell}_{hidden}_{sms}", cell, T=7, B=batch, I=3, H=hidden)
                found = test_host_grid.evaluate(host.load("grid"), case, test_host_grid.DTYPES[dtype], sms)
                lines += test_host_grid.faults(case, test_host_grid.DTYPES[dtype], found)
    return "\n".join(lines)


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
        text = "".join(kept).replace("switch (cell) {", "switch (cell) {\n    default: break;")
        assert text.count(TWO_ROWS) == 1
        entry.write_text(text.replace(TWO_ROWS, "                   : nullptr;\n"))  # CASE has one row a thread
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


def test_nothing_is_wrong_as_it_is(tmp_path):
    assert outcome() == ""
    assert run_changed(tmp_path, [RING], "outcome", only="Lstm") == ""


@pytest.mark.parametrize("name", FAULTS)
def test_a_missing_order_or_word_is_a_fault(name, tmp_path):
    found = run_changed(tmp_path, [RING, FAULTS[name]], "outcome", only="Lstm")
    assert found.startswith("Fault: "), found


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_index_is_a_wrong_result(name, tmp_path):
    found = run_changed(tmp_path, [WRONG[name]], "outcome", only="Lstm")
    assert "is off by" in found or "NaN" in found, found


def test_weights_in_shared_memory(tmp_path):
    assert run_changed(tmp_path, SMALL, "small_outcomes") == ""
