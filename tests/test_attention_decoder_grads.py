"""Derivatives of the attention decoder: numerically, of second order, under opcheck, and what autograd asks of it."""

import pytest
import torch
from decoder_cases import CASES, Case, cotangents, leaves, make, names, operator, with_leaves
from torch.autograd import gradcheck, gradgradcheck

from seqkern.seq2seq import ops, reference

SMALL = (
    Case("gru", 1, 2, 3, 2, 3, 2, lengths=(2, 3)),
    Case("lstm", 2, 2, 2, 2, 2, 3, K=2, masked=True, lengths=(0, 2)),
    Case("rnn_tanh", 2, 2, 2, 2, 2, 2, lengths=(1, 2)),
    Case("gru", 1, 3, 2, 2, 2, 3, V=2, fed=False, lengths=(1, 2)),
)
each_small = pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)


def as_function(case, decoder=ops.run):
    """The decoder as a function of its floating tensors, and these."""
    arguments = make(case, torch.float64)

    def function(*tensors):
        a, h, c, alpha = decoder(*with_leaves(arguments, list(tensors)))
        return (a, h, c, alpha) if case.cell == "lstm" else (a, h, alpha)

    return function, [t.requires_grad_() for t in leaves(arguments)]


@each_small
def test_gradcheck(case):
    function, tensors = as_function(case)
    assert gradcheck(function, tensors, fast_mode=True)


@each_small
def test_gradgradcheck(case):
    function, tensors = as_function(case)
    assert gradgradcheck(function, tensors, fast_mode=True)


@each_small
def test_second_order_is_the_references(case):
    """Also where only some gradients are asked for, of only some outputs."""

    def second(decoder, outputs, wanted):
        function, tensors = as_function(case, decoder)
        found = [t for i, t in enumerate(function(*tensors)) if i in outputs]
        inputs = [t for t, name in zip(tensors, names(case), strict=True) if name in wanted]
        first = torch.autograd.grad([(t**2).sum() for t in found], inputs, create_graph=True)
        return torch.autograd.grad([(g**2).sum() for g in first], tensors, allow_unused=True, materialize_grads=True)

    for outputs, wanted in (((0,), ["gx"]), ((0, 1, 2), names(case)), ((1,), ["keys", "h0"]), ((0,), ["w_hh0"])):
        pairs = zip(second(ops.run, outputs, wanted), second(reference.attention_decoder, outputs, wanted), strict=True)
        for got, want in pairs:
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_third_order():
    case = SMALL[0]
    results = []
    for decoder in (ops.run, reference.attention_decoder):
        function, tensors = as_function(case, decoder)
        value = (function(*tensors)[0] ** 2).sum()
        for _ in range(2):
            (value,) = torch.autograd.grad(value, tensors[0], create_graph=True)
            value = (value**2).sum()
        results.append(torch.autograd.grad(value, tensors[0])[0])
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("case", [SMALL[0], SMALL[1], SMALL[3], CASES[8]], ids=lambda c: c.name)
def test_opcheck(case):
    arguments = [
        [t.requires_grad_() for t in a] if isinstance(a, list)
        else a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point()
        else a
        for a in make(case, torch.float32)
    ]  # fmt: skip
    arguments, tokens = arguments[: ops.CELL + 1], arguments[ops.CELL + 1 :]
    torch.library.opcheck(ops.attention_decoder, (*arguments, True, *tokens))
    with torch.no_grad():
        a, _, _, alpha, reserve = ops.attention_decoder(*arguments, True, *tokens)
    *inputs, cell = arguments
    dys = cotangents(case, torch.float32)
    if cell != "lstm":
        dys.insert(2, None)
    for flags in ((True, True, True), (False, False, False)):
        torch.library.opcheck(
            ops.attention_decoder_backward, (*dys, *inputs, a, alpha, reserve, cell, *flags, *tokens),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


def test_second_backward_with_retained_graph():
    case = CASES[1]
    tensors = [t.requires_grad_() for t in leaves(make(case, torch.float32))]
    outputs = operator(*with_leaves(make(case, torch.float32), tensors))[:4]
    dys = cotangents(case, torch.float32)
    first = torch.autograd.grad(outputs, tensors, dys, retain_graph=True)
    for again, before in zip(torch.autograd.grad(outputs, tensors, dys), first, strict=True):
        assert torch.equal(again, before)


def test_autocast():
    """Everything goes to the lower precision, gradients come back in each argument's own."""
    case = CASES[0]
    tensors = [t.requires_grad_() for t in leaves(make(case, torch.float32))]
    with torch.autocast("cpu", torch.bfloat16):
        a = ops.run(*with_leaves(make(case, torch.float32), tensors))[0]
    assert a.dtype == torch.bfloat16
    a.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)
    low = [t.detach().bfloat16().requires_grad_() for t in tensors]
    ops.run(*with_leaves(make(case, torch.bfloat16), low))[0].float().sum().backward()
    for t, l in zip(tensors, low, strict=True):  # noqa: E741
        assert torch.equal(t.grad, l.grad.float())
