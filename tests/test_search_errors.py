"""Bad arguments of the searches: what was wanted, and what came."""

import re

import pytest
import torch
from search_cases import make, sources

BAD = [
    ("greedy", {"max_len": 0}, "max_len must be at least 1, got 0"),
    ("beam", {"max_len": -1}, "max_len must be at least 1, got -1"),
    ("beam", {"beam": 0}, "beam must be at least 1, got 0"),
    ("beam", {"n_best": 0}, "n_best must be at least 1, got 0"),
    ("beam", {"min_len": 9, "max_len": 5}, "min_len must be in [0, max_len] = [0, 5], got 9"),
    ("beam", {"min_len": -1}, "min_len must be in [0, max_len] = [0, 50], got -1"),
    ("beam", {"length_penalty": -0.1}, "length_penalty must be at least 0, got -0.1"),
    ("beam", {"coverage_penalty": float("nan")}, "coverage_penalty must be at least 0, got nan"),
    ("sample", {"temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ("sample", {"temperature": float("nan")}, "temperature must be above 0, got nan"),
    ("sample", {"top_k": -2}, "top_k must be at least 0 (0: all tokens), got -2"),
    ("sample", {"top_p": 0.0}, "top_p must be in (0, 1], got 0.0"),
    ("sample", {"top_p": 1.5}, "top_p must be in (0, 1], got 1.5"),
    ("sample", {"max_len": 0}, "max_len must be at least 1, got 0"),
]


@pytest.mark.parametrize("search, given, message", BAD)
@pytest.mark.parametrize("snapshot", [False, True])
def test_bad_options(search, given, message, snapshot):
    model = make()
    model = model.compile_search() if snapshot else model
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(model, search)(*sources(), **given)


@pytest.mark.parametrize("search", ["greedy", "beam", "sample"])
def test_bad_sources(search):
    model = make()
    with pytest.raises(ValueError, match="got 13"):
        getattr(model, search)(torch.full((4, 2), 13))
    with pytest.raises(ValueError, match="lengths"):
        getattr(model, search)(torch.zeros(4, 2, dtype=torch.int64), torch.tensor([5, 1]))


def test_training_mode_comes_back():
    model = make().train()
    model.encoder.eval()
    model.beam(*sources())
    assert model.training and model.decoder.training and not model.encoder.training


def test_operators_check_what_they_are_given():
    ops = torch.ops.seqkern
    h, ids = torch.zeros(1, 2, 10), [0, 1, 2]
    lengths = torch.ones(2, dtype=torch.int64)
    program = make(attention="general").compile_search().program
    keys = torch.zeros(2, 3, 10)
    with pytest.raises(RuntimeError, match="packed must be what search_pack made"):
        ops.search_greedy(torch.zeros(300, dtype=torch.uint8), None, keys, keys, lengths, h, None, None, ids, 5, False)
    with pytest.raises(RuntimeError, match=re.escape("h0 must be [L, B, H] = [1, 2, 10], got [1, 3, 10]")):
        ops.search_greedy(program.packed, None, keys, keys, lengths, h.new_zeros(1, 3, 10), None, None, ids, 5, False)
    with pytest.raises(RuntimeError, match="needs both"):
        ops.search_greedy(program.packed, None, keys, None, lengths, h, None, None, ids, 5, False)
    with pytest.raises(RuntimeError, match=re.escape("in [0, V) = [0, 11)")):
        ops.search_greedy(program.packed, None, keys, keys, lengths, h, None, None, [0, 1, 11], 5, False)
    with pytest.raises(RuntimeError, match="values must be"):
        ops.search_beam(
            program.packed, None, keys, keys[:1], lengths, h, None, ids, [1, 1, 1, 0], 0.0, 0.0, False, False
        )
