"""What writes the target: recurrent layers, attention, the attentional vector, the scores of the next token."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop

from .. import functional
from . import ops, reference
from .attention import KINDS, Attention, project
from .encoder import Memory, check_tokens, layer_class

State = tuple[Tensor, Tensor | None]  # h [L, B, H] and the LSTM's c [L, B, H]


class Carry(NamedTuple):
    """What one step of decoding hands to the next."""

    h: Tensor  # [L, N, H]
    c: Tensor | None  # [L, N, H]
    feed: Tensor | None  # [N, A], with input feeding


class Decoder(nn.Module):
    """A conditional language model over the target's tokens.

    At step t the layers read the embedding of the token before (with input feeding, beside it the attentional vector of
    the step before); the top layer's h is the query of the attention; the attentional vector is
    a_t = tanh(W_h h_t + W_c context_t + b) (Luong et al. 2015, eq. 5) and the scores of the next token W_out a_t + b.
    Without attention the encoder's context vector, the first state, is all that the decoder knows of the source.

    Args:
        vocab: V. embedding: E. hidden: H. memory_size: M, the size of the encoder's values.
        cell, num_layers: as in `Encoder`.
        attention: "none", or a kind of `Attention`.
        input_feeding: feed a_{t-1} back; needs attention.
        pre_output: A, the size of the attentional vector; None: H with attention, and no such layer without.
        dropout: the probability of a zero in the embedded tokens, between layers, and in what the output layer reads.
        tied: the output layer's weights are the embedding's (Press and Wolf 2017); E must be A (H without that layer).
        pad, bos, eos: ids of padding (never written by a search), of what begins a target, and of what ends it.

    Raises:
        ValueError: an unknown cell or attention, ids outside the vocabulary or equal, input feeding without attention,
            tied embeddings of another size.
    """

    def __init__(
        self,
        vocab: int,
        embedding: int,
        hidden: int,
        memory_size: int,
        *,
        cell: str = "gru",
        num_layers: int = 1,
        attention: str = "general",
        input_feeding: bool = False,
        pre_output: int | None = None,
        dropout: float = 0.0,
        tied: bool = False,
        pad: int = 0,
        bos: int = 1,
        eos: int = 2,
    ) -> None:
        super().__init__()
        if attention not in KINDS:
            raise ValueError(f"attention must be one of {', '.join(KINDS)}, got {attention!r}")
        if input_feeding and attention == "none":
            raise ValueError("input_feeding feeds the attentional vector back: it needs attention, got 'none'")
        ids = (pad, bos, eos)
        if len({*ids}) < 3 or not all(0 <= i < vocab for i in ids):
            raise ValueError(f"pad, bos and eos must be three ids in [0, V) = [0, {vocab}), got {ids}")
        self.vocab, self.cell, self.hidden, self.num_layers = vocab, cell, hidden, num_layers
        self.pad, self.bos, self.eos = ids
        self.input_feeding = input_feeding
        if pre_output is None and attention != "none":
            pre_output = hidden
        read = pre_output or hidden  # what the output layer reads
        if tied and embedding != read:
            raise ValueError(f"tied embeddings need E = {read}, the size that the output layer reads, got {embedding}")
        self.embedding = nn.Embedding(vocab, embedding, pad)
        self.dropout = nn.Dropout(dropout)
        self.layers = layer_class(cell)(
            embedding + (pre_output if input_feeding else 0),
            hidden,
            num_layers,
            dropout=dropout if num_layers > 1 else 0.0,
        )
        self.attention = None if attention == "none" else Attention(attention, hidden, memory_size)
        self.pre = None if not pre_output else nn.Linear(hidden, pre_output)
        self.context = None if self.attention is None else nn.Linear(memory_size, pre_output, bias=False)
        self.out = nn.Linear(read, vocab)
        if tied:
            self.out.weight = self.embedding.weight

    @property
    def mode(self) -> str:
        """The cell's key in `seqkern.reference.CELLS`."""
        return "rnn_tanh" if self.cell == "rnn" else self.cell

    def sources(self, memory: Memory) -> reference.Sources | None:
        """Keys and values, projected once for all steps; None without attention."""
        return None if self.attention is None else project(memory, self.attention, self.context)

    def _weights(self) -> list[list[Tensor]]:
        """w_ih, w_hh, b_ih, b_hh of each layer."""
        flat = self.layers._flat_weights
        return [flat[4 * layer : 4 * layer + 4] for layer in range(self.num_layers)]

    def split_weights(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The bottom layer's weights for the embedding, its b_ih, and the other weights in the order of
        `reference.attention_decoder`; without input feeding its w_feed is empty."""
        (w_ih, w_hh, b_ih, b_hh), *above = self._weights()
        size = self.embedding.embedding_dim
        # One split, whose gradient is one concatenation: two slices would each fill a matrix of zeros.
        w_embed, w_feed = w_ih.split((size, w_ih.size(1) - size), 1)
        return w_embed, b_ih, [w_feed, w_hh, b_hh, *(w for layer in above for w in layer)]

    def vectors(
        self, given: Tensor, memory: Memory, state: State, feed: Tensor | None = None
    ) -> tuple[Tensor, Carry, Tensor | None]:
        """What the output layer reads [T, B, A or H], what a next call goes on with, the weights [T, B, S] or None.

        Args: as in `forward`; feed: [B, A], zeros where None.
        """
        check_tokens("given", given, 2, self.vocab)
        if given.size(0) == 0:
            raise ValueError(f"given must have at least one step, got {list(given.shape)}")
        h, c = state
        sources = self.sources(memory)
        if self.input_feeding:
            return self._feeding(given, sources, h, c, feed)
        x = self.dropout(self.embedding(given))
        y, last = self.layers(x, h if c is None else (h, c))
        h, c = last if isinstance(last, tuple) else (last, None)
        if sources is None:
            return y if self.pre is None else torch.tanh(self.pre(y)), Carry(h, c, None), None
        weights = self.attention(y, sources.keys, sources.lengths)
        a = reference.attentional_vector(y, weights, sources.values, self.pre.weight, self.pre.bias)
        return a, Carry(h, c, None), weights

    def reads_table(self, places: int) -> bool:
        """Whether input feeding projects the vocabulary, of which each place then reads its token's row: where it has
        fewer rows than there are places, and no dropout makes places of a token differ."""
        return self.vocab < places and not (self.training and self.dropout.p)

    def _feeding(self, given: Tensor, sources: reference.Sources, h: Tensor, c: Tensor | None, feed: Tensor | None):
        w_embed, b_ih, weights = self.split_weights()
        tokens = given if self.reads_table(given.numel()) else None
        read = given if tokens is None else torch.arange(self.vocab, device=given.device)
        gx = nn.functional.linear(self.dropout(self.embedding(read)), w_embed, b_ih)
        masks = None
        if self.training and self.dropout.p and self.num_layers > 1:
            masks = drop(gx.new_ones(given.size(0), self.num_layers - 1, given.size(1), self.hidden), self.dropout.p)
        scorer = self.attention.scorer
        a, h, c_n, alpha = run_attention_decoder(
            gx, feed, h, c, weights, *sources, *scorer, self.pre.weight, self.pre.bias, masks, self.mode, tokens
        )
        return a, Carry(h, None if c is None else c_n, a[-1]), alpha

    def forward(self, given: Tensor, memory: Memory, state: State) -> Tensor:
        """Scores of the next token at every step, under teacher forcing.

        Args:
            given: [T, B] int64, what the decoder is told: bos, then the right tokens.
            memory: what the `Encoder` returned.
            state: h and c as from a `Bridge`.

        Returns:
            Logits [T, B, V].

        Raises:
            ValueError: given of another shape or dtype, T = 0, tokens outside the vocabulary.
        """
        return self.out(self.dropout(self.vectors(given, memory, state)[0]))

    def step(
        self, tokens: Tensor, sources: reference.Sources | None, carry: Carry
    ) -> tuple[Tensor, Carry, Tensor | None]:
        """One step without dropout, operation by operation: the definition of what a compiled search computes.

        Args:
            tokens: [N] int64, the token before.
            sources: those of `self.sources`, one row for each of the N.

        Returns:
            Logits [N, V], the next carry, and the weights [N, S] or None.
        """
        w_embed, b_ih, weights = self.split_weights()
        gx = nn.functional.linear(self.embedding(tokens), w_embed, b_ih)
        if carry.feed is not None:
            gx = gx + nn.functional.linear(carry.feed, weights[0])
        h, c = reference.stack_step(
            gx, list(carry.h), None if carry.c is None else list(carry.c), weights, None, self.mode
        )
        top, alpha = h[-1], None
        if sources is not None:
            alpha = self.attention(top, sources.keys, sources.lengths)
            a = reference.attentional_vector(top, alpha, sources.values, self.pre.weight, self.pre.bias)
        else:
            a = top if self.pre is None else torch.tanh(self.pre(top))
        carry = Carry(torch.stack(h), None if c is None else torch.stack(c), a if self.input_feeding else None)
        return self.out(a), carry, alpha

    def first_carry(self, state: State) -> Carry:
        """What decoding starts from; state as from a `Bridge`."""
        h, c = state
        return Carry(h, c, h.new_zeros(h.size(1), self.pre.out_features) if self.input_feeding else None)


def unfused(device: torch.device, dtype: torch.dtype) -> str | None:
    """What the fused operator does not do, of such a call; None where it does it."""
    if device.type != "cpu":
        return f"device {device.type}"
    if not functional.has_kernel(device, dtype):
        return f"dtype {str(dtype).removeprefix('torch.')}"
    return "the transforms of torch.func and forward-mode derivatives" if functional.transformed() else None


def run_attention_decoder(*args) -> Sequence[Tensor]:
    """`reference.attention_decoder`, on the fused operator where there is one: the only place that chooses."""
    gx, lengths = args[0], args[7]
    if unfused(gx.device, gx.dtype):
        return reference.attention_decoder(*args)
    return ops.run(*args[:7], lengths.cpu(), *args[8:])
