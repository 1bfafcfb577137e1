"""examples/adding.py: the problem is what it says, a GRU learns it, an RNN's gradient vanishes, a gate's does not."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm", reason="the examples' progress bar, PyPI tqdm, is not installed")
PATH = Path(__file__).resolve().parents[1] / "examples" / "adding.py"
sys.path.insert(0, str(PATH.parent))
import adding  # noqa: E402


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
        norms = adding.carried(adding.flow_of(adding.Adder(cell, 32, 300), *problem))
        left[cell] = float(norms[0] / norms.max())
    assert left["LSTM"] > 0.1 and left["GRU"] > 0.1 and left["RNN"] < 1e-6, left


@pytest.mark.parametrize(("cell", "keeps"), [("LSTM", 1), ("GRU", 1)])
def test_open_gates(cell, keeps):
    """With weights and other biases of 0 the gate's sigmoid keeps 1 - 1/(u+1) of the state, u up to `steps`."""
    layer = getattr(adding.seqkern, cell)(2, 500)
    adding.open_gates(layer, 100)
    block = slice(keeps * 500, (keeps + 1) * 500)
    u = (layer.bias_ih_l0 + layer.bias_hh_l0)[block].exp()
    assert 1 <= u.min() < 3 and 95 < u.max() <= 99 and 40 < u.mean() < 60


def test_command(tmp_path):
    pytest.importorskip("matplotlib")
    png = tmp_path / "adding.png"
    run = subprocess.run(
        [sys.executable, str(PATH), "--time", "10", "--updates", "3", "--hidden", "4", "--plot", str(png)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert all(f"T=10 {cell}: error" in run.stdout for cell in adding.CELLS) and "after:" in run.stdout
    assert png.stat().st_size > 1000
