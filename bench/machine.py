"""What a measurement was taken on: hardware, versions, sources, load."""

import json
import os
import platform
import time
from pathlib import Path

import torch

import seqkern  # noqa: F401  registers torch.ops.seqkern
from bench.sources import commit, csrc_hash


def built_hash() -> str:
    """The hash of the sources that the extension in use was built from; of csrc/ where it is not built."""
    if not hasattr(torch.ops.seqkern, "_build_info"):
        return csrc_hash()
    return json.loads(torch.ops.seqkern._build_info())["csrc"]


def cuda_archs() -> str:
    """What the extension's CUDA kernels were compiled for; "" where there are none."""
    if not hasattr(torch.ops.seqkern, "_build_info"):
        return ""
    return json.loads(torch.ops.seqkern._build_info()).get("cuda_archs", "")


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def isa() -> str:
    """The instruction set of the kernels in use; "reference" where the extension is not built."""
    return torch.ops.seqkern._cpu_isa() if hasattr(torch.ops.seqkern, "_cpu_isa") else "reference"


def stale_extension() -> str | None:
    """A sentence if the extension was not built from what is in csrc/ now, else None."""
    if built_hash() == csrc_hash():
        return None
    return (
        f"the extension was built from csrc/ {built_hash()}, which is now {csrc_hash()}: rebuild to measure the latter"
    )


def describe(device: str) -> dict[str, str | int]:
    """What stays the same through a run."""
    return {
        "device": device,
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "isa": isa(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "csrc": built_hash(),
        "commit": commit(),
    }


def load() -> float:
    """Processes that wanted to run, averaged over the last minute."""
    return round(os.getloadavg()[0], 2)


class Others:
    """How much of this machine other processes use, in cores, since it was made. None where that cannot be told.

    A second busy process slows a barrier between threads far more than it slows arithmetic, so a result taken beside
    one says little about a quiet machine.
    """

    def __init__(self):
        self.start = self._now()

    def cores(self) -> float | None:
        end = self._now()
        if self.start is None or end is None or end[0] <= self.start[0]:
            return None
        wall, busy, own = (after - before for after, before in zip(end, self.start, strict=True))
        return round(max(0.0, busy - own) / wall, 2)

    def _now(self) -> tuple[float, float, float] | None:
        """Seconds: of the clock, of all processes on this process's cores, of this process."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        rows = [line.split() for line in stat.read_text().splitlines()]
        ticks = [[int(n) for n in row[1:8]] for row in rows if row and row[0] in mine]
        if len(ticks) != len(mine):
            return None
        busy = sum(sum(row) - row[3] - row[4] for row in ticks) / os.sysconf("SC_CLK_TCK")  # less idle and iowait
        own = os.times()
        return time.perf_counter(), busy, own.user + own.system


def peak(dtype: torch.dtype, samples: int = 5) -> tuple[float, str]:
    """The fastest arithmetic seen on this machine in GF/s, and how it was measured.

    With the extension this is a loop of independent multiply-adds in registers, the ceiling of any kernel. Without,
    it is the best of a few large matrix products of torch, which stay below that ceiling.
    """
    if hasattr(torch.ops.seqkern, "_cpu_peak"):
        return float(torch.ops.seqkern._cpu_peak(str(dtype).removeprefix("torch."), torch.get_num_threads())), "fma"
    n = 2048
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    best = float("inf")
    for _ in range(samples + 1):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best / 1e9, f"torch.mm {n}"
