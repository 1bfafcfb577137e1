"""First, second and third derivatives in float64: by finite differences, and against the reference's own."""

import pytest
import torch
from cases import CELLS, Case, make_inputs
from oracle import engine

from seqkern import ops, reference

VARIANTS: dict[str, dict] = {
    "plain": {},
    "bidirectional": {"bidirectional": True},
    "packed": {"lengths": (3, 2, 1)},
    "bare": {"bias": False, "h0": False, "c0": False},
    "strided": {"layout": "strided"},
    "proj": {"proj": 2},
    "packed_proj_bidirectional": {"lengths": (2, 1), "proj": 2, "bidirectional": True},
}
PROBLEMS = [
    Case(f"gradcheck-{name}-{cell}", cell, **{"T": 3, "B": 2, "I": 2, "H": 3} | options)
    for name, options in VARIANTS.items()
    for cell in CELLS
    if cell == "lstm" or "proj" not in options
]
problems = pytest.mark.parametrize("case", PROBLEMS, ids=lambda case: case.name)
cells = pytest.mark.parametrize("cell", CELLS)


def closed(layer, case: Case):
    """`layer` as a function of its tensors alone, and those tensors as leaves."""
    x, h0, c0, weights, batch_sizes = make_inputs(case, torch.float64)
    tensors = [t for t in (x, h0, c0, *weights) if t is not None]
    has_h0, has_c0 = h0 is not None, c0 is not None

    def function(*tensors):
        rest = list(tensors)
        x = rest.pop(0)
        h0 = rest.pop(0) if has_h0 else None
        c0 = rest.pop(0) if has_c0 else None
        return tuple(
            layer(x, h0, c0, rest, batch_sizes, case.cell, case.bidirectional)[: 3 if case.cell == "lstm" else 2]
        )

    return function, [t.detach().requires_grad_() for t in tensors]


@problems
def test_gradcheck(case):
    function, leaves = closed(engine, case)
    assert torch.autograd.gradcheck(function, leaves)


@cells
def test_gradcheck_without_reserve(cell):
    """The gradients are those of the same function when backward has to recompute the forward."""
    function, leaves = closed(
        lambda *a: ops.rnn_layer(*a, False)[:3], Case(f"forgetful-{cell}", cell, T=3, B=2, I=2, H=3)
    )
    assert torch.autograd.gradcheck(function, leaves)


@problems
def test_gradgradcheck(case):
    function, leaves = closed(engine, case)
    # In full where the formula is one per cell, in a random direction for the options around it.
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=not case.name.startswith("gradcheck-plain"))


def second_order(layer, case: Case, wanted: int):
    """d/d(leaf) of |d(loss)/d(leaf)|^2 for the leaf number `wanted`, others not requiring a gradient."""
    function, leaves = closed(layer, case)
    for i, t in enumerate(leaves):
        t.requires_grad_(i == wanted)
    loss = sum(t.pow(3).sum() for t in function(*leaves))
    (first,) = torch.autograd.grad(loss, leaves[wanted], create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), leaves[wanted])
    return first, second


@cells
@pytest.mark.parametrize("wanted", range(4), ids=["x", "h0", "c0_or_weight_ih", "weight_ih_or_hh"])
def test_double_backward_with_one_leaf(cell, wanted):
    """What a gradient penalty on one input or one weight does, at a size with tails."""
    case = Case(f"penalty-{cell}", cell, T=4, B=5, I=7, H=17, bidirectional=True)
    got, want = (second_order(layer, case, wanted) for layer in (engine, reference.layer))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def third_order(layer, case: Case):
    function, leaves = closed(layer, case)
    x, weight, last = leaves[0], leaves[-2], leaves[-1]
    # A cotangent that depends on the inputs catches terms that are counted twice; sin, a third order that is lost.
    loss = sum(t.pow(3).sum() for t in function(*leaves))
    (first,) = torch.autograd.grad(loss, weight, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
    third = torch.autograd.grad(second.sin().sum(), (x, weight, last))
    return first, second, *third


@problems
def test_third_order(case):
    torch.testing.assert_close(third_order(engine, case), third_order(reference.layer, case), rtol=1e-8, atol=1e-9)


@cells
def test_second_backward_of_a_second_order_graph(cell):
    """A graph made by create_graph can be walked twice, with the same result."""
    function, leaves = closed(engine, Case(f"twice-{cell}", cell, T=3, B=2, I=2, H=5))
    loss = sum(t.pow(3).sum() for t in function(*leaves))
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    penalty = sum(g.pow(2).sum() for g in first)
    once = torch.autograd.grad(penalty, leaves, retain_graph=True)
    again = torch.autograd.grad(penalty, leaves)
    assert all(map(torch.equal, once, again))
