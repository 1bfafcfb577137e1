"""examples/g2p.py: the dictionary, its split, batches, and how pronunciations are scored."""

import pytest
import torch
from g2p_cases import everything, small_dictionary  # noqa: F401
from g2p_tool import data, scoring
from g2p_tool.data import END, LETTERS, PAD, PHONEMES, START, Pairs


def test_known_words():
    dictionary = everything()
    assert dictionary["hello"] == [["HH", "AH", "L", "OW"], ["HH", "EH", "L", "OW"]]
    assert dictionary["network"] == [["N", "EH", "T", "W", "ER", "K"]]
    assert len(dictionary) > 120_000
    assert set("".join(dictionary)) == set(LETTERS)
    assert len(PHONEMES) == 39
    assert {phoneme for said in dictionary.values() for way in said for phoneme in way} == set(PHONEMES)
    assert max(len(way) for said in dictionary.values() for way in said) < data.MAX_PHONEMES


def test_pronunciations_that_differ_in_stress_alone_are_one():
    assert all(len(said) == len(set(map(tuple, said))) for said in everything().values())


def test_split():
    parts = data.split([str(i) for i in range(60)])
    assert parts.validation == ["0", "20", "40"]
    assert parts.test == ["1", "2", "21", "22", "41", "42"]
    assert parts.train == [str(i) for i in range(60) if i % 20 not in (0, 1, 2)]


@pytest.fixture
def pairs() -> Pairs:
    words = ["network", "a", "sequence", "o'clock", "memory"]
    return Pairs(words, {word: everything()[word][:1] for word in words})


def test_batch(pairs):
    batch = pairs.batch(torch.tensor([4, 0, 1]))
    assert batch.lengths.tolist() == [6, 7, 1]
    assert batch.letters.shape == (7, 3)
    for b, word in enumerate(("memory", "network", "a")):
        ids = [data.PHONEME_ID[phoneme] for phoneme in everything()[word][0]]
        padding = [PAD] * (len(batch.wanted) - len(ids) - 1)
        assert batch.letters[:, b].tolist() == [*(data.LETTER_ID[x] for x in word), *[PAD] * (7 - len(word))]
        assert batch.given[:, b].tolist() == [START, *ids, *padding]
        assert batch.wanted[:, b].tolist() == [*ids, END, *padding]
    assert (batch.wanted != PAD).any(1).all(), "a row of padding alone"


def contents(pairs: Pairs, rows: list[torch.Tensor]) -> list[tuple[str, ...]]:
    columns = []
    for batch in map(pairs.batch, rows):
        for letters, wanted in zip(batch.letters.T.tolist(), batch.wanted.T.tolist(), strict=True):
            columns.append(
                (*(LETTERS[i - 1] for i in letters if i), "=", *(PHONEMES[i - 3] for i in wanted if i > END))
            )
    return columns


def test_the_seed_and_the_epoch_alone_decide_the_order_and_an_epoch_has_every_pair_once(small):
    pairs = Pairs(list(small), small)
    first = contents(pairs, pairs.epoch(16, seed=1, number=0))
    torch.rand(3)  # the global generator has no part in it
    assert first == contents(pairs, pairs.epoch(16, seed=1, number=0))
    assert first != contents(pairs, pairs.epoch(16, seed=2, number=0))
    assert first != contents(pairs, pairs.epoch(16, seed=1, number=1))
    assert sorted(first) == sorted((*word, "=", *way) for word, said in small.items() for way in said)


def test_batches_are_as_many_as_the_schedule_counts_and_hardly_padded(small):
    pairs = Pairs(list(small), small)
    rows = pairs.epoch(16, seed=0, number=3)
    assert len(rows) == -(-len(pairs) // 16)
    assert sorted(map(len, rows))[1:] == [16] * (len(rows) - 1)
    batches = [pairs.batch(r) for r in rows]
    assert sum(int(b.lengths.sum()) for b in batches) > 0.93 * sum(b.letters.numel() for b in batches)


@pytest.mark.parametrize("word", ["", "caf\N{LATIN SMALL LETTER E WITH ACUTE}", "two words", "Upper"])
def test_words_that_cannot_be_spelt(word):
    with pytest.raises(ValueError, match="of the letters"):
        data.spell(["fine", word])


@pytest.mark.parametrize(("a", "b", "edits"), [("", "abc", 3), ("abc", "abc", 0), ("kitten", "sitting", 3)])
def test_edit_distance(a, b, edits):
    assert scoring.edit_distance(a, b) == scoring.edit_distance(b, a) == edits
    pairs = scoring.align(a, b)
    assert sum(x != y for x, y in pairs) == edits
    assert ("".join(x for x, _ in pairs if x), "".join(y for _, y in pairs if y)) == (a, b)


def test_error_rates_take_the_nearest_pronunciation():
    said = [["HH", "EH", "L", "OW"], ["N", "EH", "T", "W", "AH", "R", "K"]]
    assert scoring.error_rates(["hello", "network"], said, everything()) == (50.0, 100 * 2 / (4 + 6))
    assert scoring.nearest(["B"], [["A", "A"], ["A"]]) == (1, ["A"])
    with pytest.raises(ValueError, match="at least one word"):
        scoring.error_rates([], [], everything())
