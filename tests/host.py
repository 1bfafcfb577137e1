"""Builds and loads seqkern_testing_*, the kernels of csrc/cuda for host execution, and keeps what it built.

`load("simt")` gives csrc/testing/simt_module.cpp with what runs it. A source is compiled again when it, or a header
it includes, has changed. Within `changed("simt", name, edited(...))` it gives a build of edited sources: what tests
break, to see that it is found. With SEQKERN_HOST_SANITIZE=1 in the environment the build is under AddressSanitizer and
UndefinedBehaviorSanitizer, for a process that has libasan preloaded (`sanitizer_environment`).
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
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


@contextlib.contextmanager
def _locked(name: str) -> Iterator[None]:
    """For one process at a time: several run the tests."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(source: Path, name: str, flags: list[str], root: Path) -> Path:
    """The object file; of one name, the latest is kept."""
    if SANITIZE:
        flags = flags + ASAN
    elif source.name.endswith("_module.cpp"):
        flags = flags + HOOKS
    files = sorted(_included(source))
    key = _key(CXX, FLAGS, flags, [(str(f.relative_to(root)), f.read_bytes()) for f in files])
    made = BUILD / f"{name}-{key}.o"
    with _locked(name):
        if not made.exists():
            subprocess.run([CXX, *FLAGS, *flags, "-c", source, "-o", made.with_suffix(".new")], check=True)
            for old in BUILD.glob(f"{name}-*.o"):
                old.unlink()
            made.with_suffix(".new").rename(made)
    return made


def compiled_for(texts: dict[str, str], dtypes: Sequence[str], grid: Sequence[str] = ()) -> dict[str, str]:
    """These texts of files of csrc, and kernels of the `step` and the `grid` engine for these dtypes alone ("F32"):
    most of the time of a test that changes a source is the compiler's. Other dtypes end the process."""
    texts = dict(texts)
    for name, kept in (("cuda/lanes.cuh", dtypes), ("cuda/grid_entry.cuh", grid)):
        lines = (texts.get(name) or (ROOT / "csrc" / name).read_text()).splitlines(keepends=True)
        cases = {i: m[1] for i, line in enumerate(lines) if (m := re.match(r"\s*case Dtype::k(\w+): return", line))}
        if not set(kept) <= set(cases.values()):
            raise ValueError(f"{name} must have a case for each of {kept}, and has them for {list(cases.values())}")
        text = "".join(line for i, line in enumerate(lines) if i not in cases or cases[i] in kept)
        texts[name] = (
            text if "default:" in text else text.replace("(dtype) {", "(dtype) {\n    default: __builtin_trap();")
        )
    return texts


@contextlib.contextmanager
def _sources(texts: dict[str, str]) -> Iterator[Path]:
    """A root with csrc, in which files have these texts."""
    if not texts:
        yield ROOT
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        shutil.copytree(ROOT / "csrc", root / "csrc")
        for name, text in texts.items():
            (root / "csrc" / name).write_text(text)
        yield root


def build(part: str, variant: str = "", texts: dict[str, str] | None = None) -> Path:
    """The path of the module with this part; texts: of files of csrc, in place of what they hold, in this variant."""
    if not (TESTING / f"{part}_module.cpp").exists():
        raise FileNotFoundError(f"no part {part}: {TESTING / part}_module.cpp does not exist")
    if not shutil.which(CXX):
        raise FileNotFoundError(f"host execution needs a C++20 compiler, and {CXX} was not found")
    part_name = f"{part}_{variant}" if variant else part
    name = f"seqkern_testing_{part_name}"
    common = [f for f in sorted(TESTING.glob("*.cpp")) if f.stem != "module" and not f.stem.endswith("_module")]
    if SANITIZE:  # what the sanitizers see does not depend on the other dtypes
        texts = compiled_for(texts or {}, ("F64", "F32", "Bf16"), grid=("Bf16",))
    with _locked(f"part-{part_name}"), _sources(texts or {}) as root:
        objects = [_compile(f, f.stem, [], ROOT) for f in common]
        objects.append(_compile(TESTING / "module.cpp", f"module_{part_name}", [f"-DSK_MODULE={name}"], ROOT))
        source = root / TESTING.relative_to(ROOT) / f"{part}_module.cpp"
        objects.append(_compile(source, f"{part}_module{part_name.removeprefix(part)}", [], root))
        folder = BUILD / f"{part_name}-{_key([o.name for o in objects])}"
        made = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
        if not made.exists():
            for old in BUILD.glob(f"{part_name}-*/"):
                shutil.rmtree(old)
            folder.mkdir()
            link = [CXX, "-shared", *(ASAN if SANITIZE else []), "-o", made.with_suffix(".new"), *objects, "-ldl"]
            subprocess.run(link, check=True)
            made.with_suffix(".new").rename(made)
    return made


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.name.split(".")[0], path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_loaded: dict[str, ModuleType] = {}


def load(part: str) -> ModuleType:
    """The module with the functions that csrc/testing/{part}_module.cpp binds."""
    if part not in _loaded:
        _loaded[part] = _load(build(part))
    return _loaded[part]


def edited(*edits: tuple[str, str, str]) -> dict[str, str]:
    """Texts of files of csrc after edits (file, old, new); each old text must stand in its file once."""
    texts: dict[str, str] = {}
    for name, old, new in edits:
        text = texts.get(name) or (ROOT / "csrc" / name).read_text()
        if text.count(old) != 1:
            raise ValueError(f"{name} must have {old!r} once, and has it {text.count(old)} times")
        texts[name] = text.replace(old, new)
    return texts


@contextlib.contextmanager
def changed(part: str, variant: str, texts: dict[str, str]) -> Iterator[ModuleType]:
    """Inside, load(part) gives a build with these texts of files of csrc. Of one variant the latest is kept."""
    before = load(part)
    _loaded[part] = _load(build(part, variant, texts))
    try:
        yield _loaded[part]
    finally:
        _loaded[part] = before


def sanitizer_environment() -> dict[str, str]:
    """The environment of a process that loads the sanitized build."""
    name = subprocess.run([CXX, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    return {
        **os.environ,
        "SEQKERN_HOST_SANITIZE": "1",
        "LD_PRELOAD": str(Path(name.strip()).resolve()),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
    }
