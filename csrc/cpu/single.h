// One step of one or two rows in inference, as a stream takes it: weights where they lie, and units that need nothing of
// each other, so that whichever thread is free takes the next few (helpers.h).
#pragma once
#include "../core/cells.h"
#include "direct.h"

namespace seqkern { namespace SK_NS { namespace {

// The units [first, last) of direction d; all of x, h0, c0 that the cell has, no options, no projection.
template <class C, class S> void single_step(const LayerArgs& a, int64_t d, int64_t first, int64_t last) {
  using V = Pack<typename AccOf<S>::Type>;
  using Cell = typename CellPackOf<S>::Type;
  const Weights& w = a.weights[d];
  const auto gate = [](const void* bias, const void* weights, const S* row, int64_t at, int64_t n, int64_t k) {
    const V start = bias ? V(load((const S*)bias + at, n)) : V(0);
    return start + dots(row, (const S*)weights + at * k, n, k);
  };
  for (int64_t j = first; j < last; j += V::kWidth)
    for (int64_t b = 0; b < a.batch; ++b) {
      const int64_t lanes = min64(last - j, V::kWidth), row = d * a.batch + b;
      const S *x_row = (const S*)a.x.data + b * a.x.row, *h_row = (const S*)a.h0 + row * a.output;
      Cell x[C::kGates], h[C::kGates], saved[C::kSaved ? C::kSaved : 1], out, carry(0);
      for (int g = 0; g < C::kGates; ++g) {
        x[g] = gate(w.b_ih, w.w_ih, x_row, g * a.hidden + j, lanes, a.input);
        h[g] = gate(w.b_hh, w.w_hh, h_row, g * a.hidden + j, lanes, a.output);
      }
      if (C::kCarry == Carry::kCell) carry = load((const S*)a.c0 + row * a.hidden + j, lanes);
      if (C::kCarry == Carry::kHidden) carry = load(h_row + j, lanes);
      C::forward(x, h, carry, out, saved);
      store(out, (S*)a.y + (b * a.directions + d) * a.output + j, lanes);
      store(out, (S*)a.h_n + row * a.output + j, lanes);
      if (C::kCarry == Carry::kCell) store(carry, (S*)a.c_n + row * a.hidden + j, lanes);
    }
}

}}}  // namespace seqkern::SK_NS
