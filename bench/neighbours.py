"""How much slower a call gets where another busy process runs on every core: seqkern's layers and torch.nn's.

    python bench/neighbours.py
    python bench/neighbours.py --json bench/results/neighbours.jsonl

Threads that meet at every time step wait for one another; with a second process on the cores the one waited for
may not be running. A fair scheduler gives each process half of the time, so that 2 is what arithmetic alone would cost.
Each case is timed alone, then beside one endless loop on each core, then alone again; a line holds the median call and
p90 of each, and the ratio of the medians for both sides.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, in place of this folder

import torch  # noqa: E402

import seqkern  # noqa: E402
from bench import machine, timing  # noqa: E402

# cell, train, T, B, H = I
CASES = [
    ("LSTM", False, 64, 32, 256),
    ("LSTM", False, 128, 4, 128),
    ("LSTM", False, 32, 1, 1024),
    ("LSTM", True, 64, 32, 256),
    ("GRU", True, 128, 8, 128),
    ("RNN", False, 512, 8, 64),
]
SPIN = "import os\nos.sched_setaffinity(0, [{core}])\nwhile True: pass"


@contextmanager
def busy_cores() -> Iterator[None]:
    """An endless loop on each core that this process may use."""
    started = [subprocess.Popen([sys.executable, "-c", SPIN.format(core=c)]) for c in sorted(os.sched_getaffinity(0))]
    try:
        time.sleep(1.0)
        yield
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()


def calls(run: Callable[[], object], seconds: float) -> list[float]:
    """Durations of single calls in so many seconds, at least 5, after a few that are not counted."""
    for _ in range(3):
        run()
    found, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(found) < 5:
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return found


def sides(cell: str, train: bool, T: int, B: int, H: int) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    peer, ours = getattr(torch.nn, cell)(H, H), getattr(seqkern, cell)(H, H)
    ours.load_state_dict(peer.state_dict())
    x, dy = torch.randn(T, B, H), torch.randn(T, B, H)

    def runner(layer: torch.nn.Module) -> Callable[[], object]:
        def run() -> object:
            if train:
                return torch.autograd.grad(layer(x)[0], list(layer.parameters()), dy)
            with torch.no_grad():
                return layer(x)

        return run

    return {"seqkern": runner(ours), "torch": runner(peer)}


def measure(case: tuple[str, bool, int, int, int], seconds: float) -> dict[str, object]:
    cell, train, T, B, H = case
    line: dict[str, object] = {"case": f"{cell.lower()}-{'train' if train else 'infer'}-fp32-B{B}-T{T}-H{H}"}
    both = sides(*case)
    alone = {name: calls(run, seconds) for name, run in both.items()}
    with busy_cores():
        beside = {name: calls(run, 2 * seconds) for name, run in both.items()}
    for name, run in both.items():
        alone[name] += calls(run, seconds)
        quiet, loaded = statistics.median(alone[name]), statistics.median(beside[name])
        line |= {f"{name}_ms": 1e3 * quiet, f"{name}_beside_ms": 1e3 * loaded}
        line |= {f"{name}_beside_p90": 1e3 * timing.percentile(beside[name], 90), f"{name}_slower": loaded / quiet}
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=0, help="default: torch's")
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring, each time; default: 1")
    parser.add_argument("--json", type=Path, help="file to which a line for each case is appended")
    a = parser.parse_args(argv)
    if a.threads:
        torch.set_num_threads(a.threads)
    for case in CASES:
        line = measure(case, a.seconds)
        times = "; ".join(
            f"{n}: {line[f'{n}_ms']:.2f} ms alone, {line[f'{n}_beside_ms']:.2f} beside, {line[f'{n}_slower']:.2f} times"
            for n in ("seqkern", "torch")
        )
        print(f"{line['case']:28} {times}", flush=True)
        if a.json:
            with a.json.open("a") as file:
                file.write(json.dumps(line | {"load": machine.load()} | machine.describe("cpu")) + "\n")


if __name__ == "__main__":
    main()
