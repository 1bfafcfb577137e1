"""Greedy and beam search as they are usually written in PyTorch: a Python loop, some forty operations a token.

Keys are projected once, states and source are tiled for a beam, hypotheses are cut and sorted with topk and gather as
in OpenNMT-py and JoeyNMT. What they find is defined as seqkern's searches define it.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from seqkern.seq2seq import Decoder


class EagerDecoder:
    """A `Decoder` of one GRU layer with attention, step by step with torch's own cell."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.cell = nn.GRUCell(decoder.layers.input_size, decoder.hidden)
        with torch.no_grad():
            for own, weight in zip(self.cell.parameters(), decoder._weights()[0], strict=True):
                own.copy_(weight)

    def sources(self, memory: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and the mask of what is padding, [B, S, *], from memory [S, B, M]."""
        memory = memory.transpose(0, 1)
        outside = torch.arange(memory.size(1)) >= lengths.unsqueeze(1)
        return self.decoder.attention.keys(memory), memory, outside

    def step(self, tokens: Tensor, h: Tensor, feed: Tensor | None, sources: tuple[Tensor, Tensor, Tensor]):
        """Logits [N, V], and h and the attentional vector [N, H]."""
        d, (keys, values, outside) = self.decoder, sources
        x = d.embedding(tokens)
        h = self.cell(x if feed is None else torch.cat([x, feed], -1), h)
        if d.attention.kind == "bahdanau":
            scores = d.attention.score(torch.tanh(d.attention.query(h).unsqueeze(1) + keys)).squeeze(-1)
        else:
            scores = torch.bmm(keys, h.unsqueeze(-1)).squeeze(-1)
        alpha = torch.softmax(scores.masked_fill(outside, -torch.inf), -1)
        context = torch.bmm(alpha.unsqueeze(1), values).squeeze(1)
        a = torch.tanh(d.pre(h) + linear(context, d.context.weight))
        return d.out(a), h, a if d.input_feeding else None


def first_feed(decoder: Decoder, rows: int) -> Tensor | None:
    return torch.zeros(rows, decoder.pre.out_features) if decoder.input_feeding else None


@torch.no_grad()
def greedy(eager: EagerDecoder, memory: Tensor, lengths: Tensor, h: Tensor, max_len: int) -> tuple[Tensor, Tensor]:
    """Tokens [T, B] and their log-probabilities [B]."""
    d, batch = eager.decoder, lengths.size(0)
    sources, feed = eager.sources(memory, lengths), first_feed(eager.decoder, batch)
    token, done, found = torch.full((batch,), d.bos), torch.zeros(batch, dtype=torch.bool), []
    barred, scores = torch.tensor([d.pad, d.bos]), torch.zeros(batch)
    for _ in range(max_len):
        logits, h, feed = eager.step(token, h, feed, sources)
        best, token = torch.log_softmax(logits, -1).index_fill_(1, barred, -torch.inf).max(-1)
        scores += best.masked_fill_(done, 0)
        done |= token == d.eos
        found.append(token.masked_fill(done, d.pad))
        if done.all():
            break
    return torch.stack(found), scores


@torch.no_grad()
def beam(
    eager: EagerDecoder, memory: Tensor, lengths: Tensor, h: Tensor, width: int, max_len: int
) -> tuple[Tensor, Tensor]:
    """The best hypothesis's tokens [T, B] and score [B], without penalties."""
    d, batch = eager.decoder, lengths.size(0)
    rows = torch.arange(batch).repeat_interleave(width)
    sources = tuple(s[rows] for s in eager.sources(memory, lengths))
    h, feed = h[rows], first_feed(d, batch * width)
    scores = torch.full((batch, width), -torch.inf)
    scores[:, 0] = 0
    alive = torch.full((batch, width, 1), d.bos)
    best, found = torch.full((batch,), -torch.inf), torch.full((batch, max_len + 1), d.pad)
    barred, first = torch.tensor([d.pad, d.bos, d.eos]), torch.arange(batch).unsqueeze(1) * width
    for t in range(max_len + 1):
        logits, h, feed = eager.step(alive[..., -1].flatten(), h, feed, sources)
        log_p = torch.log_softmax(logits, -1) + scores.view(-1, 1)
        ended, which = log_p[:, d.eos].view(batch, width).max(-1)
        better = ended > best
        best = torch.where(better, ended, best)
        text = alive.gather(1, which.view(-1, 1, 1).expand(-1, 1, alive.size(2))).squeeze(1)
        text = torch.nn.functional.pad(text[:, 1:], (0, max_len + 1 - t), value=d.pad)
        found = torch.where(better.unsqueeze(1), text, found)
        if t == max_len:
            break
        scores, flat = log_p.index_fill_(1, barred, -torch.inf).view(batch, -1).topk(width)
        if (best >= scores[:, 0]).all():
            break
        parent, token = flat // d.vocab, flat % d.vocab
        select = (first + parent).flatten()
        h, feed = h[select], None if feed is None else feed[select]
        alive = torch.cat([alive.flatten(0, 1)[select].view(batch, width, -1), token.unsqueeze(-1)], -1)
    return found[:, :max_len].t(), best
