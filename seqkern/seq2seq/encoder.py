"""What reads the source, and what hands its last state to the decoder."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import modules

LAYERS = {"rnn": modules.RNN, "gru": modules.GRU, "lstm": modules.LSTM}


def layer_class(cell: str) -> type[nn.RNNBase]:
    """seqkern's layer for "rnn", "gru" or "lstm"; ValueError for another name."""
    if cell not in LAYERS:
        raise ValueError(f"cell must be one of {', '.join(LAYERS)}, got {cell!r}")
    return LAYERS[cell]


def check_tokens(name: str, tokens: Tensor, dims: int, vocab: int) -> None:
    """ValueError unless tokens are int64 of `dims` dimensions and, where that can be read at once, in [0, vocab)."""
    shape = "[S, B]" if dims == 2 else "[B]"
    if tokens.dim() != dims or tokens.dtype != torch.int64:
        raise ValueError(f"{name} must be {shape} int64, got {list(tokens.shape)} {tokens.dtype}")
    if tokens.device.type == "cpu" and tokens.numel() and not torch.compiler.is_compiling():
        low, high = tokens.aminmax()
        if low < 0 or high >= vocab:
            raise ValueError(f"{name} must hold tokens in [0, V) = [0, {vocab}), got {int(low if low < 0 else high)}")


class Memory(NamedTuple):
    """What an encoder hands on. Shapes: S source steps, B batch, D directions, L layers, H its hidden size."""

    values: Tensor  # [S, B, D*H]: the top layer's outputs; zeros from a row's length on
    lengths: Tensor  # [B] int64
    state: tuple[Tensor, Tensor | None]  # h [L*D, B, H] after each row's last step, and the LSTM's c


class Encoder(nn.Module):
    """An embedding and a stack of recurrent layers over a batch of sequences of any lengths, in any order.

    Args:
        vocab: V, the number of tokens; None: the input is vectors already, and there is no embedding.
        embedding: E, the size of a token's vector.
        hidden: H, of each direction.
        cell: "rnn" (tanh), "gru" or "lstm".
        num_layers, bidirectional: as in torch.nn.GRU.
        dropout: the probability of a zero in the embedded input and between layers.
        padding_idx: as in torch.nn.Embedding.

    Raises:
        ValueError: another cell, a dropout outside [0, 1].
    """

    def __init__(
        self,
        vocab: int | None,
        embedding: int,
        hidden: int,
        *,
        cell: str = "gru",
        num_layers: int = 1,
        bidirectional: bool = True,
        dropout: float = 0.0,
        padding_idx: int | None = 0,
    ) -> None:
        super().__init__()
        self.vocab, self.cell, self.hidden, self.num_layers = vocab, cell, hidden, num_layers
        self.directions = 2 if bidirectional else 1
        self.embedding = None if vocab is None else nn.Embedding(vocab, embedding, padding_idx)
        self.dropout = nn.Dropout(dropout)
        self.layers = layer_class(cell)(
            embedding, hidden, num_layers, bidirectional=bidirectional, dropout=dropout if num_layers > 1 else 0.0
        )

    @property
    def size(self) -> int:
        """D*H, the size of the memory's values."""
        return self.directions * self.hidden

    def forward(self, source: Tensor, lengths: Tensor | None = None) -> Memory:
        """Reads source [S, B] int64, or [S, B, E] without a vocabulary; lengths [B] int64, None for S everywhere.

        A row of length 0 gives zeros as values and state.

        Raises:
            ValueError: another shape or dtype, S = 0, a token outside the vocabulary, a length outside [0, S].
        """
        if self.vocab is not None:
            check_tokens("source", source, 2, self.vocab)
        elif source.dim() != 3:
            raise ValueError(f"source must be [S, B, E], got {list(source.shape)}")
        steps, batch = source.shape[:2]
        if steps == 0:
            raise ValueError(f"source must have at least one step, got {list(source.shape)}")
        x = self.dropout(source if self.embedding is None else self.embedding(source))
        full = lengths is None
        if full:
            lengths = torch.full((batch,), steps, dtype=torch.int64, device=source.device)
        elif lengths.device.type == "cpu" and not torch.compiler.is_compiling():
            # Without options the layers' plain path serves; the sum alone would not notice lengths beyond S.
            full = lengths.shape == (batch,) and lengths.dtype == torch.int64 and bool((lengths == steps).all())
        values, last = self.layers(x) if full else self.layers(x, lengths=lengths)
        return Memory(values, lengths, last if isinstance(last, tuple) else (last, None))


class Bridge(nn.Module):
    """The decoder's first state from the encoder's last one: every layer's h and c, both directions.

    Decoder layer l takes the directions' states of encoder layer l, side by side, through a linear layer of its own,
    and tanh where it is an h. Of two stacks of different depth the top layers meet; where the decoder's is deeper, its
    lower layers share the encoder's lowest. An LSTM that follows a GRU or RNN starts with c = 0.

    Args:
        encoder: an `Encoder`.
        cell, num_layers, hidden: the decoder's.
        kind: "linear", or "copy": no parameters, for D*H of the encoder equal to the decoder's H.

    Raises:
        ValueError: another kind, or "copy" between different sizes.
    """

    def __init__(self, encoder: Encoder, cell: str, num_layers: int, hidden: int, kind: str = "linear") -> None:
        super().__init__()
        if kind not in ("linear", "copy"):
            raise ValueError(f"bridge must be 'linear' or 'copy', got {kind!r}")
        if kind == "copy" and encoder.size != hidden:
            raise ValueError(f"bridge 'copy' needs D*H of the encoder = H of the decoder, got {encoder.size}, {hidden}")
        self.kind, self.lstm, self.directions = kind, cell == "lstm", encoder.directions
        offset = encoder.num_layers - num_layers
        self.sources = [max(layer + offset, 0) for layer in range(num_layers)]  # the encoder layer of each
        states = 2 if self.lstm and encoder.cell == "lstm" else 1
        projections = 0 if kind == "copy" else states * num_layers
        self.projections = nn.ModuleList(nn.Linear(encoder.size, hidden) for _ in range(projections))

    def forward(self, state: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        """h [L, B, H] and, for an LSTM, c [L, B, H], from the state of a `Memory`."""
        h, c = (None if s is None else s.unflatten(0, (-1, self.directions)).movedim(1, 2).flatten(2) for s in state)
        n = len(self.sources)
        if self.kind == "copy":
            first_h = h[self.sources]
            first_c = c[self.sources] if self.lstm and c is not None else None
        else:
            h_layers, c_layers = self.projections[:n], self.projections[n:]
            first_h = torch.stack([torch.tanh(p(h[i])) for p, i in zip(h_layers, self.sources, strict=True)])
            first_c = torch.stack([p(c[i]) for p, i in zip(c_layers, self.sources, strict=True)]) if c_layers else None
        if self.lstm and first_c is None:
            first_c = torch.zeros_like(first_h)
        return first_h, first_c
