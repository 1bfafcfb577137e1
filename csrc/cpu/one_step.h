// One step of one layer in inference, from addresses: what a streaming call takes in place of the operator, whose boxed
// arguments and results cost more than a small layer's arithmetic. seqkern/one_step.py checks all of it before.
#pragma once
#include <cstdint>

namespace seqkern {
struct OneStep {
  int64_t cell, dtype;  // as enum Cell, Dtype
  int64_t batch, input, hidden, output, directions;
  void *x, *h0, *c0;     // [B, I]; [D, B, P] and [D, B, H] or null; everything dense
  void *y, *h_n, *c_n;   // [B, D*P], [D, B, P], [D, B, H]
  void* const* weights;  // w_ih, w_hh[, b_ih, b_hh][, w_hr] for each direction
  int64_t per_direction;
};
void one_step(const OneStep&);
}  // namespace seqkern
