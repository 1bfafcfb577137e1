"""examples/common.py: the table, the training loop, and what it says when data is missing."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("tqdm", reason="the examples' progress bar, PyPI tqdm, is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import common  # noqa: E402


def test_table():
    runs = [common.Run("RNN", nn.Linear(30, 40), [], 1.26, {"right, %": "9.5"})]
    assert common.table(runs, {"always 0": {"right, %": "50.0"}}).splitlines() == [
        "|          | parameters | training | right, % |",
        "| -------- | ---------: | -------: | -------: |",
        "| RNN      |      1,240 |    1.3 s |      9.5 |",
        "| always 0 |            |          |     50.0 |",
    ]


def test_missing_data():
    with pytest.raises(SystemExit, match="comes with the package no_such_package: pip install it"):
        common.package_file("no_such_package", "data.csv", "pip install it")
    with pytest.raises(SystemExit, match="torch is installed, but has no file data.csv"):
        common.package_file("torch", "data.csv", "pip install it")
    assert common.package_file("torch", "version.py", "").is_file()


def test_training():
    """A line is learnt; the curve has ten points, in evaluation mode, without gradients."""
    modes = []

    def loss_of(model, x):
        return (model(x) - 3 * x).square().mean()

    def check(model) -> float:
        modes.append((model.training, torch.is_grad_enabled()))
        return float(model.weight.detach())

    batches = itertools.repeat(torch.linspace(-1, 1, 9).unsqueeze(1))
    run = common.train("RNN", nn.Linear(1, 1), batches, loss_of, check, updates=200, rate=0.1)
    assert len(run.curve) == 10 and modes == [(False, False)] * 10 and not run.model.training
    assert run.curve[-1][1] == pytest.approx(3, abs=0.05)
    seconds = [s for s, _ in run.curve]
    assert seconds == sorted(seconds) and seconds[-1] == run.seconds and run.parameters == 2


def test_last_state():
    h, c = torch.ones(1), torch.zeros(1)
    assert common.last_state((h, c)) is h and common.last_state(h) is h
