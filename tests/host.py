"""Builds and loads seqkern_testing_*, the kernels of csrc/cuda for host execution, and keeps what it built.

`load("simt")` gives csrc/testing/simt_module.cpp with what runs it. A source is compiled again when it, or a header that
it includes, has changed. `load("grid", "SK_SOME=1")` gives another build of it, with that macro. With SEQKERN_HOST_SANITIZE=1 in the environment the build is under AddressSanitizer and
UndefinedBehaviorSanitizer, for a process that has libasan preloaded (`sanitizer_environment`).
"""

import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).resolve().parent.parent
TESTING = ROOT / "csrc" / "testing"
SANITIZE = os.environ.get("SEQKERN_HOST_SANITIZE") == "1"
BUILD = ROOT / "build" / ("testing-sanitize" if SANITIZE else "testing")
CXX = os.environ.get("CXX", "g++")

FLAGS = [
    *("-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-DSK_HOST"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    f"-I{sysconfig.get_path('include')}",
    f"-I{pybind11.get_include()}",
]
ASAN = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
# Calls of csrc/testing/hooks.cpp before each load and store. The sanitizer itself is not linked.
HOOKS = ["-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"]


@functools.cache
def _included(source: Path) -> frozenset[Path]:
    """The file and all files of csrc that it includes."""
    found = {source}
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', source.read_text(), re.MULTILINE):
        header = (source.parent / name).resolve()
        if header.exists() and header not in found:
            found |= _included(header)
    return frozenset(found)


def _key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _compile(source: Path, name: str, flags: list[str]) -> Path:
    """The object file; of one name, the latest is kept."""
    if SANITIZE:
        flags = flags + ASAN
    elif source.name.endswith("_module.cpp"):
        flags = flags + HOOKS
    files = sorted(_included(source))
    key = _key(CXX, FLAGS, flags, [(str(f.relative_to(ROOT)), f.read_bytes()) for f in files])
    made = BUILD / f"{name}-{key}.o"
    if not made.exists():
        subprocess.run([CXX, *FLAGS, *flags, "-c", source, "-o", made.with_suffix(".new")], check=True)
        for old in BUILD.glob(f"{name}-*.o"):
            old.unlink()
        made.with_suffix(".new").rename(made)
    return made


def build(part: str, *defines: str) -> Path:
    """The path of the module with this part."""
    source = TESTING / f"{part}_module.cpp"
    if not source.exists():
        raise FileNotFoundError(f"no part {part}: {source} does not exist")
    if not shutil.which(CXX):
        raise FileNotFoundError(f"host execution needs a C++20 compiler, and {CXX} was not found")
    variant = f"_{_key(defines)}" if defines else ""
    name = f"seqkern_testing_{part}{variant}"
    macros = [f"-D{define}" for define in defines]
    common = [f for f in sorted(TESTING.glob("*.cpp")) if f.stem != "module" and not f.stem.endswith("_module")]
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects = [_compile(f, f.stem, []) for f in common]
        objects.append(_compile(TESTING / "module.cpp", f"module_{part}{variant}", [f"-DSK_MODULE={name}"]))
        objects.append(_compile(source, f"{source.stem}{variant}", macros))
        folder = BUILD / f"{part}{variant}-{_key([o.name for o in objects])}"
        made = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
        if not made.exists():
            for old in BUILD.glob(f"{part}{variant}-*/"):
                shutil.rmtree(old)
            folder.mkdir()
            link = [CXX, "-shared", *(ASAN if SANITIZE else []), "-o", made.with_suffix(".new"), *objects, "-ldl"]
            subprocess.run(link, check=True)
            made.with_suffix(".new").rename(made)
    return made


@functools.cache
def load(part: str, *defines: str) -> ModuleType:
    """The module with the functions that csrc/testing/{part}_module.cpp binds; defines: macros as NAME=VALUE."""
    path = build(part, *defines)
    spec = importlib.util.spec_from_file_location(path.name.split(".")[0], path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sanitizer_environment() -> dict[str, str]:
    """The environment of a process that loads the sanitized build."""
    name = subprocess.run([CXX, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    return {
        **os.environ,
        "SEQKERN_HOST_SANITIZE": "1",
        "LD_PRELOAD": str(Path(name.strip()).resolve()),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
    }
