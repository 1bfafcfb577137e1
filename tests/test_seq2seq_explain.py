"""seqkern.explain of decoders and whole models: what it says is what runs."""

from unittest import mock

import pytest
import torch

import seqkern
from seqkern.seq2seq import Decoder, Encoder, Seq2Seq, compiled, ops, reference, search

V, S, T, B = 11, 6, 5, 4


def model(**options):
    torch.manual_seed(0)
    encoder = Encoder(V, 5, 6)
    return Seq2Seq(encoder, Decoder(V, 5, 7, encoder.size, **{"input_feeding": True} | options))


def calls(function) -> list[str]:
    """Which of the operators and references ran, in order."""
    seen = []

    def spy(owner, name, what):
        plain = getattr(owner, name)
        return mock.patch.object(owner, name, lambda *a, **k: seen.append(what) or plain(*a, **k))

    with (
        spy(ops, "run", "operator"),
        spy(reference, "attention_decoder", "reference"),
        spy(compiled.Program, "greedy", "compiled"),
        spy(search, "_walk", "loop"),
    ):
        function()
    return seen


def batch():
    source, given = torch.randint(3, V, (S, B)), torch.randint(3, V, (T, B))
    return source, torch.tensor([3, 1, S, 1]), given


def test_fused_and_compiled():
    m, (source, lengths, given) = model(), batch()
    plan = seqkern.explain(m, B, T)
    assert plan.engine == f"cpu-{torch.ops.seqkern._cpu_isa()}"
    for part in ("Seq2Seq (gru, attention general) float32 on cpu, T=5 B=4 V=11 E=5 H=7", "fused attention decoder",
                 "encoder: cpu-", "the projected vocabulary", "searches: the whole loop in one operator"):  # fmt: skip
        assert part in str(plan), part
    assert calls(lambda: m(source, lengths, given)) == ["operator"]
    assert calls(lambda: m.greedy(source, lengths, max_len=3)) == ["compiled"]
    assert "each place" in str(seqkern.explain(m.decoder, 2, T))
    assert str(seqkern.explain(m.decoder, B, T)).startswith("Decoder (gru")


def test_what_is_not_fused():
    m = model()
    for plan in (seqkern.explain(m, B, T, device="cuda"), seqkern.explain(m.to(torch.complex64), B, T)):
        assert plan.engine == "reference" and "seqkern.seq2seq.reference" in plan.why
    assert "device cuda" in str(seqkern.explain(m, B, T, device="cuda"))
    assert "dtype complex64" in str(seqkern.explain(m, B, T))


def test_without_input_feeding():
    m = model(input_feeding=False, attention="none")
    plan = seqkern.explain(m, B, T)
    assert "no input feeding" in plan.why and plan.engine == seqkern.explain(m.decoder.layers, B, T).engine
    source, lengths, given = batch()
    assert calls(lambda: m(source, lengths, given)) == []


def test_a_search_that_is_not_compiled():
    class Own(Decoder):
        def step(self, *args):
            return super().step(*args)

    m = model()
    m.decoder.__class__ = Own
    source, lengths, _ = batch()
    assert "token by token, in plain torch operations (Own has a step" in str(seqkern.explain(m, B, T))
    assert calls(lambda: m.greedy(source, lengths, max_len=3)) == ["loop"]


def test_errors():
    with pytest.raises(TypeError, match="a seqkern layer, cell, Decoder or Seq2Seq, got Encoder"):
        seqkern.explain(model().encoder, B, T)
    with pytest.raises(ValueError, match="time=0"):
        seqkern.explain(model(), B, 0)
