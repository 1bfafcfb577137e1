// Which kernel of the `grid` engine runs a plan.
#pragma once
#include "grid.cuh"
#include "grid_backward.cuh"

namespace seqkern { namespace cuda { namespace {

using GridKernel = void (*)(GridArgs);

template <class C, class S> GridKernel grid_kernel(bool backward, int units) {
  if (backward) return grid_backward_kernel<C, S>;
  // The planner gives half the units to cells of several gates only.
  if constexpr (C::kGates > 1)
    if (units == kHalfUnits) return grid_forward_kernel<C, S, kHalfUnits>;
  return units == kFullUnits ? GridKernel(grid_forward_kernel<C, S, kFullUnits>) : nullptr;
}
template <class C> GridKernel grid_kernel(Dtype dtype, bool backward, int units) {
  switch (dtype) {
    case Dtype::kF32: return grid_kernel<C, float>(backward, units);
    case Dtype::kBf16: return grid_kernel<C, bf16>(backward, units);
    case Dtype::kF16: return grid_kernel<C, half_t>(backward, units);
    default: return nullptr;
  }
}
// Null where there is none.
inline GridKernel grid_kernel(Cell cell, Dtype dtype, const Plan& p, bool backward) {
  switch (cell) {
    case Cell::kRnnTanh: return grid_kernel<RnnTanh>(dtype, backward, p.units_per_cta);
    case Cell::kRnnRelu: return grid_kernel<RnnRelu>(dtype, backward, p.units_per_cta);
    case Cell::kLstm: return grid_kernel<Lstm>(dtype, backward, p.units_per_cta);
    case Cell::kGru: return grid_kernel<Gru>(dtype, backward, p.units_per_cta);
  }
  return nullptr;
}

}}}  // namespace seqkern::cuda
