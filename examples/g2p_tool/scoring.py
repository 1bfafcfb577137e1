"""How far pronunciations are from the dictionary's: word and phoneme error rates, and which phonemes are confused."""

from collections.abc import Sequence
from typing import NamedTuple

from g2p_tool.data import Dictionary


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Fewest insertions, deletions and replacements that make b of a."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def nearest(said: list[str], pronunciations: list[list[str]]) -> tuple[int, list[str]]:
    """The smallest edit distance and the pronunciation that has it: of several the shortest."""
    if said in pronunciations:
        return 0, said
    distance, _, right = min((edit_distance(said, right), len(right), right) for right in pronunciations)
    return distance, right


class Rates(NamedTuple):
    wer: float  # per cent of the words that equal none of their pronunciations
    per: float  # edits to the nearest pronunciation, per cent of its phonemes


def error_rates(words: Sequence[str], said: Sequence[list[str]], dictionary: Dictionary) -> Rates:
    """Rates over all words. Raises ValueError without words."""
    if not words:
        raise ValueError("wanted at least one word to score, got none")
    wrong = edits = phonemes = 0
    for word, hypothesis in zip(words, said, strict=True):
        distance, right = nearest(hypothesis, dictionary[word])
        wrong, edits, phonemes = wrong + (distance > 0), edits + distance, phonemes + len(right)
    return Rates(100 * wrong / len(words), 100 * edits / phonemes)


def align(right: Sequence[str], said: Sequence[str]) -> list[tuple[str | None, str | None]]:
    """Pairs of a right and a said phoneme with the fewest differences; None where one has nothing for the other."""
    cost = [[i + j if i * j == 0 else 0 for j in range(len(said) + 1)] for i in range(len(right) + 1)]
    for i, x in enumerate(right, 1):
        for j, y in enumerate(said, 1):
            cost[i][j] = min(cost[i - 1][j] + 1, cost[i][j - 1] + 1, cost[i - 1][j - 1] + (x != y))
    pairs, i, j = [], len(right), len(said)
    while i or j:
        if i and j and cost[i][j] == cost[i - 1][j - 1] + (right[i - 1] != said[j - 1]):
            i, j = i - 1, j - 1
            pairs.append((right[i], said[j]))
        elif i and cost[i][j] == cost[i - 1][j] + 1:
            i -= 1
            pairs.append((right[i], None))
        else:
            j -= 1
            pairs.append((None, said[j]))
    return pairs[::-1]
