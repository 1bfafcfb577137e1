"""What every test shares: a report of what is under test, and thread counts that do not leak between tests."""

import importlib
import itertools
import os

import pytest
import torch

import seqkern  # noqa: F401  (registers the operators, whichever file runs alone)


def pytest_report_header() -> str:
    forced = os.environ.get("SEQKERN_CPU_ISA", "not forced")
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, SEQKERN_CPU_ISA {forced}"


def pytest_collection_modifyitems(items):
    """What compiles for minutes comes first: at the end one process would run it while the others have nothing left."""
    items.sort(key=lambda item: "test_host_sanitizers" not in item.nodeid)


def pytest_terminal_summary(terminalreporter, config):
    """Which CUDA kernels ran on the host: the cases of each test, part by part of their names, and the seeds."""
    found = {}
    for report in terminalreporter.stats.get("passed", []):
        file, _, test = report.nodeid.rpartition("::")
        name, _, case = test.partition("[")
        if "test_host_" in file:
            found.setdefault((file, name), []).append(case.rstrip("]"))
    if found:
        terminalreporter.section("CUDA kernels executed on the host")
    for (file, name), cases in found.items():
        module = importlib.import_module(os.path.basename(file).removesuffix(".py"))  # another process may have run it
        seeds = getattr(module, "SEEDS", None)
        columns = itertools.zip_longest(*(case.split("-") for case in cases), fillvalue="")
        parts = [", ".join(part for part in dict.fromkeys(column) if part) for column in columns]
        line = f"{file}::{name}: {len(cases)} passed" + (f", seeds {list(seeds)}" if seeds else "")
        terminalreporter.line(": ".join([line, " x ".join(f"{{{p}}}" for p in parts)] if any(parts) else [line]))


@pytest.fixture(autouse=True)
def restore_threads():
    """A test may set the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seed():
    """Tests that draw without a generator of their own draw the same numbers every time."""
    torch.manual_seed(0)
