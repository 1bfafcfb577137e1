"""Fused RNN, LSTM and GRU kernels for PyTorch, under layers that drop in for torch.nn's.

    model = seqkern.accelerate(model)          # a model at hand
    with seqkern.patched(): ...                # code that builds one
    layer = seqkern.LSTM(64, 128)              # torch.nn.LSTM's arguments, results and state_dict

torch.compile: importing seqkern sets `torch._dynamo.config.allow_rnn`; see `seqkern._dynamo`.
"""

try:
    from . import ops
except ImportError as error:
    raise ImportError(
        f"seqkern's compiled extension seqkern._C did not load ({error}): install the package with "
        "`pip install --no-build-isolation .`, or in a checkout run `python setup.py build_ext --inplace`"
    ) from error

from . import diagnostics, functional, reference
from ._dynamo import allow_rnn_in_compile
from .convert import accelerate, patched
from .info import Plan, __version__, explain
from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from .scan import MinGRU, MinLSTM

__all__ = [
    "GRU",
    "GRUCell",
    "LSTM",
    "LSTMCell",
    "MinGRU",
    "MinLSTM",
    "Plan",
    "RNN",
    "RNNCell",
    "__version__",
    "accelerate",
    "diagnostics",
    "explain",
    "functional",
    "ops",
    "patched",
    "reference",
]

allow_rnn_in_compile()
