"""Beam search against every sequence there is, on vocabularies so small that a wide beam loses none."""

import math

import pytest
import torch
from search_cases import EOS, make, ranked, sources, teacher_forced

from seqkern.seq2seq import compiled
from seqkern.seq2seq.beam import BeamOptions, beam

COMPILED = (False, True)


def search(model, source, lengths, options, fused):
    memory, state = model.encode(source, lengths)
    with torch.no_grad():
        find = compiled.Program(model.decoder, None if options.max_len % 2 else 1).beam if fused else None
        return find(memory, state, options) if fused else beam(model.decoder, memory, state, options)


OPTIONS = {
    "plain": BeamOptions(n_best=4, max_len=3),
    "long": BeamOptions(n_best=3, max_len=4),
    "length": BeamOptions(n_best=4, max_len=3, length_penalty=1.5),
    "coverage": BeamOptions(n_best=4, max_len=3, coverage_penalty=0.8),
    "both": BeamOptions(n_best=5, max_len=3, length_penalty=0.7, coverage_penalty=0.4),
    "min": BeamOptions(n_best=4, max_len=3, min_len=2, length_penalty=0.5),
    "one": BeamOptions(n_best=3, max_len=1, length_penalty=1.0),
    "exact": BeamOptions(n_best=2, max_len=2, min_len=2),
}


@pytest.mark.parametrize("fused", COMPILED)
@pytest.mark.parametrize("attention", ["none", "general", "bahdanau"])
@pytest.mark.parametrize("name", OPTIONS)
def test_beam_is_exact_where_it_loses_nothing(name, attention, fused):
    model = make(6, 8, attention=attention, input_feeding=attention == "bahdanau", seed=3)
    source, lengths = sources(3, 5)
    options = OPTIONS[name]._replace(beam=3 ** OPTIONS[name].max_len)
    found = search(model, source, lengths, options, fused)
    for b, sentences in enumerate(found.sentences()):
        wanted = ranked(model, source[:, b], int(lengths[b]), options)[: options.n_best]
        assert sentences == [tokens for _, tokens in wanted]
        torch.testing.assert_close(
            found.scores[: len(wanted), b].double(), torch.tensor([s for s, _ in wanted]).double(), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("fused", COMPILED)
@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("early", [False, True])
def test_narrow_beams(early, alpha, width, fused):
    """Against a search of a single source that goes on to max_len: that one stops before changes nothing."""
    model = make(7, 8, seed=5, scale=4.0)
    source, lengths = sources(6, 4)
    options = BeamOptions(beam=width, n_best=2, max_len=6, length_penalty=alpha, early_stop=early)
    found = search(model, source, lengths, options, fused)
    for b in range(source.size(1)):
        wanted = simple_beam(model, source[:, b], int(lengths[b]), options)
        assert found.sentences()[b] == [tokens for _, tokens in wanted]


def simple_beam(model, source, length, options):
    live, finished, t = [((), 0.0)], [], 0
    while live:
        extended, ends = [], []
        for tokens, log_p in live:
            step = next_log_p(model, source, length, tokens)
            ends.append((log_p + step[EOS], tokens))
            extended += [((*tokens, i), log_p + step[i]) for i in range(3, len(step))]
        live = sorted(extended, key=lambda e: -e[1])[: options.beam] if t < options.max_len else []
        if options.early_stop and len(live) == options.beam:
            ends = [end for end in ends if end[0] >= live[-1][1]]
        finished += [(log_p / ((5 + t + 1) / 6) ** options.length_penalty, list(tokens)) for log_p, tokens in ends]
        t += 1
        if options.early_stop and len(finished) >= options.beam:
            break
    return sorted(finished, key=lambda f: -f[0])[: options.n_best]


def next_log_p(model, source, length, tokens):
    memory, state = model.encode(source.unsqueeze(1), torch.tensor([length]))
    with torch.no_grad():
        logits = model.decoder(torch.tensor([[1], *([t] for t in tokens)]), memory, state)
    return torch.log_softmax(logits[-1, 0].double(), -1).tolist()


@pytest.mark.parametrize("fused", COMPILED)
def test_fewer_than_wanted(fused):
    """A beam wider than the vocabulary; more hypotheses asked for than there are."""
    model = make(5, 8)
    source, lengths = sources(2, 3)
    found = search(model, source, lengths, BeamOptions(beam=50, n_best=9, max_len=2), fused)
    assert found.lengths[:, 0].tolist().count(-1) == 2 and found.tokens.shape == (9, 2, 2)  # 1 + 2 + 4 there are
    assert [len(s) for s in found.sentences()] == [7, 7]
    assert all(math.isinf(s) for s in found.scores[7:].flatten().tolist())


@pytest.mark.parametrize("fused", COMPILED)
def test_attention_belongs_to_the_hypothesis(fused):
    model = make(9, 8, attention="bahdanau", input_feeding=True, seed=2)
    source, lengths = sources(4, 5)
    found = search(model, source, lengths, BeamOptions(beam=4, n_best=3, max_len=5, min_len=2, attention=True), fused)
    for b, sentences in enumerate(found.sentences()):
        for n, tokens in enumerate(sentences):
            weights = teacher_forced(model, source[:, b], int(lengths[b]), [tokens])[1][0]
            torch.testing.assert_close(
                found.attention[n, : len(tokens), b], weights[: len(tokens)], atol=1e-4, rtol=1e-3
            )
            torch.testing.assert_close(found.attention[n, : len(tokens), b].sum(-1), torch.ones(len(tokens)))
            assert not found.attention[n, len(tokens) :, b].any()
    assert found.lengths.max() > 1


@pytest.mark.parametrize("fused", COMPILED)
@pytest.mark.parametrize("attention", ["none", "general"])
def test_beam_of_one_that_stops_early_is_greedy(attention, fused):
    """Where the greedy search comes to its eos: one that is cut off lacks eos's probability."""
    compared = 0
    for seed in range(6):
        model = make(9, 8, attention=attention, seed=seed, scale=4.0)
        source, lengths = sources(8, 5, seed)
        greedy = model.greedy(source, lengths, max_len=12)
        found = search(model, source, lengths, BeamOptions(beam=1, max_len=12, early_stop=True), fused)
        for b in range(8):
            if greedy.lengths[0, b] < 12:
                assert found.sentences()[b] == greedy.sentences()[b]
                torch.testing.assert_close(found.scores[0, b], greedy.scores[0, b], atol=1e-4, rtol=1e-4)
                compared += 1
    assert compared > 5


@pytest.mark.parametrize("fused", COMPILED)
def test_early_stop_ends_sooner_and_may_lose(fused):
    model = make(9, 8, seed=1, scale=4.0)
    source, lengths = sources(6, 5)
    options = BeamOptions(beam=3, n_best=3, max_len=15, length_penalty=2.0)
    late, early = (search(model, source, lengths, options._replace(early_stop=e), fused) for e in (False, True))
    assert (early.scores[0] <= late.scores[0] + 1e-4).all() and (early.lengths[0] >= 0).all()
    assert early.lengths.max() <= late.lengths.max()


@pytest.mark.parametrize("fused", COMPILED)
def test_ties_take_the_better_hypothesis_then_the_lower_id(fused):
    model = make(6, 8)
    torch.nn.init.zeros_(model.decoder.out.weight)
    torch.nn.init.zeros_(model.decoder.out.bias)
    source, lengths = sources(2, 3)
    found = search(model, source, lengths, BeamOptions(beam=2, n_best=3, max_len=2, min_len=2), fused)
    assert found.sentences() == [[[3, 3], [3, 4]]] * 2  # of [3], [4] with 3, 4, 5 each the first two live on
