// One layer from addresses: what a plain call takes in place of the operator. csrc/inference.cpp and csrc/training.cpp check
// before.
#pragma once
#include <cstdint>

namespace seqkern {
struct Plain {
  int64_t cell, dtype;  // as enum Cell, Dtype
  int64_t steps, batch, input, hidden, output, directions;
  int64_t batch_first;  // of x alone
  void *x, *h0, *c0;     // [T, B, I] or [B, T, I]; [D, B, P] and [D, B, H] or null; everything dense
  void *y, *h_n, *c_n;   // [T, B, D*P], [D, B, P], [D, B, H]; of one step and direction y may be h_n
  void* reserve;         // [D, N, saved, H], or null in inference
  void* const* weights;  // w_ih, w_hh[, b_ih, b_hh][, w_hr] for each direction
  int64_t per_direction;
};
void plain_forward(const Plain&);

struct PlainGradients {
  void *dy, *dh_n, *dc_n;  // or null
  void *dx, *dh0, *dc0;    // dx null where it is not wanted
  void* const* dweights;   // likewise
};
void plain_backward(const Plain&, const PlainGradients&);

int64_t saved_per_unit(int64_t cell);  // elements of the reserve
}  // namespace seqkern
