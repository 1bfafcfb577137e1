"""Searches on a GPU: one step on buffers that stay where they are, captured as a CUDA graph and replayed.

Nothing here waits for the GPU but a look every few steps at whether anything is still searched. What is found is what
`search.greedy`, `search.sample` and `beam.beam` find; a step leaves finished rows as they are instead of dropping them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import beam as beams
from . import search
from .decoder import Carry, Decoder, State
from .encoder import Memory
from .reference import Sources
from .search import Hypotheses

LOOK = 8  # steps between looks at whether anything goes on


class Loop:
    """What both searches share: the buffers of a decoder's step for `rows` rows, and how steps are run.

    Args:
        decoder: in evaluation mode. Its weights are read where they lie: changes in place are seen.
        memory, state: of the shapes, dtype and device that this loop is for; `start` takes the values.
        width: rows of each source.
    """

    def __init__(self, decoder: Decoder, memory: Memory, state: State, width: int = 1) -> None:
        self.decoder, self.width, self.device = decoder, width, memory.values.device
        self.batch = memory.lengths.size(0)
        self.sources = self._of_rows(decoder.sources(memory))
        self.carry = Carry(*(None if t is None else t.clone() for t in self._rows_of(decoder.first_carry(state))))
        self.t = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.token = torch.full((self.batch * width,), decoder.bos, device=self.device)
        self.barred = torch.zeros(decoder.vocab, dtype=torch.bool, device=self.device)
        self.barred[[decoder.pad, decoder.bos]] = True
        self.graph: torch.cuda.CUDAGraph | None = None

    def _rows_of(self, carry: Carry) -> Carry:
        return beams._take(carry, torch.arange(self.batch, device=self.device).repeat_interleave(self.width))

    def _of_rows(self, sources: Sources | None) -> Sources | None:
        return None if sources is None else Sources(*(s.repeat_interleave(self.width, 0) for s in sources))

    def start(self, memory: Memory, state: State) -> None:
        """Takes a batch's values, and goes back to the first step."""
        pairs = [*zip(self.carry, self._rows_of(self.decoder.first_carry(state)), strict=True)]
        if self.sources is not None:
            pairs += zip(self.sources, self._of_rows(self.decoder.sources(memory)), strict=True)
        for to, value in pairs:
            if to is not None:
                to.copy_(value)
        self.t.zero_()
        self.token.fill_(self.decoder.bos)
        self.reset()

    def reset(self) -> None:
        raise NotImplementedError

    def advance(self) -> None:
        """One step, in place, without a word to the host."""
        raise NotImplementedError

    def _record(self, to: Tensor, value: Tensor) -> None:
        to.index_copy_(0, self.t, value.unsqueeze(0))

    def run(self, steps: int, going: Callable[[], Tensor]) -> None:
        """Up to `steps` steps, until nothing is going()."""
        advance = self.advance if self.device.type != "cuda" else self._captured().replay
        for step in range(steps):
            advance()
            if step % LOOK == LOOK - 1 and not going().any():
                break

    def _captured(self) -> torch.cuda.CUDAGraph:
        if self.graph is None:
            kept = [t.clone() for t in self._buffers()]  # a capture runs nothing, but warming up does
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.advance()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.advance()
            for to, value in zip(self._buffers(), kept, strict=True):
                to.copy_(value)
        return self.graph

    def _buffers(self) -> list[Tensor]:
        own = [v for v in vars(self).values() if isinstance(v, Tensor)]
        return own + [t for t in self.carry if t is not None]


class Greedy(Loop):
    """`search.greedy`."""

    def __init__(self, decoder: Decoder, memory: Memory, state: State, options: search.GreedyOptions) -> None:
        super().__init__(decoder, memory, state)
        self.options, batch = options, self.batch
        self.tokens = torch.full((options.max_len, batch), decoder.pad, device=self.device)
        self.scores = memory.values.new_zeros(batch)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.going = torch.ones(batch, dtype=torch.bool, device=self.device)
        attend = options.attention and decoder.attention is not None
        self.attention = memory.values.new_zeros(options.max_len if attend else 0, batch, memory.values.size(0))

    def reset(self) -> None:
        self.tokens.fill_(self.decoder.pad)
        self.going.fill_(True)
        for t in (self.scores, self.lengths, self.attention):
            t.zero_()

    def choose(self, logits: Tensor) -> Tensor:
        return logits.masked_fill(self.barred, -torch.inf).argmax(-1)

    def advance(self) -> None:
        logits, carry, alpha = self.decoder.step(self.token, self.sources, self.carry)
        token = self.choose(logits)
        chosen = torch.log_softmax(logits, -1).gather(1, token.unsqueeze(1)).squeeze(1)
        self.scores.add_(torch.where(self.going, chosen, 0))
        self.going.logical_and_(token != self.decoder.eos)
        self.lengths.add_(self.going)
        self._record(self.tokens, torch.where(self.going, token, self.decoder.pad))
        if self.attention.size(0):
            self._record(self.attention, torch.where(self.going.unsqueeze(1), alpha, 0))
        self.token.copy_(token)
        for to, value in zip(self.carry, carry, strict=True):
            if to is not None:
                to.copy_(value)
        self.t.add_(1)

    def find(self, memory: Memory, state: State) -> Hypotheses:
        self.start(memory, state)
        self.run(self.options.max_len, lambda: self.going)
        length = int(self.lengths.max()) if self.batch else 0
        attention = self.attention[None, :length].clone() if self.attention.size(0) else None
        return Hypotheses(
            self.tokens[None, :length].clone(), self.lengths[None].clone(), self.scores[None].clone(), attention
        )


class Sample(Greedy):
    """`search.sample`."""

    def __init__(self, decoder: Decoder, memory: Memory, state: State, options: search.SampleOptions) -> None:
        super().__init__(decoder, memory, state, search.GreedyOptions(options.max_len))
        self.drawing, self.seed = options, torch.zeros(1, dtype=torch.int64, device=self.device)

    def choose(self, logits: Tensor) -> Tensor:
        return search.draw(logits, self.seed, self.t, self.drawing, self.barred)

    def find(self, memory: Memory, state: State, seed: Tensor) -> Hypotheses:
        self.seed.copy_(seed)
        return super().find(memory, state)


class Beam(Loop):
    """`beam.beam`: a source that is done has live hypotheses of probability zero, which extend to nothing."""

    def __init__(self, decoder: Decoder, memory: Memory, state: State, options: beams.BeamOptions) -> None:
        super().__init__(decoder, memory, state, options.beam)
        self.options, batch, width, device = options, self.batch, options.beam, self.device
        self.log_p = torch.zeros(batch, width, dtype=torch.float64, device=device)
        self.ended = torch.zeros(batch, dtype=torch.int64, device=device)
        self.all_sources = torch.arange(batch, device=device)
        self.covered = memory.values.new_zeros(batch, width, memory.values.size(0))
        self.unspoken = self.barred.clone()
        self.unspoken[decoder.eos] = True
        self.penalties = torch.tensor(
            [options.penalty(t + 1) for t in range(options.max_len + 1)], dtype=torch.float64, device=device
        )
        shape = (options.max_len + 1, batch, width)
        self.parents, self.tokens = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(2))
        attend = options.attention and decoder.attention is not None
        self.attention = memory.values.new_zeros(*(shape if attend else (0, batch, width)), memory.values.size(0))
        n = options.n_best
        self.best_scores = torch.zeros(batch, n, dtype=torch.float64, device=device)
        self.best_steps, self.best_which = (torch.zeros(batch, n, dtype=torch.int64, device=device) for _ in range(2))

    def reset(self) -> None:
        self.log_p.fill_(-torch.inf)
        self.log_p[:, 0] = 0
        self.best_scores.fill_(-torch.inf)
        self.best_steps.fill_(-1)
        for t in (self.ended, self.covered, self.parents, self.tokens, self.best_which):
            t.zero_()

    def advance(self) -> None:
        options, decoder, batch, width = self.options, self.decoder, self.batch, self.width
        logits, carry, alpha = decoder.step(self.token, self.sources, self.carry)
        total = self.log_p.unsqueeze(-1) + torch.log_softmax(logits, -1).double().view(batch, width, -1)
        total = total.masked_fill(total.isnan(), -torch.inf)
        ending = total[..., decoder.eos]
        total = total.masked_fill(self.unspoken | (self.t == options.max_len), -torch.inf)
        best, chosen = total.flatten(1).sort(dim=-1, descending=True, stable=True)
        best, chosen = (beams._fill(x[:, :width], width, fill) for x, fill in ((best, -torch.inf), (chosen, 0)))
        parent, token = chosen // decoder.vocab, chosen % decoder.vocab
        if alpha is not None:
            alpha = alpha.unflatten(0, (batch, width))
            self.covered.add_(alpha)
        if options.early_stop:
            ending = ending.masked_fill(ending < best[:, -1:], -torch.inf)
        ending = ending.masked_fill(self.t < options.min_len, -torch.inf)
        self.ended.add_((ending > -torch.inf).sum(1))
        score = ending / self.penalties[self.t] + self._coverage()
        self._finish(score)
        self._record(self.parents, parent)
        self._record(self.tokens, token)
        if self.attention.size(0):
            self._record(self.attention, alpha)
        bound = best[:, 0] / options.penalty(options.max_len + 1)
        going = (best[:, 0] > -torch.inf) & (self.best_scores[:, -1] < bound)
        if options.early_stop:
            going = going & (self.ended < width)
        row = (self.all_sources.unsqueeze(1) * width + parent).flatten()
        self.log_p.copy_(torch.where(going.unsqueeze(1), best, -torch.inf))
        self.token.copy_(token.flatten())
        for to, value in zip(self.carry, beams._take(carry, row), strict=True):
            if to is not None:
                to.copy_(value)
        self.covered.copy_(self.covered.flatten(0, 1)[row].unflatten(0, (batch, width)))
        self.t.add_(1)

    def _coverage(self) -> Tensor | float:
        """The score's second part, [B, K]."""
        if not self.options.coverage_penalty or self.sources is None:
            return 0.0
        lengths = self.sources.lengths.view(self.batch, self.width)[:, 0]
        return beams._score(torch.zeros_like(self.log_p), 1, self.covered, lengths, self.options)

    def _finish(self, scores: Tensor) -> None:
        """Of the hypotheses so far and those that end at this step the n best; of equals the earlier ones."""
        n = self.options.n_best
        all_scores = torch.cat([self.best_scores, scores], 1)
        order = all_scores.sort(dim=-1, descending=True, stable=True)[1][:, :n]
        which = torch.arange(self.width, device=self.device).expand_as(scores)
        self.best_scores.copy_(all_scores.gather(1, order))
        steps = torch.cat([self.best_steps, self.t.expand_as(scores)], 1).gather(1, order)
        self.best_steps.copy_(steps.masked_fill(self.best_scores == -torch.inf, -1))
        self.best_which.copy_(torch.cat([self.best_which, which], 1).gather(1, order))

    def find(self, memory: Memory, state: State) -> Hypotheses:
        self.start(memory, state)
        self.run(self.options.max_len + 1, lambda: self.log_p > -torch.inf)
        finished = beams._Finished(self.batch, self.options.n_best, self.device)
        finished.scores, finished.steps = self.best_scores.clone(), self.best_steps.clone()
        finished.which = self.best_which
        alphas = self.attention if self.attention.size(0) else [None] * len(self.tokens)
        history = [(self.all_sources, *step) for step in zip(self.parents, self.tokens, alphas, strict=True)]
        return beams._collect(self.decoder, memory, finished, history, self.options)


KINDS = {"greedy": Greedy, "beam": Beam, "sample": Sample}


class GraphedSearch:
    """The searches of a decoder, one graph for each size of source, batch and setting; the last few are kept."""

    KEPT = 8

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.loops: dict[tuple, Loop] = {}

    def find(self, kind: str, memory: Memory, state: State, options, *seed: Tensor) -> Hypotheses:
        """`search.greedy`, `search.sample` or `beam.beam`."""
        if memory.lengths.numel() == 0:
            from .compiled import REFERENCES  # which knows this module

            return REFERENCES[kind](self.decoder, memory, state, options, *seed)
        memory = memory._replace(lengths=memory.lengths.to(memory.values.device))
        key = (kind, options, tuple(memory.values.shape), memory.values.dtype, memory.values.device)
        if key not in self.loops:
            if len(self.loops) == self.KEPT:
                del self.loops[next(iter(self.loops))]
            self.loops[key] = KINDS[kind](self.decoder, memory, state, options)
        return self.loops[key].find(memory, state, *seed)
