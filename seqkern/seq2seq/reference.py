"""The attention decoder in plain torch operations: the definition that the fused operators are held to.

Shapes: T target steps, S source steps, B batch, H hidden, G gates, L layers, K key size, A size of the attentional
vector. Source-side tensors are batch-major, [B, S, *], so that one row's keys lie together.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from ..reference import CELLS, State


class Sources(NamedTuple):
    """What a decoder attends to, projected once for all steps."""

    keys: Tensor  # [B, S, K]
    values: Tensor  # [B, S, A], already multiplied by the pre-output layer's weights for the context
    lengths: Tensor  # [B] int64, on any device: places from lengths[b] on are not attended to


class Scorer(NamedTuple):
    """The score of a key k for a query h. Without parameters h . k (K = H); with them v . tanh(w_query h + k)."""

    w_query: Tensor | None = None  # [K, H]
    v: Tensor | None = None  # [K]


def places_inside(lengths: Tensor, steps: int, device: torch.device) -> Tensor:
    """[B, S], true before each row's length."""
    return torch.arange(steps, device=device) < lengths.to(device).unsqueeze(-1)


def attention_weights(query: Tensor, keys: Tensor, lengths: Tensor, scorer: Scorer) -> Tensor:
    """Softmax over the places before `lengths` of the scores: [..., B, S] from query [..., B, H] and keys [B, S, K].

    A row of length 0 gets zeros, not NaN.
    """
    if scorer.v is None:
        scores = torch.einsum("...bk,bsk->...bs", query, keys)
    else:
        scores = torch.tanh(linear(query, scorer.w_query).unsqueeze(-2) + keys) @ scorer.v
    inside = places_inside(lengths, keys.size(1), keys.device)
    scores = scores.masked_fill(~inside, -torch.inf)
    # Where nothing is inside, a row of -inf would give NaN, in the gradient too.
    empty = (lengths.to(keys.device) <= 0).unsqueeze(-1)
    return torch.softmax(scores.masked_fill(empty, 0), -1).masked_fill(~inside, 0)


def project_sources(
    memory: Tensor, lengths: Tensor, w_key: Tensor, b_key: Tensor | None, w_value: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys W_key m + b_key [B, S, K] and values W_value m [B, S, A] of the places m before each row's length, zeros
    from there on: memory [S, B, M], lengths [B] int64, w_key [K, M], b_key [K], w_value [A, M]."""
    inside = places_inside(lengths, memory.size(0), memory.device).unsqueeze(-1)
    rows = torch.where(inside, memory.transpose(0, 1), 0)
    return torch.where(inside, linear(rows, w_key, b_key), 0), linear(rows, w_value)


def attentional_vector(query: Tensor, weights: Tensor, values: Tensor, w_pre: Tensor, b_pre: Tensor) -> Tensor:
    """tanh(w_pre h + sum_s weights_s values_s + b_pre), [..., B, A]: Luong et al. 2015, eq. 5, with the context's part
    of the product done beforehand."""
    return torch.tanh(linear(query, w_pre, b_pre) + torch.einsum("...bs,bsa->...ba", weights, values))


def stack_step(
    gx: Tensor, h: Sequence[Tensor], c: Sequence[Tensor] | None, weights: Sequence[Tensor], mask, cell: str
) -> tuple[list[Tensor], list[Tensor] | None]:
    """One step of all layers; gx [B, G*H] is all of the bottom layer's input projection. New h and c of each layer."""
    new_h, new_c = [], []
    for layer in range(len(h)):
        if layer == 0:
            w_hh, b_hh = weights[1:3]
        else:
            w_ih, w_hh, b_ih, b_hh = weights[4 * layer - 1 : 4 * layer + 3]
            below = new_h[-1] if mask is None else new_h[-1] * mask[layer - 1]
            gx = linear(below, w_ih, b_ih)
        state = CELLS[cell].step(gx, linear(h[layer], w_hh, b_hh), State(h[layer], None if c is None else c[layer]))
        new_h.append(state.h)
        new_c.append(state.c)
    return new_h, None if c is None else new_c


def attention_decoder(
    gx: Tensor,
    feed0: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    w_query: Tensor | None,
    v: Tensor | None,
    w_pre: Tensor,
    b_pre: Tensor,
    masks: Tensor | None,
    cell: str,
    tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Recurrent layers with attention and input feeding over a whole target (Luong et al. 2015, section 3.3).

    At step t, with a_0 = feed0: the bottom layer reads gx_t + w_feed a_{t-1}, each further layer the h below it (times
    its mask); the top layer's h is the query; a_t = tanh(w_pre h + sum_s alpha_ts values_s + b_pre).

    Args:
        gx: [T, B, G*H], the bottom layer's projection of the embedded target, W_ih e_t + b_ih, gates in torch's order.
        feed0: [B, A], or None for zeros.
        h0: [L, B, H].
        c0: [L, B, H] for the LSTM, else None.
        weights: w_feed [G*H, A], w_hh [G*H, H], b_hh [G*H] of the bottom layer, then for each further layer
            w_ih [G*H, H], w_hh [G*H, H], b_ih [G*H], b_hh [G*H].
        keys, values, lengths: as in `Sources`.
        w_query, v: as in `Scorer`: both or neither.
        w_pre: [A, H]; b_pre: [A].
        masks: [T, L-1, B, H], multiplied onto the h that goes up from layer to layer (dropout), or None.
        cell: a key of `seqkern.reference.CELLS`.
        tokens: [T, B] int64; then gx is [V, G*H], a row for each token, and step t reads the rows of its tokens.

    Returns:
        a [T, B, A], h_n [L, B, H], c_n [L, B, H] (LSTM; else empty), alpha [T, B, S].
    """
    gx = gx if tokens is None else embedding(tokens, gx)
    h, c = list(h0), None if c0 is None else list(c0)
    feed = values.new_zeros(gx.size(1), values.size(2)) if feed0 is None else feed0
    scorer = Scorer(w_query, v)
    outputs, alphas = [], []
    for t in range(gx.size(0)):
        h, c = stack_step(gx[t] + linear(feed, weights[0]), h, c, weights, None if masks is None else masks[t], cell)
        alpha = attention_weights(h[-1], keys, lengths, scorer)
        feed = attentional_vector(h[-1], alpha, values, w_pre, b_pre)
        outputs.append(feed)
        alphas.append(alpha)
    return torch.stack(outputs), torch.stack(h), gx.new_empty(0) if c is None else torch.stack(c), torch.stack(alphas)
