"""What the compiled objects show to the linker.

An inline function that the compiler emits in an AVX-512 object as a weak symbol may be the copy that the linker keeps
for everybody, and then a CPU without AVX-512 dies in code that never asked for it. So an ISA's object has no weak
symbol at all, and shows one name: its table of kernels. The extension shows one name too: what Python calls.
"""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

BUILD = Path(__file__).parent.parent / "build"
ISAS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")
LINKERS_OWN = {"__bss_start", "_edata", "_end", "_init", "_fini"}
OBJECTS = sorted(path for isa in ISAS for path in BUILD.glob(f"**/{isa}/**/*.o"))

needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, from binutils")


def symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """(type, name) of each defined symbol, by nm's letters: capitals are global, V, W and u may be merged."""
    done = subprocess.run(
        ["nm", "--format=posix", "--defined-only", *options, str(path)], capture_output=True, text=True, check=True
    )
    return [(fields[1], fields[0]) for fields in map(str.split, done.stdout.splitlines()) if len(fields) > 1]


@needs_nm
@pytest.mark.skipif(not OBJECTS, reason=f"no object of an ISA below {BUILD}: the extension was not built here")
def test_isa_objects_have_no_weak_symbol_and_one_table():
    for path in OBJECTS:
        found = symbols(path)
        assert [name for kind, name in found if kind in "VvWwu"] == [], path
        shown = [(kind, name) for kind, name in found if kind.isupper()]
        assert len(shown) == 1 and shown[0][0] in "DRB", f"{path} must show one table, shows {shown}"


@needs_nm
def test_extension_shows_only_its_init_function():
    found = importlib.util.find_spec("seqkern._C")
    assert found is not None, "the extension seqkern._C is not built"
    exported = symbols(Path(found.origin), "--dynamic")
    strong = {name for kind, name in exported if kind.isupper() and kind not in "VW"}
    assert strong - LINKERS_OWN == {"PyInit__C"}
    # What is weak comes from the C++ library's headers, which insist on being visible; none of it is ours.
    assert [name for _, name in exported if "seqkern" in name] == []


def test_extension_is_for_every_python():
    """The stable ABI of Python: one file for 3.10 and later."""
    found = importlib.util.find_spec("seqkern._C")
    assert found is not None, "the extension seqkern._C is not built"
    assert found.origin.endswith((".abi3.so", ".pyd"))
