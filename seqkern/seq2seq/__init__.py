"""Sequence to sequence: encoder, context vector, attention, decoder, search."""

from .attention import Attention
from .decoder import Decoder
from .encoder import Bridge, Encoder, Memory
from .model import CompiledSearch, Seq2Seq
from .search import Hypotheses

__all__ = ["Attention", "Bridge", "CompiledSearch", "Decoder", "Encoder", "Hypotheses", "Memory", "Seq2Seq"]
