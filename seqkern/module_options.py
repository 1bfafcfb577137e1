"""The options of RNN, LSTM and GRU that torch.nn's lack, as constructor arguments: parameters, initialisation, text."""

import torch
from torch import Tensor, nn

from .options import DEFAULT, make_settings
from .reference import Extra

DOC = """
    seqkern's options, keyword-only; formulas and sources in docs/options.md:

    Args:
        zoneout: probability that a unit of h keeps its old value at a step, or a pair (h, c) for the LSTM. In eval mode
            the expectation is used. Default: 0.
        recurrent_dropout: probability of a zero in h on its way into the recurrent product, one mask for all steps.
            Default: 0.
        weight_dropout: probability of a zero in weight_hh, one mask a call (DropConnect). Default: 0.
        grad_clip: in backward, the gradients of h and c on their way to the step before are clamped to +-number, or
            with ("norm", number) each row of them is scaled down to that norm. Default: None.
        layer_norm: (LSTM, GRU) normalises W_ih x and W_hh h and, in the LSTM, c before it is read. Default: False.
        peephole: (LSTM) the gates see c. Default: False.
        coupled: (LSTM) the forget gate is 1 - i, so that weights have 3*H rows, i, g, o. Default: False.
        gate_activation: (LSTM, GRU) "sigmoid" or "hard_sigmoid", clamp(v / 6 + 1/2, 0, 1). Default: "sigmoid".
        reset_after: (GRU) False: the reset gate acts before the recurrent product. Default: True.
        forget_bias: (LSTM) the initial bias of the forget gate, b_ih + b_hh. Default: None, torch's uniform one.
        recurrent_init: "orthogonal" makes each gate's block of weight_hh orthogonal. Default: None, torch's uniform
            one.
        recompute: keeps the state of every k-th step alone and computes the gates again in backward. A bidirectional
            layer keeps no gates at all. Default: 0, off.

    forward takes further keywords:

    Args:
        lengths: [B] integers in [0, T], in any order, on any device. Past a sequence's end y is zero and the state
            stays; the reverse direction starts at each sequence's own end.
        resets: [T, B] ([B, T] with batch_first, [T] for unbatched input) bool, True where the state is cleared before
            that step, in each direction's own order; or floating, what the state is multiplied by, in [0, 1].
        return_all_states: True: a third result, h of every layer and step [L, T, B, D*P] ([L, B, T, D*P] with
            batch_first), and for the LSTM a pair of that and c [L, T, B, D*H].
        generator: a torch.Generator for the random masks of zoneout, recurrent_dropout and weight_dropout.

    Raises:
        ValueError, TypeError: an option has a bad value, shape or dtype, or the cell lacks it.
"""

NAMES = (
    "zoneout", "recurrent_dropout", "weight_dropout", "grad_clip", "layer_norm", "peephole", "coupled",
    "gate_activation", "reset_after", "forget_bias", "recurrent_init", "recompute",
)  # fmt: skip


def install(module: nn.RNNBase, given: dict) -> None:
    """Gives `module`, built as torch.nn builds it, the options `given` by name."""
    cell = module.mode.lower()
    given = dict(given)
    forget_bias, recurrent_init = given.pop("forget_bias", None), given.pop("recurrent_init", None)
    settings = make_settings(cell, **given)
    if recurrent_init not in (None, "orthogonal"):
        raise ValueError(f"{cell}: recurrent_init must be 'orthogonal' or None, got {recurrent_init!r}")
    if forget_bias is not None and (cell != "lstm" or settings.coupled or not module.bias):
        raise ValueError(f"{cell}: forget_bias needs an LSTM with biases and a forget gate, got {forget_bias!r}")
    module._settings, module._initial = settings, (forget_bias, recurrent_init)
    bound = module.hidden_size**-0.5
    if settings.coupled:
        for name in module._flat_weights_names:
            old = getattr(module, name)
            if not name.startswith("weight_hr"):
                new = old.new_empty(old.size(0) // 4 * 3, *old.shape[1:]).uniform_(-bound, bound)
                setattr(module, name, nn.Parameter(new))
    if settings.extra:
        module._extra_names = []
        for layer in range(module.num_layers):
            for suffix in ("", "_reverse")[: 2 if module.bidirectional else 1]:
                _add_extra(module, f"_l{layer}{suffix}")
    initialise(module)


def _add_extra(module: nn.RNNBase, suffix: str) -> None:
    settings, hidden = module._settings, module.hidden_size
    like = module.weight_hh_l0
    rows = like.size(0)
    names = dict.fromkeys(Extra._fields)

    def add(field: str, name: str, size: int) -> None:
        names[field] = name + suffix
        setattr(module, name + suffix, nn.Parameter(like.new_empty(size).uniform_(-(hidden**-0.5), hidden**-0.5)))

    if settings.peephole:
        add("peephole", "weight_peephole", (2 if settings.coupled else 3) * hidden)
    if settings.layer_norm:
        add("gain_x", "gain_ih", rows)
        add("gain_h", "gain_hh", rows)
        if module.mode == "LSTM":
            add("gain_c", "gain_c", hidden)
            add("bias_c", "bias_c", hidden)
    module._extra_names.append(names)


@torch.no_grad()
def initialise(module: nn.RNNBase) -> None:
    """What differs from torch.nn's uniform initial values."""
    forget_bias, recurrent_init = module._initial
    hidden = module.hidden_size
    for names in module._extra_names:
        for field, value in (("gain_x", 1.0), ("gain_h", 1.0), ("gain_c", 1.0), ("bias_c", 0.0)):
            if names[field]:
                nn.init.constant_(getattr(module, names[field]), value)
    for name in module._flat_weights_names:
        weight = getattr(module, name)
        if forget_bias is not None and name.startswith("bias_"):
            weight[hidden : 2 * hidden] = forget_bias if name.startswith("bias_ih") else 0.0
        if recurrent_init == "orthogonal" and name.startswith("weight_hh"):
            for block in weight.split(hidden):
                nn.init.orthogonal_(block)


def extras(module: nn.RNNBase) -> list[Extra]:
    """For each layer and direction, as they are now."""

    def get(name: str | None) -> Tensor | None:
        return None if name is None else getattr(module, name)

    return [Extra(*(get(names[field]) for field in Extra._fields)) for names in module._extra_names]


def text(module: nn.RNNBase) -> str:
    """What extra_repr shows of the options."""
    s, d = module._settings, DEFAULT
    forget_bias, recurrent_init = module._initial
    shown = {
        "zoneout": s.zoneout if s.zoneout[1] else s.zoneout[0] or None,
        "recurrent_dropout": s.recurrent_dropout or None,
        "weight_dropout": s.weight_dropout or None,
        "grad_clip": s.grad_clip and (s.grad_clip[1] if s.grad_clip[0] == "value" else s.grad_clip),
        "layer_norm": s.layer_norm or None,
        "peephole": s.peephole or None,
        "coupled": s.coupled or None,
        "gate_activation": "hard_sigmoid" if s.hard_sigmoid != d.hard_sigmoid else None,
        "reset_after": False if s.reset_before else None,
        "forget_bias": forget_bias,
        "recurrent_init": recurrent_init,
        "recompute": s.recompute or None,
    }
    return "".join(f", {name}={value!r}" for name, value in shown.items() if value is not None)
