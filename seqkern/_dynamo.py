"""Lets torch.compile take seqkern's layers.

Dynamo refuses every instance of torch.nn.RNN, LSTM and GRU, subclasses included, unless
`torch._dynamo.config.allow_rnn` is True (False by default in torch 2.11 to 2.14); without it a compiled model breaks
its graph at each layer, and `fullgraph=True` raises. The flag is for the whole process: torch.nn's own layers are then
traced too. To have torch's behaviour back, set it to False after importing seqkern.

Importing torch._dynamo takes a second and most programs never do, so the flag is set when somebody else imports it.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_CONFIG = "torch._dynamo.config"


def _allow_rnn(config: ModuleType) -> None:
    if hasattr(config, "allow_rnn"):  # a torch without the flag has no such refusal
        config.allow_rnn = True


class _AtImport(MetaPathFinder):
    """Finds torch._dynamo.config as Python would, and sets the flag once it has run."""

    def find_spec(self, name: str, path=None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_allow(module: ModuleType) -> None:
                run(module)
                _allow_rnn(module)

            spec.loader.exec_module = run_and_allow
        return spec


def allow_rnn_in_compile() -> None:
    """Sets the flag now if torch._dynamo has been imported, else when it is."""
    if _CONFIG in sys.modules:
        _allow_rnn(sys.modules[_CONFIG])
    else:
        sys.meta_path.insert(0, _AtImport())
