"""examples/generate_names.py: given and wanted letters, the baseline's probabilities, a short training's perplexity."""

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm", reason="the examples' progress bar, PyPI tqdm, is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import common  # noqa: E402
import generate_names as example  # noqa: E402


@pytest.fixture(scope="module")
def names():
    try:
        return example.read()
    except SystemExit as error:
        pytest.skip(str(error))


def test_the_census(names):
    train, held = names
    assert {k: len(train[k]) + len(held[k]) for k in train} == {"woman": 4275, "man": 1219, "surname": 88799}
    assert all(not {*train[k]} & {*held[k]} for k in train)
    assert all({*name} <= {*example.LETTERS} for part in names for some in part.values() for name in some)


def test_given_and_wanted():
    given, wanted = example.batch_of([("man", "AB"), ("surname", "C")])
    a, b, c = (example.LETTER_ID[letter] for letter in "ABC")
    assert given.T.tolist() == [[example.KIND_ID["man"], a, b], [example.KIND_ID["surname"], c, 0]]
    assert wanted.T.tolist() == [[a, b, example.END], [c, example.END, 0]]


def test_the_baseline_by_hand():
    train = {"man": ["AB", "AC", "BA"]}
    endings = 1 / example.trigram_perplexity(train, {"man": [""]})["man"]  # the end at once: never seen
    assert endings == pytest.approx(0.1 * 3 / 9 + 1e-6)  # 3 ends among 9 letters and ends, by the shortest context
    # P(A, B, end) = P(A|^^) P(B|^A) P(end|AB), each mixed of what follows two letters, one, and none.
    mixed = [0.6 * 2 / 3 + 0.3 * 2 / 3 + 0.1 * 3 / 9, 0.6 / 2 + 0.3 / 3 + 0.1 * 2 / 9, 0.6 + 0.3 / 2 + 0.1 * 3 / 9]
    expected = math.prod(p + 1e-6 for p in mixed) ** (-1 / 3)
    assert example.trigram_perplexity(train, {"man": ["AB"]})["man"] == pytest.approx(expected)


@pytest.mark.parametrize("cell", common.CELLS)
def test_one_letter_at_a_time(cell):
    """Carrying the state gives what one call over the name gives."""
    model = example.Writer(cell, 8).eval()
    given, _ = example.batch_of([("man", "ABCD"), ("woman", "XYZW")])
    state, logits = None, []
    for token in given:
        step, state = model(token.unsqueeze(0), state)
        logits.append(step)
    torch.testing.assert_close(torch.cat(logits), model(given)[0])


def test_samples():
    model = example.Writer("GRU", 8).eval()
    with torch.no_grad():
        model.next.bias[example.END] = 2.0
    samples = model.sample("man", 50, torch.Generator().manual_seed(0))
    assert len(samples) == 50 and len({*samples}) > 10
    assert samples == model.sample("man", 50, torch.Generator().manual_seed(0))
    assert all(len(name) <= example.LONGEST and {*name} <= {*example.LETTERS} for name in samples)


def test_a_short_training(names, tmp_path):
    train, held = names
    held = {kind: some[:200] for kind, some in held.items()}
    model = example.Writer("GRU", 32)
    batches = example.batches(train, 48, 0)
    run = common.train("GRU", model, batches, example.loss_of, lambda m: example.perplexity(m, held)["surname"], 100)
    letters = "".join(itertools.chain(*train.values(), *held.values()))
    single = math.exp(-sum(p * math.log(p) for p in (letters.count(c) / len(letters) for c in example.LETTERS)))
    assert run.curve[-1][1] < 0.85 * single < 16.5
    pytest.importorskip("matplotlib")
    example.plot([run], held, 11.0, str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").stat().st_size > 10_000
