"""Sampling: what is drawn, how often, and that kernel and reference draw the same."""

import pytest
import torch
from search_cases import BOS, EOS, PAD, make, sources

from seqkern.seq2seq import compiled, search
from seqkern.seq2seq.search import SampleOptions

OPTIONS = {
    "plain": SampleOptions(8),
    "hot": SampleOptions(8, temperature=2.5),
    "cold": SampleOptions(8, temperature=0.3),
    "top_k": SampleOptions(8, top_k=4),
    "top_p": SampleOptions(8, top_p=0.7),
    "both": SampleOptions(8, temperature=1.5, top_k=6, top_p=0.8),
}


def both(model, source, lengths, options, seed):
    with torch.no_grad():
        memory, state = model.encode(source, lengths)
        return (
            compiled.Program(model.decoder).sample(memory, state, options, seed),
            search.sample(model.decoder, memory, state, options, seed),
        )


@pytest.mark.parametrize("vocab", [9, 70, 1500])
@pytest.mark.parametrize("name", OPTIONS)
def test_same_tokens_as_the_reference(vocab, name):
    """At V = 1500 and these weights most nuclei are larger than the list of candidates that the kernel keeps."""
    model = make(vocab, 12, scale=1.2, attention="general")
    source, lengths = sources(40, 5)
    found, wanted = both(model, source, lengths, OPTIONS[name], torch.tensor([77]))
    assert found.sentences() == wanted.sentences()
    torch.testing.assert_close(found.scores, wanted.scores, atol=1e-4, rtol=1e-4)


def chi_square(counts, expected):
    inside = expected > 0
    assert not counts[~inside].any()
    return float(((counts - expected)[inside] ** 2 / expected[inside]).sum())


@pytest.mark.parametrize("vocab, limit", [(8, 25), (100, 160)])
@pytest.mark.parametrize("name", OPTIONS)
def test_distribution(vocab, limit, name):
    """First tokens of 20,000 rows with the same source. limit: about the 99.99 % point of chi-square."""
    options, rows = OPTIONS[name]._replace(max_len=1), 20_000
    model = make(vocab, 12, scale=1.2, seed=4)
    source = torch.full((3, 1), 5)
    with torch.no_grad():
        memory, state = model.encode(source, None)
        logits = model.decoder(torch.tensor([[BOS]]), memory, state)[0, 0].double() / options.temperature
    logits[[PAD, BOS]] = -torch.inf
    p = torch.softmax(logits, -1)
    order = p.argsort(descending=True)
    if options.top_k:
        p[order[options.top_k :]] = 0
        p /= p.sum()
    kept = int((p[order].cumsum(0) < options.top_p).sum()) + 1
    p[order[kept:]] = 0
    found = model.sample(
        source.expand(-1, rows), max_len=1, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    tokens = [row[0][0] if row[0] else EOS for row in found.sentences()]
    counts = torch.bincount(torch.tensor(tokens), minlength=vocab).double()
    assert chi_square(counts, p / p.sum() * rows) < limit


def test_rows_and_steps_draw_apart():
    model = make(50, 12, scale=0.1)
    found = model.sample(torch.full((3, 64), 5), max_len=30, generator=torch.Generator().manual_seed(1))
    rows = [tuple(r[0]) for r in found.sentences()]
    assert len(set(rows)) == 64 and len({t for r in rows for t in r}) > 40


def test_seed_and_place_decide():
    """The same generator draws the same again, and a row does not see the others: its score's last bit may, where the
    encoder's products are cut to the batch."""
    model = make(30, 12).compile_search()
    source, lengths = sources(20, 5)
    first, again, other = (model.sample(source, lengths, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert first.sentences() == again.sentences() != other.sentences()
    shorter = model.sample(source[:, :7], lengths[:7], generator=torch.Generator().manual_seed(3))
    assert shorter.sentences() == first.sentences()[:7]
    torch.testing.assert_close(shorter.scores[0], first.scores[0, :7], atol=1e-5, rtol=1e-6)


def test_scores_are_the_models_own():
    """Whatever is drawn from, the score is log p at temperature 1 over all tokens."""
    model = make(20, 12, attention="general")
    source, lengths = sources(10, 5)
    found = model.sample(
        source, lengths, max_len=4, temperature=3.0, top_k=5, generator=torch.Generator().manual_seed(1)
    )
    memory, state = model.encode(source, lengths)
    for b, ((tokens,), score) in enumerate(zip(found.sentences(), found.scores[0], strict=True)):
        given = torch.full((len(tokens) + 1, 10), BOS)
        given[1:, b] = torch.tensor(tokens)
        log_p = torch.log_softmax(model.decoder(given, memory, state), -1)[:, b]
        answers = torch.tensor([*tokens, EOS])[: min(len(tokens) + 1, 4)]
        wanted = log_p[: len(answers)].gather(1, answers.unsqueeze(1)).sum()
        torch.testing.assert_close(score, wanted, atol=1e-4, rtol=1e-4)


def test_top_k_of_one_is_greedy():
    model = make(20, 12)
    source, lengths = sources(10, 5)
    wanted = model.greedy(source, lengths, max_len=6).sentences()
    assert model.sample(source, lengths, max_len=6, top_k=1).sentences() == wanted
    assert model.sample(source, lengths, max_len=6, top_p=1e-9).sentences() == wanted
