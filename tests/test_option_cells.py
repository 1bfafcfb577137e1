"""Other cells: peepholes, coupled gates, hard sigmoids, the reset gate before the product, layer normalisation; and
initial values."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from loops import call, check, make, run, state
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import linear

import seqkern
from seqkern import functional
from seqkern.module_options import extras
from seqkern.options import Settings

T, B, I, H = 7, 4, 3, 5  # noqa: E741


def hard(v):
    return (v / 6 + 0.5).clamp(0, 1)


def normal(v, gain=1.0, bias=0.0):
    mean, variance = v.mean(-1, keepdim=True), v.var(-1, unbiased=False, keepdim=True)
    return (v - mean) / (variance + 1e-5).sqrt() * gain + bias


def written_out(m, x, h, c, w, t, layer, d):
    """The formulas, straight from the papers, gate by gate."""
    s = m._settings or Settings()
    sigmoid = hard if s.hard_sigmoid else torch.sigmoid
    extra = {n: getattr(m, f"{n}_l{layer}" + "_reverse" * d, None)
             for n in ("weight_peephole", "gain_ih", "gain_hh", "gain_c", "bias_c")}  # fmt: skip
    gx, gh = linear(x, w["weight_ih"]), linear(h, w["weight_hh"])
    if s.layer_norm:
        gx, gh = normal(gx, extra["gain_ih"]), normal(gh, extra["gain_hh"])
    if w["bias_ih"] is not None:
        gx, gh = gx + w["bias_ih"], gh + w["bias_hh"]
    k = m.hidden_size
    if m.mode == "GRU":
        r, z = sigmoid(gx[:, :k] + gh[:, :k]), sigmoid(gx[:, k : 2 * k] + gh[:, k : 2 * k])
        if s.reset_before:
            bias = None if w["bias_hh"] is None else w["bias_hh"][2 * k :]
            n = gx[:, 2 * k :] + linear(r * h, w["weight_hh"][2 * k :], bias)
        else:
            n = gx[:, 2 * k :] + r * gh[:, 2 * k :]
        return (1 - z) * n.tanh() + z * h, None
    gates = (gx + gh).split(k, -1)
    i, g, o = gates[0], gates[-2], gates[-1]
    p = extra["weight_peephole"]
    if s.peephole:
        i = i + p[:k] * c
    i = sigmoid(i)
    f = 1 - i if s.coupled else sigmoid(gates[1] + p[k : 2 * k] * c if s.peephole else gates[1])
    c = f * c + i * g.tanh()
    o = sigmoid(o + p[-k:] * c) if s.peephole else sigmoid(o)
    h = o * (normal(c, extra["gain_c"], extra["bias_c"]) if s.layer_norm else c).tanh()
    return h if w["weight_hr"] is None else linear(h, w["weight_hr"]), c


LSTM_OPTIONS = {"peephole": True, "coupled": True, "layer_norm": True, "gate_activation": "hard_sigmoid"}
LSTM_OPTIONS["proj_size"] = 3
GRU_OPTIONS = {"reset_after": False, "gate_activation": "hard_sigmoid"}
VARIANTS = [("GRU", {"layer_norm": True})]
for n in (1, 2, 3):
    VARIANTS += [("LSTM", {k: LSTM_OPTIONS[k] for k in chosen}) for chosen in itertools.combinations(LSTM_OPTIONS, n)]
    VARIANTS += [("GRU", {k: GRU_OPTIONS[k] for k in chosen}) for chosen in itertools.combinations(GRU_OPTIONS, n)]
names = lambda v: v if isinstance(v, str) else "-".join(v)  # noqa: E731
each_variant = pytest.mark.parametrize("kind, options", VARIANTS, ids=names)


def randomised(kind, options, **more):
    """A layer whose every parameter is random, gains too."""
    m = make(kind, I, H, **options, **more)
    with torch.no_grad():
        for p in m.parameters():
            p.normal_(std=0.5)
    return m


@each_variant
def test_equals_the_formulas(kind, options):
    m = randomised(kind, options, num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    hx = state(m, B)
    check(m, call(m, x, hx, return_all_states=True), run(m, x, hx, step=written_out), [x, hx])


@each_variant
def test_with_lengths_and_resets(kind, options):
    m = randomised(kind, options, bidirectional=True, bias=False)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    resets, lengths, hx = torch.rand(T, B) < 0.3, [7, 0, 3, 5], state(m, B)

    def before(h, c, t, *_):
        keep = resets[t].logical_not().double().unsqueeze(-1)
        return h * keep, None if c is None else c * keep

    got = call(m, x, hx, resets=resets, lengths=lengths)
    check(m, got, run(m, x, hx, lengths, before=before, step=written_out), [x, hx])


@pytest.mark.parametrize(
    "kind, options",
    [("LSTM", {"peephole": True}), ("LSTM", {"coupled": True, "layer_norm": True}), ("GRU", {"reset_after": False}),
     ("GRU", {"layer_norm": True})],
)  # fmt: skip
def test_derivatives(kind, options):
    m = make(kind, 2, 3, **options)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    names = [n for n, _ in m.named_parameters()]

    def function(x, *weights):
        out, last = torch.func.functional_call(m, dict(zip(names, weights, strict=True)), (x,))
        return out, *(last if isinstance(last, tuple) else (last,))

    assert gradcheck(function, (x, *m.parameters()))
    assert gradgradcheck(function, (x, *m.parameters()))


@each_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_copies_and_pickles(kind, options, dtype):
    m = randomised(kind, options, dtype=dtype)
    x = torch.randn(T, B, I).to(dtype)
    y, last = m(x)
    wide = copy.deepcopy(m).double()
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(y.double(), wide(x.double())[0], rtol=0, atol=tolerance)
    assert y.dtype == dtype
    again = pickle.loads(pickle.dumps(m))
    torch.testing.assert_close(again(x), (y, last))
    other = make(kind, I, H, **options, dtype=dtype)
    other.load_state_dict(m.state_dict())
    torch.testing.assert_close(other(x), (y, last))
    for name in options:
        assert name in repr(m)
    if options.keys() <= {"proj_size"}:
        return
    with pytest.raises(RuntimeError, match="torch.jit.script knows none of the options"):
        torch.jit.script(m)


def test_a_layer_norm_layer_starts_as_its_definition():
    m = make("LSTM", I, H, layer_norm=True)
    assert torch.equal(m.gain_ih_l0, torch.ones(4 * H).double()) and torch.equal(m.bias_c_l0, torch.zeros(H).double())
    pairs = [f"{what}_{which}_l0" for what in ("weight", "bias", "gain") for which in ("ih", "hh")]
    assert sorted(m.state_dict()) == sorted([*pairs, "gain_c_l0", "bias_c_l0"])
    assert make("LSTM", I, H, coupled=True).weight_ih_l0.shape == (3 * H, I)


def test_initial_values():
    torch.manual_seed(3)
    m = seqkern.LSTM(I, H, num_layers=2, forget_bias=1.5, recurrent_init="orthogonal")
    for layer in (0, 1):
        b_ih, b_hh = getattr(m, f"bias_ih_l{layer}"), getattr(m, f"bias_hh_l{layer}")
        assert torch.equal((b_ih + b_hh)[H : 2 * H], torch.full((H,), 1.5))
        for block in getattr(m, f"weight_hh_l{layer}").split(H):
            torch.testing.assert_close(block @ block.T, torch.eye(H), rtol=0, atol=1e-5)
    torch.manual_seed(3)
    theirs = nn.LSTM(I, H, num_layers=2)
    assert torch.equal(m.weight_ih_l1, theirs.weight_ih_l1) and torch.equal(m.bias_ih_l0[:H], theirs.bias_ih_l0[:H])
    assert "forget_bias=1.5" in repr(m) and "recurrent_init='orthogonal'" in repr(m)
    m.reset_parameters()
    assert torch.equal(m.bias_ih_l0[H : 2 * H], torch.full((H,), 1.5))
    bound = 1 / math.sqrt(H)
    assert make("LSTM", I, H, peephole=True).weight_peephole_l0.abs().max() <= bound


@pytest.mark.parametrize(
    "kind, options, error",
    [
        ("GRU", {"peephole": True}, "peephole is an option of the LSTM"),
        ("RNN", {"coupled": True}, "coupled is an option of the LSTM"),
        ("RNN", {"layer_norm": True}, "layer_norm is an option of the LSTM and the GRU"),
        ("LSTM", {"reset_after": False}, "reset_after is an option of the GRU"),
        ("RNN", {"gate_activation": "hard_sigmoid"}, "gate_activation is an option of"),
        ("LSTM", {"gate_activation": "relu"}, "must be 'sigmoid' or 'hard_sigmoid', got 'relu'"),
        ("GRU", {"forget_bias": 1.0}, "forget_bias needs an LSTM"),
        ("LSTM", {"forget_bias": 1.0, "bias": False}, "forget_bias needs an LSTM with biases"),
        ("LSTM", {"recurrent_init": "ones"}, "recurrent_init must be"),
        ("LSTM", {"recompute": -1}, "recompute must be a number of steps"),
    ],
)
def test_errors(kind, options, error):
    with pytest.raises(ValueError, match=error):
        make(kind, I, H, **options)


def test_functional_takes_extra_parameters():
    m = randomised("LSTM", {"layer_norm": True, "peephole": True}, num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I, dtype=torch.float64)
    options = {"num_layers": 2, "bidirectional": True, "layer_norm": True, "peephole": True}
    found = functional.lstm(x, None, m._flat_weights, extra=extras(m), **options)
    torch.testing.assert_close(found, m(x))
    with pytest.raises(ValueError, match="extra must hold parameters for 4 layers and directions, got 3"):
        functional.lstm(x, None, m._flat_weights, extra=extras(m)[:3], **options)
    with pytest.raises(TypeError, match="unknown option 'zone'"):
        functional.lstm(x, None, m._flat_weights, zone=0.1)


def test_explain_says_what_runs_where():
    for options in ({"layer_norm": True}, {"grad_clip": ("norm", 1.0)}, {"coupled": True, "peephole": True}):
        plan = seqkern.explain(make("LSTM", I, H, **options), B, T)
        assert plan.engine.startswith("cpu-") and all(name in str(plan) for name in options)
        assert "rows of the batch" in str(plan)
        for m, device in ((make("proj", I, H, **options), "cpu"), (make("LSTM", I, H, **options), "cuda")):
            plan = seqkern.explain(m, B, T, device)
            assert plan.engine == "reference"
            assert device == "cuda" or ("proj_size" in plan.why and all(name in plan.why for name in options))
    plan = seqkern.explain(make("GRU", I, H, layer_norm=True, reset_after=False), B, T)
    assert plan.engine == "reference" and "layer_norm with reset_after=False" in plan.why
    for options in ({"zoneout": 0.1}, {"recurrent_dropout": 0.1}, {"grad_clip": 1.0}):
        plan = seqkern.explain(make("LSTM", I, H, **options), B, T)
        assert plan.engine.startswith("cpu-") and "by rows" not in plan.why
