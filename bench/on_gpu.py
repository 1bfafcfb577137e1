"""All that needs a GPU, in one go: build for it, tests, the comparison with cuDNN, primitives, compute-sanitizer.

    python bench/on_gpu.py                        under ten minutes
    python bench/on_gpu.py --only grid --quick    a short call for one engine

Uses the interpreter that runs it, with its torch (a CUDA build), pytest and ninja, and a CUDA toolkit; no network, no
environment of its own. The tests' float64 truths are computed on the CPU: with pytest-xdist there too they take half a
minute. Builds in place. Writes bench/results/GPU.jsonl and its page, and bench/out/on_gpu.md: each stage, what came of
it and how long it took. Goes on after a stage that fails, and then ends with status 1.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 570.0  # seconds, all stages
PYTHON = sys.executable


class Stage(NamedTuple):
    name: str
    result: str
    seconds: float


def refuse(why: str) -> None:
    sys.exit(f"make gpu: {why}. Nothing was built or measured.")


def check_machine() -> str:
    """The GPU's compute capability, as in "9.0"."""
    if torch.version.cuda is None:
        refuse(f"torch {torch.__version__} is a CPU build; a CUDA build is needed")
    if not torch.cuda.is_available():
        refuse(f"no GPU: torch {torch.__version__} for CUDA {torch.version.cuda} finds none on this machine")
    return "{}.{}".format(*torch.cuda.get_device_capability())


def sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    places = (Path(home, "bin", "compute-sanitizer"), Path(home, "compute-sanitizer", "compute-sanitizer"))
    return shutil.which("compute-sanitizer") or next((str(p) for p in places if p.exists()), None)


class Session:
    def __init__(self, capability: str) -> None:
        self.begun = time.monotonic()
        self.stages: list[Stage] = []
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        self.environment = os.environ | {
            "SEQKERN_CUDA": "1",
            "TORCH_CUDA_ARCH_LIST": capability,
            "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        }

    def left(self) -> float:
        return BUDGET - (time.monotonic() - self.begun)

    def run(self, name: str, command: list[str], most: float) -> bool:
        """One stage, for at most `most` seconds and what is left of the budget."""
        allowed = min(most, self.left())
        if allowed < 5:
            self.stages.append(Stage(name, "left out: no time", 0.0))
            return False
        print(f"== {name}: {' '.join(command)}", flush=True)
        begun = time.monotonic()
        try:
            status = subprocess.run(command, cwd=ROOT, env=self.environment, timeout=allowed, check=False).returncode
            result = "ok" if status == 0 else f"failed, status {status}"
        except subprocess.TimeoutExpired:
            result = f"stopped after {allowed:.0f} s"
        self.stages.append(Stage(name, result, time.monotonic() - begun))
        return result == "ok"

    def skip(self, name: str, why: str) -> None:
        self.stages.append(Stage(name, f"left out: {why}", 0.0))

    def summary(self) -> str:
        rows = [f"| {s.name} | {s.result} | {s.seconds:.0f} |" for s in self.stages]
        head = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
        return "\n".join([head, "", "| stage | result | seconds |", "| --- | --- | ---: |", *rows]) + "\n"

    def failed(self) -> bool:
        return any(s.result != "ok" and not s.result.startswith("left out") for s in self.stages)


def session(only: str | None, quick: bool) -> Session:
    s = Session(check_machine())
    if not s.run("build", [PYTHON, "setup.py", "build_ext", "--inplace"], 300):
        return s
    chosen = ["-k", f"{only} or not (step or grid)"] if only else []
    tests = [PYTHON, "-m", "pytest", "-q", "-x" if quick else "--maxfail=20", *chosen]
    files = [f"tests/test_cuda_{name}.py" for name in ("engine", "torch", "options", "scan")]
    workers = ["-n", str(min(12, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    s.run("tests", [*tests, *workers, *files, "tests/test_search_graphs.py"], 240)

    limit = max(10, min(200, s.left() - 150))
    command = [PYTHON, "bench/run.py", "--device", "cuda", "--json", "bench/results", "--report"]
    command += ["--quick"] if quick else ["--limit", f"{limit:.0f}"]
    s.run("comparison with cuDNN", command + (["--engine", only] if only else []), limit + 60)

    tool = sanitizer()
    if quick or only:
        s.skip("primitives", "a quick run" if quick else f"only the {only} engine")
    else:
        s.run("primitives", [PYTHON, "bench/primitives.py"], 60)
    if quick or tool is None:
        s.skip("compute-sanitizer", "a quick run" if quick else "it was not found")
        return s
    for check in ("memcheck", "racecheck"):
        watched = [*tests, "-p", "no:faulthandler", "tests/test_cuda_sanitizer.py"]
        s.run(check, [tool, "--tool", check, "--error-exitcode", "9", *watched], 80)
    return s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["step", "grid"], help="one engine's tests and measurements")
    parser.add_argument("--quick", action="store_true", help="tests up to the first failure, the short comparison")
    arguments = parser.parse_args()
    done = session(arguments.only, arguments.quick)
    out = ROOT / "bench" / "out" / "on_gpu.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(done.summary())
    print(done.summary())
    sys.exit(1 if done.failed() else 0)


if __name__ == "__main__":
    main()
