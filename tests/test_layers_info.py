"""explain(), `python -m seqkern info`, and what importing the package does."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import seqkern


def test_explain():
    layer = seqkern.LSTM(3, 4, bidirectional=True)
    plan = seqkern.explain(layer, batch=2, time=7)
    assert plan.engine == f"cpu-{torch.ops.seqkern._cpu_isa()}"
    assert plan.threads >= 1
    for part in ("LSTM", "float32", "T=7", "B=2", plan.engine, plan.why):
        assert part in str(plan)
    elsewhere = seqkern.explain(layer, 2, 7, device="cuda")
    assert (elsewhere.engine, "device cuda" in str(elsewhere)) == ("reference", True)
    exotic = seqkern.explain(layer.to(torch.complex64), 2, 7)
    assert (exotic.engine, "dtype complex64" in str(exotic)) == ("reference", True)
    assert "T=1 " in str(seqkern.explain(seqkern.GRUCell(3, 4), 2, 7))
    torch.set_num_threads(2)
    assert seqkern.explain(seqkern.GRU(64, 256), 64, 100).threads == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert "bfloat16" in str(seqkern.explain(seqkern.GRU(3, 4), 2, 7))
    with pytest.raises(TypeError, match="got LSTM; seqkern.accelerate"):
        seqkern.explain(nn.LSTM(3, 4), 2, 7)
    with pytest.raises(ValueError, match="time=0"):
        seqkern.explain(seqkern.GRU(3, 4), 2, 0)


def test_what_explain_says_is_what_runs():
    """A dtype without a kernel runs, on the reference, and differentiates."""
    layer = seqkern.RNN(3, 4, dtype=torch.complex64)
    y, _ = layer(torch.randn(5, 2, 3, dtype=torch.complex64))
    y.abs().sum().backward()
    assert y.dtype == layer.weight_ih_l0.grad.dtype == torch.complex64


def test_info_command():
    run = subprocess.run([sys.executable, "-m", "seqkern", "info"], capture_output=True, text=True, check=True)
    for part in (torch.ops.seqkern._cpu_isa(), torch.__version__, "threads", "cuda archs", seqkern.__version__):
        assert part in run.stdout


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_import_is_light():
    run = python(
        "import sys, seqkern; print([m for m in sys.modules if m.startswith(('torch._dynamo', 'torch._inductor'))])"
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


def test_a_missing_extension_is_named_in_one_sentence():
    run = python("import sys; sys.modules['seqkern._C'] = None; import seqkern")
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: seqkern's compiled extension seqkern._C did not load")
    assert "pip install --no-build-isolation ." in last
