"""The searches as one operator each on the CPU: a decoder's weights packed once, then the whole loop without Python.

What they find is defined by `search` and `beam`, token by token. Besides what fusing saves, three things are done once
instead of at every step: the embedding is multiplied by the bottom layer's input weights (a table of V rows; Devlin
2017, "Sharp models on dull hardware"), matrices are brought into the order in which the kernels read them, and the
output layer keeps of its scores only what the search asks for, so that nothing of size V is written.
"""

import torch
from torch import Tensor

from . import beam as beams
from . import search
from .attention import Attention
from .decoder import Decoder, State
from .encoder import Memory
from .search import Hypotheses

MAX_LAYERS = 16  # csrc/core/search_args.h
MAX_TABLE = 32 << 20  # numbers in a table that is made whatever it costs


def uncovered(decoder: Decoder, device: torch.device) -> str | None:
    """What keeps the compiled searches from doing this decoder, which the reference then does; None: nothing."""
    if device.type != "cpu":
        return f"device {device.type}"
    if type(decoder).step is not Decoder.step or type(decoder).sources is not Decoder.sources:
        return f"{type(decoder).__name__} has a step or sources of its own"
    if type(decoder.attention) not in (type(None), Attention):
        return f"attention is a {type(decoder.attention).__name__}"
    if decoder.num_layers > MAX_LAYERS:
        return f"{decoder.num_layers} layers, more than {MAX_LAYERS}"
    return "torch.compile is tracing" if torch.compiler.is_compiling() else None


def covers(decoder: Decoder, device: torch.device) -> bool:
    """Whether the compiled searches do this decoder; the reference does the others."""
    return uncovered(decoder, device) is None


def folding_pays(decoder: Decoder, tokens: int | None) -> bool:
    """Whether to multiply the whole embedding by the input weights: for many uses (None) unless the table would be
    large, else where at least a third as many tokens will be read as it has rows."""
    rows, columns = decoder.vocab, decoder._weights()[0][0].size(0)
    return rows * columns <= MAX_TABLE if tokens is None else rows <= 3 * tokens


class Program:
    """A decoder as the operators take it; a snapshot of its weights.

    Args:
        decoder: on the CPU. Weights other than float64 are taken as float32, and so are the states and sources.
        tokens: about how many it will read, or None: as many as it takes to make up for any preparation.
    """

    def __init__(self, decoder: Decoder, tokens: int | None = None) -> None:
        self.decoder = decoder
        self.ids = [decoder.pad, decoder.bos, decoder.eos]
        self.dtype = torch.float64 if decoder.out.weight.dtype == torch.float64 else torch.float32
        (w_ih, w_hh, b_ih, b_hh), *above = ([self._cast(w) for w in layer] for layer in decoder._weights())
        embedding = self._cast(decoder.embedding.weight)
        empty, size, self.embedding = w_ih.new_empty(0), embedding.size(1), None
        if folding_pays(decoder, tokens):
            table, w_ih, size = torch.addmm(b_ih, embedding, w_ih[:, :size].t()), w_ih[:, size:], 0
        else:
            table, self.embedding = empty, embedding
        kind, query, sources = "none", [], []
        if decoder.attention is not None:
            w_query, v = decoder.attention.scorer
            kind = "dot" if v is None else "additive"
            query = [] if v is None else [self._cast(w_query), self._cast(v)]
            key = decoder.attention.key
            projections = [decoder.context.weight, *([] if key is None else [key.weight, key.bias])]
            sources = [self._cast(w) for w in projections if w is not None]
        pre, out = (
            [] if part is None else [self._cast(part.weight), self._cast(part.bias)]
            for part in (decoder.pre, decoder.out)
        )
        layers = [w_hh, b_hh, *(w for layer in above for w in layer)]
        self.packed = torch.ops.seqkern.search_pack(
            table, w_ih, b_ih, layers, sources, query, pre, out, decoder.mode, kind, size
        )

    def _cast(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().to(self.dtype)

    def _given(self, memory: Memory, state: State) -> list[Tensor | None]:
        values = None if self.decoder.attention is None else self._cast(memory.values)
        return [self.packed, self.embedding, values, memory.lengths.cpu(), *map(self._cast, state)]

    def greedy(self, memory: Memory, state: State, options: search.GreedyOptions) -> Hypotheses:
        given = self._given(memory, state)
        found = torch.ops.seqkern.search_greedy(*given, None, self.ids, options.max_len, options.attention)
        return _hypotheses(memory, found)

    def sample(self, memory: Memory, state: State, options: search.SampleOptions, seed: Tensor) -> Hypotheses:
        given = self._given(memory, state)
        return _hypotheses(memory, torch.ops.seqkern.search_sample(*given, seed, self.ids, *options))

    def beam(self, memory: Memory, state: State, options: beams.BeamOptions) -> Hypotheses:
        given = self._given(memory, state)
        return _hypotheses(memory, torch.ops.seqkern.search_beam(*given, self.ids, list(options[:4]), *options[4:]))

    def mix(self, memory: Memory, state: State, given: Tensor, own: Tensor) -> Tensor:
        """given [T, B] with the decoder's likeliest tokens where own [T, B] says so."""
        if given.size(0) < 2:
            return given.clone()
        forced = given.masked_fill(own, -1)
        forced[0] = given[0]
        found = torch.ops.seqkern.search_greedy(*self._given(memory, state), forced, self.ids, given.size(0) - 1, False)
        return torch.cat([given[:1], found[0][0]])


def _hypotheses(memory: Memory, found: tuple[Tensor, Tensor, Tensor, Tensor]) -> Hypotheses:
    tokens, lengths, scores, attention = found
    longest = max(int(lengths.max()), 0) if lengths.numel() else 0
    dtype = memory.values.dtype
    kept = attention[:, :longest].to(dtype) if attention.numel() else None
    return Hypotheses(tokens[:, :longest], lengths, scores.to(dtype), kept)


def find(kind: str, decoder: Decoder, memory: Memory, state: State, options, *seed: Tensor) -> Hypotheses:
    """The search "greedy", "beam" or "sample", compiled where it can be: the only place that chooses."""
    if covers(decoder, memory.values.device):
        program = Program(decoder, memory.lengths.numel() * getattr(options, "beam", 1) * options.max_len)
        return getattr(program, kind)(memory, state, options, *seed)
    return REFERENCES[kind](decoder, memory, state, options, *seed)


REFERENCES = {"greedy": search.greedy, "beam": beams.beam, "sample": search.sample}
