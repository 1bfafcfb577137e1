"""The options of the `step` engine run on the host against the reference in float64: alone, together, in every cell.

As in test_host_step.py, a read of what nobody wrote or an access out of range ends a run with a Fault.
"""

import pytest
import torch
from cases import DTYPES, Case
from host_options import outcome

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
