"""Models for the tests of the searches, and the comparison of what two searches found."""

import itertools

import torch
from torch import Tensor

from seqkern.seq2seq import Decoder, Encoder, Hypotheses, Seq2Seq
from seqkern.seq2seq.beam import BeamOptions

PAD, BOS, EOS = 0, 1, 2
KINDS = ("none", "dot", "general", "bahdanau", "concat")


def make(
    vocab: int = 11,
    hidden: int = 10,
    *,
    embedding: int = 7,
    encoder_hidden: int | None = None,
    scale: float = 3.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **decoder,
) -> Seq2Seq:
    """A model with weights large enough that its answers differ from row to row."""
    torch.manual_seed(seed)
    encoder = Encoder(13, 6, encoder_hidden or hidden, bidirectional=False)
    model = Seq2Seq(encoder, Decoder(vocab, embedding, hidden, encoder.size, **decoder))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(scale)
    return model.to(dtype).eval()


def sources(batch: int = 5, places: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Source [S, B] and lengths [B], the first row full, one of length 1."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, places + 1, (batch,), generator=generator)
    lengths[0] = places
    lengths[-1] = 1
    return torch.randint(13, (places, batch), generator=generator), lengths


def same(found: Hypotheses, wanted: Hypotheses, atol: float = 2e-4) -> None:
    """The same tokens, and close scores and weights."""
    assert found.lengths.tolist() == wanted.lengths.tolist()
    assert found.tokens.tolist() == wanted.tokens.tolist()
    torch.testing.assert_close(found.scores, wanted.scores, atol=atol, rtol=1e-4)
    assert (found.attention is None) == (wanted.attention is None)
    if wanted.attention is not None:
        torch.testing.assert_close(found.attention, wanted.attention, atol=atol, rtol=1e-3)


@torch.no_grad()
def teacher_forced(model: Seq2Seq, source: Tensor, length: int, group: list) -> tuple[Tensor, Tensor | None]:
    """log p(tokens, eos) [C] of one source [S] for C hypotheses of the same length T, and the weights [C, T + 1, S]."""
    count = len(group)
    memory, state = model.encode(source.unsqueeze(1).expand(-1, count), torch.full((count,), length))
    given = torch.tensor([[BOS, *tokens] for tokens in group]).t()
    vectors, _, weights = model.decoder.vectors(given, memory, state)
    log_p = torch.log_softmax(model.decoder.out(vectors).double(), -1)
    answers = torch.tensor([[*tokens, EOS] for tokens in group]).t()
    return log_p.gather(-1, answers.unsqueeze(-1)).sum((0, 2)), None if weights is None else weights.transpose(0, 1)


def ranked(model: Seq2Seq, source: Tensor, length: int, options: BeamOptions) -> list[tuple[float, list[int]]]:
    """All hypotheses of one source with their final scores, best first."""
    tokens = [t for t in range(model.decoder.vocab) if t not in (PAD, BOS, EOS)]
    found = []
    for n in range(options.min_len, options.max_len + 1):
        group = list(itertools.product(tokens, repeat=n))
        scores, weights = teacher_forced(model, source, length, group)
        scores = scores / ((5 + n + 1) / 6) ** options.length_penalty
        if options.coverage_penalty and weights is not None:
            covered = weights[..., :length].sum(1).clamp(max=1).double()
            scores = scores + options.coverage_penalty * covered.log().sum(-1)
        found += [(float(score), list(row)) for score, row in zip(scores, group, strict=True)]
    return sorted(found, key=lambda f: -f[0])
