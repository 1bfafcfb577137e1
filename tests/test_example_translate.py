"""examples/translate.py: verses out of their markup, the split, the baseline, and a toy language that it learns."""

import random
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm", reason="the examples' progress bar, PyPI tqdm, is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import common  # noqa: E402
import translate as example  # noqa: E402

DIGITS = dict(
    zip("0123456789", ["cero", "uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve"], strict=True)
)


def toy(count: int, seed: int) -> list[example.Verse]:
    """Digits as words, told in Spanish from the last to the first."""
    rng = random.Random(seed)
    rows = [rng.choices("0123456789", k=rng.randint(2, 5)) for _ in range(count)]
    return [([DIGITS[d] for d in reversed(row)], row) for row in rows]


@pytest.fixture
def task():
    verses = toy(600, 0)
    return example.Task({"train": verses}, *(example.Vocabulary([v[side] for v in verses]) for side in (0, 1)))


def test_words_of_a_verse():
    """A note between two words without a space, a verse mark, an apostrophe, an empty element."""
    markup = '<div sID="x"/>¶ <w lemma="H1">In</w> the, God<note n="a">or <i>Elohim</i></note><w>didn’t</w> rest.<div/>'
    assert example.words_of(markup) == ["in", "the", ",", "god", "didn’t", "rest", "."]
    assert example.words_of("Á su  <title>Psalm</title>Hijo; ¿beth-el?") == [
        "á",
        "su",
        "hijo",
        ";",
        "¿",
        "beth-el",
        "?",
    ]


def test_missing_data_says_what_to_install(tmp_path):
    with pytest.raises(SystemExit, match="spaRV1909eb, is not in .* apt-get install sword-text-sparv sword-text-web"):
        example.read(str(tmp_path))


def test_split_leaves_out_what_training_has():
    verses = [([str(i)], [f"e{i}"]) for i in range(60)]
    verses[21], verses[41], verses[40] = (["22"], ["other"]), (["other"], ["e23"]), (["24"], ["e24"])
    parts = example.split(verses)
    assert parts["test"] == [verses[1]] and parts["validation"] == [verses[0], verses[20]]
    assert len(parts["train"]) == 54 and not any(v in parts["train"] for v in (verses[1], verses[0]))


def test_vocabulary():
    vocabulary = example.Vocabulary([["b", "a"], ["b", "a", "c"]])
    assert len(vocabulary) == 6 and vocabulary(["a", "c", "b"]).tolist() == [4, example.UNK, 5]


def test_batches(task):
    source, lengths, given, wanted = next(task.batches(8, 0))
    for b in range(8):
        n = int((wanted[:, b] != example.PAD).sum())
        assert given[0, b] == example.BOS and wanted[n - 1, b] == example.EOS
        assert torch.equal(given[1:n, b], wanted[: n - 1, b])
        words = [task.english.words[i] for i in wanted[: n - 1, b]]
        spoken = [task.spanish.words[i] for i in source[: lengths[b], b]]
        assert spoken == [DIGITS[word] for word in reversed(words)]


def test_the_baseline():
    train = [(["a", "b", "c"], ["one"]), (["a", "d", "e"], ["two"]), (["a", "f", "g"], ["three"])]
    assert example.most_similar(train, [(["a", "f", "x"], []), (["d", "a", "a"], [])]) == [["three"], ["two"]]


def test_bleu():
    pytest.importorskip("sacrebleu")
    verses = [([], ["in", "the", "beginning", "god", "created"]), ([], ["a", "b", "c", "d", "e"])]
    assert example.bleu([target for _, target in verses], verses) == pytest.approx(100)
    assert 30 < example.bleu([["in", "the", "beginning", "god", "made"], ["a", "b", "c", "d", "e"]], verses) < 95


@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
def test_a_toy_language(task, cell, tmp_path):
    """Digits backwards: after a short training most of fresh sentences are right, greedy and with a beam."""
    fresh = toy(60, 1)

    def right(model, beam: int = 1) -> float:
        found = task.translate(model, fresh, beam)
        return sum(answer == target for answer, (_, target) in zip(found, fresh, strict=True)) / len(fresh)

    model = example.make_model(cell, len(task.spanish), len(task.english), 48, 32)
    run = common.train(cell, model, task.batches(32, 0), example.loss_of, right, 150, rate=1e-2)
    assert run.curve[-1][1] > 0.6, run.curve
    assert right(model, 3) > 0.6
    pytest.importorskip("matplotlib")
    example.plot([run], task, fresh[0], str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").stat().st_size > 10_000
