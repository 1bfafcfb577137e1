"""Builds primitives.cu for the GPU of this machine, runs it, and writes its figures as a table.

    python bench/primitives.py                     # bench/results/GPU-primitives.json and .md
    python bench/primitives.py --build-only --arch 9.0

Needs nvcc (CUDA_HOME, else on the PATH) and neither torch nor the package.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, in place of this folder

from bench.sources import ROOT, commit, slug  # noqa: E402

Figure = dict[str, object]
SOURCE = ROOT / "bench" / "primitives.cu"

# What each figure is, in the order of the page.
MEANING = {
    "cluster_barrier": "barrier of one cluster; ordered: with a fence, so that global memory is ordered too",
    "dsmem_handoff": "16 bytes into another CTA's shared memory by st.async, seen there on its mbarrier, one way",
    "dsmem_exchange": "each CTA of a cluster sends `bytes` to every other and waits for theirs, with one __syncthreads",
    "resident_clusters": "clusters that run at the same time, each CTA holding `shared_kib` of shared memory",
    "l2_handoff": "a flag through L2 from one SM to another, one way",
    "grid_sync": "cooperative_groups' barrier of the grid",
    "counter_barrier": "barrier of the grid by one counter in L2",
    "flag_barrier": "barrier of the grid by one flag a CTA in L2, then every CTA reads the same `bytes` from L2",
    "mma_sync_latency": "one m16n8k16 on the result of the one before",
    "mma_sync": "mma.sync m16n8k16 bf16, 64 rows a warp, N columns, A in registers, all SMs",
    "wgmma_registers": "wgmma m64nNk16 bf16, A in registers, K = 256 and a wait each round, all SMs",
    "shared_read": "16-byte reads of shared memory without bank conflicts",
    "l2_read": "16-byte reads past L1 on all SMs; own: each CTA its own part, else all the same",
}
SIZES = ("ctas", "bytes", "shared_kib", "ordered", "n", "warps", "warpgroups", "threads", "kib", "own")
UNITS = {
    "ns": "ns",
    "cycles": "cycles",
    "clusters": "clusters",
    "macs_per_clock_sm": "MAC/clock/SM",
    "cycles_per_k16": "cycles per K=16",
    "tflops": "TFLOP/s",
    "bytes_per_clock_sm": "B/clock/SM",
    "gb_per_s": "GB/s",
}


def architecture(capability: str) -> str:
    """nvcc's target for a compute capability such as "9.0": the one with wgmma where there is one.

    Raises:
        ValueError: it is not a compute capability from 8.0 on.
    """
    major, dot, minor = capability.strip().partition(".")
    if not (dot and major.isdigit() and minor.isdigit() and int(major) >= 8):
        raise ValueError(f"wanted a compute capability from 8.0 on, such as 9.0, got {capability!r}")
    number = f"{major}{minor}{'a' if (major, minor) == ('9', '0') else ''}"
    return f"arch=compute_{number},code=sm_{number}"


def capability() -> str | None:
    """That of the first GPU, from nvidia-smi; None where it does not answer."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    first = answer.stdout.strip().splitlines()[:1]
    return first[0] if answer.returncode == 0 and first else None


def nvcc() -> str | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    usual = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(usual) if usual.exists() else None)


def build(arch: str, program: Path) -> str | None:
    """Compiles primitives.cu; returns what nvcc said where it failed, else None."""
    compiler = nvcc()
    if compiler is None:
        return "nvcc was not found: set CUDA_HOME"
    program.parent.mkdir(parents=True, exist_ok=True)
    command = [compiler, "-O3", "-std=c++17", "-gencode", arch, str(SOURCE), "-o", str(program)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{' '.join(command)}\n{found.stderr}" if found.returncode else None


def execute(program: Path, timeout: float) -> tuple[int, str, str]:
    """Exit status, figures and what went wrong; figures up to a failure or the timeout count."""
    with subprocess.Popen([str(program)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            text, errors = running.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            running.kill()
            text, _ = running.communicate()
            whole = text[: text.rfind("\n") + 1]  # the last line may have been cut off
            return 1, whole, f"not done after {timeout:g} s"
    return running.returncode, text, f"exit status {running.returncode}: {errors.strip()}"


def parse(text: str) -> list[Figure]:
    """The program's lines.

    Raises:
        ValueError: a line is not JSON with a name, or the first is not the device.
    """
    figures = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            figure = json.loads(line)
        except json.JSONDecodeError as broken:
            raise ValueError(f"line {number} is not JSON: {line!r}") from broken
        if not isinstance(figure, dict) or "name" not in figure:
            raise ValueError(f"line {number} has no name: {line!r}")
        figures.append(figure)
    if not figures or figures[0]["name"] != "device":
        raise ValueError("the first line must be the device")
    return figures


def page(figures: list[Figure], when: str) -> str:
    """The table, as markdown."""
    device = figures[0]
    shown = {key: value for key, value in device.items() if key not in ("name", "gpu")}
    parts = [
        f"# Primitives on {device['gpu']}",
        "Written by bench/primitives.py from bench/primitives.cu. Times are slopes between two loop lengths, medians "
        f"of five. {when}; " + ", ".join(f"{key} {value}" for key, value in shown.items()) + ".",
    ]
    named = dict.fromkeys(str(figure["name"]) for figure in figures[1:])
    for name in sorted(named, key=lambda name: list(MEANING).index(name) if name in MEANING else len(MEANING)):
        mine = [figure for figure in figures[1:] if figure["name"] == name]
        sizes = [key for key in SIZES if any(key in figure for figure in mine)]
        units = [key for key in UNITS if any(key in figure for figure in mine)]
        rows = []
        for figure in mine:
            row = [f"{figure[key]:g}" if key in figure else "" for key in sizes]
            row += [f"{figure[key]:.4g}" if key in figure else "" for key in units]
            rows.append([*row, str(figure.get("skipped", ""))])
        head = [*sizes, *(UNITS[key] for key in units), "not measured"]
        if not any(row[-1] for row in rows):
            head, rows = head[:-1], [row[:-1] for row in rows]
        table = "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---:"] * len(head), *rows])
        parts.append(f"## {name}\n{MEANING.get(name, '')}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def write(figures: list[Figure], folder: Path) -> Path:
    """Writes GPU-primitives.json and .md into the folder; returns the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    when = f"{time.strftime('%Y-%m-%d', time.gmtime())}, commit {commit()}"
    base = folder / f"{slug(str(figures[0]['gpu']))}-primitives"
    base.with_suffix(".json").write_text("".join(json.dumps(figure) + "\n" for figure in figures))
    base.with_suffix(".md").write_text(page(figures, when))
    return base.with_suffix(".md")


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 1 if building or running failed, 2 if there is nothing to run on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="the folder of the results")
    parser.add_argument("--arch", help="compute capability to build for (default: this machine's GPU)")
    parser.add_argument("--build-only", action="store_true", help="compile and stop")
    parser.add_argument("--timeout", type=float, default=120, help="seconds that the program may take")
    options = parser.parse_args(argv)
    wanted = options.arch or capability()
    if wanted is None:
        print("primitives: no GPU found (nvidia-smi); --arch 9.0 --build-only compiles without one", file=sys.stderr)
        return 2
    try:
        arch = architecture(wanted)
    except ValueError as wrong:
        print(f"primitives: {wrong}", file=sys.stderr)
        return 2
    program = ROOT / "bench" / "out" / f"primitives-{arch.rpartition('_')[2]}"
    if failed := build(arch, program):
        print(f"primitives: {failed}", file=sys.stderr)
        return 1
    if options.build_only:
        print(program)
        return 0
    status, text, said = execute(program, options.timeout)
    if status:
        print(f"primitives: {said}", file=sys.stderr)
    try:
        written = write(parse(text), options.out)
    except ValueError as nothing:
        print(f"primitives: {nothing}", file=sys.stderr)
        return 2 if status == 2 else 1
    print(written.read_text())
    print(f"written: {written}", file=sys.stderr)
    return 1 if status else 0


if __name__ == "__main__":
    sys.exit(main())
