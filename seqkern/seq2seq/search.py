"""Searches for the target, written out in torch operations: what the compiled ones must find, token by token.

Shapes: T steps, N hypotheses of a source, B batch, S source steps, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

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


def greedy(decoder: Decoder, memory: Memory, state: State, max_len: int, attention: bool) -> Hypotheses:
    """At each step the likeliest token but pad and bos (the lowest id of equals), until eos or max_len tokens.

    A row that has ended does no further work for the others: it only waits.
    """
    if max_len < 1:
        raise ValueError(f"max_len must be at least 1, got {max_len}")
    sources, carry = decoder.sources(memory), decoder.first_carry(state)
    batch, device = memory.lengths.size(0), memory.values.device
    token = torch.full((batch,), decoder.bos, device=device)
    going = torch.ones(batch, dtype=torch.bool, device=device)
    scores, lengths = memory.values.new_zeros(batch), torch.zeros(batch, dtype=torch.int64, device=device)
    tokens, weights = [], []
    for _ in range(max_len):
        logits, carry, alpha = decoder.step(token, sources, carry)
        log_p = torch.log_softmax(logits, -1)
        barred = logits.clone()
        barred[:, [decoder.pad, decoder.bos]] = -torch.inf
        token = barred.argmax(-1)
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
    flags = [m for m in decoder.modules() if m.training]
    decoder.eval()
    try:
        draws = torch.rand(given.shape, generator=generator, device=given.device)
        own = (draws < p) & (given != decoder.pad)
        sources, carry = decoder.sources(memory), decoder.first_carry(state)
        mixed = [given[0]]
        for t in range(1, given.size(0)):
            logits, carry, _ = decoder.step(mixed[-1], sources, carry)
            logits[:, [decoder.pad, decoder.bos]] = -torch.inf
            mixed.append(torch.where(own[t], logits.argmax(-1), given[t]))
        return torch.stack(mixed)
    finally:
        for m in flags:
            m.training = True
