"""The compiled searches against the reference loops, which define them: the same tokens, and close scores."""

import itertools

import pytest
import torch
from search_cases import BOS, EOS, KINDS, PAD, make, same, sources

from seqkern.seq2seq import beam, compiled, search
from seqkern.seq2seq.beam import BeamOptions
from seqkern.seq2seq.search import GreedyOptions

BEAM = BeamOptions(beam=4, n_best=3, max_len=9, length_penalty=0.6, coverage_penalty=0.2, attention=True)


def both(model, source, lengths, options, tokens=None):
    """What the compiled search and the reference find."""
    kind = "greedy" if isinstance(options, GreedyOptions) else "beam"
    with torch.no_grad():
        memory, state = model.encode(source, lengths)
        reference = getattr({"greedy": search, "beam": beam}[kind], kind)
        program = compiled.Program(model.decoder, tokens)
        return getattr(program, kind)(memory, state, options), reference(model.decoder, memory, state, options)


def check(model, source, lengths, **close):
    for tokens in (None, 1):  # with the folded table and without
        same(*both(model, source, lengths, GreedyOptions(9, True), tokens), **close)
        same(*both(model, source, lengths, BEAM, tokens), **close)


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(
    "attention, feeding", [(k, f) for k, f in itertools.product(KINDS, (False, True)) if k != "none" or not f]
)
def test_architectures(cell, layers, attention, feeding):
    model = make(cell=cell, num_layers=layers, attention=attention, input_feeding=feeding, scale=2.0)
    check(model, *sources())


@pytest.mark.parametrize("vocab, hidden, embedding", [(3, 1, 1), (40, 33, 5), (65, 64, 20), (129, 17, 65), (700, 50, 30)])
@pytest.mark.parametrize("attention, pre", [("none", None), ("none", 21), ("general", 35), ("bahdanau", 70)])
def test_sizes(vocab, hidden, embedding, attention, pre):
    """Sizes below, at and beyond whole vectors and panels, without and with a pre-output layer."""
    model = make(vocab, hidden, embedding=embedding, attention=attention, pre_output=pre, scale=2.5)
    check(model, *sources(7, 19))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    """float64 is computed as such; other types as float32, closer than a loop in that type."""
    model = make(attention="bahdanau", input_feeding=True, dtype=dtype)
    source, lengths = sources()
    found = model.beam(source, lengths, beam=3, max_len=6, length_penalty=0.5)
    assert found.scores.dtype == dtype
    if dtype == torch.float64:
        check(model, source, lengths, atol=1e-9)


def test_trained_weights():
    """A model that has learnt to reverse: long answers, peaked distributions."""
    torch.manual_seed(0)
    model = make(13, 32, scale=1.0, attention="general", input_feeding=True).train()
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        source = torch.randint(3, 13, (5, 32))
        given = torch.cat([torch.full((1, 32), BOS), source.flip(0)])
        wanted = torch.cat([source.flip(0), torch.full((1, 32), EOS)])
        logits = model(source, None, given)
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten()).backward()
        optimiser.step()
    model.eval()
    source = torch.randint(3, 13, (5, 20), generator=torch.Generator().manual_seed(7))
    lengths = torch.full((20,), 5)
    greedy = both(model, source, lengths, GreedyOptions(9, True))
    same(*greedy)
    assert greedy[0].lengths.float().mean() > 4
    same(*both(model, source, lengths, BEAM))


@pytest.mark.parametrize("attention", ["none", "general", "bahdanau"])
@pytest.mark.parametrize("hidden, vocab", [(20, 30), (128, 300)])
def test_a_row_does_not_see_its_batch(attention, hidden, vocab):
    """One alone equals one of a hundred, to the last bit; so does one of longer padding."""
    model = make(vocab, hidden, attention=attention, scale=2.0).compile_search()
    source, lengths = sources(100, 7)
    searches = {
        "greedy": lambda *given: model.greedy(*given, max_len=12),
        "beam": lambda *given: model.beam(*given, beam=3, n_best=2, max_len=12, length_penalty=0.5),
    }
    for name, find in searches.items():
        memory, state = model.model.encode(source, lengths)
        together = find(source, lengths)
        for b in (0, 1, 17, 63, 98, 99):
            encoded = [row(memory, state, b, padding) for padding in (0, 5)]
            for alone in (getattr(model.program, name)(*given, options_of(name)) for given in encoded):
                assert alone.sentences()[0] == together.sentences()[b], name
                assert alone.scores[:, 0].tolist() == together.scores[:, b].tolist(), name


def options_of(name):
    return GreedyOptions(12) if name == "greedy" else BeamOptions(3, 2, 12, length_penalty=0.5)


def row(memory, state, b, padding):
    """Source b alone, with so much more padding, encoded in its batch: encoders round as they like."""
    values = torch.nn.functional.pad(memory.values[:, b : b + 1], (0, 0, 0, 0, 0, padding))
    h, c = state
    one = (h[:, b : b + 1], None if c is None else c[:, b : b + 1])
    return memory._replace(values=values, lengths=memory.lengths[b : b + 1]), one


@pytest.mark.parametrize("attention", ["general", "bahdanau"])
def test_threads(attention):
    """One source for several threads, which then share the panels, and many."""
    model = make(3000, 200, attention=attention, input_feeding=True, scale=1.5).compile_search()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for batch in (1, 2, 40):
            source, lengths = sources(40, 7)
            memory, state = model.model.encode(source, lengths)
            memory = memory._replace(values=memory.values[:, :batch], lengths=memory.lengths[:batch])
            state = (state[0][:, :batch], None)
            greedy = model.program.greedy(memory, state, GreedyOptions(6))
            wide = model.program.beam(memory, state, BeamOptions(3, 2, 6))
            found.append([(h.sentences()[0], h.scores[:, 0].tolist()) for h in (greedy, wide)])
    assert all(f == found[0] for f in found)


def test_length_zero():
    """A row without any place: the context is zero, and nothing is NaN."""
    model = make(attention="bahdanau")
    source, lengths = sources()
    lengths[2] = 0
    check(model, source, lengths)
    assert model.beam(source, lengths, beam=3, coverage_penalty=1.0).scores.isfinite().all()


def test_nothing_to_search():
    model = make(attention="general")
    source = torch.zeros(4, 0, dtype=torch.int64)
    for found in (model.greedy(source), model.beam(source), model.sample(source)):
        assert found.tokens.shape == (1, 0, 0) and found.sentences() == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_no_numbers_end(value):
    model = make(attention="general")
    model.decoder.out.bias.data[5] = value
    source, lengths = sources()
    for _ in range(2):
        for found in (
            model.greedy(source, lengths, max_len=7),
            model.beam(source, lengths, max_len=7),
            model.sample(source, lengths, max_len=7),
            model.sample(source, lengths, max_len=7, top_p=0.5),
            model.sample(source, lengths, max_len=7, top_k=3),
        ):
            assert found.lengths.max() <= 7
            assert all(t not in (PAD, BOS) for rows in found.sentences() for tokens in rows for t in tokens)
        model.decoder.out.bias.data.fill_(value)


def test_eos_at_once_and_never():
    model = make()
    source, lengths = sources()
    model.decoder.out.bias.data[EOS] = 1e4
    assert model.greedy(source, lengths).lengths.eq(0).all() and model.greedy(source, lengths).tokens.size(1) == 0
    same(*both(model, source, lengths, BEAM))
    model.decoder.out.bias.data[EOS] = -1e4
    assert model.greedy(source, lengths, max_len=6).lengths.eq(6).all()
    same(*both(model, source, lengths, BEAM))


def test_mix():
    """Scheduled sampling: forced tokens, and the search's own between them."""
    model = make(cell="lstm", attention="general", input_feeding=True)
    source, lengths = sources()
    given = torch.randint(1, 11, (8, 5), generator=torch.Generator().manual_seed(3))
    given[5:, 2] = PAD
    own = torch.rand(8, 5, generator=torch.Generator().manual_seed(4)) < 0.5
    own[:, 3] = False
    with torch.no_grad():
        memory, state = model.encode(source, lengths)
        for mask in (own, torch.ones_like(own), torch.zeros_like(own)):
            mixed = compiled.Program(model.decoder).mix(memory, state, given, mask)
            assert mixed.tolist() == search.mixed(model.decoder, memory, state, given, mask).tolist()


def test_memory_does_not_grow_with_the_vocabulary():
    """Scratch of a beam search: V = 32,000 takes what V = 5,000 does."""
    bytes_of = [
        torch.ops.seqkern._search_scratch(compiled.Program(make(vocab).decoder).packed, 32, 20, 5)
        for vocab in (5_000, 32_000)
    ]
    assert bytes_of[0] == bytes_of[1] < 3 << 20


def test_snapshot_and_fresh_weights():
    """A compiled search keeps its weights; the model's own searches see every change, whichever way it was made."""
    model = make(attention="general")
    source, lengths = sources()
    kept = model.compile_search()
    before = model.greedy(source, lengths)
    model.decoder.out.bias.data[7] += 100
    model.encoder.embedding.weight.data.zero_()
    assert model.greedy(source, lengths).tokens.eq(7).all()
    same(kept.greedy(source, lengths), before)
