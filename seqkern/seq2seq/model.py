"""Encoder, bridge and decoder in one module, with its searches."""

import torch
from torch import Tensor, nn

from . import search
from .decoder import Decoder
from .encoder import Bridge, Encoder, Memory


class Seq2Seq(nn.Module):
    """A sequence-to-sequence model: `Encoder`, `Bridge`, `Decoder`.

    Args:
        encoder, decoder: the parts; the decoder's memory_size is the encoder's `size`.
        bridge: "linear", "copy" or a `Bridge`.
    """

    def __init__(self, encoder: Encoder, decoder: Decoder, bridge: str | nn.Module = "linear") -> None:
        super().__init__()
        if decoder.context is not None and decoder.context.in_features != encoder.size:
            got = decoder.context.in_features
            raise ValueError(f"the decoder's memory_size must be the encoder's D*H = {encoder.size}, got {got}")
        self.encoder, self.decoder = encoder, decoder
        if isinstance(bridge, str):
            bridge = Bridge(encoder, decoder.cell, decoder.num_layers, decoder.hidden, bridge)
        self.bridge = bridge

    def encode(self, source: Tensor, lengths: Tensor | None = None) -> tuple[Memory, tuple[Tensor, Tensor | None]]:
        """The memory of source [S, B], and the decoder's first state."""
        memory = self.encoder(source, lengths)
        return memory, self.bridge(memory.state)

    def forward(
        self,
        source: Tensor,
        lengths: Tensor | None,
        given: Tensor,
        *,
        sampling: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Logits [T, B, V] of the token after each of given.

        Args:
            source: [S, B] int64, or [S, B, E] for an encoder without a vocabulary.
            lengths: [B] int64, in any order, zeros allowed; None: all are S.
            given: [T, B] int64: bos, then the right tokens (teacher forcing).
            sampling: the probability, drawn for each place, that the decoder is told its own likeliest answer instead
                of the right token (scheduled sampling, Bengio et al. 2015). As no gradient passes through a token, the
                tokens are found first, by a search without dropout, and then given.
            generator: draws the places of `sampling`.

        Raises:
            ValueError: shapes, dtypes, tokens or lengths that do not fit, sampling outside [0, 1].
        """
        memory, state = self.encode(source, lengths)
        if not 0 <= sampling <= 1:
            raise ValueError(f"sampling must be a probability in [0, 1], got {sampling}")
        if sampling:
            given = search.mix(self.decoder, memory, state, given, sampling, generator)
        return self.decoder(given, memory, state)

    @torch.no_grad()
    def _found(self, find, source: Tensor, lengths: Tensor | None, *args) -> search.Hypotheses:
        training = [m for m in self.modules() if m.training]
        self.eval()
        try:
            memory, state = self.encode(source, lengths)
            return find(self.decoder, memory, state, *args)
        finally:
            for m in training:
                m.training = True

    def greedy(
        self, source: Tensor, lengths: Tensor | None = None, *, max_len: int = 50, attention: bool = False
    ) -> search.Hypotheses:
        """The likeliest token at every step, until eos or max_len tokens; see `search.greedy`."""
        return self._found(search.greedy, source, lengths, max_len, attention)
