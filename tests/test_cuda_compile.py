"""What ptxas makes of the CUDA kernels: none spills, and none has grown out of the table in tests/data.

`make cuda-check` compiles them with the same script, with a toolkit from PyPI where the machine has none;
`python tests/cuda_compile.py --write` writes the table anew. Registers are compared where the toolkit is the one that
the table names.
"""

import cuda_compile
import pytest

MARGIN = 8  # registers: their unit of allocation


@pytest.fixture(scope="module")
def table():
    nvcc = cuda_compile.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc on the path, in CUDA_HOME or in this environment: `make cuda-check` installs one")
    return cuda_compile.compile_all(nvcc)


def test_nothing_spills(table):
    assert not cuda_compile.spills(table)


def test_every_kernel_stands_in_the_table(table):
    _, expected = cuda_compile.read(cuda_compile.TABLE)
    assert expected.keys() == table.keys()
    assert all(set(by_arch) == set(cuda_compile.ARCHS) for by_arch in table.values())


def test_registers_and_shared_memory(table):
    toolkit, expected = cuda_compile.read(cuda_compile.TABLE)
    found = cuda_compile.release(cuda_compile.find_nvcc())
    if found != toolkit:
        pytest.skip(f"the table is from nvcc {toolkit}, this is {found}")
    grown = []
    for name, (registers, shared) in expected.items():
        for arch, usage in table.get(name, {}).items():
            if usage.registers > registers[arch] + MARGIN or usage.shared > shared:
                grown.append(f"{name} for sm_{arch}: {usage}, expected {registers[arch]} registers, {shared} bytes")
    assert not grown, "\n".join(grown)


REPORT = """
ptxas info    : Compiling entry function '_ZN7seqkern4cuda12_GLOBAL__N_19widen_allI{}EEvPKvPvl' for 'sm_90'
ptxas info    : Function properties for _ZN7seqkern4cuda12_GLOBAL__N_19widen_allI{}EEvPKvPvl
    {} bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 1 barriers, 1024 bytes smem, 440 bytes cmem[0]
"""


def test_a_spill_is_seen():
    """The parser, on a report with two kernels of which each has a fault."""
    usages = cuda_compile.parse(REPORT.format("d", "d", 0) + REPORT.format("f", "f", 8))
    assert usages == {"widen_all<double>": (10, 1024, 4), "widen_all<float>": (10, 1024, 12)}
    assert len(cuda_compile.spills({name: {90: usage} for name, usage in usages.items()})) == 2
