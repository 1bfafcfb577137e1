"""Every instruction set this CPU has, forced in turn.

The choice is made once per process, so the engine's tests run again in a process of their own for each.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import seqkern.ops  # noqa: F401  (loads the operators)

HERE = Path(__file__).parent
FILES = ["test_engine.py", "test_engine_grads.py", "test_engine_numerics.py", "test_math.py", "test_kept_weights.py"]
FILES += ["test_option_recurrence.py", "test_attention_decoder.py", "test_search_compiled.py"]
ISAS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")


def available() -> list[str]:
    """What the build has a kernel for and this CPU can run."""
    return re.findall(r"\w+", torch.ops.seqkern._cpu_isas())


@pytest.mark.skipif("SEQKERN_CPU_ISA" in os.environ, reason="this run has an ISA forced already")
@pytest.mark.parametrize("isa", ISAS)
def test_isa(isa):
    if isa not in available():
        pytest.skip(f"this CPU has no {isa}")
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *FILES]
    environment = os.environ | {"SEQKERN_CPU_ISA": isa, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, f"SEQKERN_CPU_ISA={isa}:\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("isa, reason", [("sse9", "sse9"), ("", None)])
def test_unknown_isa(isa, reason):
    """An ISA that does not exist is an error that names it, an empty variable is none."""
    program = "import torch, seqkern.ops; print(torch.ops.seqkern._cpu_isa())"
    environment = os.environ | {"SEQKERN_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    if reason is None:
        assert done.stdout.strip() in available(), done.stderr
    else:
        assert done.returncode != 0 and reason in done.stderr
