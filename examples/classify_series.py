"""Many-to-one: who speaks? A recurrent layer reads sequences of different lengths, and its last state gives the class.

    python examples/classify_series.py --plot classify.png

Japanese Vowels (Kudo, Toyama and Shimbo 1999): 640 recordings of nine men who say /ae/, each 7 to 29 frames of 12
linear-prediction cepstral coefficients; 270 to train, 370 to test. A batch is padded, in any order, and the layer gets
`lengths`: nothing is sorted or packed, and no padding is read. `h_n` then is each sequence's own last state, and for
the reverse direction the state after its own first frame.

There is so little data that each cell is trained from five seeds; the table has means and standard deviations.

Needs: pip install tqdm matplotlib, and pip install --no-deps aeon (for its data files only: it is not imported)
"""

import statistics
from collections.abc import Iterator

import common
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

import seqkern

INSTALL = "pip install --no-deps aeon"
CLASSES = 9


class Classifier(nn.Module):
    def __init__(self, cell: str, hidden: int):
        super().__init__()
        self.rnn = getattr(seqkern, cell)(12, hidden, bidirectional=True)
        self.dropout = nn.Dropout(0.3)
        self.speaker = nn.Linear(2 * hidden, CLASSES)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Logits [B, 9] from x [T, B, 12]."""
        _, state = self.rnn(x, lengths=lengths)
        h = common.last_state(state)  # [2, B, H]: forward, reverse
        return self.speaker(self.dropout(torch.cat([h[0], h[1]], -1)))


Data = tuple[Tensor, Tensor, Tensor]  # x [T, N, 12], padded with 0; lengths [N]; speakers [N]


def parse_ts(text: str) -> tuple[list[Tensor], list[int]]:
    """Sequences [T, 12] and labels 0 to 8 of a .ts file: after @data, a line has the dimensions and the label."""
    _, _, lines = text.partition("@data\n")
    rows = [line.split(":") for line in lines.splitlines() if line]
    sequences = [torch.tensor([[float(v) for v in part.split(",")] for part in row[:-1]]).T for row in rows]
    return sequences, [int(row[-1]) - 1 for row in rows]


def read() -> tuple[Data, Data]:
    """The official parts, training and test, normalised by the first."""
    folder = "datasets/data/JapaneseVowels/JapaneseVowels_"
    parts = [parse_ts(common.package_file("aeon", f"{folder}{p}.ts", INSTALL).read_text()) for p in ("TRAIN", "TEST")]
    frames = torch.cat(parts[0][0])
    mean, std = frames.mean(0), frames.std(0)
    train, test = (
        (pad_sequence([(x - mean) / std for x in xs]), torch.tensor([len(x) for x in xs]), torch.tensor(labels))
        for xs, labels in parts
    )
    return train, test


def batches(data: Data, size: int, seed: int) -> Iterator[Data]:
    generator = torch.Generator().manual_seed(seed)
    x, lengths, labels = data
    while True:
        for rows in torch.randperm(len(labels), generator=generator).split(size):
            yield x[:, rows], lengths[rows], labels[rows]


def loss_of(model: Classifier, batch: Data) -> Tensor:
    x, lengths, labels = batch
    return cross_entropy(model(x, lengths), labels, label_smoothing=0.1)


def answers(model: Classifier, data: Data) -> Tensor:
    with torch.no_grad():
        return model(*data[:2]).argmax(-1)


def accuracy(model: Classifier, data: Data) -> float:
    return float((answers(model, data) == data[2]).float().mean())


def nearest_mean(train: Data, test: Data) -> float:
    """A baseline without order: the class whose sequences' mean frame is nearest to this one's."""
    frames = [x.sum(0) / lengths.unsqueeze(-1) for x, lengths, _ in (train, test)]
    centres = torch.stack([frames[0][train[2] == c].mean(0) for c in range(CLASSES)])
    return float((torch.cdist(frames[1], centres).argmin(-1) == test[2]).float().mean())


def plot(runs: list[common.Run], test: Data, baseline: float, path: str) -> None:
    """Accuracy while training, and who is taken for whom by the last cell."""
    figure, axes = common.figure(runs, "accuracy on the test part", 1, ("nearest mean frame", baseline))
    best = max(runs, key=lambda r: r.curve[-1][1])
    confusion = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    for wanted, got in zip(test[2], answers(best.model, test), strict=True):
        confusion[wanted, got] += 1
    share = confusion / confusion.sum(1, keepdim=True)
    axes[1].imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i in range(CLASSES):
        for j in range(CLASSES):
            if confusion[i, j]:
                color = "white" if share[i, j] > 0.5 else "black"
                axes[1].text(j, i, int(confusion[i, j]), ha="center", va="center", color=color)
    ticks = range(CLASSES)
    axes[1].set(
        xlabel="answer", ylabel="speaker", title=f"{best.cell}: answers of the first seed",
        xticks=ticks, yticks=ticks, xticklabels=[t + 1 for t in ticks], yticklabels=[t + 1 for t in ticks],
    )  # fmt: skip
    figure.savefig(path, dpi=110)


def train_cell(cell: str, train: Data, test: Data, seeds: range, updates: int, hidden: int = 64) -> common.Run:
    """The run of the first seed, with the scores of all."""
    runs = []
    for seed in seeds:
        torch.manual_seed(seed)
        model = Classifier(cell, hidden)
        check = lambda model: accuracy(model, test)  # noqa: E731
        runs.append(common.train(cell, model, batches(train, 30, seed), loss_of, check, updates))
    correct = [100 * accuracy(r.model, test) for r in runs]
    spread = f" ± {statistics.stdev(correct):.1f}" if len(correct) > 1 else ""
    run = runs[0]._replace(seconds=statistics.mean(r.seconds for r in runs))
    run.scores["test accuracy, %"] = f"{statistics.mean(correct):.1f}{spread}"
    return run


def main() -> None:
    parser = common.arguments(__doc__, updates=500, quick=60)
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each cell; default: 5")
    a = common.parse(parser)
    train, test = read()
    seeds = range(a.seed, a.seed + a.seeds)
    runs = [train_cell(cell, train, test, seeds, a.updates) for cell in a.cell]
    baseline = nearest_mean(train, test)
    print(common.table(runs, {"nearest mean frame": {"test accuracy, %": f"{100 * baseline:.1f}"}}))
    if a.plot:
        plot(runs, test, baseline, a.plot)


if __name__ == "__main__":
    main()
