"""The side of a measurement that belongs to the GPU: what it is, timing by events, replay of a graph, the engine."""

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

import seqkern
from bench.cases import Case
from bench.cudnn import Gpu

ENGINE = "SEQKERN_CUDA_ENGINE"  # forces an engine of seqkern: step | grid
ENGINES = ("step", "grid")
TF32_EPS = 2.0**-10
Run = Callable[[], object]


def gpu() -> Gpu:
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Gpu(found.major, found.minor, found.multi_processor_count, torch.backends.cudnn.version() or 0)


# What nvidia-smi is asked for, and the name of the answer in a line.
QUERIES = {
    "driver_version": "driver",
    "clocks.sm": "clock_sm",
    "clocks.mem": "clock_mem",
    "clocks.max.sm": "clock_sm_max",
    "power.limit": "power_limit",
    "temperature.gpu": "temperature",
}


def parse_smi(row: str) -> dict[str, str | float]:
    """One line of `nvidia-smi --query-gpu=... --format=csv,noheader,nounits`; what it does not know is left out."""
    found: dict[str, str | float] = {}
    for name, value in zip(QUERIES.values(), (part.strip() for part in row.split(",")), strict=False):
        if name == "driver" and value[:1].isdigit():
            found[name] = value
        elif re.fullmatch(r"\d+(\.\d+)?", value):
            found[name] = float(value)
    return found


def smi() -> dict[str, str | float]:
    """Driver and clocks (MHz), from nvidia-smi; empty where it is not there or does not answer."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERIES)}", "--format=csv,noheader,nounits"]
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    for which in ([["-i", f"GPU-{uuid}"]] if uuid is not None else []) + [[]]:
        try:
            answer = subprocess.run([*command, *which], capture_output=True, text=True, check=False, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return {}
        if answer.returncode == 0 and answer.stdout.strip():
            return parse_smi(answer.stdout.splitlines()[0])
    return {}


def burst(seconds: float = 1.0) -> dict[str, str | float]:
    """Driver, and clocks as they are under load: nvidia-smi answers while large products run. Warms the GPU too."""
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
    torch.mm(a, a)
    torch.cuda.synchronize()
    once = events(lambda: torch.mm(a, a), 3)
    for _ in range(min(20000, int(seconds / once) + 1)):
        torch.mm(a, a)
    found = smi()
    torch.cuda.synchronize()
    return found


def tf32() -> dict[str, bool | str]:
    """Whether fp32 may use TF32: in cuDNN's recurrent layers, and in matrix products."""
    found: dict[str, bool | str] = {}
    for name, read in (
        ("tf32_rnn", lambda: torch.backends.cudnn.rnn.fp32_precision == "tf32"),
        ("tf32_matmul", lambda: bool(torch.backends.cuda.matmul.allow_tf32)),
    ):
        try:
            found[name] = read()
        except (RuntimeError, AttributeError) as mixed:  # set through the newer fp32_precision alone
            found[name] = str(mixed).splitlines()[0][:80]
    return found


def describe() -> dict[str, object]:
    """What stays the same through a run."""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": found.name,
        "sms": found.multi_processor_count,
        "capability": f"{found.major}.{found.minor}",
        "cuda": torch.version.cuda or "?",
        "cudnn": torch.backends.cudnn.version() or 0,
        **tf32(),
        **burst(),
    }


def events(run: Run, calls: int) -> float:
    """Seconds per call between two events on the current stream, with nothing in flight before."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return max(start.elapsed_time(end), 1e-6) * 1e-3 / calls


def graphed(run: Run) -> Run:
    """A replay of the run's work as one CUDA graph.

    Raises:
        RuntimeError: the run cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def error_eps(case: Case) -> float | None:
    """The eps of the arithmetic where it is coarser than the dtype's: TF32."""
    return TF32_EPS if case.dtype == "fp32" and tf32()["tf32_rnn"] is True else None


@contextmanager
def forced(engine: str) -> Iterator[None]:
    """seqkern takes this engine inside; "" leaves the choice as it was."""
    before = os.environ.get(ENGINE)
    if engine:
        os.environ[ENGINE] = engine
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(ENGINE, None)
        else:
            os.environ[ENGINE] = before


def short_engine(name: str) -> str:
    """grid | step | cluster | reference, from a plan's engine such as "cuda-grid"; anything else as it is."""
    return next((known for known in ("cluster", "grid", "step", "reference") if known in name), name)


def engines(layer: nn.Module, case: Case) -> dict[str, str]:
    """The engines that seqkern says it runs: "engine" forward and, where its plan tells, "engine_backward"."""
    try:
        plan = seqkern.explain(layer, case.batch, case.time)
    except Exception as failed:  # noqa: BLE001  a measurement does not depend on the explanation
        return {"engine": "unknown", "engine_why": f"{type(failed).__name__}: {failed}"[:120]}
    told = getattr(plan, "split", "") or str(plan.why)  # on CUDA, a line for each pass: "backward: step: ..."
    found = {"engine": short_engine(plan.engine), "engine_why": "; ".join(told.splitlines())[:400]}
    backward = re.search(r"^backward: (\w+)", told, re.MULTILINE)
    if case.passes == "train" and backward:
        found["engine_backward"] = short_engine(backward[1])
    return found
