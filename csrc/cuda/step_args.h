// What the kernels of the `step` engine are given: plain pointers, on the device.
//
// T steps, B batch, N rows of all steps together, H hidden, P output (the projection's size where there is one, else
// H), G gates, K gradients kept for each unit (kGrads), D directions, S the storage type, W the type of sums (double
// for double, else float).
//
// A kernel with options takes a struct that adds to the plain one, and is an instantiation of its own: a plain call
// pays nothing for them.
#pragma once
#include "../core/args.h"

namespace seqkern { namespace cuda {

// One time step, each direction's own: its rows b in [0, rows) are the layer's rows first + b.
struct Step {
  int64_t first[kMaxDirections], rows[kMaxDirections];
};

// Where the steps before and after a step lie. Before and after are those of the forward pass in this direction.
struct Neighbours {
  int64_t time[kMaxDirections], time_before[kMaxDirections], time_after[kMaxDirections];
  int64_t after[kMaxDirections];  // first row of the step after
  int64_t both[kMaxDirections];   // rows of this step that it has too; 0 where there is none
};

struct ForwardStep {
  static constexpr bool kOptions = false;
  Step step;
  int64_t batch, all_rows, hidden, output, directions;
  const void* gates_x;               // [D, N, G*H] S: W_ih x
  const void* gates_h;               // [D, B, G*H] W: W_hh h; null: zeros
  const void* b_ih[kMaxDirections];  // [G*H] S or null
  const void* b_hh[kMaxDirections];
  void* carry;    // [D, B, H] W: the LSTM's c, the GRU's h, as they were before this step and then after it
  void* h;        // [D, B, H] S: the cell's output
  void* y;        // [N, D*P] S; null where there is a projection
  void* reserve;  // [D, N, kSaved, H] S or null
};
struct OptionForwardStep : ForwardStep {
  static constexpr bool kOptions = true;
  LayerOptions o;
  Neighbours near;
  void* entering;  // [D, B, P] S: h as the next step's product reads it; null: as it is
};

struct BackwardStep {
  static constexpr bool kOptions = false;
  Step step;
  int64_t batch, all_rows, hidden, output, directions;
  int64_t known[kMaxDirections];   // rows below were in the step before, in this pass's order: dh holds theirs
  int64_t before[kMaxDirections];  // first row of the step whose state this one read
  int64_t fed[kMaxDirections];     // how many rows it has; the others read the initial state
  const void* dh;                  // [D, B, H] W, d(loss)/d(cell's output) through the steps after
  const void* dh_n;                // [D, B, H] S or null: the same for rows from `known` on
  Sequence dy;                     // added to either; data null: nothing
  const void* h0;                  // [D, B, H] S or null
  const void* c0;                  // [D, B, H] S or null
  const void* y;                   // [N, D*P] S
  const void* reserve;
  void* carry;   // [D, B, H] W
  void* dgates;  // [D, N, K*H] S
  void* now;     // [D, B, K*H] S: each row's latest, for the next product
};
// What reaches the state that a step left is clipped, and multiplied by keep, when this step reads it: dh, past and
// carry hold it as the step after wrote it.
struct OptionBackwardStep : BackwardStep {
  static constexpr bool kOptions = true;
  LayerOptions o;
  Neighbours near;
  void* past;  // [D, B, P] W: d(loss)/d(h) past the cell, by zoneout or, in a cell that carries h, its gate; or null
  const void* scale;  // [2, D, B] W: factors for the gradients of h and c, where they are clipped by norm; or null
  bool of_h;          // dh is h's; else the projection's backward brought it, and has heeded the options on h
};

// Rows of a state from the layer's output: a projection's result, or its gradient.
struct OutputStep {
  static constexpr bool kOptions = false;
  Step step;
  int64_t batch, all_rows, output, directions;
  const void* from;  // forward: [D, B, P] S
  void* h;           // forward: [D, B, P] S
  void* y;           // forward: [N, D*P] S
  int64_t known[kMaxDirections];
  const void* dh;  // backward: [D, B, P] W, and as in BackwardStep
  const void* dh_n;
  Sequence dy;
  void* dp;   // backward: [D, N, P] S
  void* now;  // backward: [D, B, P] S
};
struct OptionOutputStep : OutputStep {
  static constexpr bool kOptions = true;
  LayerOptions o;
  Neighbours near;
  void* entering;  // forward, as above; the others backward
  void* past;
  const void* scale;
  bool of_h;
};

struct Gather {
  static constexpr bool kOptions = false;
  int64_t steps, batch, all_rows, hidden, output, directions;
  const int64_t* starts;  // on the device, [T+1]; null: step t starts at t * batch
  const void* y;          // [N, D*P] S
  const void* h0;         // [D, B, P] S or null
  const void* reserve;    // [D, N, 5, H] S
  void* to;
};
struct OptionGather : Gather {
  static constexpr bool kOptions = true;
  LayerOptions o;
};

// The state at a layer's ends, of all rows: h0 on its way into the first product, or, back, the gradient of h0 or c0.
struct Ends {
  int64_t steps, batch, width, directions;
  const int64_t* starts;  // as in Gather
  LayerOptions o;         // h_mask null for c
  const void* from;       // [D, B, width]: S forward, W back
  const void* past;       // [D, B, width] W: added; or null
  const void* scale;      // [D, B] W or null
  const void* last;       // [D, B, width] S or null: the gradient of the last state, for rows without a step
  void* to;               // [D, B, width] S
};

// Factors that scale rows of d(loss)/dh = h_mask dh + past, and of d(loss)/dc = carry, down to the norm clip_norm.
struct RowNorms {
  int64_t rows, batch, hidden, output, directions;
  LayerOptions o;
  const void *dh, *past, *carry;  // [D, B, P], [D, B, P] and [D, B, H] W; past may be null
  void* scale;                    // [2, D, B] W
};

struct BiasSums {
  int64_t rows, hidden, columns;  // columns: K*H
  int64_t chunk;                  // rows that a block sums
  const void* dgates;             // [N, K*H] S
  void* partial;                  // [chunks, K*H] W
  int64_t chunks;
  void *b_ih, *b_hh;  // [G*H] S
};

constexpr int kUploaded = 448;
struct Table {
  int64_t values[kUploaded];
  int count;
  int64_t* to;
};

}}  // namespace seqkern::cuda
