"""examples/adding.py: the problem is what it says, a GRU learns it, an RNN's gradient vanishes, an LSTM's does not."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parent.parent / "examples" / "adding.py"
spec = importlib.util.spec_from_file_location("adding", PATH)
adding = importlib.util.module_from_spec(spec)
spec.loader.exec_module(adding)


def test_the_problem():
    x, sums = adding.draw(11, 500, torch.Generator().manual_seed(1))
    assert x.shape == (11, 500, 2) and torch.equal(x[..., 1].sum(0), torch.full((500,), 2.0))
    assert torch.equal(x[:5, :, 1].sum(0), torch.ones(500))
    torch.testing.assert_close((x[..., 0] * x[..., 1]).sum(0), sums)
    assert abs((sums - 1).square().mean() - adding.NOTHING_LEARNT) < 0.03


def test_a_gru_learns_it():
    r = adding.run("GRU", steps=12, updates=150, hidden=24, batch=32, seed=0, rate=1e-2)
    assert r.error < 0.3 * adding.NOTHING_LEARNT
    assert len(r.losses) == 150 and r.after.records[0].h.shape == (12,)


def test_how_far_gradients_reach():
    left = {}
    for cell in adding.CELLS:
        torch.manual_seed(0)
        problem = adding.draw(300, 16, torch.Generator().manual_seed(0))
        (r,) = adding.flow_of(adding.Adder(cell, 32, 300), *problem).records
        left[cell] = float(r.h[0] / r.h.max())
    assert left["LSTM"] > 0.1 and left["RNN"] < 1e-3, left


def test_command(tmp_path):
    pytest.importorskip("matplotlib")
    png = tmp_path / "adding.png"
    run = subprocess.run(
        [sys.executable, str(PATH), "--time", "10", "--updates", "3", "--hidden", "4", "--plot", str(png)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert all(f"T=10 {cell}: error" in run.stdout for cell in adding.CELLS) and "after:" in run.stdout
    assert png.stat().st_size > 1000
