"""Compiles every .cu file for the architectures of a release and reads what ptxas says of each kernel.

    python tests/cuda_compile.py            compile and print the table, fail on a spill
    python tests/cuda_compile.py --write    and make it the expected one, tests/data/cuda_registers.tsv

Needs a CUDA toolkit and no torch: `nvcc` on the path, of CUDA_HOME, or from PyPI's packages in this environment.
Results are kept in build/ptxas by a hash of the sources, the flags and the compiler.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "data" / "cuda_registers.tsv"
ARCHS = (80, 90, 120)
FLAGS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Werror=all-warnings", "-cubin", "-Xptxas=-v")
SPACES = re.compile(r"seqkern::|cuda::|\(anonymous namespace\)::|<unnamed>::")


class Usage(NamedTuple):
    registers: int
    shared: int  # static, bytes
    spilled: int  # bytes of spill stores and loads, and of a stack frame


def find_nvcc() -> str | None:
    """The first of CUDA_HOME's, the path's, PyPI's in this environment."""
    places = [Path(os.environ["CUDA_HOME"], "bin")] if os.environ.get("CUDA_HOME") else []
    places += [Path(p) for p in os.environ.get("PATH", "").split(os.pathsep) if p]
    places += sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*/bin"))
    return next((str(p / "nvcc") for p in places if os.access(p / "nvcc", os.X_OK)), None)


def release(nvcc: str) -> str:
    """The toolkit's release, as in "13.0"."""
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", told).group(1)


def cuda_sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def demangle(names: list[str]) -> list[str]:
    """Readable names without namespaces and parameters, as in `forward_step<Lstm, float, 4>`."""
    if shutil.which("c++filt") is None:
        raise RuntimeError("c++filt was not found; it comes with binutils")
    run = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    short = []
    for line in run.stdout.splitlines():
        name = SPACES.sub("", line).removeprefix("void ")
        name = re.sub(r"\((\w+)\)(\d+)", r"\2", name)  # (int)4
        depth, end = 0, len(name)
        for i, letter in enumerate(name):
            depth += (letter == "<") - (letter == ">")
            if letter == "(" and depth == 0:
                end = i
                break
        short.append(name[:end])
    return short


def parse(report: str) -> dict[str, Usage]:
    """What `ptxas -v` said, by kernel."""
    entry = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)",
        re.S,
    )
    found = entry.findall(report)
    usages = {}
    for name, row in zip(demangle([f[0] for f in found]), found, strict=True):
        shared = re.search(r"(\d+) bytes smem", row[5])
        usages[name] = Usage(int(row[4]), int(shared.group(1)) if shared else 0, sum(map(int, row[1:4])))
    return usages


def compile_one(nvcc: str, source: Path, arch: int) -> dict[str, Usage]:
    """The kernels of one source for one architecture.

    Raises:
        RuntimeError: nvcc failed; with its output.
    """
    digest = hashlib.sha256(json.dumps([FLAGS, arch, source.name]).encode())
    digest.update(subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout)
    for path in [source, *sorted((ROOT / "csrc" / "core").glob("*.h")), *sorted((ROOT / "csrc" / "cuda").glob("*.*h"))]:
        digest.update(path.read_bytes())
    kept = ROOT / "build" / "ptxas" / f"{source.stem}-{arch}-{digest.hexdigest()[:16]}.txt"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        cubin = kept.with_suffix(".cubin")
        command = [nvcc, *FLAGS, f"-arch=sm_{arch}", str(source), "-o", str(cubin)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{run.stdout}{run.stderr}")
        cubin.unlink()
        kept.write_text(run.stdout + run.stderr)
    return parse(kept.read_text())


def compile_all(nvcc: str) -> dict[str, dict[int, Usage]]:
    """Every kernel's usage by architecture."""
    jobs = [(source, arch) for source in cuda_sources() for arch in ARCHS]
    table: dict[str, dict[int, Usage]] = {}
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        for (_, arch), usages in zip(jobs, pool.map(lambda job: compile_one(nvcc, *job), jobs), strict=True):
            for name, usage in usages.items():
                table.setdefault(name, {})[arch] = usage
    return dict(sorted(table.items()))


def write(table: dict[str, dict[int, Usage]], toolkit: str, path: Path) -> None:
    lines = [f"kernel, nvcc {toolkit}\t" + "\t".join(f"sm_{a}" for a in ARCHS) + "\tshared"]
    for name, by_arch in table.items():
        registers = "\t".join(str(by_arch[a].registers) for a in ARCHS)
        lines.append(f"{name}\t{registers}\t{max(u.shared for u in by_arch.values())}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def read(path: Path) -> tuple[str, dict[str, tuple[dict[int, int], int]]]:
    """The toolkit's release; registers by architecture and bytes of static shared memory, by kernel."""
    head, *rows = [line.split("\t") for line in path.read_text().splitlines()]
    archs = [int(name.removeprefix("sm_")) for name in head[1:-1]]
    kernels = {r[0]: (dict(zip(archs, map(int, r[1:-1]), strict=True)), int(r[-1])) for r in rows}
    return head[0].rpartition(" ")[2], kernels


def spills(table: dict[str, dict[int, Usage]]) -> list[str]:
    return [
        f"{name} for sm_{arch}: {usage.spilled} bytes spilled or on the stack"
        for name, by_arch in table.items()
        for arch, usage in by_arch.items()
        if usage.spilled
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(ROOT)}")
    write_table = parser.parse_args().write
    nvcc = find_nvcc()
    if nvcc is None:
        sys.exit("cuda_compile: nvcc was not found on the path, in CUDA_HOME or in this environment")
    table = compile_all(nvcc)
    width = max(map(len, table))
    print(f"{'kernel':<{width}}" + "".join(f"{'sm_' + str(a):>8}" for a in ARCHS) + "  registers; static shared bytes")
    for name, by_arch in table.items():
        row = "".join(f"{by_arch[a].registers:>8}" for a in ARCHS)
        print(f"{name:<{width}}{row}  {max(u.shared for u in by_arch.values()) or ''}")
    wrong = spills(table)
    print(f"{len(table)} kernels, {len(wrong)} spills")
    if write_table:
        write(table, release(nvcc), TABLE)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
