"""The searches on fixed buffers: on the CPU their steps run one by one, on a GPU they are captured and replayed."""

import pytest
import torch
from search_cases import KINDS, make, same, sources

from seqkern.seq2seq import beam, compiled, graphs, search

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
on_devices = pytest.mark.parametrize("device", DEVICES)
MODELS = [
    dict(cell=cell, attention=kind, input_feeding=feeding, num_layers=layers)
    for cell, kind, feeding, layers in zip(
        ("gru", "lstm", "rnn", "lstm", "gru"), KINDS, (False, True, False, True, True), (1, 2, 1, 1, 2), strict=True
    )
]
models = pytest.mark.parametrize("settings", MODELS, ids=lambda m: m["attention"])
GREEDY = [search.GreedyOptions(12), search.GreedyOptions(1, True), search.GreedyOptions(25, True)]
BEAMS = [
    beam.BeamOptions(4, 3, 9, attention=True),
    beam.BeamOptions(3, 5, 12, 2, 0.7, 0.4, attention=True),
    beam.BeamOptions(3, 1, 20, early_stop=True),
    beam.BeamOptions(15, 2, 1),
]


SAMPLES = [
    search.SampleOptions(12),
    search.SampleOptions(20, 1.7, 4),
    search.SampleOptions(9, 0.6, 0, 0.8),
    search.SampleOptions(25, 1.2, 6, 0.9),
]


@torch.no_grad()
def compare(settings, device, kind, options):
    model = make(**settings).to(device)
    graphed, reference = graphs.GraphedSearch(model.decoder), compiled.REFERENCES[kind]
    for seed in (1, 2, 3):  # the same buffers again with other values
        source, lengths = sources(seed=seed)
        if settings["attention"] != "none":
            lengths[1] = 0
        memory, state = model.encode(source.to(device), lengths)
        draws = [torch.tensor([2**40 * seed + 5], device=device)] if kind == "sample" else []
        found = graphed.find(kind, memory, state, options, *draws)
        same(found, reference(model.decoder, memory, state, options, *draws))
    assert len(graphed.loops) == 1


@on_devices
@models
@pytest.mark.parametrize("options", GREEDY, ids=str)
def test_greedy(settings, device, options):
    compare(settings, device, "greedy", options)


@on_devices
@models
@pytest.mark.parametrize("options", SAMPLES, ids=str)
def test_sample(settings, device, options):
    compare(settings, device, "sample", options)


@on_devices
@models
@pytest.mark.parametrize("options", BEAMS, ids=str)
def test_beam(settings, device, options):
    compare(settings, device, "beam", options)


@torch.no_grad()
def test_results_stay_and_few_loops_are_kept():
    model = make()
    graphed = graphs.GraphedSearch(model.decoder)
    source, lengths = sources()
    memory, state = model.encode(source, lengths)
    other = model.encode(*sources(seed=9))
    for kind, options in (("greedy", search.GreedyOptions(12, True)), ("beam", beam.BeamOptions(attention=True))):
        first = graphed.find(kind, memory, state, options)
        kept = [t.clone() for t in first]
        graphed.find(kind, *other, options)
        assert all(a.equal(b) for a, b in zip(first, kept, strict=True))
    for n in range(1, 12):
        graphed.find("greedy", memory, state, search.GreedyOptions(n))
    assert len(graphed.loops) == graphed.KEPT


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@models
def test_compiled_search_on_a_gpu_equals_the_models_own(settings):
    model = make(**settings).cuda()
    source, lengths = sources()
    graphed = model.compile_search()
    same(graphed.greedy(source.cuda(), lengths), model.greedy(source.cuda(), lengths))
    same(graphed.beam(source.cuda(), lengths, n_best=2), model.beam(source.cuda(), lengths, n_best=2))
    draws = [torch.Generator().manual_seed(4) for _ in range(2)]
    sides = zip((graphed, model), draws, strict=True)
    found, wanted = (m.sample(source.cuda(), lengths, generator=g) for m, g in sides)
    same(found, wanted)
