// Which kernel of the `grid` engine runs a plan.
#pragma once
#include "grid.cuh"
#include "grid_backward.cuh"

namespace seqkern { namespace cuda { namespace {

using GridKernel = void (*)(GridArgs);

// kWithOptions: false leaves the kernels with options uncompiled, for tests of the plain ones.
template <bool kWithOptions, class C, class S, int kRows> GridKernel grid_kernel(bool backward, bool options) {
  if constexpr (kWithOptions)
    if (options) return backward ? grid_backward_kernel<C, S, kRows, true> : grid_forward_kernel<C, S, kRows, true>;
  if (options) return nullptr;
  return backward ? grid_backward_kernel<C, S, kRows, false> : grid_forward_kernel<C, S, kRows, false>;
}
template <bool kWithOptions, class C, class S> GridKernel grid_kernel(int rows, bool backward, bool options) {
  return rows == 1 ? grid_kernel<kWithOptions, C, S, 1>(backward, options)
                   : grid_kernel<kWithOptions, C, S, 2>(backward, options);
}
template <bool kWithOptions, class C>
GridKernel grid_kernel(Dtype dtype, int rows, bool backward, bool options) {
  switch (dtype) {
    case Dtype::kF32: return grid_kernel<kWithOptions, C, float>(rows, backward, options);
    case Dtype::kBf16: return grid_kernel<kWithOptions, C, bf16>(rows, backward, options);
    case Dtype::kF16: return grid_kernel<kWithOptions, C, half_t>(rows, backward, options);
    default: return nullptr;
  }
}
// Null where there is none.
template <bool kWithOptions = true>
GridKernel grid_kernel(Cell cell, Dtype dtype, const Plan& p, bool backward, bool options) {
  switch (cell) {
    case Cell::kRnnTanh: return grid_kernel<kWithOptions, RnnTanh>(dtype, p.rows_per_thread, backward, options);
    case Cell::kRnnRelu: return grid_kernel<kWithOptions, RnnRelu>(dtype, p.rows_per_thread, backward, options);
    case Cell::kLstm: return grid_kernel<kWithOptions, Lstm>(dtype, p.rows_per_thread, backward, options);
    case Cell::kGru: return grid_kernel<kWithOptions, Gru>(dtype, p.rows_per_thread, backward, options);
  }
  return nullptr;
}

}}}  // namespace seqkern::cuda
