"""Searches for the target, written out in torch operations: what the compiled ones must find, token by token.

Shapes: T steps, N hypotheses of a source, B batch, S source steps, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import masks
from .decoder import Decoder, State
from .encoder import Memory


class Hypotheses(NamedTuple):
    """What a search found, best first.

    tokens: [N, T, B] int64, without bos and eos, padded with the decoder's pad; T is the longest one's length.
    lengths: [N, B] int64; -1 where a source has fewer than N hypotheses.
    scores: [N, B], the natural logarithm of the probability, of eos too where the search let it end, and with the
        penalties of a beam search; -inf where there is none.
    attention: [N, T, B, S], the weights when each token was chosen; zeros beyond a hypothesis's end. None where not
        asked for, or without attention.
    """

    tokens: Tensor
    lengths: Tensor
    scores: Tensor
    attention: Tensor | None = None

    def sentences(self) -> list[list[list[int]]]:
        """The tokens as lists: of each source, of each of its hypotheses."""
        tokens, lengths = self.tokens.permute(2, 0, 1).tolist(), self.lengths.t().tolist()
        return [
            [row[:length] for row, length in zip(rows, ends, strict=True) if length >= 0]
            for rows, ends in zip(tokens, lengths, strict=True)
        ]


class GreedyOptions(NamedTuple):
    """max_len: the most tokens, without eos. attention: return the weights."""

    max_len: int = 50
    attention: bool = False

    def check(self) -> None:
        check_lengths(self.max_len)


class SampleOptions(NamedTuple):
    """What `sample` draws from.

    temperature: divides the logits. top_k: the number of likeliest tokens to draw from; 0: all. top_p: of those, the
    smallest set of likeliest ones whose share of their probability reaches top_p. Of equally likely ones the lower ids
    are taken first.
    """

    max_len: int = 50
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def check(self) -> None:
        check_lengths(self.max_len)
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0 (0: all tokens), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")


def check_lengths(max_len: int, min_len: int = 0) -> None:
    if max_len < 1:
        raise ValueError(f"max_len must be at least 1, got {max_len}")
    if not 0 <= min_len <= max_len:
        raise ValueError(f"min_len must be in [0, max_len] = [0, {max_len}], got {min_len}")


def greedy(decoder: Decoder, memory: Memory, state: State, options: GreedyOptions) -> Hypotheses:
    """At each step the likeliest token but pad and bos (the lowest id of equals), until eos or max_len tokens."""

    def likeliest(t: int, logits: Tensor) -> Tensor:
        barred = logits.clone()
        barred[:, [decoder.pad, decoder.bos]] = -torch.inf
        return barred.argmax(-1)

    return _walk(decoder, memory, state, options.max_len, options.attention, likeliest)


def sample(decoder: Decoder, memory: Memory, state: State, options: SampleOptions, seed: Tensor) -> Hypotheses:
    """Tokens drawn step by step, until eos or max_len tokens; pad and bos never.

    Row b's draw at step t is the number u = (bits + 1/2) / 2^32 with the bits of element b of stream t of
    `seqkern.masks`: the token is the first, in order of ids, up to which more than the share u of the probability lies.
    So a row's tokens depend on the seed, its place in the batch and its own logits, on nothing else.

    Args:
        seed: [1] int64, as from `masks.draw_seed`.

    Returns:
        Hypotheses; scores are the log-probabilities under the model itself: temperature 1, all tokens.
    """

    barred = torch.zeros(decoder.vocab, dtype=torch.bool, device=memory.values.device)
    barred[[decoder.pad, decoder.bos]] = True

    def drawn(t: int, logits: Tensor) -> Tensor:
        return draw(logits, seed, t, options, barred)

    return _walk(decoder, memory, state, options.max_len, False, drawn)


def draw(logits: Tensor, seed: Tensor, t: int | Tensor, options: SampleOptions, barred: Tensor) -> Tensor:
    """Tokens [B] of step t from logits [B, V], none of the barred ones, [V] bool; see `sample` and `SampleOptions`."""
    u = (masks.bits(seed, t, logits.size(0)).double() + 0.5) / 2**32
    x = (logits.double() / options.temperature).masked_fill(barred, -torch.inf)
    x, order = x.sort(dim=-1, descending=True, stable=True)
    p = torch.softmax(x, -1)
    if options.top_k:
        p[:, options.top_k :] = 0
    before = p.cumsum(-1) - p
    p = p.masked_fill(before >= options.top_p * p.sum(-1, keepdim=True), 0)
    total = torch.zeros_like(p).scatter(-1, order, p).cumsum(-1)
    return (total <= u.unsqueeze(-1) * total[:, -1:]).sum(-1).clamp(max=logits.size(-1) - 1)


def _walk(decoder: Decoder, memory: Memory, state: State, max_len: int, attention: bool, choose) -> Hypotheses:
    """One token after the other, each choose(t, logits [B, V])."""
    sources, carry = decoder.sources(memory), decoder.first_carry(state)
    batch, device = memory.lengths.size(0), memory.values.device
    token = torch.full((batch,), decoder.bos, device=device)
    going = torch.ones(batch, dtype=torch.bool, device=device)
    scores, lengths = memory.values.new_zeros(batch), torch.zeros(batch, dtype=torch.int64, device=device)
    tokens, weights = [], []
    for t in range(max_len):
        logits, carry, alpha = decoder.step(token, sources, carry)
        log_p = torch.log_softmax(logits, -1)
        token = choose(t, logits)
        scores = scores + torch.where(going, log_p.gather(1, token.unsqueeze(1)).squeeze(1), 0)
        going = going & (token != decoder.eos)
        lengths = lengths + going
        tokens.append(torch.where(going, token, decoder.pad))
        if attention and alpha is not None:
            weights.append(torch.where(going.unsqueeze(1), alpha, 0))
        if not going.any():
            break
    length = int(lengths.max()) if batch else 0
    found = torch.stack(tokens)[:length]
    return Hypotheses(
        found[None], lengths[None], scores[None], torch.stack(weights)[None, :length] if weights else None
    )


@torch.no_grad()
def mix(
    decoder: Decoder, memory: Memory, state: State, given: Tensor, p: float, generator: torch.Generator | None
) -> Tensor:
    """given [T, B] with, drawn with probability p for each place after the first, the model's own likeliest token
    there, found without dropout from the mixed tokens before it. Padding stays."""
    from . import compiled  # which knows this module

    flags = [m for m in decoder.modules() if m.training]
    decoder.eval()
    try:
        draws = torch.rand(given.shape, generator=generator, device=given.device)
        own = (draws < p) & (given != decoder.pad)
        if compiled.covers(decoder, given.device):
            return compiled.Program(decoder, given.numel()).mix(memory, state, given, own)
        return mixed(decoder, memory, state, given, own)
    finally:
        for m in flags:
            m.training = True


def mixed(decoder: Decoder, memory: Memory, state: State, given: Tensor, own: Tensor) -> Tensor:
    """given [T, B] with the model's own likeliest token where own [T, B] says so, but for the first step."""
    sources, carry = decoder.sources(memory), decoder.first_carry(state)
    found = [given[0]]
    for t in range(1, given.size(0)):
        logits, carry, _ = decoder.step(found[-1], sources, carry)
        logits[:, [decoder.pad, decoder.bos]] = -torch.inf
        found.append(torch.where(own[t], logits.argmax(-1), given[t]))
    return torch.stack(found)
