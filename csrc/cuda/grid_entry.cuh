// Which kernel of the `grid` engine runs a plan.
#pragma once
#include "grid.cuh"
#include "grid_backward.cuh"

namespace seqkern { namespace cuda { namespace {

using GridKernel = void (*)(GridArgs);

template <class C, class S> GridKernel grid_kernel(int rows, bool backward) {
  if (rows == 1) return backward ? grid_backward_kernel<C, S, 1> : grid_forward_kernel<C, S, 1>;
  return backward ? grid_backward_kernel<C, S, 2> : grid_forward_kernel<C, S, 2>;
}
template <class C> GridKernel grid_kernel(Dtype dtype, int rows, bool backward) {
  switch (dtype) {
    case Dtype::kF32: return grid_kernel<C, float>(rows, backward);
    case Dtype::kBf16: return grid_kernel<C, bf16>(rows, backward);
    case Dtype::kF16: return grid_kernel<C, half_t>(rows, backward);
    default: return nullptr;
  }
}
// Null where there is none.
inline GridKernel grid_kernel(Cell cell, Dtype dtype, const Plan& p, bool backward) {
  switch (cell) {
    case Cell::kRnnTanh: return grid_kernel<RnnTanh>(dtype, p.rows_per_thread, backward);
    case Cell::kRnnRelu: return grid_kernel<RnnRelu>(dtype, p.rows_per_thread, backward);
    case Cell::kLstm: return grid_kernel<Lstm>(dtype, p.rows_per_thread, backward);
    case Cell::kGru: return grid_kernel<Gru>(dtype, p.rows_per_thread, backward);
  }
  return nullptr;
}

}}}  // namespace seqkern::cuda
