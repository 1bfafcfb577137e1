"""Keys and values of a source in one operator: against its definition in float64; and what autograd asks of it."""

import oracle
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from seqkern.seq2seq import Attention, reference
from seqkern.seq2seq.attention import project
from seqkern.seq2seq.encoder import Memory
from seqkern.seq2seq.sources import project_sources, project_sources_backward

NAMES = ("keys", "values", "dmemory", "dw_key", "db_key", "dw_value")
# S, B, M, K, A, lengths: on either side of the sizes of vectors, tiles and blocks.
SIZES = (
    (3, 2, 4, 5, 6, (3, 1)),
    (1, 1, 1, 1, 1, (1,)),
    (7, 5, 33, 70, 9, (7, 0, 3, 1, 6)),
    (40, 9, 65, 17, 130, (40, 39, 1, 20, 33, 40, 0, 7, 12)),
    (2, 3, 300, 64, 64, (0, 0, 0)),
    (25, 40, 16, 6, 12, tuple(range(25)) + (25,) * 15),
)
each_size = pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "s{}_b{}_m{}_k{}_a{}".format(*s))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def make(sizes, dtype, biased=True):
    s, b, m, k, a, lengths = sizes
    g = torch.Generator().manual_seed(0)
    shapes = [(s, b, m), (k, m), (k,), (a, m)]
    memory, w_key, b_key, w_value = (torch.randn(n, generator=g).to(dtype) for n in shapes)
    return [memory, torch.tensor(lengths), w_key, b_key if biased else None, w_value]


def cotangents(sizes, dtype):
    s, b, _, k, a, _ = sizes
    g = torch.Generator().manual_seed(1)
    return [torch.randn((b, s, n), generator=g).to(dtype) for n in (k, a)]


def evaluate(function, arguments, dys):
    leaves = [None if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in arguments]
    outputs = function(*leaves)
    grads = torch.autograd.grad(outputs, [t for t in leaves if t is not None and t.requires_grad], dys)
    names = [n for n in NAMES if arguments[3] is not None or n != "db_key"]
    return dict(zip(names, (*(o.detach() for o in outputs), *grads), strict=True))


def faults(sizes, dtype, biased=True, function=project_sources):
    arguments, dys = make(sizes, dtype, biased), cotangents(sizes, dtype)
    exact = [t.double() if t is not None and t.is_floating_point() else t for t in arguments]
    want = evaluate(reference.project_sources, exact, [d.double() for d in dys])
    low = torch.float32 if dtype == torch.float64 else dtype
    native = evaluate(reference.project_sources, make(sizes, low, biased), cotangents(sizes, low))
    shrink = torch.finfo(dtype).eps / torch.finfo(low).eps
    found = evaluate(function, arguments, dys)
    wrong = {}
    for name, got in found.items():
        assert got.dtype == dtype
        true = want[name] if low == dtype else evaluate(
            reference.project_sources,
            [t.double() if t is not None and t.is_floating_point() else t for t in make(sizes, low, biased)],
            [d.double() for d in cotangents(sizes, low)],
        )[name]  # fmt: skip
        problem = oracle.fault(got, want[name], oracle.distance(native[name], true) * shrink)
        if problem:
            wrong[name] = problem
    return wrong


@each_size
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(sizes, dtype):
    assert not faults(sizes, dtype)
    assert not faults(sizes, dtype, biased=False)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads):
    torch.set_num_threads(threads)
    assert not faults(SIZES[3], torch.float32)
    assert not faults(SIZES[5], torch.bfloat16)


def test_the_check_finds_a_fault():
    def off(memory, lengths, w_key, b_key, w_value):
        keys, values = project_sources(memory, (lengths - 1).clamp(min=0), w_key, b_key, w_value)
        return keys, values

    assert set(faults(SIZES[0], torch.float32, function=off)) == set(NAMES)


def test_padding_is_not_read():
    arguments, dys = make(SIZES[2], torch.float32), cotangents(SIZES[2], torch.float32)
    inside = reference.places_inside(arguments[1], 7, torch.device("cpu")).unsqueeze(-1)
    plain = evaluate(project_sources, arguments, dys)
    arguments[0] = torch.where(inside.transpose(0, 1), arguments[0], torch.nan)
    found = evaluate(project_sources, arguments, [torch.where(inside, d, torch.nan) for d in dys])
    for name, t in plain.items():
        assert torch.equal(found[name], t), name
    for name in ("keys", "values"):
        assert (found[name][~inside.squeeze(-1)] == 0).all()
    assert (found["dmemory"].transpose(0, 1)[~inside.squeeze(-1)] == 0).all()


def test_batch_of_zero_and_strides():
    memory, _, w_key, b_key, w_value = make(SIZES[0], torch.float32)
    none = [memory[:, :0], torch.zeros(0, dtype=torch.int64), w_key, b_key, w_value]
    found = evaluate(project_sources, none, [torch.zeros(0, 3, 5), torch.zeros(0, 3, 6)])
    assert found["keys"].shape == (0, 3, 5) and (found["dw_key"] == 0).all() and (found["db_key"] == 0).all()
    arguments, dys = make(SIZES[3], torch.float32), cotangents(SIZES[3], torch.float32)
    plain = evaluate(project_sources, arguments, dys)
    strided = [
        t if t is None or t.dim() < 2 else t.transpose(0, 1).contiguous().transpose(0, 1) for t in arguments
    ]  # fmt: skip
    for name, t in evaluate(project_sources, strided, [d.mT.contiguous().mT for d in dys]).items():
        assert torch.equal(t, plain[name]), name


def test_each_gradient_alone():
    arguments, dys = make(SIZES[2], torch.float32), cotangents(SIZES[2], torch.float32)
    every = evaluate(project_sources, arguments, dys)
    for place, name in ((0, "dmemory"), (2, "dw_key"), (3, "db_key"), (4, "dw_value")):
        alone = [t.detach() for t in arguments]
        alone[place].requires_grad_()
        (got,) = torch.autograd.grad(project_sources(*alone), alone[place], dys)
        assert torch.equal(got, every[name])


@pytest.mark.parametrize("biased", [True, False])
def test_derivatives(biased):
    memory, lengths, *weights = make((3, 2, 2, 3, 2, (3, 1)), torch.float64, biased)
    leaves = [t.requires_grad_() for t in (memory, *weights) if t is not None]

    def function(memory, w_key, *rest):
        *b_key, w_value = rest
        return project_sources(memory, lengths, w_key, b_key[0] if b_key else None, w_value)

    assert gradcheck(function, leaves) and gradgradcheck(function, leaves)


def test_opcheck():
    for biased in (True, False):
        arguments = [
            t.requires_grad_() if t is not None and t.is_floating_point() else t
            for t in make(SIZES[2], torch.float32, biased)
        ]
        torch.library.opcheck(project_sources, arguments)
        dys = cotangents(SIZES[2], torch.float32)
        for flags in ((True, True), (False, False)):
            torch.library.opcheck(
                project_sources_backward, (*dys, *arguments, *flags), test_utils=("test_schema", "test_faketensor")
            )


def test_autocast():
    arguments = make(SIZES[2], torch.float32)
    low = [t if t is None or not t.is_floating_point() else t.bfloat16() for t in arguments]
    with torch.autocast("cpu", torch.bfloat16):
        found = project_sources(*arguments)
    for got, want in zip(found, project_sources(*low), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["general", "bahdanau", "concat", "dot"])
def test_modules_use_it(kind):
    torch.manual_seed(0)
    attention, context = Attention(kind, 6, 6), torch.nn.Linear(6, 4, bias=False)
    memory = Memory(torch.randn(5, 3, 6), torch.tensor([5, 0, 2]), (None, None))
    keys, values, lengths = project(memory, attention, context)
    inside = reference.places_inside(lengths, 5, torch.device("cpu"))
    rows = memory.values.transpose(0, 1)
    torch.testing.assert_close(keys[inside], attention.keys(rows)[inside])
    torch.testing.assert_close(values[inside], context(rows)[inside])


@pytest.mark.parametrize(
    "place, change, match",
    [
        (0, lambda t: t[0], r"memory must be \[S, B, M\], got \[2, 4\]"),
        (0, lambda t: t[:0], "S, M, K and A must be at least 1"),
        (0, lambda t: t.to(torch.complex64), "must be float64, float32, bfloat16 or float16"),
        (1, lambda t: t[1:], r"lengths must be \[B\] = \[2\] int64"),
        (1, lambda t: t.int(), r"lengths must be \[B\] = \[2\] int64"),
        (1, lambda t: t + 1, r"lengths must be in \[0, S\] = \[0, 3\], got 4"),
        (1, lambda t: t - 2, r"lengths must be in \[0, S\] = \[0, 3\], got -1"),
        (2, lambda t: t[:, 1:], r"w_key must be \[K, M\] = \[5, 4\], got \[5, 3\]"),
        (2, lambda t: t[0], r"w_key must be \[K, M\] and w_value \[A, M\], got \[4\]"),
        (3, lambda t: t[1:], r"b_key must be \[K\] = \[5\], got \[4\]"),
        (4, lambda t: t.double(), "w_value must be float32"),
    ],
)
def test_errors(place, change, match):
    arguments = make(SIZES[0], torch.float32)
    arguments[place] = change(arguments[place])
    with pytest.raises(RuntimeError, match=match):
        project_sources(*arguments)


def test_errors_of_backward():
    arguments, (dkeys, dvalues) = make(SIZES[0], torch.float32), cotangents(SIZES[0], torch.float32)
    with pytest.raises(RuntimeError, match=r"dkeys must be \[B, S, K\] = \[2, 3, 5\], got \[1, 3, 5\]"):
        project_sources_backward(dkeys[:1], dvalues, *arguments, True, True)
    with pytest.raises(RuntimeError, match="dvalues must be float32"):
        project_sources_backward(dkeys, dvalues.double(), *arguments, True, True)
