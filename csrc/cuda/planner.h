// Problem and device -> which engine runs, on which tiles. Pure arithmetic: no torch, no CUDA, no library. The only
// place that knows limits of architectures, and the only place where tile sizes stand.
//
// The grid engine's work split. The hidden units of a direction are cut over CTAs: each keeps the weights of its own
// units on chip for the whole call. The batch is cut into tiles; each tile has CTAs of its own, which meet nobody else.
// A CTA goes through its tile in passes of kPassRows rows, or of twice that, two rows a thread: mma products of
// M x N x K, one for each kPassRows rows, with
//
//            forward                          backward
//   M        its units, a tile for each gate  its units, one tile
//   N        rows of the pass                 rows of the pass
//   K        H (the state)                    G*H (gradients of the gates)
//
// K is counted in chunks of kChunkBytes of a row and shared out to the warps; the warps' partial sums meet in shared
// memory. Of a warp's weights, the first chunks lie in registers, the others in shared memory.
#pragma once
#include <stdint.h>

#include "../core/args.h"

#ifdef __CUDACC__
#define SK_PLAN __host__ __device__
#else
#define SK_PLAN
#endif

namespace seqkern { namespace cuda {

constexpr int kWarps = 8, kThreads = kWarps * 32;
constexpr int kProductWarps = kWarps;  // that K is shared out to
constexpr int kTileRows = 16;          // M of an mma
constexpr int kPassRows = 16;          // N of a pass: two mma columns of 8; the second is left out where 8 rows are all
// Beyond either, what a block exchanges in a step takes longer than one product of all rows: measured on an H200, where
// an LSTM at B = 128, H = 1024 (512 KiB backward) is as fast both ways, and one at B = 64, H = 2048 (1 MiB) is not.
constexpr int kMaxTileRows = 64;
constexpr int64_t kMaxTileBytes = 768 << 10;
// Copies of the exchanged rows: those of kCopies states after one another. See grid_product.cuh.
constexpr int kCopies = 32, kEmptyAhead = 16, kFenceSteps = 8;
constexpr int kEmptyByte = 0xff;  // the workspace begins as these
constexpr int kChunkBytes = 64;        // two mma steps along K: 32 elements of 16 bits, 16 of 32
// Fragments of weights in registers, 8 each, of the 255 that a thread of 256 may have. With a single M tile half as
// many: K is long then, and more of the operand is under way at a time. Options take registers of their own.
constexpr int kHeldTiles = 16, kHeldTilesWithOptions = 15;
constexpr int kFragmentBytes = 1024;            // an M tile and a chunk, a warp: 32 bytes a lane
constexpr int kUnits = kTileRows;               // hidden units of a CTA
constexpr int kMinSteps = 2;  // below, loading the weights on chip does not pay: one step reads them once anyway
constexpr int kMinCc = 80;    // mma of bf16 and tf32
constexpr int64_t kMaxSteps = (int64_t(1) << 31) - 64;  // steps are counted in ints
constexpr int kReservedShared = 1024;                   // of a block's shared memory, by the system

enum class Engine : int { kStep = 0, kGrid, kCluster };  // kCluster: not offered yet
constexpr const char* engine_name(Engine e) {
  return e == Engine::kStep ? "step" : e == Engine::kGrid ? "grid" : "cluster";
}

struct Device {
  int sms;
  int cc;                // 10 * major + minor
  int shared_per_block;  // bytes, opt-in
  int shared_per_sm;     // bytes
  int registers_per_sm;  // 32-bit
  int threads_per_sm;
};

struct Shape {
  Cell cell;
  Dtype dtype;
  bool tf32;                                         // kF32 only: products may round their operands to TF32
  int64_t steps, batch, hidden, output, directions;  // output: P, or H without a projection
  bool packed;
  bool options = false;    // any of LayerOptions
  bool norms = false;    // clip_norm, which needs all units of a row at once
};

struct Plan {
  Engine engine;
  const char* why;  // a reason for the engine, to be shown to the user
  int directions;   // that run in one launch; fewer than the layer's: launches one after the other
  int tiles;        // of the batch, a direction
  int batch_tile;   // rows of a tile, the last may have fewer
  int ctas;         // of a tile
  int units_per_cta;
  int rows_per_thread;  // 1 or 2
  int threads;
  int64_t shared_bytes;     // a CTA, dynamic
  int64_t workspace_bytes;  // device memory, of all directions; kEmptyByte when the first launch begins
  int grid() const { return directions * tiles * ctas; }
};

constexpr int gates_of(Cell cell) { return cell == Cell::kLstm ? 4 : cell == Cell::kGru ? 3 : 1; }
SK_PLAN constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

SK_PLAN constexpr int held_chunks(int m_tiles, bool options) {
  return m_tiles == 1 ? kHeldTiles / 2 : (options ? kHeldTilesWithOptions : kHeldTiles) / m_tiles;
}

// How the product is cut, from what is known when compiling (m_tiles) and when running (k_bytes).
struct Product {
  int m_tiles;      // of 16 rows
  int row_bytes;    // of the exchanged operand: K padded to chunks
  int warp_chunks;  // at most, a warp
  int warps;        // that have any
  int spilled;      // chunks of a warp whose weights lie in shared memory
  SK_PLAN constexpr Product(int tiles, int64_t k_bytes, bool options)
      : m_tiles(tiles),
        row_bytes(int(ceil_div(k_bytes, kChunkBytes) * kChunkBytes)),
        warp_chunks(int(ceil_div(row_bytes / kChunkBytes, kProductWarps))),
        warps(int(ceil_div(row_bytes / kChunkBytes, warp_chunks))),
        spilled(warp_chunks > held_chunks(tiles, options) ? warp_chunks - held_chunks(tiles, options) : 0) {}
  // Shared memory, in this order: weights; partial sums, two sets in turn, of as many products as a pass has,
  // [2][products][warps][2][m_tiles][16][8] floats.
  SK_PLAN constexpr int64_t weight_bytes() const { return int64_t(kProductWarps) * spilled * m_tiles * kFragmentBytes; }
  SK_PLAN constexpr int64_t sum_bytes() const { return int64_t(kProductWarps) * m_tiles * kTileRows * kPassRows * 4; }
};

// A tile's workspace: the exchanged rows [kCopies][rows][row_bytes], those of a tile rounded up to whole passes.
SK_PLAN constexpr int64_t tile_bytes(const Product& p, int64_t rows) { return kCopies * rows * p.row_bytes; }

namespace detail {

struct Kind {  // of a pass over the layer
  bool backward;
  int gates, slots;  // slots: 32-bit values kept for each unit and row between steps
  int64_t bytes;     // an element
  bool options;
  Product product(int64_t hidden) const {
    const int64_t published = ceil_div(hidden, kUnits) * kUnits;
    return backward ? Product(1, published * gates * bytes, options) : Product(gates, published * bytes, options);
  }
};

inline Plan step_plan(const char* why) { return {Engine::kStep, why, 0, 0, 0, 0, 0, 0, 0, 0, 0}; }

// `rows` are whole passes.
inline int64_t shared_bytes(const Kind& kind, const Product& p, int64_t rows, int rows_per_thread) {
  const int64_t bias = kind.backward ? 0 : 2 * kind.gates * kUnits * 4;
  return p.weight_bytes() + 2 * rows_per_thread * p.sum_bytes() + rows * kUnits * kind.slots * 4 + bias;
}

inline Plan tiles_for(const Shape& s, const Device& d, const Kind& kind) {
  const int64_t ctas = ceil_div(s.hidden, kUnits);
  if (ctas > d.sms) return step_plan("step: the hidden units, 16 to a block, need more SMs than the GPU has");
  const int64_t directions = ctas * s.directions <= d.sms ? s.directions : 1;
  const int64_t most = d.sms / (ctas * directions);
  for (int64_t rows = 8; rows <= kMaxTileRows; rows += rows < kPassRows ? 8 : kPassRows) {
    const int64_t tiles = ceil_div(s.batch, rows);
    if (tiles > most) continue;
    const Product p = kind.product(s.hidden);
    if (rows * p.row_bytes > kMaxTileBytes) break;
    // Two rows a thread where a tile has them: one waits for the other's arithmetic, and half the barriers are left.
    for (int of_thread = rows > kPassRows ? 2 : 1; of_thread > 0; --of_thread) {
      const int64_t pass = of_thread * kPassRows, padded = ceil_div(rows, pass) * pass;
      const int64_t shared = shared_bytes(kind, p, padded, of_thread);
      if (shared > d.shared_per_block || shared + kReservedShared > d.shared_per_sm) continue;
      return {Engine::kGrid,   "grid: recurrent weights stay on chip",
              int(directions), int(tiles),
              int(rows),       int(ctas),
              kUnits,          of_thread,
              kThreads,        shared,
              s.directions * tiles * tile_bytes(p, padded)};
    }
    return step_plan("step: the recurrent weights do not fit in registers and shared memory of the GPU");
  }
  return step_plan("step: the batch is large enough for one product per step");
}

inline Plan plan(const Shape& s, const Device& d, bool backward) {
  if (s.dtype == Dtype::kF64) return step_plan("step: float64 has no tensor-core path");
  if (s.dtype == Dtype::kF32 && !s.tf32) return step_plan("step: float32 without TF32");
  if (s.output != s.hidden) return step_plan("step: a projection is set");
  if (s.norms) return step_plan("step: gradients are clipped by norm");
  if (d.cc < kMinCc) return step_plan("step: the GPU is older than sm_80");
  if (d.registers_per_sm < 256 * kThreads || d.threads_per_sm < kThreads)
    return step_plan("step: the GPU's SMs are smaller than a block of the grid engine");
  if (s.steps < kMinSteps) return step_plan("step: a single time step");
  if (s.steps > kMaxSteps) return step_plan("step: more time steps than are counted");
  if (s.batch < 1) return step_plan("step: the batch is empty");
  const int gates = gates_of(s.cell), bytes = s.dtype == Dtype::kF32 ? 4 : 2;
  const bool lstm = s.cell == Cell::kLstm, gru = s.cell == Cell::kGru;
  // Forward carries the LSTM's c and the GRU's h, backward d(loss)/dc and the part of d(loss)/dh past the gates; with
  // options every cell carries h and that part.
  const detail::Kind kind{backward, gates, int(lstm || gru) + int(s.options && !gru), bytes, s.options};
  return tiles_for(s, d, kind);
}

}  // namespace detail

inline Plan plan_forward(const Shape& s, const Device& d) { return detail::plan(s, d, false); }
inline Plan plan_backward(const Shape& s, const Device& d) { return detail::plan(s, d, true); }

}}  // namespace seqkern::cuda
