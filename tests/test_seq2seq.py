"""The parts of seqkern.seq2seq: what each computes, and what programs that came before got wrong."""

import itertools

import pytest
import torch
from torch import nn

from seqkern.seq2seq import Attention, Bridge, Decoder, Encoder, Seq2Seq

PAD, BOS = 0, 1
LENGTHS = torch.tensor([7, 3, 0, 5, 1])
KINDS = ("none", "dot", "general", "bahdanau", "concat")
CELLS = ("rnn", "gru", "lstm")


def make_model(cell="gru", attention="general", feeding=False, layers=1, encoder_layers=1, dropout=0.0, **options):
    encoder = Encoder(20, 8, 6, cell=cell, num_layers=encoder_layers, dropout=dropout)
    decoder = Decoder(
        15, 10, 12, encoder.size, cell=cell, num_layers=layers, attention=attention, input_feeding=feeding,
        dropout=dropout, **options,
    )  # fmt: skip
    return Seq2Seq(encoder, decoder)


def make_batch(steps=7, target=4):
    given = torch.randint(3, 15, (target, 5))
    given[0] = BOS
    return torch.randint(1, 20, (steps, 5)), LENGTHS, given


MODELS = [
    dict(cell=cell, attention=kind, feeding=feeding, layers=layers)
    for (cell, layers), (kind, feeding) in itertools.product(
        zip(CELLS, (1, 2, 2), strict=True), [(k, f) for k in KINDS for f in (False, True) if k != "none" or not f]
    )
]
ids = [" ".join(map(str, m.values())) for m in MODELS]


@pytest.mark.parametrize("settings", MODELS, ids=ids)
def test_whole_target_equals_step_by_step(settings):
    model = make_model(**settings)
    source, lengths, given = make_batch()
    whole = model(source, lengths, given)
    memory, state = model.encode(source, lengths)
    sources, carry, steps = model.decoder.sources(memory), model.decoder.first_carry(state), []
    for tokens in given:
        logits, carry, alpha = model.decoder.step(tokens, sources, carry)
        steps.append(logits)
        if alpha is not None:
            assert torch.allclose(alpha.sum(1), (lengths > 0).float())
            assert all(not row[n:].any() for row, n in zip(alpha, lengths.tolist(), strict=True))
    torch.testing.assert_close(whole, torch.stack(steps), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("settings", MODELS, ids=ids)
def test_every_parameter_learns_and_nothing_is_nan(settings):
    model = make_model(dropout=0.2, encoder_layers=2, **settings)
    model(*make_batch()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("feeding", [False, True])
def test_padding_and_neighbours_change_no_row(kind, feeding):
    if kind == "none" and feeding:
        pytest.skip("refused")
    model = make_model("lstm", kind, feeding)
    source, lengths, given = make_batch()
    whole = model(source, lengths, given)
    longer = torch.cat([source, torch.randint(1, 20, (3, 5))])
    torch.testing.assert_close(model(longer, lengths, given), whole)
    for b, n in enumerate(lengths.tolist()):
        alone = model(source[: max(n, 1), b : b + 1], lengths[b : b + 1], given[:, b : b + 1])
        torch.testing.assert_close(alone, whole[:, b : b + 1], atol=2e-6, rtol=1e-5)


def test_attention_is_what_the_papers_say():
    h, m, lengths = torch.randn(3, 5), torch.randn(3, 4, 5), torch.tensor([4, 2, 1])
    for kind in KINDS[1:]:
        attention = Attention(kind, 5, 5)
        found = attention(h, attention.keys(m), lengths)
        for b, n in enumerate(lengths.tolist()):
            scores = []
            for place in m[b, :n]:
                if kind == "dot":
                    scores.append(h[b] @ place)
                elif kind == "general":
                    scores.append(h[b] @ (attention.key.weight @ place))
                else:
                    both = torch.cat([attention.query.weight, attention.key.weight], 1) @ torch.cat([h[b], place])
                    bias = attention.key.bias if kind == "bahdanau" else 0
                    scores.append(attention.score.weight[0] @ torch.tanh(both + bias))
            torch.testing.assert_close(found[b, :n], torch.softmax(torch.stack(scores), 0))


def test_pre_output_is_tanh_of_h_beside_the_context():
    model = make_model("gru", "general")
    source, lengths, given = make_batch()
    memory, state = model.encode(source, lengths)
    decoder = model.decoder
    a, _, weights = decoder.vectors(given, memory, state)
    h, _ = decoder.layers(decoder.embedding(given), state[0])
    context = torch.einsum("tbs,sbm->tbm", weights, memory.values)
    joined = torch.cat([decoder.pre.weight, decoder.context.weight], 1)
    expected = torch.tanh(nn.functional.linear(torch.cat([h, context], -1), joined, decoder.pre.bias))
    torch.testing.assert_close(a, expected)


@pytest.mark.parametrize("cell", CELLS)
def test_encoder_equals_torch_on_packed_sequences(cell):
    encoder = Encoder(20, 8, 6, cell=cell, num_layers=2)
    source, lengths = torch.randint(1, 20, (7, 4)), torch.tensor([3, 7, 1, 5])
    memory = encoder(source, lengths)
    twin = getattr(nn, cell.upper())(8, 6, 2, bidirectional=True)
    twin.load_state_dict(encoder.layers.state_dict())
    packed = nn.utils.rnn.pack_padded_sequence(encoder.embedding(source), lengths, enforce_sorted=False)
    y, last = twin(packed)
    torch.testing.assert_close(memory.values, nn.utils.rnn.pad_packed_sequence(y)[0])
    h, c = last if cell == "lstm" else (last, None)
    torch.testing.assert_close(memory.state[0], h)
    if c is not None:
        torch.testing.assert_close(memory.state[1], c)


def test_encoder_takes_vectors():
    encoder = Encoder(None, 8, 6)
    memory = encoder(torch.randn(7, 5, 8), LENGTHS)
    assert memory.values.shape == (7, 5, 12) and not memory.values[:, 2].any() and not memory.state[0][:, 2].any()


@pytest.mark.parametrize("decoder_layers, sources", [(1, [2]), (2, [1, 2]), (3, [0, 1, 2]), (4, [0, 0, 1, 2])])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_bridge_uses_every_state_of_the_layer_it_takes(cell, decoder_layers, sources):
    """Not the h of the top layer alone, not the forward half alone, and the LSTM's c from the encoder's c."""
    encoder = Encoder(20, 8, 6, cell=cell, num_layers=3)
    bridge = Bridge(encoder, cell, decoder_layers, 10)
    h = torch.randn(6, 5, 6, requires_grad=True)
    c = torch.randn(6, 5, 6, requires_grad=True) if cell == "lstm" else None
    first_h, first_c = bridge((h, c))
    assert first_h.shape == (decoder_layers, 5, 10)
    for layer, source in enumerate(sources):
        for first, state in ((first_h, h), (first_c, c)):
            if state is None:
                continue
            (grad,) = torch.autograd.grad(first[layer].sum(), state, retain_graph=True)
            used = [i for i in range(6) if grad[i].abs().min() > 0]
            assert used == [2 * source, 2 * source + 1]
    if c is not None:
        assert first_c.abs().max() > first_c.tanh().abs().max(), "c is not squashed"


def test_bridge_copy_and_mixed_cells():
    encoder = Encoder(20, 8, 6, cell="gru", num_layers=2)
    memory = encoder(*make_batch()[:2])
    h, c = Bridge(encoder, "lstm", 2, 12, "copy")(memory.state)
    assert not c.any()
    torch.testing.assert_close(h[1], torch.cat([memory.state[0][2], memory.state[0][3]], -1))
    encoder = Encoder(20, 8, 6, cell="lstm")
    h, c = Bridge(encoder, "gru", 1, 9)(encoder(*make_batch()[:2]).state)
    assert h.shape == (1, 5, 9) and c is None


@pytest.mark.parametrize("feeding", [False, True])
def test_scheduled_sampling_gives_the_models_own_tokens(feeding):
    model = make_model("gru", "general", feeding, dropout=0.3)
    model.eval()
    source, lengths, given = make_batch(target=6)
    memory, state = model.encode(source, lengths)
    own = model(source, lengths, given, sampling=1.0)
    # With probability one the tokens are those of the greedy search that is not allowed to end.
    sources, carry, token = model.decoder.sources(memory), model.decoder.first_carry(state), given[0]
    for t in range(6):
        logits, carry, _ = model.decoder.step(token, sources, carry)
        torch.testing.assert_close(own[t], logits, atol=2e-6, rtol=1e-5)
        logits[:, [PAD, BOS]] = -torch.inf
        token = logits.argmax(-1)
    torch.testing.assert_close(model(source, lengths, given, sampling=0.0), model(source, lengths, given))
    model.train()
    draws = [model(source, lengths, given, sampling=0.5, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert model.decoder.training and model.decoder.dropout.training and draws[0].shape == draws[1].shape


def test_searching_leaves_each_part_in_its_mode():
    model = make_model(dropout=0.5)
    model.train()
    model.encoder.eval()
    first, second = (model.greedy(*make_batch()[:2], max_len=5) for _ in range(2))
    assert model.training and model.decoder.training and not model.encoder.training
    assert first.tokens.dim() == 3 and second.lengths.shape == (1, 5)


def test_tied_embeddings_are_one_parameter():
    model = make_model(tied=True, pre_output=10)
    assert model.decoder.out.weight is model.decoder.embedding.weight
    assert len({id(p) for p in model.parameters()}) == len(list(model.parameters()))
    other = make_model(tied=True, pre_output=10)
    other.load_state_dict(model.state_dict())
    source, lengths, given = make_batch()
    assert torch.equal(other(source, lengths, given), model(source, lengths, given))
    assert other.decoder.out.weight is other.decoder.embedding.weight


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Encoder(20, 8, 6, cell="sru"), "cell must be one of rnn, gru, lstm, got 'sru'"),
        (lambda: make_model(attention="cosine"), "attention must be one of .*, got 'cosine'"),
        (lambda: make_model(attention="none", feeding=True), "input_feeding .* needs attention"),
        (lambda: make_model(tied=True), r"tied embeddings need E = 12, .*, got 10"),
        (lambda: make_model(pad=1), r"pad, bos and eos must be three ids in .*\(1, 1, 2\)"),
        (lambda: make_model(eos=15), r"in \[0, V\) = \[0, 15\), got \(0, 1, 15\)"),
        (lambda: Attention("dot", 5, 6), "'dot' needs .* got 5 and 6"),
        (lambda: Bridge(Encoder(9, 8, 6), "gru", 1, 10, "copy"), "got 12, 10"),
        (lambda: Bridge(Encoder(9, 8, 6), "gru", 1, 10, "mean"), "'linear' or 'copy', got 'mean'"),
        (lambda: Seq2Seq(Encoder(9, 8, 6), Decoder(9, 8, 6, 13)), "must be the encoder's D\\*H = 12, got 13"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(source=torch.zeros(0, 5, dtype=torch.int64)), "source must have at least one step"),
        (dict(source=torch.full((7, 5), 20)), r"source must hold tokens in \[0, V\) = \[0, 20\), got 20"),
        (dict(source=torch.full((7, 5), -1)), "got -1"),
        (dict(source=torch.zeros(7, 5)), r"source must be \[S, B\] int64, got \[7, 5\] torch.float32"),
        (dict(given=torch.full((4, 5), 15)), r"given must hold tokens in \[0, V\) = \[0, 15\), got 15"),
        (dict(given=torch.zeros(0, 5, dtype=torch.int64)), "given must have at least one step"),
        (dict(lengths=torch.tensor([8, 3, 0, 5, 1])), "lengths"),
        (dict(lengths=torch.tensor([-1, 3, 0, 5, 1])), "lengths"),
        (dict(lengths=torch.tensor([7, 3])), "lengths"),
        (dict(sampling=1.5), r"sampling must be a probability in \[0, 1\], got 1.5"),
    ],
)
def test_wrong_input_is_refused(change, message):
    source, lengths, given = make_batch()
    call = dict(source=source, lengths=lengths, given=given) | change
    with pytest.raises((ValueError, RuntimeError), match=message):
        make_model()(**call)
