"""The options of the `step` engine run on the host against the reference in float64: alone, together, in every cell.

As in test_host_step.py, a read of what nobody wrote or an access out of range ends a run with a Fault.
"""

import dataclasses
from unittest import mock

import host
import host_operator
import pytest
import torch
from cases import DTYPES, Case, make_inputs
from host_layer import DEVICE, DTYPE_NUMBERS, array
from host_options import cotangents_of, make_options, outcome, run

from seqkern import masks
from seqkern.reference import Options

LAYERS = {"rnn_tanh": {}, "rnn_relu": {}, "lstm": {}, "gru": {}, "proj": {"proj": 4}}
KINDS = {
    "padded": {"T": 5, "B": 4, "H": 8, "bidirectional": True},
    "one_way": {"T": 4, "B": 3, "H": 5, "bias": False},
    "packed": {"lengths": (5, 3, 3, 1), "H": 6, "bidirectional": True},
    "no_state": {"T": 4, "B": 3, "H": 5, "bidirectional": True, "h0": False, "c0": False},
}
ALONE = ("keep", "lengths", "h_mask", "zone", "zone_eval", "clip", "clip_norm", "states")
TOGETHER = ("keep lengths", "keep h_mask zone clip states", "keep h_mask zone clip_norm states")


def case_of(layer: str, kind: str) -> Case:
    cell = "lstm" if layer == "proj" else layer
    return Case(f"options-{kind}-{layer}", cell, I=3, **KINDS[kind], **LAYERS[layer])


def applies(layer: str, kind: str, names: str) -> bool:
    """Lengths are for padded input, c of every step is the LSTM's; an RNN's derivative is taken from its output."""
    has_c = layer in ("lstm", "proj")
    return not (
        ("lengths" in names and kind == "packed")
        or (names == "states" and not has_c)
        or (names == "zone_eval" and layer.startswith("rnn"))
    )


@pytest.mark.parametrize("names", [*ALONE, *TOGETHER])
@pytest.mark.parametrize("layer", LAYERS)
def test_options(layer, names):
    for i, kind in enumerate(KINDS):
        if applies(layer, kind, names):
            dtype = DTYPES[i % 2]
            more = " lengths" if len(names.split()) > 2 and kind != "packed" else ""
            assert outcome(case_of(layer, kind), dtype, names + more) == []


@pytest.mark.parametrize("dtype", DTYPES[2:])
@pytest.mark.parametrize("layer", [n for n in LAYERS if n != "rnn_relu"])  # at whose kinks rounding decides
def test_16_bits(layer, dtype):
    for kind in ("padded", "packed"):
        more = "" if kind == "packed" else " lengths"
        assert outcome(case_of(layer, kind), dtype, "keep h_mask zone clip states" + more) == []
        assert outcome(case_of(layer, kind), dtype, "clip_norm" + more) == []


GRID_KINDS = {
    "two_ways": {"T": 6, "B": 5, "H": 24, "bidirectional": True},
    "passes": {"T": 3, "B": 35, "H": 40, "bias": False},
    "packed": KINDS["packed"],
    "no_state": {"T": 4, "B": 3, "H": 17, "bidirectional": True, "h0": False, "c0": False},
}


@pytest.mark.parametrize("names", [n for n in [*ALONE, *TOGETHER] if "clip_norm" not in n])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_on_the_grid_engine(cell, names):
    """As planned for a small GPU, some of them with several tiles or passes."""
    for i, (kind, shape) in enumerate(GRID_KINDS.items()):
        if applies(cell, kind, names):
            more = " lengths" if len(names.split()) > 2 and kind != "packed" else ""
            host_operator.plans.clear()
            case = Case(f"options-grid-{kind}-{cell}", cell, I=3, **shape)
            assert outcome(case, DTYPES[2 + i % 2], names + more, device=DEVICE) == []
            assert [plan["engine"] for plan in host_operator.plans] == ["grid", "grid"]


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_relu"])
def test_the_engines_agree_in_tf32(cell):
    """float32, whose products the grid engine takes from rounded operands."""
    case = Case(f"options-tf32-{cell}", cell, T=6, B=5, I=3, H=20, bidirectional=True)
    inputs, cotangents = make_inputs(case, torch.float32), cotangents_of(case, torch.float32, cell == "lstm")
    o = make_options(case, torch.float32, "keep lengths h_mask zone clip")
    with mock.patch.object(host_operator, "TF32", True):
        found = run(case, inputs, cotangents, o, device=DEVICE)
    for name, want in run(case, inputs, cotangents, o).items():
        torch.testing.assert_close(found[name], want, rtol=3e-3, atol=3e-3 * max(1.0, want.abs().max().item()))


def test_norms_take_the_step_engine():
    """Backward; forward knows nothing of them."""
    case = Case("options-norms", "lstm", T=3, B=2, I=3, H=8)
    host_operator.plans.clear()
    assert outcome(case, torch.bfloat16, "clip_norm", device=DEVICE) == []
    assert [plan["engine"] for plan in host_operator.plans] == ["grid", "step"]


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_any_order_of_threads_gives_the_same_on_the_grid_engine(cell):
    case = Case(f"options-order-{cell}", cell, T=5, B=4, I=3, H=24, bidirectional=True)
    o, inputs = make_options(case, torch.bfloat16, "keep h_mask zone clip lengths"), make_inputs(case, torch.bfloat16)
    cotangents = cotangents_of(case, torch.bfloat16, cell == "lstm")
    first, *others = (run(case, inputs, cotangents, o, seed, DEVICE) for seed in (1, 2, 3))
    assert all(torch.equal(t, other[name]) for other in others for name, t in first.items())


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_as_packed(cell):
    """With lengths that fall, what a packed sequence gives; and gradients of zero in the padding."""
    lengths = (5, 3, 3, 1)
    padded = Case(f"as_packed-{cell}", cell, T=5, B=4, I=3, H=6, bidirectional=True)
    packed = Case(f"as_packed-{cell}", cell, I=3, H=6, bidirectional=True, lengths=lengths)
    inside = torch.arange(5).unsqueeze(1) < torch.tensor(lengths)
    inputs, cotangents = make_inputs(padded, torch.float32), cotangents_of(padded, torch.float32, False)
    found = run(padded, inputs, cotangents, Options(lengths=torch.tensor(lengths)))
    rows = inputs._replace(x=inputs.x[inside], batch_sizes=packed.batch_sizes)
    want = run(packed, rows, cotangents | {"y": cotangents["y"][inside]}, Options())
    for name in ("y", "dx"):
        assert not found[name][~inside].any()
        found[name] = found[name][inside]
    found["flow"] = found["flow"].view(2, 2, 5, 4)[:, :, inside]
    for name, t in want.items():
        torch.testing.assert_close(found[name], t, rtol=1e-5, atol=1e-6, msg=lambda s, n=name: f"{n}: {s}")


@pytest.mark.parametrize("names", ["keep h_mask zone clip states lengths", "clip_norm lengths"])
def test_any_order_of_threads_gives_the_same(names):
    case = case_of("lstm", "padded")
    o, inputs = make_options(case, torch.float32, names), make_inputs(case, torch.float32)
    first, *others = (run(case, inputs, cotangents_of(case, torch.float32, True), o, seed) for seed in (1, 2, 3))
    assert all(torch.equal(t, other[name]) for other in others for name, t in first.items())


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_padding_is_not_read_in_forward(cell):
    """Whatever stands there; in backward, zeros of the gradients meet it in a product, and the caller clears it."""
    case = case_of(cell, "padded")
    o, inputs = make_options(case, torch.float32, "lengths"), make_inputs(case, torch.float32)
    cotangents = cotangents_of(case, torch.float32, False)
    want = run(case, inputs, cotangents, o)
    padding = torch.arange(case.T).unsqueeze(1) >= o.lengths
    found = run(case, inputs._replace(x=inputs.x.masked_fill(padding.unsqueeze(-1), float("nan"))), cotangents, o)
    for name in ("y", "h_n", "dx", "dh0", "dweight_hh"):
        assert torch.equal(found[name], want[name])


@pytest.mark.parametrize("device", [None, DEVICE], ids=["step", "grid"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_relu"])
def test_a_reset_clears_what_is_not_a_number(cell, device):
    case, dtype = case_of(cell, "one_way"), torch.float32 if device is None else torch.bfloat16
    inputs, cotangents = make_inputs(case, dtype), cotangents_of(case, dtype, False)
    inputs.x[1, 0] = float("nan")
    keep = torch.ones(case.T, case.B)
    keep[2, 0] = 0
    found = run(case, inputs, cotangents, Options(keep=keep.flatten()), device=device)
    assert found["y"][1, 0].isnan().all() and not found["y"][2:].isnan().any()
    assert not found["dx"][2:].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_masks_are_the_cpus(dtype):
    for seed, stream, p in ((0, 0, 0.5), (2**62 + 12345, 9, 0.3), (77, 3, 1.0), (5, 1, 0.0)):
        want = masks.bernoulli(torch.empty(0, dtype=dtype), (5, 301), torch.tensor([seed]), stream, p, 1 / 0.7)
        found = torch.full_like(want, float("nan"))
        host.load("step").random(DTYPE_NUMBERS[dtype], seed, stream, round(p * 2**32), 1 / 0.7, array(found))
        assert torch.equal(found, want)


@pytest.mark.parametrize("layer, more", [("lstm", 2), ("gru", 2), ("proj", 4)])
def test_no_more_launches_than_a_plain_step(layer, more):
    """A clipped norm takes one more for each step of backward."""
    case = case_of(layer, "padded")
    for names, extra in (("keep h_mask zone clip lengths", 0), ("clip_norm", 1)):
        counts = []
        for steps in (4, 9):
            long = dataclasses.replace(case, T=steps)
            host_operator.plans.clear()
            o = make_options(long, torch.float32, names)
            run(long, make_inputs(long, torch.float32), cotangents_of(long, torch.float32, False), o)
            counts.append(sum(plan["launches"] for plan in host_operator.plans))
        assert counts[1] - counts[0] == 5 * (more + extra)
