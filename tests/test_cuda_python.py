"""The Python side of the CUDA engines, as far as it goes without a GPU: plans in words, TF32's permission, builds."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CASES, make_cotangents, make_inputs
from torch.utils._python_dispatch import TorchDispatchMode

import seqkern
from seqkern import functional, info, ops

ROOT = Path(__file__).resolve().parent.parent
GRID = {"engine": "grid", "why": "grid: weights stay on chip", "directions": 2, "tiles": 3, "batch_tile": 16, "ctas": 8}
GRID |= {"units_per_cta": 16, "threads": 256, "shared_bytes": 65536, "workspace_bytes": 1024}
STEP = dict.fromkeys(GRID, 0) | {"engine": "step", "why": "step: too large"}


def test_explain_tells_both_passes(monkeypatch):
    """What _cuda_plan says of the forward and of the backward pass, in words; asked with the layer's own shape."""
    asked = []

    def plan(*arguments):
        asked.append(arguments)
        return json.dumps(STEP if arguments[5] else GRID)

    monkeypatch.setattr(torch.ops.seqkern, "_cuda_plan", plan, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(functional, "KERNEL_DEVICES", frozenset({"cpu", "cuda"}))
    layer = seqkern.LSTM(5, 128, proj_size=32, bidirectional=True, dtype=torch.bfloat16)
    plan = seqkern.explain(layer, batch=40, time=9, device="cuda:1")
    sizes = [9, 40, 128, 32]
    assert asked == [(sizes, "lstm", "bfloat16", True, True, backward, 1, False, False) for backward in (False, True)]
    assert plan.engine == "cuda-grid"
    assert "fused kernels for lstm in bfloat16 on GPU 1" in str(plan)
    assert "forward: grid: weights stay on chip; 48 blocks of 256 threads" in str(plan)
    assert "64 KiB" in str(plan) and "backward: step: too large" in str(plan)
    asked.clear()
    for clip in (0.5, ("norm", 0.5)):
        seqkern.explain(seqkern.GRU(5, 128, grad_clip=clip), batch=40, time=9, device="cuda:0")
    # whether there are options for the kernels, and norms among them
    assert [arguments[-2:] for arguments in asked] == [(False, False), (True, False), (False, False), (True, True)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_explain_without_a_gpu_says_what_is_missing():
    plan = seqkern.explain(seqkern.GRU(3, 4), 2, 7, device="cuda")
    assert plan.engine == "reference"
    assert ("torch finds no GPU" if ops.BUILT_WITH_CUDA else "SEQKERN_CUDA=1 builds it") in plan.why


def test_build_and_operators_agree():
    assert bool(info.build()["cuda_archs"]) == ops.BUILT_WITH_CUDA == ("cuda" in functional.KERNEL_DEVICES)


@pytest.mark.parametrize("tf32", [False, True])
def test_permission_for_tf32_reaches_backward(tf32):
    class Calls(TorchDispatchMode):
        seen: dict = {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "rnn_layer" in str(func):
                self.seen[str(func)] = len(args) > len(func._schema.arguments) - 1 and args[-1]
            return func(*args, **(kwargs or {}))

    case = CASES["h_tail-gru"]
    x, h0, c0, weights, _ = make_inputs(case, torch.float32)
    x.requires_grad_()
    with Calls() as calls:
        y = ops.rnn_layer(x, h0, c0, weights, None, "gru", False, True, tf32)[0]
        torch.autograd.grad(y, x, make_cotangents(case, torch.float32)[0])
    assert calls.seen == dict.fromkeys(("seqkern.rnn_layer.default", "seqkern.rnn_layer_backward.default"), tf32)


def test_tf32_is_for_float32_on_a_gpu_alone():
    assert not ops.tf32_allowed(torch.zeros(1))
    with torch.device("meta"):
        assert not ops.tf32_allowed(torch.zeros(1))


def test_make_gpu_without_a_gpu_says_so():
    """And builds nothing."""
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "bench/on_gpu.py", "--only", "grid", "--quick"]
    run = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "make gpu: " in run.stderr and "Nothing was built or measured." in run.stderr
    assert run.stdout == ""


@pytest.mark.parametrize("archs, message", [("9.0;pascal", "got 'pascal'"), ("8.0+SASS", "got '8.0\\+SASS'")])
def test_setup_refuses_an_architecture_that_is_none(archs, message):
    """The flags for nvcc, from setup.py itself."""
    code = "import runpy, setuptools; setuptools.setup = lambda **k: None; s = runpy.run_path('setup.py'); "
    code += "print(*s['arch_flags'](s['cuda_archs']()))"

    def flags(value: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"TORCH_CUDA_ARCH_LIST": value, "SEQKERN_CUDA": "0"}
        return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)

    wrong = flags(archs)
    assert wrong.returncode == 1 and re.search(message, wrong.stderr)
    right = flags("8.0 9.0a;12.0+PTX").stdout.split()
    assert right == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
