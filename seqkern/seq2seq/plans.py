"""What runs a decoder's or a model's training and searches, and why: `seqkern.explain` for them."""

import torch
from torch import nn

from ..info import Plan, explain
from . import compiled
from .decoder import Decoder, unfused
from .model import Seq2Seq


def plan(module: nn.Module, batch: int, time: int, device: torch.device, dtype: torch.dtype) -> Plan | None:
    """The plan of a `Decoder` or `Seq2Seq` for targets [time, batch]; None for another module."""
    if isinstance(module, Seq2Seq):
        decoder, lines = module.decoder, [f"encoder: {explain(module.encoder.layers, batch, time, device).engine}"]
    elif isinstance(module, Decoder):
        decoder, lines = module, []
    else:
        return None
    if not decoder.input_feeding:
        engine = explain(decoder.layers, batch, time, device).engine
        why = "no input feeding: the layers read the whole target, then the attention of all steps at once"
    elif lacking := unfused(device, dtype):
        engine, why = "reference", f"no fused attention decoder for {lacking}: seqkern.seq2seq.reference, step by step"
    else:
        engine = f"cpu-{torch.ops.seqkern._cpu_isa()}"
        why = "fused attention decoder: the whole target, input feeding included, in one operator"
        reads = "the projected vocabulary" if decoder.reads_table(batch * time) else "each place, projected"
        lines.append(f"embedded target: {reads}")
    if lacking := compiled.uncovered(decoder, device):
        lines.append(f"searches: token by token, in plain torch operations ({lacking})")
        if device.type == "cuda":
            lines.append("greedy and beam of compile_search: a step captured as a CUDA graph")
    else:
        lines.append("searches: the whole loop in one operator")
    sizes = f"T={time} B={batch} V={decoder.vocab} E={decoder.embedding.embedding_dim} H={decoder.hidden}"
    kind = f"{decoder.cell}, attention {decoder.attention.kind if decoder.attention else 'none'}"
    call = f"{type(module).__name__} ({kind}) {str(dtype).removeprefix('torch.')} on {device}, {sizes}"
    return Plan(engine, why, call, split="\n".join(lines))
