"""The attention decoder's operator against the reference in float64, with random cotangents on all outputs."""

import pytest
import torch
from decoder_cases import CASES, DTYPES, Case, check, cotangents, evaluate, leaves, make, operator, with_leaves

from seqkern.seq2seq import ops

each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(case, dtype):
    check(case, dtype, evaluate(operator, case, make(case, dtype), cotangents(case, dtype)))


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[6], CASES[11]], ids=lambda c: c.name)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(case, threads):
    """Any number of threads, by itself enough work for them."""
    case = Case(**{**case.__dict__, "B": 13, "T": 12, "lengths": None})
    torch.set_num_threads(threads)
    check(case, torch.float32, evaluate(operator, case, make(case, torch.float32), cotangents(case, torch.float32)))


@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[11]], ids=lambda c: c.name)
def test_repeats_bit_for_bit(case):
    arguments, dys = make(case, torch.float32), cotangents(case, torch.float32)
    first, second = (evaluate(operator, case, arguments, dys) for _ in range(2))
    for name, t in first.items():
        assert torch.equal(t, second[name]), name


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[4]], ids=lambda c: c.name)
def test_longer_source_and_batch_change_no_row(case):
    """NaN in the padding of S and in another row of the batch reaches nothing."""
    arguments = make(case, torch.float32)
    a, h_n, c_n, alpha, _ = operator(*arguments)
    gx, feed0, h0, c0, weights, keys, values, lengths, *rest, masks, cell = arguments

    def row(t, dim):  # one more row of NaN
        return None if t is None else torch.cat([t, torch.full_like(t.narrow(dim, 0, 1), torch.nan)], dim)

    def pad(t):
        return row(torch.cat([t, torch.full_like(t, torch.nan)], 1), 0)

    lengths = torch.cat([lengths, lengths.new_tensor([case.S])])
    wider = (row(gx, 1), row(feed0, 0), row(h0, 1), row(c0, 1), weights, pad(keys), pad(values), lengths, *rest)
    a2, h2, c2, alpha2, _ = operator(*wider, row(masks, 2), cell)
    torch.testing.assert_close(a2[:, :-1], a, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(h2[:, :-1], h_n, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alpha2[:, :-1, : case.S], alpha, rtol=1e-5, atol=1e-6)
    assert (alpha2[:, :-1, case.S :] == 0).all()
    if cell == "lstm":
        torch.testing.assert_close(c2[:, :-1], c_n, rtol=1e-5, atol=1e-6)
    assert a2[:, -1].isnan().all()


def test_gradient_of_padding_is_zero_even_beside_nan():
    case = CASES[4]
    arguments = make(case, torch.float32)
    outside = torch.arange(case.S) >= arguments[7].unsqueeze(1)
    for i in (5, 6):
        arguments[i] = arguments[i].masked_fill(outside.unsqueeze(-1), torch.nan)
    found = evaluate(operator, case, arguments, cotangents(case, torch.float32))
    plain = evaluate(operator, case, make(case, torch.float32), cotangents(case, torch.float32))
    for name, t in plain.items():
        assert torch.equal(found[name], t), name
    assert (found["dkeys"][outside] == 0).all() and (found["dvalues"][outside] == 0).all()


def test_rows_of_length_zero():
    case = Case("gru", lengths=(0, 0, 0))
    found = evaluate(operator, case, make(case, torch.float32), cotangents(case, torch.float32))
    assert (found["alpha"] == 0).all() and (found["dkeys"] == 0).all() and (found["dvalues"] == 0).all()
    check(case, torch.float32, found)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_batch_of_zero(cell):
    case = Case(cell, 2, B=0, K=4, lengths=(), V=None if cell == "gru" else 3)
    found = evaluate(operator, case, make(case, torch.float32), cotangents(case, torch.float32))
    assert found["a"].shape == (case.T, 0, case.A) and found["dw_pre"].abs().sum() == 0


def test_strided_and_expanded_inputs():
    case = CASES[1]
    arguments = make(case, torch.float32)

    def strange(t):  # every second element of a twice as large tensor, its dimensions in another order
        big = torch.zeros([2 * n for n in reversed(t.shape)])
        view = big[tuple(slice(None, None, 2) for _ in t.shape)].permute(*reversed(range(t.dim())))
        return view.copy_(t)

    strided = with_leaves(arguments, [strange(t) for t in leaves(arguments)])
    strided[7] = torch.stack([strided[7], strided[7]], 1)[:, 0]
    plain = evaluate(operator, case, arguments, cotangents(case, torch.float32))
    found = evaluate(operator, case, strided, cotangents(case, torch.float32))
    for name, t in plain.items():
        assert torch.equal(found[name], t), name
    dys = [torch.ones(()).expand_as(d) for d in cotangents(case, torch.float32)]
    expanded = evaluate(operator, case, arguments, dys)
    for name, t in evaluate(operator, case, arguments, [d.contiguous() for d in dys]).items():
        assert torch.equal(expanded[name], t), name


@pytest.mark.parametrize("case", [CASES[0], CASES[1]], ids=lambda c: c.name)
def test_each_gradient_alone(case):
    """One argument that needs a gradient, one cotangent, and the rest None."""
    arguments, dys = make(case, torch.float32), cotangents(case, torch.float32)
    for out, dy in zip([0, 1, *[2] * (case.cell == "lstm"), 3], dys, strict=True):
        tensors = [t.detach().requires_grad_() for t in leaves(arguments)]
        every = torch.autograd.grad(ops.run(*with_leaves(arguments, tensors))[out], tensors, dy)
        for i, want in enumerate(every):
            alone = [t.detach() for t in leaves(arguments)]
            alone[i].requires_grad_()
            (got,) = torch.autograd.grad(ops.run(*with_leaves(arguments, alone))[out], alone[i], dy)
            torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("threads", [1, 2])
def test_tokens_read_their_rows(threads):
    """The same as gx with the rows looked up; a row's gradient is the sum over the places of its token."""
    torch.set_num_threads(threads)
    case = CASES[11]
    arguments, dys = make(case, torch.float64), cotangents(case, torch.float64)
    *inputs, tokens = arguments
    table = inputs[0].requires_grad_()
    plain = operator(table[tokens], *inputs[1:])
    (want,) = torch.autograd.grad([plain[0], plain[1], plain[3]], table, dys)
    found = operator(*arguments)
    (got,) = torch.autograd.grad([found[0], found[1], found[3]], table, dys)
    assert torch.equal(found[0], plain[0])
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_no_feed_is_a_feed_of_zeros():
    case = CASES[14]
    arguments, dys = make(case, torch.float32), cotangents(case, torch.float32)
    found = evaluate(operator, case, arguments, dys)
    fed = Case(**{**case.__dict__, "fed": True})
    zeros = evaluate(operator, fed, [arguments[0], torch.zeros(case.B, case.A), *arguments[2:]], dys)
    for name, t in found.items():
        torch.testing.assert_close(t, zeros[name], rtol=1e-5, atol=1e-5)


def test_inference_keeps_nothing():
    arguments = make(CASES[1], torch.float32)
    assert ops.attention_decoder(*arguments, False)[4].numel() == 0
    for got, want in zip(ops.run(*arguments), operator(*arguments)[:4], strict=True):
        assert torch.equal(got, want)


def test_backward_without_reserve():
    """The backward operator runs forward again where nothing was kept."""
    case = CASES[1]
    arguments, (da, dh, dc, dalpha) = make(case, torch.float32), cotangents(case, torch.float32)
    a, _, _, alpha, reserve = operator(*arguments)
    *inputs, cell = arguments
    results = [
        ops.attention_decoder_backward(da, dh, dc, dalpha, *inputs, a, alpha, kept, cell, True, True, True)
        for kept in (reserve, reserve.new_empty(0))
    ]
    for got, want in zip(*results, strict=True):
        for g, w in zip(got, want, strict=True) if isinstance(got, list) else [(got, want)]:
            assert torch.equal(g, w)
