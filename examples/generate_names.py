"""One-to-many: from one token that says which kind of name, a recurrent layer writes a name, letter by letter.

    python examples/generate_names.py --plot names.png

The names of the US census of 1990: 4,275 first names of women, 1,219 of men, 88,799 surnames. The kind is the first
input; each letter read gives a distribution over the next one, or the end. While training the whole name is one call
of the layer; while sampling, each call reads one letter and carries the state.

A tenth of the names is held out; perplexity per letter (the end counts as one) says among how many equally likely
letters the model hesitates. The baseline counts which letter follows which two, mixed with shorter contexts.

Needs: pip install names tqdm matplotlib
"""

import math
import random
from collections import Counter
from collections.abc import Iterator

import common
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

import seqkern

FILES = {"woman": "dist.female.first", "man": "dist.male.first", "surname": "dist.all.last"}
PAD, END = 0, 1
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER_ID = {letter: i for i, letter in enumerate(LETTERS, 2)}
KIND_ID = {kind: i for i, kind in enumerate(FILES, 2 + len(LETTERS))}
INPUTS, OUTPUTS = 2 + len(LETTERS) + len(FILES), 2 + len(LETTERS)
LONGEST = 20

Names = dict[str, list[str]]  # by kind


class Writer(nn.Module):
    def __init__(self, cell: str, hidden: int, embedding: int = 32):
        super().__init__()
        self.embed = nn.Embedding(INPUTS, embedding, padding_idx=PAD)
        self.rnn = getattr(seqkern, cell)(embedding, hidden)
        self.dropout = nn.Dropout(0.2)
        self.next = nn.Linear(hidden, OUTPUTS)

    def forward(self, given: Tensor, state=None):
        """Logits [T, B, 28] of what follows each of `given` [T, B], and the state after it."""
        y, state = self.rnn(self.embed(given), state)
        return self.next(self.dropout(y)), state

    @torch.no_grad()
    def sample(self, kind: str, count: int, generator: torch.Generator, temperature: float = 1.0) -> list[str]:
        token, state, tokens = torch.full((1, count), KIND_ID[kind]), None, []
        for _ in range(LONGEST):
            logits, state = self(token, state)
            logits[..., PAD] = -math.inf
            token = torch.multinomial((logits[0] / temperature).softmax(-1), 1, generator=generator).T
            tokens.append(token)
        return ["".join(LETTERS[i - 2] if i > END else " " for i in row).split(" ")[0] for row in torch.cat(tokens).T]


def read() -> tuple[Names, Names]:
    """Names to train on, and a tenth to hold out, of each kind."""
    train, held = {}, {}
    for kind, file in FILES.items():
        text = common.package_file("names", file, "pip install names").read_text()
        names = sorted({line.split()[0] for line in text.splitlines() if line.strip()})
        random.Random(0).shuffle(names)
        held[kind], train[kind] = names[: len(names) // 10], names[len(names) // 10 :]
    return train, held


def batch_of(pairs: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """What the layer is given and what is wanted, [T, B] each, of (kind, name)."""
    ids = [[LETTER_ID[letter] for letter in name] for _, name in pairs]
    given = [torch.tensor([KIND_ID[kind], *row]) for (kind, _), row in zip(pairs, ids, strict=True)]
    return pad_sequence(given), pad_sequence([torch.tensor([*row, END]) for row in ids])


def batches(names: Names, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Kinds as the root of their numbers: room for first names, which are few, without learning them by heart."""
    rng, weights = random.Random(seed), [math.sqrt(len(ns)) for ns in names.values()]
    while True:
        yield batch_of([(kind, rng.choice(names[kind])) for kind in rng.choices(list(names), weights, k=size)])


def loss_of(model: Writer, batch: tuple[Tensor, Tensor]) -> Tensor:
    given, wanted = batch
    return cross_entropy(model(given)[0].flatten(0, 1), wanted.flatten(), ignore_index=PAD)


def perplexity(model: Writer, names: Names) -> dict[str, float]:
    """exp of the mean loss per letter, of 2,000 names at most of each kind."""
    with torch.no_grad():
        return {k: math.exp(loss_of(model, batch_of([(k, name) for name in names[k][:2000]]))) for k in names}


def trigram_perplexity(train: Names, held: Names) -> dict[str, float]:
    """Of counts: letters after two, after one and anywhere, mixed 6 : 3 : 1, apart for each kind."""
    found = {}
    for kind in train:
        counts = [Counter(), Counter(), Counter()]  # by the length of the context
        for name in train[kind]:
            text = "^^" + name + "$"
            for i in range(2, len(text)):
                for n in range(3):
                    counts[n][text[i - n : i + 1]] += 1
                    counts[n][text[i - n : i], None] += 1  # how often the context itself
        loss = [0.0, 0]
        for name in held[kind][:2000]:
            text = "^^" + name + "$"
            for i in range(2, len(text)):
                parts = [counts[n][text[i - n : i + 1]] / max(1, counts[n][text[i - n : i], None]) for n in range(3)]
                loss = [loss[0] - math.log(0.6 * parts[2] + 0.3 * parts[1] + 0.1 * parts[0] + 1e-6), loss[1] + 1]
        found[kind] = math.exp(loss[0] / loss[1])
    return found


def columns(perplexities: dict[str, float]) -> dict[str, str]:
    return {f"perplexity: {kind}": f"{value:.2f}" for kind, value in perplexities.items()}


def plot(runs: list[common.Run], held: Names, baseline: float, path: str) -> None:
    """Perplexity while training; and how long the names are, real and written."""
    figure, axes = common.figure(runs, "perplexity per letter, held-out surnames", 1, ("trigram counts", baseline))
    bins = range(1, 14)

    def share(names: list[str]) -> list[float]:
        return [sum(len(name) == n for name in names) / len(names) for n in bins]

    axes[1].bar(bins, share(held["surname"]), color="#cccccc", label="real, held out")
    for r in runs:
        written = r.model.sample("surname", 2000, torch.Generator().manual_seed(0))
        axes[1].plot(bins, share(written), color=common.COLORS[r.cell], marker="o", markersize=3, label=r.cell)
    axes[1].set(xlabel="letters of a surname", ylabel="share of names", title="2,000 written surnames")
    axes[1].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = common.arguments(__doc__, updates=1000, quick=100)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.8, help="of the printed samples; default: 0.8")
    a = common.parse(parser)
    train, held = read()
    known = {name for names in train.values() for name in names}
    runs = []
    for cell in a.cell:
        torch.manual_seed(a.seed)
        check = lambda model: perplexity(model, {"surname": held["surname"]})["surname"]  # noqa: E731
        model = Writer(cell, a.hidden)
        runs.append(r := common.train(cell, model, batches(train, 128, a.seed), loss_of, check, a.updates))
        generator = torch.Generator().manual_seed(a.seed)
        written = [name for kind in train for name in r.model.sample(kind, 500, generator)]
        new = sum(name not in known for name in written) / len(written)
        r.scores.update({**columns(perplexity(r.model, held)), "new names, %": f"{100 * new:.0f}"})
        for kind in train:
            samples = r.model.sample(kind, 8, generator, a.temperature)
            print(f"{cell:4} {kind:8}", *(name.title() for name in samples))
    baseline = trigram_perplexity(train, held)
    print(common.table(runs, {"trigram counts": columns(baseline)}))
    if a.plot:
        plot(runs, held, baseline["surname"], a.plot)


if __name__ == "__main__":
    main()
