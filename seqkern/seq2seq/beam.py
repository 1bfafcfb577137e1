"""Beam search, written out in torch operations: what the compiled one must find.

Shapes: K hypotheses that live at a time (the beam), N that are returned, B batch, n sources that are still searched,
S source steps, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .decoder import Carry, Decoder, State
from .encoder import Memory
from .search import Hypotheses, check_lengths


class BeamOptions(NamedTuple):
    """What `beam` looks for.

    beam: K. n_best: N. max_len, min_len: the most and the fewest tokens of a hypothesis, without eos.
    length_penalty: alpha, coverage_penalty: beta (Wu et al. 2016, eq. 14). early_stop, attention: see `beam`.
    """

    beam: int = 5
    n_best: int = 1
    max_len: int = 50
    min_len: int = 0
    length_penalty: float = 0.0
    coverage_penalty: float = 0.0
    early_stop: bool = False
    attention: bool = False

    def check(self) -> None:
        check_lengths(self.max_len, self.min_len)
        for name in ("beam", "n_best"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("length_penalty", "coverage_penalty"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")

    def penalty(self, length: int) -> float:
        """What a log-probability of `length` tokens, eos among them, is divided by: ((5 + length) / 6)^alpha."""
        return ((5 + length) / 6) ** self.length_penalty


class _Finished:
    """The N best hypotheses that have ended: scores [B, N], the step of their eos, and which live one they were."""

    def __init__(self, batch: int, n_best: int, device: torch.device) -> None:
        self.scores = torch.full((batch, n_best), -torch.inf, dtype=torch.float64, device=device)
        self.steps = torch.full((batch, n_best), -1, device=device)
        self.which = torch.zeros_like(self.steps)

    def add(self, sources: Tensor, scores: Tensor, step: int) -> None:
        """scores [n, K] of the hypotheses that end at `step`; -inf for none. Of equals the earlier ones stay."""
        which = torch.arange(scores.size(1), device=scores.device).expand_as(scores)
        all_scores = torch.cat([self.scores[sources], scores], 1)
        order = all_scores.sort(dim=-1, descending=True, stable=True)[1][:, : self.scores.size(1)]
        self.scores[sources] = all_scores.gather(1, order)
        self.steps[sources] = torch.cat([self.steps[sources], torch.full_like(which, step)], 1).gather(1, order)
        self.which[sources] = torch.cat([self.which[sources], which], 1).gather(1, order)
        self.steps[self.scores == -torch.inf] = -1


def beam(decoder: Decoder, memory: Memory, state: State, options: BeamOptions) -> Hypotheses:
    """The N likeliest hypotheses that a beam of K finds.

    A hypothesis is a sequence of tokens but pad, bos and eos, and its log-probability log p the sum of those of its
    tokens. From the empty one, step by step:
    1. each live hypothesis of at least min_len tokens also ends: with eos it is a finished one, however unlikely;
    2. of all extensions of a source's live hypotheses by one token, the K of the highest log p live on (of equals the
       one of the better hypothesis, then the lower id). One of max_len tokens can only end.
    Extensions of probability zero, and of logits that are not numbers, do not live on. Where there are fewer than K
    extensions, fewer live on.

    The score of a finished hypothesis is
        log p(tokens, eos) / ((5 + length) / 6)^alpha + beta sum_s log min(sum_t alpha_ts, 1)
    (Wu et al. 2016, eq. 14), where length counts eos, t runs over its steps with that of eos, and s over the source's
    places; a place that got no weight at all counts as the least normal number. Without attention there is no second
    part. The N best stay, of equals the shorter.

    A source is done when nothing that lives can still come among its N best: as log p only falls, and the second part
    is never positive, the best live log p over the penalty of the greatest length is a bound. So stopping changes
    nothing. With early_stop it is also done when K hypotheses have ended, and as any hypothesis may end at any step,
    only those are said to end there (1.) whose log p with eos is not below that of all K that live on: with a beam of
    one this is the greedy search, where that one comes to its eos.

    Returns:
        Hypotheses, best first, with length -1 and score -inf where a source has fewer than N.
    """
    batch, device, width = memory.lengths.size(0), memory.values.device, options.beam
    memory = memory._replace(lengths=memory.lengths.to(device))
    finished = _Finished(batch, options.n_best, device)
    active = torch.arange(batch, device=device)
    rows = active.repeat_interleave(width)
    sources, carry = decoder.sources(memory), _take(decoder.first_carry(state), rows)
    log_p = torch.full((batch, width), -torch.inf, dtype=torch.float64, device=device)
    log_p[:, 0] = 0
    tokens = torch.full((batch * width,), decoder.bos, device=device)
    ended = torch.zeros(batch, dtype=torch.int64, device=device)
    covered: Tensor | float = 0.0
    history = []
    for t in range(options.max_len + 1):
        if not active.numel():
            break
        count = active.numel()
        here = None if sources is None else reference.Sources(*(s[active.repeat_interleave(width)] for s in sources))
        logits, carry, alpha = decoder.step(tokens, here, carry)
        total = log_p.unsqueeze(-1) + torch.log_softmax(logits, -1).double().view(count, width, -1)
        total = total.masked_fill(total.isnan(), -torch.inf)
        ending = total[..., decoder.eos].clone()
        total[..., [decoder.pad, decoder.bos, decoder.eos]] = -torch.inf
        if t == options.max_len:
            total = torch.full_like(total, -torch.inf)
        best, chosen = total.flatten(1).sort(dim=-1, descending=True, stable=True)
        best, chosen = (_fill(x[:, :width], width, fill) for x, fill in ((best, -torch.inf), (chosen, 0)))
        parent, token = chosen // decoder.vocab, chosen % decoder.vocab
        if alpha is not None:
            alpha = alpha.unflatten(0, (count, width))
            covered = covered + alpha
        if options.early_stop:
            ending = ending.masked_fill(ending < best[:, -1:], -torch.inf)
        if t >= options.min_len:
            finished.add(active, _score(ending, t + 1, covered, memory.lengths[active], options), t)
            ended = ended + (ending > -torch.inf).sum(1)
        history.append((active, parent, token, alpha if options.attention else None))
        bound = best[:, 0] / options.penalty(options.max_len + 1)
        going = (best[:, 0] > -torch.inf) & (finished.scores[active, -1] < bound)
        if options.early_stop:
            going = going & (ended < width)
        row = torch.arange(count, device=device).unsqueeze(1) * width + parent
        active, log_p, ended, row = active[going], best[going], ended[going], row[going].flatten()
        tokens, carry = token[going].flatten(), _take(carry, row)
        if alpha is not None:
            covered = covered.flatten(0, 1)[row].unflatten(0, (active.numel(), width))
    return _collect(decoder, memory, finished, history, options)


def _fill(x: Tensor, width: int, value: float) -> Tensor:
    """x [n, at most K] with columns of `value` up to K."""
    return torch.nn.functional.pad(x, (0, width - x.size(1)), value=value)


def _take(carry: Carry, rows: Tensor) -> Carry:
    h, c, feed = carry
    return Carry(h[:, rows], None if c is None else c[:, rows], None if feed is None else feed[rows])


def _score(log_p: Tensor, length: int, covered: Tensor | float, lengths: Tensor, options: BeamOptions) -> Tensor:
    score = log_p / options.penalty(length)
    if options.coverage_penalty and isinstance(covered, Tensor):
        share = covered.double().clamp(torch.finfo(torch.float32).tiny, 1).log()
        inside = torch.arange(covered.size(-1), device=covered.device) < lengths.view(-1, 1, 1)
        score = score + options.coverage_penalty * share.masked_fill(~inside, 0).sum(-1)
    return score


def _collect(decoder: Decoder, memory: Memory, finished: _Finished, history: list, options: BeamOptions) -> Hypotheses:
    """Follows each finished hypothesis back to its beginning."""
    lengths = finished.steps
    length, source = int(lengths.max()) if lengths.numel() else 0, torch.arange(lengths.size(0), device=lengths.device)
    shape = (max(length, 0), *lengths.shape)
    found = torch.full(shape, decoder.pad, device=lengths.device)
    attention = None
    if options.attention and decoder.attention is not None:
        attention = memory.values.new_zeros(*shape, memory.values.size(0))
    which = finished.which.clone()
    for t in range(shape[0] - 1, -1, -1):
        active, parent, token, alpha = history[t]
        place = torch.zeros_like(source)
        place[active] = torch.arange(active.numel(), device=active.device)
        inside = lengths > t
        found[t] = torch.where(inside, token[place].gather(1, which), found[t])
        which = torch.where(inside, parent[place].gather(1, which), which)
        if attention is not None:
            attention[t] = torch.where(inside.unsqueeze(-1), alpha[place.unsqueeze(1), which], attention[t])
    scores = finished.scores.to(memory.values.dtype)
    return Hypotheses(
        found.permute(2, 0, 1),
        lengths.t(),
        scores.t(),
        None if attention is None else attention.permute(2, 0, 1, 3),
    )
