// What the kernels of variant.cuh are given.
#pragma once
#include "step_args.h"

namespace seqkern { namespace cuda {

constexpr int kRowThreads = 512;        // at most; a power of two
constexpr int64_t kRowBytes = 40 * 1024;  // of a block's shared memory for its row of gates, at most

// A step of a recurrence; letters as in step_args.h, and S: as in RecurrenceArgs. Everything is in one type.
struct VariantStep {
  RecurrenceArgs a;  // but sizes, starts and packed, which are not the device's
  Step step;
  Neighbours near;
  void* gates;  // [D, B, G*H] forward: W_hh h, then what the row's passes leave; back: d(loss)/d(W_hh h), each row's
                // latest
  void* reset;  // [D, B, H] forward: r h as its product reads it; back: the gradient of that; for RESET_BEFORE
  void* enter;  // [D, B, H] forward: h as the next step's product reads it; null: as it is
  // backward
  const void* back;  // [D, B, H] `gates` of the step after, times W_hh
  void* past;        // [D, B, H] d(loss)/dh past the product
  void* dc;          // [D, B, H]
  void* sums;        // [B, D, S] gradients of the parameters besides w_hh, of each row; bias_n's come first
  int64_t sums_size, at_peephole, at_gain_h, at_gain_c;  // S, and places in it
  bool close;  // a block keeps its row of `gates` in shared memory meanwhile
};

}}  // namespace seqkern::cuda
