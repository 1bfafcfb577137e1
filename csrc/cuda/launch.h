// What ops.cpp and the .cu files say to each other: plain pointers, no torch, no CUDA header.
#pragma once
#include <stdint.h>

#include "../core/args.h"

namespace seqkern { namespace cuda {

struct Plan;    // planner.h
struct Device;  // planner.h
using Stream = void*;       // a cudaStream_t
using Error = const char*;  // null: none; else the CUDA runtime's text

// The recurrence of one layer, forward or backward, all directions. The products over all steps at once (gates_x; dx, dW,
// db from dgates) are done around it. Every pointer is on the device.
//
// Forward reads gates_x, w_hh, b_ih, b_hh, h0, c0 and writes y, h_n, c_n and, where it is not null, reserve.
// Backward reads dy, dh_n, dc_n, w_hh, h0, c0, y, reserve and writes dgates, dh0, dc0.
struct Recurrence {
  LayerArgs layer;  // x, dx, w_ih, dweights, plan, row_bounds, barriers, scratch: not used. sizes is null;
                    // starts is on the device, and null where the input is not packed: step t starts at row t * batch
  Cell cell;
  Dtype dtype;
  bool tf32;                             // float32 operands of a product may be rounded to TF32
  const void* gates_x[kMaxDirections];   // [N, G*H] W_ih x in torch's gate order, without biases, in `dtype`
  void* dgates[kMaxDirections];          // [N, kGrads*H] columns as in core/cells.h, in `dtype`
  char* workspace;                       // plan.workspace_bytes, 256-byte aligned, zeroed
};

// ---- grid.cu

// Whether every CTA of the plan is resident at once on the current device: asks the occupancy of the kernel that
// grid_forward (grid_backward) would launch.
bool grid_fits(const Recurrence&, const Plan&, bool backward);
Error grid_forward(const Recurrence&, const Plan&, Stream);
Error grid_backward(const Recurrence&, const Plan&, Stream);

// ---- step.cu

// What the planner asks about the current device.
Error query_device(Device*);
// Writes host values to the device through kernel parameters: in stream order, without a copy that would read the host's
// memory again when a CUDA graph replays it.
Error upload(int64_t* to, const int64_t* from, int64_t n, Stream);

}}  // namespace seqkern::cuda
