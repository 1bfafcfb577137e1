"""grad_clip: gradients bounded on their way from step to step, against hooks in a loop of torch's cells."""

import pytest
import torch
from loops import LAYERS, call, check, make, run, state

T, B, I, H = 12, 4, 3, 6  # noqa: E741
each_layer = pytest.mark.parametrize("kind", LAYERS)


def hooked(clip):
    """The loop's `before`: the state itself, with a hook on its gradient."""

    def one(v):
        v = v.clone() if v.requires_grad else v.clone().requires_grad_()
        v.register_hook(clip)
        return v

    return lambda h, c, *_: (one(h), None if c is None else one(c))


CLIPS = {
    "value": (0.05, lambda g: g.clamp(-0.05, 0.05)),
    "value_named": (("value", 0.05), lambda g: g.clamp(-0.05, 0.05)),
    "norm": (("norm", 0.1), lambda g: g * (0.1 / g.norm(dim=-1, keepdim=True)).clamp(max=1)),
}


@each_layer
@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["one", "stack"])
def test_equals_hooks_in_a_loop(kind, name, options):
    grad_clip, clip = CLIPS[name]
    m = make(kind, I, H, grad_clip=grad_clip, **options)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    hx = state(m, B)
    got = call(m, x, hx)
    check(m, got, run(m, x, hx, before=hooked(clip)), [x, hx])
    plain = make(kind, I, H, **options)
    plain.load_state_dict(m.state_dict())
    want = call(plain, x, hx)
    for n in got:
        assert torch.equal(got[n], want[n]) or name == "norm"  # other kernels, which add in another order
    with pytest.raises(AssertionError):  # the clip is small enough to matter
        check(m, got, run(m, x, hx), [x, hx])


@each_layer
def test_with_lengths_and_resets(kind):
    m = make(kind, I, H, grad_clip=0.05, bidirectional=True)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    hx, resets, lengths = state(m, B), torch.rand(T, B) < 0.2, [12, 3, 0, 7]
    inner = hooked(lambda g: g.clamp(-0.05, 0.05))

    def before(h, c, t, *rest):
        keep = resets[t].logical_not().double().unsqueeze(-1)
        return inner(h * keep, None if c is None else c * keep)

    check(m, call(m, x, hx, lengths=lengths, resets=resets), run(m, x, hx, lengths, before=before), [x, hx])


def test_bounds_an_exploding_gradient():
    m = make("RNN", 4, 4, grad_clip=1.0)
    with torch.no_grad():
        m.weight_hh_l0.copy_(3 * torch.eye(4))
        m.weight_ih_l0.mul_(0.01)
        for b in (m.bias_ih_l0, m.bias_hh_l0):
            b.zero_()
    x = 1e-6 * torch.randn(30, 2, 4, dtype=torch.float64)
    h = torch.zeros(1, 2, 4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(m(x, h)[0].sum(), h)
    assert grad.abs().max() <= 1.0
    plain = make("RNN", 4, 4)
    plain.load_state_dict(m.state_dict())
    (grad,) = torch.autograd.grad(plain(x, h)[0].sum(), h)
    assert grad.abs().max() > 1e6


def test_errors_and_text():
    for bad in (0, -1, "norm", ("norm", 0), ("other", 1.0), True, (1.0, 2.0, 3.0)):
        with pytest.raises(ValueError, match="grad_clip must be a positive number"):
            make("GRU", I, H, grad_clip=bad)
    assert "grad_clip=0.5" in repr(make("GRU", I, H, grad_clip=0.5))
    assert "grad_clip=('norm', 2.0)" in repr(make("GRU", I, H, grad_clip=("norm", 2)))
