// One layer in inference, from addresses: what a plain call (csrc/inference.cpp) takes in place of the operator, and checks before.
#pragma once
#include <cstdint>

namespace seqkern {
struct Inference {
  int64_t cell, dtype;  // as enum Cell, Dtype
  int64_t steps, batch, input, hidden, output, directions;
  int64_t batch_first;  // of x alone
  void *x, *h0, *c0;     // [T, B, I] or [B, T, I]; [D, B, P] and [D, B, H] or null; everything dense
  void *y, *h_n, *c_n;   // [T, B, D*P], [D, B, P], [D, B, H]; of one step and direction y may be h_n
  void* const* weights;  // w_ih, w_hh[, b_ih, b_hh][, w_hr] for each direction
  int64_t per_direction;
};
void infer(const Inference&);
}  // namespace seqkern
