"""RNN, LSTM, GRU and the three cells: torch.nn's own classes with another forward.

Construction, initial weights, `state_dict`, checks and representation are inherited. Two things differ from torch.nn
besides speed: `_flat_weights` is derived from the module's attributes on every use, so that whatever replaces a
weight (setattr, parametrizations, pruning, weight norm, functional_call) takes effect at once and no stale or
non-leaf tensor is kept; and a state that is not given is passed on as None, so that no zeros are allocated.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import functional, inference, module_options, options

__all__ = ["GRU", "GRUCell", "LSTM", "LSTMCell", "RNN", "RNNCell"]

State = Tensor | tuple[Tensor, Tensor]  # h, or the LSTM's (h, c)


def _weights(module: nn.Module, names: Iterable[str]) -> list[Tensor]:
    """The module's weights as they are now. A parametrized or normalised one is not in `_parameters`."""
    parameters = module._parameters
    try:
        return [parameters[name] for name in names]
    except KeyError:
        return [getattr(module, name) for name in names]


def _split(hx: State, lstm: bool) -> tuple[Tensor, Tensor | None]:
    """h and c. RuntimeError, as in torch, unless an LSTM gets two states."""
    if not lstm:
        return hx, None
    if len(hx) > 2:
        raise RuntimeError(f"the LSTM expects two states, (h_0, c_0), got {len(hx)}")
    return hx[0], hx[1]


def _batch_of_one(call: options.Call) -> options.Call:
    """resets [T] of an unbatched call as [T, 1]."""
    if call.lengths is not None:
        raise ValueError("lengths are for batched input: shorten an unbatched one instead")
    if call.resets is None:
        return call
    if call.resets.dim() != 1:
        raise ValueError(f"resets of unbatched input must be [T], got {list(call.resets.shape)}")
    return call._replace(resets=call.resets.unsqueeze(1))


class _Scriptable(nn.Module):
    """torch.jit.script cannot compile the forwards here; it gets torch.nn's own module on the same Parameters.

    torch puts that module into the scripted model's source too: `seqkern.accelerate` it again to go on with it.
    """

    def __prepare_scriptable__(self) -> nn.Module:
        if getattr(self, "_settings", None) is not None:
            raise RuntimeError(f"{type(self).__name__}: torch.jit.script knows none of the options{self._text()}")
        torch_class = next(cls for cls in type(self).__mro__ if cls.__module__ == nn.RNNBase.__module__)
        twin = torch_class.__new__(torch_class)
        twin.__dict__.update(self.__dict__)
        if isinstance(twin, nn.RNNBase):
            twin._init_flat_weights()
        return twin


class _Layer(_Scriptable, nn.RNNBase):
    """What RNN, LSTM and GRU share."""

    # Where no option is set. On the class, for layers that torch.nn made: unpickled, or given to `accelerate`.
    _settings: options.Settings | None = None
    _initial = (None, None)
    _extra_names: list[dict] = []  # noqa: RUF012

    def __init__(self, *args, **kwargs):
        given = {name: kwargs.pop(name) for name in module_options.NAMES if name in kwargs}
        super().__init__(*args, **kwargs)
        if given:
            module_options.install(self, given)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self._settings is not None:
            module_options.initialise(self)

    def _text(self) -> str:
        return module_options.text(self) if self._settings is not None else ""

    def extra_repr(self) -> str:
        return super().extra_repr() + self._text()

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor | None]) -> None:
        """Assigning the list replaces the attributes; assigning an element of it does nothing."""
        for name, weight in zip(self._flat_weights_names, weights, strict=True):
            if getattr(self, name, None) is not weight:
                setattr(self, name, weight)

    # torch.nn.RNNBase's own keeps a list up to date.
    __setattr__ = nn.Module.__setattr__

    def _init_flat_weights(self) -> None:
        self._flat_weight_refs = []

    def _update_flat_weights(self) -> None:
        """There is no list to update."""

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels take weights wherever they are. Here for the programs that call it."""

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        state.pop("_flat_weight_refs", None)
        state.pop("_flat_weights", None)
        # torch.nn.utils.weight_norm and pruning leave a computed weight as a plain attribute, and compute it again
        # before the next forward. Not being a leaf, it could be neither copied nor pickled.
        for name in self._flat_weights_names:
            if isinstance(state.get(name), Tensor):
                state[name] = state[name].detach()
        return state

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.__dict__.pop("_flat_weights", None)

    def _check_state(self, h: Tensor, c: Tensor | None, batch: int) -> None:
        """Raises RuntimeError unless h is [L*D, B, P] and c, for the LSTM, [L*D, B, H]."""
        states = self.num_layers * (2 if self.bidirectional else 1)
        if c is None:
            self.check_hidden_size(h, (states, batch, self.hidden_size))
        else:
            size = (states, batch, self.proj_size or self.hidden_size)
            self.check_hidden_size(h, size, "Expected hidden[0] size {}, got {}")
            self.check_hidden_size(c, (states, batch, self.hidden_size), "Expected hidden[1] size {}, got {}")

    def _run(self, x: Tensor, h: Tensor | None, c: Tensor | None, weights: list[Tensor], batch_sizes: Tensor | None,
             call: options.Call | None):  # fmt: skip
        if call is not None or self._settings is not None:
            settings = self._settings or options.DEFAULT
            return options.run_stack(
                options.Stack(self.mode.lower(), self.num_layers, self.bidirectional, self.dropout, self.training,
                              settings, module_options.extras(self)),
                (x, h, c),
                weights,
                batch_sizes,
                call or options.Call(),
            )  # fmt: skip
        return functional.run_stack(
            self.mode.lower(),
            (x, h, c),
            weights,
            batch_sizes,
            self.num_layers,
            self.bidirectional,
            self.dropout if self.training else 0.0,
        )

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        return_all_states: bool = False,
        generator: torch.Generator | None = None,
    ):
        """The forward of the torch.nn class of the same name: its arguments, results and exception types.

        The keywords are seqkern's own: see the class.
        """
        call = None
        if lengths is not None or resets is not None or return_all_states or generator is not None:
            call = options.Call(lengths, resets, return_all_states, generator)
        elif (done := inference.call(self, input, hx)) is not None:
            return done
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, call)
        dim = input.dim()
        if dim != 3 and dim != 2:
            raise ValueError(f"{type(self).__name__}: Expected input to be 2D or 3D, got {dim}D instead")
        batched = dim == 3
        lstm = self.mode == "LSTM"
        h = c = None
        if hx is not None:
            h, c = _split(hx, lstm)
            if h.dim() != dim or (lstm and c.dim() != dim):
                raise RuntimeError(
                    f"For {'batched 3-D' if batched else 'unbatched 2-D'} input, the state should also be {dim}-D but "
                    f"got {h.dim()}-D" + (f" and {c.dim()}-D tensors" if lstm else " tensor")
                )
        x = input
        if not batched:  # time-major, whatever batch_first says
            call = call and _batch_of_one(call)
            x = x.unsqueeze(1)
            h = None if h is None else h.unsqueeze(1)
            c = None if c is None else c.unsqueeze(1)
        weights = _weights(self, self._flat_weights_names)
        if x.dtype != weights[0].dtype or x.size(-1) != self.input_size:
            self.check_input(x, None)
        batch_first = batched and self.batch_first
        if batch_first:
            x = x.transpose(0, 1)
            if resets is not None:
                call = call._replace(resets=resets.transpose(0, 1) if resets.dim() == 2 else resets)
        if h is not None:
            self._check_state(h, c, x.size(1))
        y, h_n, c_n, *states = self._run(x, h, c, weights, None, call)
        if batch_first:
            y = y.transpose(0, 1)
            states = [None if s is None else s.transpose(1, 2) for s in states]
        elif not batched:
            y, h_n = y.squeeze(1), h_n.squeeze(1)
            c_n = c_n.squeeze(1) if lstm else c_n
            states = [None if s is None else s.squeeze(2) for s in states]
        return self._results(y, (h_n, c_n) if lstm else h_n, states if return_all_states else None)

    @staticmethod
    def _results(y, last: State, states: list[Tensor | None] | None):
        if states is None:
            return y, last
        return y, last, tuple(states) if isinstance(last, tuple) else states[0]

    def _forward_packed(self, input: PackedSequence, hx: State | None, call: options.Call | None):
        data, batch_sizes, sorted_indices, unsorted_indices = input
        lstm = self.mode == "LSTM"
        h = c = None
        if hx is not None:
            h, c = _split(self.permute_hidden(hx, sorted_indices), lstm)
        weights = _weights(self, self._flat_weights_names)
        # A packed LSTM's dtypes are left to the operator, for then torch raises RuntimeError, not ValueError.
        if data.size(-1) != self.input_size or (data.dtype != weights[0].dtype and not lstm):
            self.check_input(data, batch_sizes)
        if not torch.compiler.is_compiling():  # the batch is data, which a graph does not see
            batch = int(batch_sizes[0])  # IndexError, as in torch, where there is no step
            if lstm and h is not None and min(h.dim(), c.dim()) < 3:
                raise IndexError(f"a packed LSTM's state should be 3-D, got {h.dim()}-D and {c.dim()}-D tensors")
            if h is not None:
                self._check_state(h, c, batch)
        y, h_n, c_n, *states = self._run(data, h, c, weights, batch_sizes, call)
        last = self.permute_hidden((h_n, c_n) if lstm else h_n, unsorted_indices)
        y = PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices)
        return self._results(y, last, states if call is not None and call.all_states else None)


class RNN(_Layer, nn.RNN):
    __doc__ = (nn.RNN.__doc__ or "") + module_options.DOC


class LSTM(_Layer, nn.LSTM):
    __doc__ = (nn.LSTM.__doc__ or "") + module_options.DOC


class GRU(_Layer, nn.GRU):
    __doc__ = (nn.GRU.__doc__ or "") + module_options.DOC


_CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class _Cell(_Scriptable, nn.RNNCellBase):
    """What RNNCell, LSTMCell and GRUCell share: a layer of one step, one operator call."""

    _cell: str  # a key of reference.CELLS

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        """The forward of the torch.nn class of the same name: its arguments, results and exception types."""
        cell = self._cell
        if (done := inference.step(self, cell, input, hx)) is not None:
            return done
        dim = input.dim()
        if dim != 2 and dim != 1:
            raise ValueError(f"{type(self).__name__}: Expected input to be 1D or 2D, got {dim}D instead")
        lstm = cell == "lstm"
        batch = input.size(0) if dim == 2 else 1
        h = c = None
        if hx is not None:
            if lstm and len(hx) != 2:
                raise RuntimeError(f"LSTMCell expects two states, (h, c), got {len(hx)}")
            h, c = _split(hx, lstm)
            self._check(h, "h", dim, batch)
            if lstm:
                self._check(c, "c", dim, batch)
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                f"{type(self).__name__}: input.size(-1) must be input_size = {self.input_size}, got {input.size(-1)}"
            )
        weights = _weights(self, _CELL_WEIGHTS)
        if weights[2] is None:
            weights = weights[:2]
        h_n, c_n = functional.run_cell(cell, (input, h, c), weights)
        return (h_n, c_n) if lstm else h_n

    def _check(self, state: Tensor, name: str, dim: int, batch: int) -> None:
        if state.dim() not in (1, 2):
            raise ValueError(
                f"{type(self).__name__}: Expected hidden state {name} to be 1D or 2D, got {state.dim()}D instead"
            )
        wanted = (batch, self.hidden_size) if dim == 2 else (self.hidden_size,)
        if state.size() != wanted:
            raise RuntimeError(
                f"{type(self).__name__}: hidden state {name} must be {'[B, H]' if dim == 2 else '[H]'} = "
                f"{list(wanted)}, got {list(state.size())}"
            )


class RNNCell(_Cell, nn.RNNCell):
    __doc__ = nn.RNNCell.__doc__

    @property
    def _cell(self) -> str:
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"RNNCell: nonlinearity must be 'tanh' or 'relu', got {self.nonlinearity!r}")
        return "rnn_" + self.nonlinearity


class LSTMCell(_Cell, nn.LSTMCell):
    __doc__ = nn.LSTMCell.__doc__
    _cell = "lstm"


class GRUCell(_Cell, nn.GRUCell):
    __doc__ = nn.GRUCell.__doc__
    _cell = "gru"
