"""What every test shares: a report of what is under test, and thread counts that do not leak between tests."""

import os

import pytest
import torch

import seqkern  # noqa: F401  (registers the operators, whichever file runs alone)


def pytest_report_header() -> str:
    forced = os.environ.get("SEQKERN_CPU_ISA", "not forced")
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, SEQKERN_CPU_ISA {forced}"


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
