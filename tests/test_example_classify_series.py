"""examples/classify_series.py: the file is parsed right, padding does not matter, and a short training learns."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm", reason="the examples' progress bar, PyPI tqdm, is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import classify_series as example  # noqa: E402
import common  # noqa: E402


@pytest.fixture(scope="module")
def data():
    try:
        return example.read()
    except SystemExit as error:
        pytest.skip(str(error))


def test_a_ts_file():
    text = "#words\n@equalLength false\n@data\n1,2,3:4,5,6:2\n7,8:9,-1:1\n"
    sequences, labels = example.parse_ts(text)
    assert [x.tolist() for x in sequences] == [[[1, 4], [2, 5], [3, 6]], [[7, 9], [8, -1]]] and labels == [1, 0]


def test_the_official_parts(data):
    """Sizes as published with the data: 30 recordings of each of nine speakers; 370 of 7 to 29 frames to test."""
    (x, lengths, labels), (y, test_lengths, test_labels) = data
    assert x.shape[1:] == (270, 12) and torch.equal(labels.bincount(), torch.full((9,), 30))
    assert y.shape == (29, 370, 12) and test_labels.bincount().tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]
    assert lengths.min() == 7 and lengths.max() == len(x) and test_lengths.min() == 7
    inside = torch.arange(len(x)).unsqueeze(1) < lengths
    torch.testing.assert_close(x[inside].mean(0), torch.zeros(12), atol=1e-4, rtol=0)
    assert torch.equal(x[~inside], torch.zeros_like(x[~inside]))


@pytest.mark.parametrize("cell", common.CELLS)
def test_padding_does_not_matter(cell):
    model = example.Classifier(cell, 8).eval()
    x, lengths = torch.randn(9, 3, 12), torch.tensor([4, 9, 1])
    alone = torch.cat([model(x[:n, b : b + 1], torch.tensor([n])) for b, n in enumerate(lengths.tolist())])
    torch.testing.assert_close(model(x, lengths), alone)


def test_a_short_training(data, tmp_path):
    train, test = data
    run = example.train_cell("GRU", train, test, range(1), updates=60, hidden=24)
    assert example.accuracy(run.model, test) > 0.8  # always the commonest speaker: 0.24
    assert 0.9 < example.nearest_mean(train, test) < 0.95
    pytest.importorskip("matplotlib")
    example.plot([run], test, 0.5, str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").stat().st_size > 10_000
