"""seqkern::recurrence by the CUDA kernels run on the host: against the reference, within the oracle's bound.

As in test_host_step.py, a read of what nobody wrote, a race or an access out of range ends a run with a Fault.
"""

from unittest import mock

import host
import host_operator
import pytest
import torch
from loops import make
from test_option_recurrence import SHAPES, VARIANTS, by_reference, check, everything, leaf_in, problem

from seqkern import functional, option_ops

each_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(autouse=True)
def on_the_host():
    """All calls go to `recurrence`, as the kernels of csrc/cuda do it; lengths too."""
    host_operator.plans.clear()
    no = mock.patch.object(option_ops, "covers", lambda *_: False)
    lengths = mock.patch.object(functional, "takes_lengths", lambda _: True)
    with host_operator.installed(), no, lengths:
        yield
    assert {plan["engine"] for plan in host_operator.plans} <= {"recurrence"}


@each_variant
@pytest.mark.parametrize("shape", ["small", "one", "tails"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_within_the_oracles_bound(variant, shape, dtype):
    m, x, hx = problem(variant, shape, dtype)
    check(m, x, hx, dtype)
    assert len(host_operator.plans) == 2


@pytest.mark.parametrize("variant", ["lstm-coupled-peephole-layer_norm", "gru-layer_norm", "gru-reset_before"])
def test_more_units_than_a_block_has_threads(variant):
    """With 600 a thread takes one or two; two directions, and a norm over several warps."""
    with mock.patch.dict(SHAPES, {"units": (2, 2, 3, 600, True)}):
        m, x, hx = problem(variant, "units", torch.float64)
        check(m, x, hx, torch.float64)


@pytest.mark.parametrize("variant", ["lstm-layer_norm", "gru-layer_norm"])
def test_a_row_that_shared_memory_does_not_hold(variant):
    with mock.patch.dict(SHAPES, {"units": (2, 1, 3, 1800, False)}):
        m, x, hx = problem(variant, "units", torch.float64)
        check(m, x, hx, torch.float64)


@each_variant
def test_16_bit(variant):
    m, x, hx = problem(variant, "small", torch.bfloat16)
    check(m, x, hx, torch.bfloat16)


@each_variant
@pytest.mark.parametrize("lengths", [None, [9, 2, 0, 5, 9]])
def test_with_every_other_option(variant, lengths):
    more = {"zoneout": (0.3, 0.2) if variant.startswith("lstm") else 0.3, "recurrent_dropout": 0.3}
    more |= {"weight_dropout": 0.2} | ({} if "clip" in variant else {"grad_clip": 0.1})
    m, x, hx = problem(variant, "tails", torch.float64, **more)
    call = {"resets": torch.rand(x.shape[:2]) < 0.3, "lengths": lengths, "return_all_states": True}
    got = everything(m, x, hx, generator=torch.Generator().manual_seed(5), **call)
    want = by_reference(m, x, hx, leaf_in(torch.float64), generator=torch.Generator().manual_seed(5), **call)
    for name, t in got.items():
        torch.testing.assert_close(t, want[name], rtol=1e-10, atol=1e-10, msg=lambda s, n=name: n + s)


@pytest.mark.parametrize("variant", ["lstm-layer_norm", "gru-reset_before", "gru-layer_norm", "rnn-clip"])
def test_packed(variant):
    """As padded, with lengths."""
    m, x, hx = problem(variant, "tails", torch.float64)
    lengths = torch.tensor([9, 4, 4, 2, 1])
    leaves = [x, *([hx] if torch.is_tensor(hx) else hx), *m.parameters()]
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths)
    padded = m(x, hx, lengths=lengths)
    y = torch.nn.utils.rnn.pad_packed_sequence(m(packed, hx)[0])[0]
    torch.testing.assert_close(y, padded[0], rtol=1e-12, atol=1e-12)
    want = torch.autograd.grad(padded[0].square().sum(), leaves)
    for got, t in zip(torch.autograd.grad(y.square().sum(), leaves), want, strict=True):
        torch.testing.assert_close(got, t, rtol=1e-11, atol=1e-11)


@each_variant
def test_any_order_of_threads_gives_the_same(variant):
    m, x, hx = problem(variant, "tails", torch.float32)
    found = []
    for seed in (1, 2):
        with mock.patch.object(host_operator, "SEED", seed):
            found.append(everything(m, x, hx))
    assert all(torch.equal(t, found[1][name]) for name, t in found[0].items())


def test_a_reset_clears_what_is_not_a_number():
    m = make("LSTM", 3, 5, layer_norm=True, peephole=True)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    bad = torch.full((1, 2, 5), float("nan"), dtype=torch.float64)
    resets = torch.tensor([[True, True], *[[False, False]] * 3])
    torch.testing.assert_close(m(x, (bad, bad), resets=resets)[0], m(x)[0])


@pytest.mark.parametrize(("variant", "each"), [("lstm-layer_norm", 2), ("gru-reset_before", 4)])
def test_launches(variant, each):
    """One for a step of either pass, and one more where the reset gate comes before the product."""
    counts = []
    for steps in (4, 9):
        host_operator.plans.clear()
        m, x, hx = problem(variant, "small", torch.float32)
        everything(m, torch.randn(steps, 3, 6, requires_grad=True), hx)
        counts.append(sum(plan["launches"] for plan in host_operator.plans))
    assert counts[1] - counts[0] == 5 * each


FAULTS = {
    "a removed barrier": ("variant.cuh", "  block_sync();\n#pragma unroll\n", "#pragma unroll\n", "Fault"),
    "the peephole of another gate": ("variant.cuh", "peephole(2, j) * fresh", "peephole(1, j) * fresh", "out0"),
    "a norm without its mean": ("variant.cuh", "(now[q] * gain[q] - mean -", "(now[q] * gain[q] -", "dweight_hh_l0"),
    "a late row from where nothing is": (
        "variant.cuh",
        "const bool known = after();",
        "const bool known = true;",
        "Fault",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_seen(name):
    file, old, new, seen = FAULTS[name]
    m, x, hx = problem("lstm-coupled-peephole-layer_norm", "tails", torch.float64)
    variant = name.replace(" ", "_")
    with host.changed("recurrence", variant, host.edited((f"cuda/{file}", old, new))) as module:
        try:
            check(m, x, hx, torch.float64)
            found = ""
        except (AssertionError, module.Fault) as error:
            found = type(error).__name__ + str(error)
    assert seen in found
