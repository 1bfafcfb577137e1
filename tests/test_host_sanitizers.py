"""Host execution of the CUDA kernels under AddressSanitizer and UndefinedBehaviorSanitizer, each in its own process.

They see what the checks of csrc/testing do not: memory beside the buffers of a launch, the stack, undefined arithmetic.
"""

import subprocess
import sys

import host
import pytest

pytestmark = pytest.mark.skipif(host.SANITIZE, reason="this is the process of its own")

# What runs: a file of tests, and which of them.
RUNS = {
    "primitives": ("test_host_simt.py", "primitive or hundreds"),
    "grid": ("test_host_grid.py", "(packed_reverse or directions_in_turn) and (lstm or gru) and bf16"),
    "step": (
        "test_host_step.py",
        "(packed_bidirectional or proj_bidirectional or h_tail) and (lstm or gru) and not torch.float16",
    ),
    "options": ("test_host_step_options.py", "test_options and zone and clip_norm and (proj or gru)"),
}
PROBE = """
import sys; sys.path.insert(0, "tests")
import test_host_simt as t
t.run(t.host.load("simt"), *{arguments})
"""


def sanitized(*command: str) -> tuple[int, str]:
    run = subprocess.run(
        [sys.executable, *command], env=host.sanitizer_environment(), cwd=host.ROOT, capture_output=True, text=True
    )
    return run.returncode, run.stdout + run.stderr


@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_reported(name):
    file, which = RUNS[name]
    code, output = sanitized("-m", "pytest", f"tests/{file}", "-k", which, "-q", "-x", "-p", "no:cacheprovider")
    assert code == 0, output  # pytest's 5: no test was chosen


@pytest.mark.parametrize(
    "kernel, broken, report",
    [
        ("reverse", "out_of_range", "AddressSanitizer: use-after-poison"),
        ("reverse_static", "out_of_range", "AddressSanitizer: use-after-poison"),
        ("reverse", "misaligned", "runtime error: load of misaligned address"),
    ],
)
def test_a_broken_kernel_is_reported(kernel, broken, report):
    code, output = sanitized("-c", PROBE.format(arguments=(kernel, 0, broken)))
    assert code != 0 and report in output, output
