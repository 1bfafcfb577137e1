"""rnn(), lstm() and gru(): stacks of recurrent layers on given weights, from one operator call per layer.

Shapes: L layers, D directions (2 if bidirectional else 1), T time, B batch, N rows of a packed sequence, I input,
H hidden, P output (the projection's size where there is one, else H).
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops, reference, training, watch
from .plain import transformed

__all__ = ["gru", "lstm", "rnn"]

# meta runs the operator's shape function.
KERNEL_DEVICES = frozenset({"cpu", "meta", "cuda"} if ops.BUILT_WITH_CUDA else {"cpu", "meta"})
KERNEL_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the fused operator takes tensors of this device and dtype; the reference takes the others."""
    return device.type in KERNEL_DEVICES and dtype in KERNEL_DTYPES


def takes_lengths(device: torch.device) -> bool:
    """Whether the device's kernels take lengths, and bounds on norms. The CPU's want packed rows, and `recurrence`."""
    return device.type == "cuda"


def check_devices(cell: str, x: Tensor, others: Sequence[Tensor | None]) -> None:
    # The dispatcher does not: among CPU and meta tensors it would run the shape function and return garbage.
    device = x.device
    for t in others:
        if t is not None and t.device != device:
            raise RuntimeError(f"{cell}: states and weights must be on {device} as the input is, got one on {t.device}")


def wants_grad(sequence: Sequence[Tensor | None], weights: Sequence[Tensor]) -> bool:
    # Loops, not any(): a generator costs more than the whole test on the path of one-step calls.
    for t in sequence:
        if t is not None and t.requires_grad:
            return True
    for w in weights:  # noqa: SIM110
        if w.requires_grad:
            return True
    return False


def cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What autocast does to an argument: everything floating but float64."""
    return t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype)


def cast_options(o: reference.Options, dtype: torch.dtype) -> reference.Options:
    extra = [reference.Extra(*(cast(t, dtype) for t in e)) for e in o.extra]
    masks = {name: cast(getattr(o, name), dtype) for name in ("h_mask", "zone_h", "zone_c")}
    return dataclasses.replace(o, extra=extra, **masks)


def reference_layer(cell, sequence, weights, batch_sizes, bidirectional, options=reference.NONE):
    """`reference.layer_with` with the operator's rules: one dtype for all arguments, to which autocast casts them."""
    device = sequence[0].device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        sequence, weights = [cast(t, dtype) for t in sequence], [cast(w, dtype) for w in weights]
        options = cast_options(options, dtype)
        with torch.autocast(device, enabled=False):
            return reference_layer(cell, sequence, weights, batch_sizes, bidirectional, options)
    check_types(cell, sequence, weights, batch_sizes, bidirectional)
    x, h, c = sequence
    if (take := watch.claim()) is not None:
        sizes = [x.size(1)] * x.size(0) if batch_sizes is None else batch_sizes.tolist()
        directions = 2 if bidirectional else 1
        options = dataclasses.replace(options, watcher=watch.Hooks(take, directions, sizes, x))
    return reference.layer_with(options, x, h, c, weights, batch_sizes, cell, bidirectional)


def check_types(cell, sequence, weights, batch_sizes, bidirectional) -> None:
    """The operator's checks that torch's own operations lack: one dtype, states of the batch's size."""
    x, h, c = sequence
    for t in (h, c, *weights):
        if t is not None and t.dtype != x.dtype:
            raise RuntimeError(f"{cell}: states and weights must be {x.dtype} as the input is, got one of {t.dtype}")
    leading = (2 if bidirectional else 1, x.size(1) if batch_sizes is None else int(batch_sizes[0]))
    for name, t in (("h0", h), ("c0", c)):
        if t is not None and t.shape[:-1] != leading:
            raise RuntimeError(f"{cell}: {name}'s first sizes must be [D, B] = {[*leading]}, got {list(t.shape)}")


def _plain_eager(device: str) -> bool:
    """Whether nothing but autograd has to see the operator: no compiler, no tracer, no autocast."""
    watched = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return device in ("cpu", "cuda") and not watched and not torch.is_autocast_enabled(device)


def run_layer(
    cell: str,
    sequence: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bidirectional: bool,
) -> Sequence[Tensor]:
    """One layer, on the operator or on the reference: the only place that chooses.

    sequence is x, h0, c0; they, the other arguments and the first three results are those of `reference.layer`.
    """
    x, h, c = sequence
    check_devices(cell, x, (h, c, *weights))
    if has_kernel(x.device, x.dtype) and not transformed():
        save = torch.is_grad_enabled() and wants_grad(sequence, weights)
        if save and _plain_eager(x.device.type):
            tf32 = ops.tf32_allowed(x)
            return training.EagerLayer.apply(x, h, c, batch_sizes, cell, bidirectional, tf32, *weights)
        if save or torch.compiler.is_compiling():
            return ops.rnn_layer(x, h, c, weights, batch_sizes, cell, bidirectional, save, ops.tf32_allowed(x))
        # Autograd, which has nothing to do here, costs as much Python time as all the rest of a one-step call.
        with torch._C._AutoDispatchBelowAutograd():
            return ops.rnn_layer(x, h, c, weights, batch_sizes, cell, bidirectional, False, ops.tf32_allowed(x))
    return reference_layer(cell, sequence, weights, batch_sizes, bidirectional)


def run_cell(cell: str, state: Sequence[Tensor | None], weights: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """One step of RNNCell and its like: h' and, of an LSTM, c', from x [B, I] or [I], h and c [B, H], [H] or None."""
    x, h, c = state
    check_devices(cell, x, (h, c, *weights))
    if (
        torch.is_grad_enabled()
        and wants_grad(state, weights)
        and has_kernel(x.device, x.dtype)
        and not transformed()
        and not watch.listening()
        and _plain_eager(x.device.type)
    ):
        done = training.EagerCell.apply(x, h, c, cell, ops.tf32_allowed(x), *weights)
        return done if cell == "lstm" else (done, None)
    batched = x.dim() == 2
    sequence = [t if t is None else (t if batched else t.unsqueeze(0)).unsqueeze(0) for t in state]
    _, h_n, c_n = run_layer(cell, sequence, weights, None, False)[:3]
    h_n = h_n.squeeze(0) if batched else h_n[0, 0]
    if cell != "lstm":
        return h_n, None
    return h_n, c_n.squeeze(0) if batched else c_n[0, 0]


def run_stack(
    cell: str,
    sequence: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    num_layers: int,
    bidirectional: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """All layers over a time-major or packed sequence: the driver under rnn, lstm, gru and the modules.

    Args:
        cell: a key of `reference.CELLS`.
        sequence: x [T, B, I] or, with batch_sizes, [N, I]; h [L*D, B, P] and c [L*D, B, H], or None for zeros.
        weights: for each layer and direction, in torch.nn's order.
        dropout: the probability of a zero between layers; 0 when not training.

    Returns:
        y [T, B, D*P] or [N, D*P], h_n [L*D, B, P], c_n [L*D, B, H] (for the LSTM; else not to be used).
    """
    x, h, c = sequence
    if batch_sizes is None and x.size(0) == 0:
        raise RuntimeError(f"{cell}: Expected sequence length to be larger than 0 in RNN, got x {list(x.shape)}")
    if num_layers == 1:
        return run_layer(cell, sequence, weights, batch_sizes, bidirectional)[:3]
    directions = 2 if bidirectional else 1
    per = len(weights) // num_layers
    h_in = [None] * num_layers if h is None else h.split(directions)
    c_in = [None] * num_layers if c is None else c.split(directions)
    h_out, c_out = [], []
    for layer in range(num_layers):
        if dropout and layer:
            x = torch.dropout(x, dropout, True)
        w = weights[layer * per : (layer + 1) * per]
        x, h_n, c_n = run_layer(cell, (x, h_in[layer], c_in[layer]), w, batch_sizes, bidirectional)[:3]
        h_out.append(h_n)
        c_out.append(c_n)
    return x, torch.cat(h_out), torch.cat(c_out) if cell == "lstm" else c_n


def _run(
    cell: str,
    sequence: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    **beyond,
) -> tuple[Tensor, ...]:
    """The public functions' checks and layouts around `run_stack`, or, with options, around `options.run_stack`."""
    x, h, c = sequence
    directions = 2 if bidirectional else 1
    states = num_layers * directions
    if num_layers < 1 or not weights or len(weights) % states:
        raise RuntimeError(
            f"{cell}: weights must hold as many tensors for each of {num_layers} layers and {directions} directions, "
            f"got {len(weights)}"
        )
    wanted = 3 if batch_sizes is None else 2
    if x.dim() != wanted:
        raise RuntimeError(f"{cell}: input must have {wanted} dimensions, got {list(x.shape)}")
    for name, t in (("h_0", h), ("c_0", c)):
        if t is not None and (t.dim() != 3 or t.size(0) != states):
            raise RuntimeError(f"{cell}: {name} must be [L*D, B, ...] with L*D = {states}, got {list(t.shape)}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"{cell}: dropout must be a probability in [0, 1], got {dropout}")
    transpose = batch_first and batch_sizes is None
    if transpose:
        x = x.transpose(0, 1)
    p = dropout if training else 0.0
    if not beyond:
        y, h_n, c_n = run_stack(cell, (x, h, c), weights, batch_sizes, num_layers, bidirectional, p)
        return (y.transpose(0, 1) if transpose else y), h_n, c_n
    from . import options  # which imports this module

    stack, call = options.from_keywords(cell, (num_layers, bidirectional, dropout, training), beyond)
    if transpose and call.resets is not None:
        call = call._replace(resets=call.resets.transpose(0, 1))
    y, h_n, c_n, *states = options.run_stack(stack, (x, h, c), weights, batch_sizes, call)
    if not transpose:
        return y, h_n, c_n, *states
    return y.transpose(0, 1), h_n, c_n, *(None if s is None else s.transpose(1, 2) for s in states)


def _results(y: Tensor, last, states: Sequence[Tensor | None]):
    """With return_all_states a third result."""
    states = [s for s in states if s is not None]
    return (y, last, tuple(states) if isinstance(last, tuple) else states[0]) if states else (y, last)


def rnn(
    input: Tensor, hx: Tensor | None, weights: Sequence[Tensor], *, nonlinearity: str = "tanh", **options
) -> tuple[Tensor, Tensor]:
    """Elman RNN, h' = f(W_ih x + b_ih + W_hh h + b_hh); equivalent to `torch.nn.RNN` with these weights.

    Args:
        input: [T, B, I], [B, T, I] with batch_first, or with batch_sizes the data of a PackedSequence, [N, I].
        hx: [L*D, B, H]; None means zeros, and none are allocated.
        weights: for each layer and each direction w_ih [H, I or D*H], w_hh [H, H], then b_ih and b_hh [H] or neither:
            `torch.nn.RNN`'s `_flat_weights`.
        nonlinearity: "tanh" or "relu".
        num_layers, bidirectional, batch_first: as in torch.nn.RNN. Defaults: 1, False, False.
        dropout, training: with training, the probability of a zero in each layer's output but the last's. The masks
            are torch.nn.RNN's under the same seed. Defaults: 0.0, False.
        batch_sizes: [T] int64 on the CPU, as in PackedSequence: input is packed. Default: None.
        lengths, resets, return_all_states, generator: as in the forward of `seqkern.RNN`.
        zoneout, recurrent_dropout and the other options of `seqkern.RNN` that need no parameters of their own; those
            that do (LSTM, GRU) take them in `extra`, a `reference.Extra` for each layer and direction.

    All tensors are of one dtype (autocast casts them) and on one device. float64, float32, bfloat16 and float16 on
    the CPU, and on CUDA where the build has it, run on the fused kernels, everything else on `seqkern.reference`.

    Returns:
        y [T, B, D*H] ([B, T, D*H], [N, D*H]) and h_n [L*D, B, H].

    Raises:
        RuntimeError: T is 0, or a shape, dtype or device does not fit.
        ValueError: nonlinearity is neither of the two, dropout is not a probability.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"rnn: nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    y, h_n, _, *states = _run("rnn_" + nonlinearity, (input, hx, None), weights, **options)
    return _results(y, h_n, states)


def lstm(
    input: Tensor, hx: tuple[Tensor | None, Tensor | None] | None, weights: Sequence[Tensor], **options
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """LSTM, c' = f c + i g, h' = o tanh(c') (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al.
    2000) and, with a projection, h' = W_hr (o tanh(c')) (Sak et al. 2014); equivalent to `torch.nn.LSTM`.

    Args:
        input, options and errors: as in `rnn`, without nonlinearity.
        hx: (h_0 [L*D, B, P], c_0 [L*D, B, H]), either of which may be None for zeros; None for both.
        weights: for each layer and each direction w_ih [4*H, I or D*P], w_hh [4*H, P], then b_ih and b_hh [4*H] or
            neither, then w_hr [P, H] or not. Gates i, f, g, o.

    Returns:
        y [T, B, D*P] ([B, T, D*P], [N, D*P]) and (h_n [L*D, B, P], c_n [L*D, B, H]).
    """
    h, c = (None, None) if hx is None else hx
    y, h_n, c_n, *states = _run("lstm", (input, h, c), weights, **options)
    return _results(y, (h_n, c_n), states)


def gru(input: Tensor, hx: Tensor | None, weights: Sequence[Tensor], **options) -> tuple[Tensor, Tensor]:
    """GRU, n = tanh(W_in x + b_in + r (W_hn h + b_hn)), h' = (1 - z) n + z h (Cho et al. 2014, with the reset gate
    behind the product as in cuDNN); equivalent to `torch.nn.GRU`.

    Args:
        input, hx, options and errors: as in `rnn`, without nonlinearity.
        weights: for each layer and each direction w_ih [3*H, I or D*H], w_hh [3*H, H], then b_ih and b_hh [3*H] or
            neither. Gates r, z, n.

    Returns:
        y [T, B, D*H] ([B, T, D*H], [N, D*H]) and h_n [L*D, B, H].
    """
    y, h_n, _, *states = _run("gru", (input, hx, None), weights, **options)
    return _results(y, h_n, states)
