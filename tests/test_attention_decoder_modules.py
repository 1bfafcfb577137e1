"""The decoder's modules on the fused operator: the same as on the reference, compiled too; when which of them runs."""

from unittest import mock

import pytest
import torch
from torch import nn

from seqkern.seq2seq import Decoder, Encoder, Seq2Seq, decoder, ops, reference, search

V, S, T, B = 11, 6, 5, 4


def model(cell="gru", attention="general", layers=2, dropout=0.0):
    torch.manual_seed(0)
    encoder = Encoder(V, 5, 6, cell=cell, num_layers=layers)
    return Seq2Seq(
        encoder, Decoder(V, 5, 7, encoder.size, cell=cell, num_layers=layers, attention=attention, input_feeding=True,
                         pre_output=9, dropout=dropout),
    )  # fmt: skip


def batch():
    torch.manual_seed(1)
    source, given = torch.randint(3, V, (S, B)), torch.randint(3, V, (T, B))
    given[0] = 1
    return source, torch.tensor([3, 0, S, 1]), given


def gradients(m, *inputs, **more):
    m.zero_grad()
    y = m(*inputs, **more)
    (y**2).sum().backward()
    return [y.detach(), *(p.grad.clone() for p in m.parameters())]


def on_the_reference():
    return mock.patch.object(decoder, "run_attention_decoder", reference.attention_decoder)


def assert_same(found, wanted):
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("attention", ["general", "bahdanau", "concat"])
@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn"])
def test_model(cell, attention):
    m = model(cell, attention)
    found = gradients(m, *batch())
    with on_the_reference():
        assert_same(found, gradients(m, *batch()))


def test_dropout_draws_the_same_masks():
    m = model(dropout=0.4)
    torch.manual_seed(3)
    found = gradients(m, *batch())
    with on_the_reference():
        torch.manual_seed(3)
        assert_same(found, gradients(m, *batch()))


def test_scheduled_sampling():
    """Its gradient is the reference's, given the tokens that were mixed."""
    m, (source, lengths, given) = model(), batch()
    found = gradients(m, source, lengths, given, sampling=0.7, generator=torch.Generator().manual_seed(5))
    memory, state = m.encode(source, lengths)
    mixed = search.mix(m.decoder, memory, state, given, 0.7, torch.Generator().manual_seed(5))
    assert not torch.equal(mixed, given)
    with on_the_reference():
        assert_same(found, gradients(m, source, lengths, mixed))


@pytest.mark.parametrize("attention, cell", [("general", "gru"), ("bahdanau", "lstm")])
def test_compiled(attention, cell):
    m, (source, lengths, given) = model(cell, attention), batch()
    memory, state = m.encode(source, lengths)
    memory = memory._replace(values=memory.values.detach(), state=None)
    state = tuple(None if s is None else s.detach() for s in state)
    compiled = torch.compile(m.decoder, fullgraph=True, backend="aot_eager")
    assert_same(gradients(compiled, given, memory, state), gradients(m.decoder, given, memory, state))


def test_a_table_of_the_vocabulary_or_of_the_places():
    """With fewer tokens than places the projected vocabulary is read, else each place is projected."""
    m, (source, lengths, given) = model(), batch()
    seen = []
    fused = ops.run
    with mock.patch.object(ops, "run", lambda *a: seen.append(a[0].shape) or fused(*a)):
        whole = gradients(m, source, lengths, given)
        memory, state = m.encode(source, lengths)
        first = m.decoder(given[:2], memory, state)
        m.train()
        m.decoder.dropout.p = 0.5
        m(source, lengths, given)
    assert seen == [(V, 21), (2, B, 21), (T, B, 21)]
    torch.testing.assert_close(first, whole[0][:2], rtol=1e-5, atol=1e-6)


def test_the_embedding_of_padding_gets_no_gradient():
    m, (source, lengths, given) = model(), batch()
    given[3:] = 0
    gradients(m, source, lengths, given)
    grad = m.decoder.embedding.weight.grad
    assert (grad[0] == 0).all() and (grad[given[:3]] != 0).any(-1).all()


def calls(function) -> list[str]:
    """Which of the two ran."""
    seen = []
    plain, fused = reference.attention_decoder, ops.run
    with (
        mock.patch.object(reference, "attention_decoder", lambda *a: seen.append("reference") or plain(*a)),
        mock.patch.object(ops, "run", lambda *a: seen.append("operator") or fused(*a)),
    ):
        function()
    return seen


def test_which_one_runs():
    m, inputs = model(), batch()
    assert calls(lambda: m(*inputs)) == ["operator"]
    assert calls(lambda: m.bfloat16()(*inputs)) == ["operator"]
    m = model()
    memory, state = m.encode(*inputs[:2])

    def of_bias(bias):
        return torch.func.functional_call(m.decoder, {"out.bias": bias}, (inputs[2], memory, state)).sum()

    assert calls(lambda: torch.func.grad(of_bias)(torch.zeros(V))) == ["reference"]


def test_lengths_of_another_stride_and_no_gradient():
    m, (source, lengths, given) = model(), batch()
    with torch.no_grad():
        wanted = m(source, lengths, given)
        assert torch.equal(m(source, torch.stack([lengths, lengths], 1)[:, 1], given), wanted)
    assert isinstance(m, nn.Module) and not wanted.requires_grad
