"""Pictures of which letters the model looked at for which phoneme."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from torch import Tensor

from g2p_tool.data import MAX_PHONEMES, phoneme_names, spell
from seqkern.seq2seq import Seq2Seq


def attended(model: Seq2Seq, word: str) -> tuple[list[str], Tensor]:
    """What the model says greedily, T phonemes, and its weights [T, S]. Raises ValueError without attention."""
    if model.decoder.attention is None:
        raise ValueError("wanted a model with attention to plot, got one that was trained with --attention none")
    found = model.greedy(*spell([word]), max_len=MAX_PHONEMES, attention=True)
    said = phoneme_names(found.sentences()[0][0])
    return said, found.attention[0, : len(said), 0]


def heat_maps(model: Seq2Seq, words: Sequence[str], columns: int = 3) -> Figure:
    """One map for each word: its letters from left to right, its phonemes from top to bottom."""
    columns = min(columns, len(words))
    rows = -(-len(words) // columns)
    figure = Figure(figsize=(4 * columns, 3.6 * rows), layout="constrained")
    for i, word in enumerate(words, 1):
        said, weights = attended(model, word)
        axes = figure.add_subplot(rows, columns, i, title=word)
        if said:  # a model that says nothing looks at nothing
            axes.imshow(weights.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(word)), list(word))
        axes.set_yticks(range(len(said)), said)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return figure
