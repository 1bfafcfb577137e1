"""torch's own checks of both operators: schema, fake kernels, autograd registration, tracing with dynamic shapes.

They do not test the math; the oracle and gradcheck do.
"""

import pytest
import torch
from cases import CELLS, Case, make_cotangents, make_inputs

OPTIONS: dict[str, dict] = {
    "plain": {},
    "h_1": {"T": 1, "B": 1, "I": 1, "H": 1},
    "strided": {"layout": "strided"},
    "bare": {"bias": False, "h0": False, "c0": False},
    "packed_bidirectional": {"lengths": (4, 2, 2), "bidirectional": True},
}
PROBLEMS = [Case(f"opcheck-{name}-{cell}", cell, **options) for name, options in OPTIONS.items() for cell in CELLS]
PROBLEMS += [
    Case("opcheck-proj", "lstm", proj=3),
    Case("opcheck-packed_proj_bidirectional", "lstm", lengths=(4, 2, 2), proj=3, bidirectional=True),
]
problems = pytest.mark.parametrize("case", PROBLEMS, ids=lambda case: case.name)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def leaf(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.detach().requires_grad_()


def arguments(case: Case, dtype: torch.dtype) -> list:
    x, h0, c0, weights, batch_sizes = make_inputs(case, dtype)
    return [leaf(x), leaf(h0), leaf(c0), [leaf(w) for w in weights], batch_sizes]


@problems
@pytest.mark.parametrize(
    "dtype, save",
    [(torch.float32, True), (torch.float64, True), (torch.float32, False)],
    ids=["f32", "f64", "no_reserve"],
)
def test_rnn_layer(case, dtype, save):
    op = torch.ops.seqkern.rnn_layer.default
    torch.library.opcheck(op, (*arguments(case, dtype), case.cell, case.bidirectional, save))


@problems
@dtypes
def test_rnn_layer_backward(case, dtype):
    inputs = arguments(case, dtype)
    with torch.no_grad():
        y, _, _, reserve = torch.ops.seqkern.rnn_layer(*inputs, case.cell, case.bidirectional, True)
    cotangents = [leaf(d) for d in make_cotangents(case, dtype)] + [None] * (case.cell != "lstm")
    op = torch.ops.seqkern.rnn_layer_backward.default
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        op, (*cotangents, *inputs, y, reserve, case.cell, case.bidirectional, True, True), test_utils=checks
    )
    # torch.compile traces this operator in a training step's backward, never its own backward (it does not support
    # double backward), so the tracing is checked on tensors that need no gradient.
    cotangents, inputs = make_cotangents(case, dtype) + [None] * (case.cell != "lstm"), make_inputs(case, dtype)
    torch.library.opcheck(
        op,
        (*cotangents, *inputs, y, reserve, case.cell, case.bidirectional, True, True),
        test_utils="test_aot_dispatch_dynamic",
    )


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("need_dx, need_dw", [(True, False), (False, True)])
def test_rnn_layer_backward_in_part(cell, need_dx, need_dw):
    case = Case(f"opcheck-part-{cell}", cell)
    inputs = make_inputs(case, torch.float32)
    y, _, _, reserve = torch.ops.seqkern.rnn_layer(*inputs, cell, False, True)
    cotangents = [make_cotangents(case, torch.float32)[0], None, None]
    op = torch.ops.seqkern.rnn_layer_backward.default
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(op, (*cotangents, *inputs, y, reserve, cell, False, need_dx, need_dw), test_utils=checks)


@pytest.mark.parametrize("cell", CELLS)
def test_fake_kernel_on_meta(cell):
    """Shapes without data: a model can be built and traced on the meta device."""
    case = Case(f"meta-{cell}", cell, bidirectional=True)
    inputs = make_inputs(case, torch.float32)
    real = torch.ops.seqkern.rnn_layer(*inputs, cell, True, True)
    x, h0, c0, weights, _ = inputs
    move = {"device": "meta"}
    c0 = None if c0 is None else c0.to(**move)
    fake = torch.ops.seqkern.rnn_layer(
        x.to(**move), h0.to(**move), c0, [w.to(**move) for w in weights], None, cell, True, True
    )
    assert [(t.shape, t.dtype, t.stride()) for t in fake] == [(t.shape, t.dtype, t.stride()) for t in real]
