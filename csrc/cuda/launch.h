// What ops.cpp and the .cu files say to each other: plain pointers, no torch, no CUDA header.
#pragma once
#include <stdint.h>

#include "../core/args.h"

namespace seqkern { namespace cuda {

struct Plan;                // planner.h
struct Device;              // planner.h
using Stream = void*;       // a cudaStream_t
using Error = const char*;  // null: none; else what CUDA said

struct Extent {
  unsigned x, y, z;
};  // of a grid or a block

// C = A B, or C += A B: row-major, batch times. A [m, k] or, with a_t, [k, m]; B [k, n] or, with b_t, [n, k]; C [m, n].
// ld: elements from row to row as stored; stride: from one of the batch to the next. Sums are in float, or in double
// for double.
struct Gemm {
  const void *a, *b;
  void* c;
  int64_t m, n, k, lda, ldb, ldc;
  bool a_t, b_t;
  int64_t batch, stride_a, stride_b, stride_c;
  Dtype in, out;
  bool tf32, accumulate;
};

// A whole layer. In `layer` every pointer but sizes and starts is on the device; x is [N, I] with rows x.row apart;
// plan, row_bounds, barriers and scratch are not used.
struct LayerCall {
  LayerArgs layer;
  Cell cell;
  Dtype dtype;
  bool tf32;         // float32 operands of a product may be rounded to TF32
  const Plan* plan;  // made for this pass, forward or backward
};

// The recurrence of one layer, forward or backward, all directions. The products over all steps at once (gates_x; dx,
// dW, db from dgates) are done around it. Every pointer is on the device.
//
// Forward reads gates_x, w_hh, b_ih, b_hh, h0, c0 and writes y, h_n, c_n and, where it is not null, reserve.
// Backward reads dy, dh_n, dc_n, w_hh, h0, c0, y, reserve and writes dgates, dh0, dc0.
struct Recurrence {
  LayerArgs layer;  // x, dx, w_ih, dweights, plan, row_bounds, barriers, scratch: not used. sizes is null;
                    // starts is on the device, and null where the input is not packed: step t starts at row t * batch
  Cell cell;
  Dtype dtype;
  bool tf32;
  const void* gates_x[kMaxDirections];  // [N, G*H] W_ih x in torch's gate order, without biases, in `dtype`
  void* dgates[kMaxDirections];         // [N, kGrads*H] columns as in core/cells.h, in `dtype`
  char* workspace;                      // plan.workspace_bytes, 256-byte aligned, all kEmptyByte
};

// A random mask (seqkern/masks.py): to[k] of n elements is `value` where k's bits are below limit, of 2^32, else 0.
struct Random {
  const int64_t* seed;  // on the device
  int64_t stream, limit;
  double value;
  int64_t n;
  void* to;
};

// ---- step.cu: the current device, a stream of it, and a cublasHandle_t bound to that stream

int64_t layer_workspace(const LayerCall&, bool backward);  // bytes
Error layer_forward(const LayerCall&, char* workspace, Stream, void* blas);
Error layer_backward(const LayerCall&, char* workspace, Stream, void* blas);
Error query_device(Device*);
Error fill_mask(Dtype, const Random&, Stream);
Error product(const Gemm&, Stream, void* blas);

// ---- variant.cu

// seqkern::recurrence. In `args` every pointer but sizes and starts is on the device; packed is not used.
struct VariantCall {
  RecurrenceArgs args;
  Dtype dtype;  // float64 or float32
  bool tf32, packed;
  int64_t sums_size;
  void* sums;  // backward: [B, D, S], zeros, where the gradients of the parameters besides w_hh are added
};
int64_t variant_workspace(const VariantCall&, bool backward);  // bytes
Error variant_pass(const VariantCall&, bool backward, char* workspace, Stream, void* blas);

// ---- scan.cu

int64_t scan_workspace(const ScanArgs&, Dtype, int sms);  // bytes
// Forward, or, where a.dp is not null, backward with dh0 [B, H]. cell: as in core/scan_cells.h's operators.
Error scan(const ScanArgs& a, void* dh0, int cell, Dtype, int sms, char* workspace, Stream);

// ---- grid.cu

// Whether every CTA of the plan is resident at once on the current device: asks the occupancy of the kernel that
// grid_forward (grid_backward) would launch.
bool grid_fits(Cell, Dtype, const Plan&, bool backward, bool options);
Error grid_forward(const Recurrence&, const Plan&, Stream);
Error grid_backward(const Recurrence&, const Plan&, Stream);

}}  // namespace seqkern::cuda
