"""Attention: where in the source a decoder looks."""

from torch import Tensor, nn

from .. import functional
from .encoder import Memory
from .reference import Scorer, Sources, attention_weights
from .sources import project_sources

KINDS = ("none", "dot", "general", "bahdanau", "concat")


class Attention(nn.Module):
    """Scores of the source's places for a query, softmaxed over those before each row's length.

    Args:
        kind: how a place with values m is scored for a query h:
            "dot"       h . m                             (Luong et al. 2015; needs H = M)
            "general"   h . W m                           (Luong et al. 2015)
            "concat"    v . tanh(W [h; m])                (Luong et al. 2015)
            "bahdanau"  v . tanh(W h + U m + b)           (Bahdanau et al. 2015)
        query: H, the decoder's hidden size.
        memory: M, the size of the encoder's values.

    The keys, what a score needs of the source, are projected once for all steps: W m, or U m + b.

    Raises:
        ValueError: another kind, "dot" of different sizes.
    """

    def __init__(self, kind: str, query: int, memory: int) -> None:
        super().__init__()
        if kind not in KINDS[1:]:
            raise ValueError(f"attention must be one of {', '.join(KINDS)}, got {kind!r}")
        if kind == "dot" and query != memory:
            raise ValueError(
                f"attention 'dot' needs the decoder's H = D*H of the encoder, got {query} and {memory}; take 'general'"
            )
        self.kind = kind
        additive = kind in ("bahdanau", "concat")
        self.key = None if kind == "dot" else nn.Linear(memory, query, bias=kind == "bahdanau")
        self.query = nn.Linear(query, query, bias=False) if additive else None
        self.score = nn.Linear(query, 1, bias=False) if additive else None

    @property
    def scorer(self) -> Scorer:
        return Scorer() if self.query is None else Scorer(self.query.weight, self.score.weight[0])

    def keys(self, values: Tensor) -> Tensor:
        """[B, S, K] from values [B, S, M]."""
        return values if self.key is None else self.key(values)

    def forward(self, query: Tensor, keys: Tensor, lengths: Tensor) -> Tensor:
        """The weights [..., B, S] of queries [..., B, H]; rows sum to one, or are zero where the length is 0."""
        return attention_weights(query, keys, lengths, self.scorer)


def project(memory: Memory, attention: Attention, context: nn.Linear) -> Sources:
    """Keys and values of a memory, batch-major; `context` [A, M] is the pre-output layer's part for the context."""
    values, key = memory.values, attention.key
    fused = values.device.type == "cpu" and functional.has_kernel(values.device, values.dtype)
    if fused and key is not None and not functional.transformed():
        found = project_sources(values, memory.lengths.cpu(), key.weight, key.bias, context.weight)
        return Sources(*found, memory.lengths)
    values = values.transpose(0, 1).contiguous()  # copied once, not by each product forward and backward
    return Sources(attention.keys(values), context(values), memory.lengths)
