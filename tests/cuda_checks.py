"""What the tests on a GPU share: tensors moved there, and the oracle with torch's own layer on the GPU as its native.

The truth is the CPU's float64 reference; the native error is that of torch.nn on the GPU, cuDNN's, in the same dtype
and with the same permission to use TF32. Importing this skips a test file where there is no GPU.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from cases import Case, Inputs, make_cotangents, make_inputs
from oracle import distance, evaluate, fault, native, torch_layer, truth_beside
from tf32 import native as tf32_native
from torch import Tensor

from seqkern import ops

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
if not ops.BUILT_WITH_CUDA:
    pytest.skip("built without CUDA: SEQKERN_CUDA=1 builds it", allow_module_level=True)

ENGINE = "SEQKERN_CUDA_ENGINE"


def to(device: str, t):
    """Tensors, and what tuples and lists hold of them, on a device; strides stay, those of 0 too."""
    if isinstance(t, (list, tuple)):
        return [to(device, part) for part in t]
    if not isinstance(t, Tensor):
        return t
    once = t[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in t.stride())]
    moved = torch.empty_strided(once.size(), once.stride(), dtype=t.dtype, device=device)
    return moved.copy_(once).expand(t.shape)


def inputs_on(case: Case, dtype: torch.dtype, device: str = "cuda") -> Inputs:
    x, h0, c0, weights, batch_sizes = make_inputs(case, dtype)
    return Inputs(*to(device, [x, h0, c0, weights]), batch_sizes)


def cotangents_on(case: Case, dtype: torch.dtype, device: str = "cuda") -> list[Tensor]:
    return to(device, make_cotangents(case, dtype))


def engine(x, h0, c0, weights, batch_sizes, cell, bidirectional) -> Sequence[Tensor]:
    """The operator under test as the layers call it."""
    return ops.rnn_layer(x, h0, c0, weights, batch_sizes, cell, bidirectional, True, ops.tf32_allowed(x))[:3]


def run(case: Case, dtype: torch.dtype, device: str = "cuda") -> dict[str, Tensor]:
    return evaluate(engine, case, inputs_on(case, dtype, device), cotangents_on(case, dtype, device))


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextmanager
def forced(engine: str | None) -> Iterator[None]:
    """Only this engine inside; None: the planner's choice."""
    before = os.environ.pop(ENGINE, None)
    if engine:
        os.environ[ENGINE] = engine
    try:
        yield
    finally:
        os.environ.pop(ENGINE, None)
        if before is not None:
            os.environ[ENGINE] = before


def plain(t):
    """Dense copies, of tensors and of what tuples and lists hold of them: cuDNN takes states no other way."""
    if isinstance(t, (list, tuple)):
        return [plain(part) for part in t]
    return t.contiguous() if isinstance(t, Tensor) else t


def on_cpu(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.cpu() for name, t in found.items()}


def check(case: Case, dtype: torch.dtype, found: dict[str, Tensor]) -> None:
    """Raises AssertionError, naming tensors and figures, unless everything in `found` is within the oracle's bound."""
    found = on_cpu(found)
    want = truth_beside(case, dtype, found)
    figures = dict.fromkeys(want, 0.0)
    if dtype == torch.float64:
        figures = native(case, dtype)
    elif case.N:
        dense = Inputs(*plain(inputs_on(case, dtype)))
        theirs = on_cpu(evaluate(torch_layer, case, dense, plain(cotangents_on(case, dtype))))
        figures = {name: distance(theirs[name], t) for name, t in truth_beside(case, dtype, theirs).items()}
        if dtype == torch.float32 and torch.backends.cudnn.allow_tf32:  # small layers of cuDNN's do without TF32
            figures = {name: max(figures[name], figure) for name, figure in tf32_native(case).items()}
    wrong = []
    for name, got in found.items():
        line = f"must be {dtype}, got {got.dtype}" if got.dtype != dtype else fault(got, want[name], figures[name])
        if line:
            wrong.append(f"{case.name} {dtype}: {name} {line}")
    assert not wrong, "\n".join(wrong)
