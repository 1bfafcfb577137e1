// What a layer's kernels are given: plain pointers, sizes and strides. No torch, no C++ standard library.
//
// T steps, B batch, N rows of all steps together, I input, H hidden, P output (the projection's size where there is
// one, else H), G gates, D directions. Strides count elements.
#pragma once
#include <stdint.h>

namespace seqkern {

enum class Cell : int { kRnnTanh = 0, kRnnRelu, kLstm, kGru };
enum class Dtype : int { kF64 = 0, kF32, kBf16, kF16 };
constexpr int kCells = 4, kDtypes = 4, kMaxDirections = 2;

// A [T, B, *] tensor, or the rows of a packed one; the last dimension is dense.
struct Sequence {
  void* data;
  int64_t step;  // between steps of a tensor that is not packed
  int64_t row;   // between rows of a step
  bool packed;   // step t starts at row starts[t]
};

struct Weights {
  void* w_ih;  // [G*H, I]
  void* w_hh;  // [G*H, P]
  void* b_ih;  // [G*H] or null
  void* b_hh;  // [G*H] or null
  void* w_hr;  // [P, H] or null
};

// How a call is shared out. Threads are numbered (direction, row part, unit part), unit part fastest.
struct Plan {
  int directions;  // 2: the directions run at the same time
  int rows;        // parts of the batch; they meet only where weight gradients are summed
  int units;       // parts of the hidden units; they meet after every step
  int threads() const { return directions * rows * units; }
};

struct Barrier {
  alignas(64) int arrived;
  alignas(64) int phase;
  int sleepers;
};

// What a layer does beyond torch.nn's (seqkern/reference.py, Options); null or 0 where it does not.
struct LayerOptions {
  bool any;            // of the ones below
  const void* keep;    // [N] in the type that sums are in; multiplies the state that a step reads
  const void* h_mask;  // [D, B, P] multiplies h on its way into the product
  const void* zone_h;  // [N, D*P], share of the old h in the new; rows zone_h_row apart, 0 for the same at every step
  const void* zone_c;  // [N, D*H]
  int64_t zone_h_row, zone_c_row;
  double clip_value;   // bound on d(loss)/d(state) on its way to the step before
  void* c_all;         // [N, D*H] c of every step: an output of forward, an input of backward
  const void* dc_all;  // [N, D*H] its gradient
  void* flow;          // [2, D, N, flow_panels] squares of d(loss)/dh and d(loss)/dc, summed over the units of a panel
  int64_t flow_panels;
  // CUDA's alone:
  const int64_t* lengths;  // [B] on the device, not with packed input: steps that each row takes part in
  double clip_norm;        // bound on the norm of a row of what clip_value bounds
};

struct LayerArgs {
  int64_t steps, batch, rows, input, hidden, output, directions;
  const int64_t* sizes;   // [T] rows of each step, never growing
  const int64_t* starts;  // [T+1] first row of each step
  Sequence x;             // [T, B, I]
  const void* h0;         // [D, B, P] or null
  const void* c0;         // [D, B, H] or null
  Weights weights[kMaxDirections];
  void* y;        // [N, D*P], dense; an output of forward, an input of backward
  void* reserve;  // [D, N, kSaved, H], dense, likewise; null in inference
  // forward
  void* h_n;  // [D, B, P]
  void* c_n;  // [D, B, H] (LSTM) or null
  // backward
  Sequence dy;       // [T, B, D*P]; data null: zeros
  const void* dh_n;  // [D, B, P] or null
  const void* dc_n;  // [D, B, H] or null
  void* dx;          // [N, I], dense, or null where it is not wanted
  void* dh0;         // [D, B, P]
  void* dc0;         // [D, B, H] (LSTM) or null
  Weights dweights[kMaxDirections];  // all null where they are not wanted
  LayerOptions options;
  // execution
  Plan plan;
  const int64_t* row_bounds;  // [plan.rows + 1]: row part r has rows row_bounds[r] to row_bounds[r+1]
  Barrier* barriers;          // [1 + kMaxDirections * (1 + plan.rows)]: all; a direction; its row parts
  char* scratch;              // as many bytes as scratch() asked for, 64-byte aligned
  bool keep;        // pack weights in the form in which they are kept from call to call
  char* kept;       // where they are, or null: there was no room
  uint64_t* marks;  // of the weights that those were packed from
};

// What a forward call packs of its weights: bytes, panels, and everything else on which their form depends.
struct Packing { int64_t bytes, marks, form; };

// One cell in one dtype: how many bytes of scratch a call needs, and the work of thread `tid` of plan.threads().
struct Kernel {
  int64_t (*scratch)(const LayerArgs&);
  void (*run)(const LayerArgs&, int tid);
  Packing (*packing)(const LayerArgs&);  // of a call with `keep`; null for backward
};

// Cells that are linear in their state (scan_cells.h).
constexpr int kScanCells = 4;
struct ScanArgs {
  int64_t steps, batch, hidden;
  const void* p;     // [T, B, G*H], dense as all of these
  const void* h0;    // [B, H] or null
  const void* keep;  // [T, B] in the type that sums are in, or null
  void* h;           // [T, B, H]; an output of forward, an input of backward
  const void* dh;    // [T, B, H]
  void* dp;          // [T, B, G*H]
};
// A piece of time, [begin, end), for some of the vectors of units that the batch's rows are made of.
struct ScanPart {
  int64_t begin, end, first, last;
  void* state;   // [last - first][width], in and out
  void* factor;  // likewise: what the piece multiplies a state by
  bool summary;  // only state and factor are wanted
};
struct ScanKernel {
  void (*forward)(const ScanArgs&, const ScanPart&);
  void (*backward)(const ScanArgs&, const ScanPart&);
};

// A layer's recurrence alone, from the projected inputs, with cells beyond torch.nn's. Everything is in the type that
// sums are in, dense. S: the parameters below besides w_hh, in their order, those that are there.
struct Variant {
  bool coupled, hard, reset_before, normal, peephole;
  // A row of the reserve: what the cell saves, then the normalised product and the factor that made it so. In whole
  // lines: a store across two of them takes twice as long.
  constexpr int64_t saved(Cell cell) const { return cell == Cell::kLstm ? 6 : cell == Cell::kGru ? 4 : 1; }
  constexpr int64_t row(Cell cell, int64_t gates, int64_t hidden) const {
    constexpr int64_t kLine = 16;
    return saved(cell) * hidden + (normal ? (gates * hidden + kLine) / kLine * kLine : 0);
  }
};
struct RecurrenceArgs {
  int64_t steps, batch, rows, hidden, gates, directions;
  const int64_t* sizes;   // [T], and starts [T+1], as in LayerArgs
  const int64_t* starts;
  Cell cell;
  Variant variant;
  const void* gx;      // [N, D, G*H], biases added but the GRU's b_hn with the reset gate behind the product
  const void* h0;      // [D, B, H] or null
  const void* c0;      // likewise
  const void* w_hh;    // [D, G*H, H]
  const void* bias_n;  // [D, H] b_hn where it is not in gx, or null
  const void* peephole;  // [D, 3*H] for i, f, o; [D, 2*H] for i, o where the gates are coupled
  const void* gain_h;  // [D, G*H] of the normalised product; null without layer normalisation
  const void* gain_c;  // [D, H] of the LSTM's normalised c', and its bias
  const void* bias_c;
  LayerOptions options;  // but flow
  double clip_norm;      // bound on the norm of a row of d(loss)/d(state) on its way to the step before
  void* y;        // [N, D, H]
  void* h_n;      // [D, B, H]
  void* c_n;      // likewise (LSTM)
  void* read;     // [D, N, H] h as each step read it; an output of forward, an input of backward, null in inference
  void* reserve;  // [D, N, variant.row()], likewise
  // backward
  const void* dy;    // [N, D, H] or null: zeros
  const void* dh_n;  // [D, B, H] or null
  const void* dc_n;
  void* dgx;  // [N, D, G*H]
  void* dgh;  // [D, N, G*H] the gradient of W_hh h, or null: it is dgx
  void* dh0;  // [D, B, H]
  void* dc0;
  // execution
  char* packed;  // W_hh in panels
};
struct RecurrencePart {  // rows [begin, end) of the batch in one direction
  int64_t direction, begin, end;
  char* scratch;
  void* sums;  // [S] gradients of the parameters besides w_hh
};
struct RecurrenceKernel {
  int64_t (*packed)(const RecurrenceArgs&, bool backward);  // bytes
  int64_t (*panels)(const RecurrenceArgs&, bool backward);  // of all directions
  void (*pack)(const RecurrenceArgs&, bool backward, int64_t first, int64_t last);
  int64_t (*scratch)(const RecurrenceArgs&, bool backward, int64_t rows);  // bytes for a part
  void (*run)(const RecurrenceArgs&, bool backward, const RecurrencePart&);
};
struct RecurrenceKernels {
  RecurrenceKernel f64, f32;
};

struct RandomArgs {
  int64_t seed, stream, limit;  // limit: of 2^32
  double value;
};

struct CpuKernels {
  const char* isa;
  bool tiles;                 // whether products go to a tile unit
  int64_t min_rows[kDtypes];  // of a part of the batch: fewer leave the tiles of the products half empty
  Kernel forward[kCells][kDtypes];
  Kernel backward[kCells][kDtypes];
  // One step in inference, units [first, last) of direction d: single.h.
  void (*single[kCells][kDtypes])(const LayerArgs&, int64_t d, int64_t first, int64_t last);
  void (*math_f32)(const char* name, const float* x, float* y, int64_t n);
  void (*math_f64)(const char* name, const double* x, double* y, int64_t n);
  // Multiply-adds on registers alone, `n` rounds; returns the floating-point operations done. Times the peak.
  int64_t (*burst[kDtypes])(int64_t n);
  void (*bernoulli[kDtypes])(void* to, int64_t begin, int64_t end, const RandomArgs&);
  ScanKernel scan[kScanCells][kDtypes];
  int64_t scan_bytes;  // of a vector
  uint64_t (*mark)(const void* from, int64_t bytes);  // by which changed weights are seen
};

}  // namespace seqkern
