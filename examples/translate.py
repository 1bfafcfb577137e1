"""Many-to-many: Spanish into English, verse by verse, with attention.

    apt-get install sword-text-sparv sword-text-web          (the data: two public-domain Bibles in Debian and Ubuntu)
    python examples/translate.py --plot translate.png
    python examples/translate.py --cell RNN LSTM GRU         all three cells, one after the other

The Reina-Valera of 1909 and the World English Bible share 31,077 verses; here are those of at most 20 words on each
side, 8,567, lower-cased, with marks apart; words that training has seen once are <unk>. Verses of the test part that
stand in the training part too, in either language, are left out: the Bible repeats itself. BLEU is sacrebleu's, on
these words, greedy and with a beam. The baseline answers with the English of the most similar Spanish verse that
training has.

A bidirectional encoder, Luong's general attention, a decoder: `seqkern.seq2seq`. A few minutes on a few thousand verses
do not make a translator; they show the parts at work, and the heat map where the decoder looks as it writes.

Needs: pip install pysword sacrebleu tqdm matplotlib, and the two modules above; without root:
    apt-get download sword-text-sparv sword-text-web && for f in sword-text-*.deb; do dpkg -x $f bibles; done
    python examples/translate.py --sword bibles/usr/share/sword
"""

import functools
import math
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import common
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from seqkern.seq2seq import Decoder, Encoder, Seq2Seq

SPANISH, ENGLISH = "spaRV1909eb", "engWEB2015eb"
INSTALL = "apt-get install sword-text-sparv sword-text-web (without root: see --help)"
PAD, BOS, EOS, UNK = range(4)
LONGEST = 20

Verse = tuple[list[str], list[str]]  # Spanish, English
Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # source [S, B], lengths [B], given [T, B], wanted [T, B]


def words_of(markup: str) -> list[str]:
    """Words and marks of a verse in OSIS markup, without its notes. Notes stand between words without a space."""
    text = re.sub(r"<(note|title)\b.*?</\1>", " ", markup, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", "", text).lower()
    return re.findall(r"\w+(?:[’'-]\w+)*|[^\w\s¶]", text)


def read_bible(root: str, name: str) -> dict[tuple[str, int, int], list[str]]:
    """Words of each verse, by book, chapter and number."""
    if not any(Path(root, "mods.d", f"{n}.conf").is_file() for n in (name, name.lower())):
        raise SystemExit(f"The data of this example, SWORD module {name}, is not in {root}: {INSTALL}")
    from pysword.modules import SwordModules

    modules = SwordModules(root)
    modules.parse_modules()
    bible = modules.get_bible_from_module(name)
    # pysword unpacks a whole book for every verse.
    bible._decompressed_text = functools.lru_cache(2)(bible._decompressed_text)
    verses = {}
    for book in (b for testament in bible.get_structure().get_books().values() for b in testament):
        for chapter, count in enumerate(book.chapter_lengths, 1):
            for number in range(1, count + 1):
                markup = bible.get(books=[book.name], chapters=[chapter], verses=[number], clean=False)
                if words := words_of(markup):
                    verses[book.name, chapter, number] = words
    return verses


def read(root: str) -> list[Verse]:
    """The verses that both have, in the Spanish one's order, none longer than LONGEST."""
    spanish, english = read_bible(root, SPANISH), read_bible(root, ENGLISH)
    pairs = [(words, english[key]) for key, words in spanish.items() if key in english]
    return [pair for pair in pairs if max(map(len, pair)) <= LONGEST]


def split(verses: list[Verse]) -> dict[str, list[Verse]]:
    """Of twenty, the first to validate, the second to test; both without what training has in either language."""
    train = [verse for i, verse in enumerate(verses) if i % 20 > 1]
    seen = [{" ".join(verse[side]) for verse in train} for side in (0, 1)]
    parts = {"train": train}
    for place, name in enumerate(("validation", "test")):
        parts[name] = [v for v in verses[place::20] if all(" ".join(v[side]) not in seen[side] for side in (0, 1))]
    return parts


class Vocabulary:
    """Ids of the words that stand at least twice in `sentences`; the others are UNK."""

    def __init__(self, sentences: list[list[str]]):
        counts = Counter(word for sentence in sentences for word in sentence)
        self.words = ["", "", "", "<unk>", *sorted(word for word, count in counts.items() if count > 1)]
        self.ids = {word: i for i, word in enumerate(self.words) if i >= UNK}

    def __len__(self) -> int:
        return len(self.words)

    def __call__(self, sentence: list[str]) -> Tensor:
        return torch.tensor([self.ids.get(word, UNK) for word in sentence])


def make_model(cell: str, source: int, target: int, hidden: int, embedding: int = 128) -> Seq2Seq:
    """Vocabularies of `source` and `target` words; the output layer shares the target embedding's weights."""
    shared = {"cell": cell.lower(), "dropout": 0.3}
    encoder = Encoder(source, embedding, hidden // 2, bidirectional=True, padding_idx=PAD, **shared)
    decoder = Decoder(
        target, embedding, hidden, hidden, attention="general", pre_output=embedding, tied=True,
        pad=PAD, bos=BOS, eos=EOS, **shared,
    )  # fmt: skip
    return Seq2Seq(encoder, decoder)


class Task(NamedTuple):
    parts: dict[str, list[Verse]]
    spanish: Vocabulary
    english: Vocabulary

    def source(self, verses: list[Verse]) -> tuple[Tensor, Tensor]:
        rows = [self.spanish(source) for source, _ in verses]
        return pad_sequence(rows, padding_value=PAD), torch.tensor([len(row) for row in rows])

    def batches(self, size: int, seed: int) -> Iterator[Batch]:
        """Verses of about one length side by side: the decoder spends time on padding."""
        rng, verses = random.Random(seed), list(self.parts["train"])
        while True:
            rng.shuffle(verses)
            for start in range(0, len(verses), 20 * size):
                pool = sorted(verses[start : start + 20 * size], key=lambda verse: len(verse[1]))
                groups = [pool[i : i + size] for i in range(0, len(pool), size)]
                for group in rng.sample(groups, len(groups)):
                    rows = [self.english(target) for _, target in group]
                    given = pad_sequence([torch.cat([torch.tensor([BOS]), row]) for row in rows], padding_value=PAD)
                    wanted = pad_sequence([torch.cat([row, torch.tensor([EOS])]) for row in rows], padding_value=PAD)
                    yield *self.source(group), given, wanted

    def translate(self, model: Seq2Seq, verses: list[Verse], beam: int = 1) -> list[list[str]]:
        options = {"max_len": 2 * LONGEST}
        search = functools.partial(model.beam, beam=beam, length_penalty=1.0) if beam > 1 else model.greedy
        found = search(*self.source(verses), **options).sentences()
        return [[self.english.words[i] for i in best[0]] for best in found]


def loss_of(model: Seq2Seq, batch: Batch) -> Tensor:
    source, lengths, given, wanted = batch
    logits = model(source, lengths, given).flatten(0, 1)
    return cross_entropy(logits, wanted.flatten(), ignore_index=PAD, label_smoothing=0.1)


def bleu(answers: list[list[str]], verses: list[Verse]) -> float:
    import sacrebleu

    wanted = [[" ".join(target) for _, target in verses]]
    return sacrebleu.corpus_bleu([" ".join(answer) for answer in answers], wanted, tokenize="none", force=True).score


def most_similar(train: list[Verse], verses: list[Verse]) -> list[list[str]]:
    """The English of the training verse whose Spanish words are nearest: cosine of word counts, rare words first."""
    seen = Counter(word for source, _ in train for word in set(source))
    index = {word: i for i, word in enumerate(seen)}

    def vectors(some: list[Verse]) -> Tensor:
        found = torch.zeros(len(some), len(index))
        for row, (source, _) in zip(found, some, strict=True):
            for word in source:
                if word in index:
                    row[index[word]] += math.log(len(train) / seen[word])
        return nn.functional.normalize(found, dim=1)

    return [train[i][1] for i in (vectors(verses) @ vectors(train).T).argmax(1)]


def plot(runs: list[common.Run], task: Task, verse: Verse, path: str) -> None:
    """BLEU while training; where the best model looks as it writes each word of one verse."""
    figure, axes = common.figure(runs, "BLEU of greedy search, validation", 1)
    model = max(runs, key=lambda r: r.curve[-1][1]).model
    found = model.greedy(*task.source([verse]), max_len=2 * LONGEST, attention=True)
    words = [task.english.words[i] for i in found.sentences()[0][0]]
    axes[1].imshow(found.attention[0, : len(words), 0], cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes[1].set_xticks(range(len(verse[0])), verse[0], rotation=60, ha="right", rotation_mode="anchor")
    axes[1].set_yticks(range(len(words)), words)
    axes[1].set_title("weights of the attention: each row's sum is 1")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = common.arguments(__doc__, updates=1000, quick=30)
    parser.set_defaults(cell=["GRU"])
    parser.add_argument("--sword", default="/usr/share/sword", metavar="FOLDER", help="default: /usr/share/sword")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--beam", type=int, default=5, help="hypotheses; 1: greedy search only; default: 5")
    a = common.parse(parser)
    parts = split(read(a.sword))
    task = Task(parts, *(Vocabulary([verse[side] for verse in parts["train"]]) for side in (0, 1)))
    validation, test = parts["validation"][:200], parts["test"]
    runs = []
    for cell in a.cell:
        torch.manual_seed(a.seed)
        check = lambda model: bleu(task.translate(model, validation), validation)  # noqa: E731
        model = make_model(cell, len(task.spanish), len(task.english), a.hidden)
        runs.append(r := common.train(cell, model, task.batches(64, a.seed), loss_of, check, a.updates, rate=3e-3))
        answers = {"greedy": task.translate(r.model, test)}
        if a.beam > 1:
            answers[f"beam {a.beam}"] = task.translate(r.model, test, a.beam)
        for i in range(0, len(test), len(test) // 4):
            print(f"{cell:4} Spanish  {' '.join(test[i][0])}\n     English  {' '.join(test[i][1])}")
            for name, found in answers.items():
                print(f"     {name:8} {' '.join(found[i])}")
        r.scores.update({f"BLEU, {name}": f"{bleu(found, test):.1f}" for name, found in answers.items()})
    similar = f"{bleu(most_similar(parts['train'], test), test):.1f}"
    print(common.table(runs, {"most similar verse": {"BLEU, greedy": similar}}))
    if a.plot:
        shown = next(v for v in test if 8 <= len(v[0]) <= 12 and all(w in task.spanish.ids for w in v[0]))
        plot(runs, task, shown, a.plot)


if __name__ == "__main__":
    main()
