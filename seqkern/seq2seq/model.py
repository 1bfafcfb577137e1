"""Encoder, bridge and decoder in one module, with its searches."""

import copy

import torch
from torch import Tensor, nn

from .. import masks
from . import compiled, graphs, search
from .beam import BeamOptions
from .decoder import Decoder
from .encoder import Bridge, Encoder, Memory
from .search import GreedyOptions, Hypotheses, SampleOptions


class Searches:
    """The searches that a model has, and a compiled one.

    source: [S, B] int64, or [S, B, E] for an encoder without a vocabulary. lengths: [B] int64, zeros allowed, or None:
    all are S. They run without gradients and without dropout. Raises ValueError for options that make no sense.
    """

    def greedy(
        self, source: Tensor, lengths: Tensor | None = None, *, max_len: int = 50, attention: bool = False
    ) -> Hypotheses:
        """The likeliest token at every step, until eos or max_len tokens; see `search.greedy`."""
        return self._found("greedy", source, lengths, GreedyOptions(max_len, attention))

    def beam(
        self,
        source: Tensor,
        lengths: Tensor | None = None,
        *,
        beam: int = 5,
        n_best: int = 1,
        max_len: int = 50,
        min_len: int = 0,
        length_penalty: float = 0.0,
        coverage_penalty: float = 0.0,
        early_stop: bool = False,
        attention: bool = False,
    ) -> Hypotheses:
        """The n_best best of the hypotheses that a beam finds; see `beam.beam` for what each argument does."""
        options = BeamOptions(beam, n_best, max_len, min_len, length_penalty, coverage_penalty, early_stop, attention)
        return self._found("beam", source, lengths, options)

    def sample(
        self,
        source: Tensor,
        lengths: Tensor | None = None,
        *,
        max_len: int = 50,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Hypotheses:
        """Tokens drawn step by step; see `search.sample` and `search.SampleOptions`."""
        options = SampleOptions(max_len, temperature, top_k, top_p)
        options.check()
        return self._found("sample", source, lengths, options, masks.draw_seed(generator, source.device))


class Seq2Seq(Searches, nn.Module):
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
    def _found(self, kind: str, source: Tensor, lengths: Tensor | None, options, *seed: Tensor) -> Hypotheses:
        options.check()
        training = [m for m in self.modules() if m.training]
        self.eval()
        try:
            memory, state = self.encode(source, lengths)
            return compiled.find(kind, self.decoder, memory, state, options, *seed)
        finally:
            for m in training:
                m.training = True

    def compile_search(self) -> "CompiledSearch":
        """The searches with the weights as they are now, prepared once: for many calls, or one word at a time.

        A copy of the model; what becomes of this one's weights afterwards does not show in it. `greedy`, `beam` and
        `sample` of the model itself prepare the decoder again on every call.
        """
        return CompiledSearch(self)


class CompiledSearch(Searches):
    """`greedy`, `beam` and `sample` of a model as it was when this was made; from `Seq2Seq.compile_search`."""

    def __init__(self, model: Seq2Seq) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        decoder = self.model.decoder
        device = decoder.out.weight.device
        self.program = compiled.Program(decoder) if compiled.covers(decoder, device) else None
        self.graphs = graphs.GraphedSearch(decoder) if device.type == "cuda" else None

    @torch.no_grad()
    def _found(self, kind: str, source: Tensor, lengths: Tensor | None, options, *seed: Tensor) -> Hypotheses:
        options.check()
        memory, state = self.model.encode(source, lengths)
        if self.graphs is not None:
            return self.graphs.find(kind, memory, state, options, *seed)
        if self.program is None:
            return compiled.find(kind, self.model.decoder, memory, state, options, *seed)
        return getattr(self.program, kind)(memory, state, options, *seed)
