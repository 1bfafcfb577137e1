// What the forward and backward passes of the `grid` engine share: a CTA's place in the plan, and the product of the
// weights that it keeps on chip with rows that all CTAs of its tile wrote one step before.
//
// The exchange. Rows lie in the workspace twice: a step reads one copy and writes the other. A CTA publishes its
// columns of a pass with one flag: its threads store, the block meets, one thread stores the flag with release. A warp
// polls the flags of those CTAs alone whose columns it multiplies, a lane each, with acquire; what follows reads
// through L2 (ld.cg), never a stale line of L1. Two copies are enough: who overwrites the copy of step i - 1 in step i
// has seen all flags of step i - 1, and each of them was set after its CTA's last read of that copy. Flags count up
// from the zeros that are written on the stream before the launch, so that a replayed CUDA graph begins afresh. A CTA
// waits for others of its tile only, and all CTAs of a launch are resident (checked before it): no deadlock.
//
// Fragments. The order of K within a product is free as long as both operands agree. Lane (group, quarter) takes bytes
// [16 quarter, +16) of each chunk of a row: the b registers of two mma steps in one 16-byte load straight from L2, in
// whole 32-byte sectors, with no staging in shared memory; the same bytes of two rows of the weights are the a
// registers. It is the same for 16-bit elements (m16n8k16) and TF32 (m16n8k8). Weights beyond the registers lie in
// shared memory as each lane's own 16-byte pieces: a warp reads 512 contiguous bytes, and no thread reads what another
// wrote.
#pragma once
#include <string.h>

#include "launch.h"
#include "math.cuh"
#include "planner.h"
#include "simt.cuh"

// A kernel of one block per SM: up to 255 registers a thread of 256. __grid_constant__: parameters stay where they are.
#ifdef __CUDACC__
#define SK_GRID_KERNEL __global__ void __launch_bounds__(kThreads, 1)
#define SK_PARAMETER const __grid_constant__
#else
#define SK_GRID_KERNEL void
#define SK_PARAMETER const
#endif

namespace seqkern { namespace cuda {

struct GridArgs {
  Recurrence r;
  int first_direction, tiles, batch_tile, ctas;  // as in Plan
};

namespace {

struct alignas(16) Piece {
  uint32_t v[4];
};
struct alignas(8) Pair {
  float x, y;
};

template <class S> constexpr int kPieceSize = 16 / int(sizeof(S));  // elements
template <class S> constexpr int kChunkSize = kChunkBytes / int(sizeof(S));

template <class To, class From> SK_DEVICE To reinterpret(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// What is exchanged and multiplied: the dtype itself; float32 as TF32, rounded once by who writes.
template <class S> struct Operand {
  static SK_DEVICE S of(float x) { return from_float<S>(x); }
  static SK_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_m16n8k16<S>(d, a, b); }
};
template <> struct Operand<float> {
  static SK_DEVICE float of(float x) { return reinterpret<float>(to_tf32(x)); }
  static SK_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k8_tf32(d, a, b);
  }
};

template <class S> SK_DEVICE float load(const S* p) { return to_float(*p); }
// What is loaded before a wait stays as it is until after it: to convert it would be to wait for it first.
template <class S> SK_DEVICE S raw_or_zero(const void* p, int64_t i) { return p ? ((const S*)p)[i] : S{}; }
template <class S> SK_DEVICE float load_or_zero(const void* p, int64_t i) { return to_float(raw_or_zero<S>(p, i)); }
template <class S> SK_DEVICE void store(float x, void* p, int64_t i) {
  // By the member: a call's result stored whole is a store that host execution does not see.
  if constexpr (sizeof(S) == 2) ((S*)p)[i].bits = from_float<S>(x).bits;
  else ((S*)p)[i] = x;
}

// One of two directions' values: a kernel's parameters are not indexed at run time, which would copy them to the stack.
template <class T> SK_DEVICE T of(const T (&x)[kMaxDirections], int d) { return d ? x[1] : x[0]; }

SK_DEVICE const void* w_hh_of(const LayerArgs& l, int d) { return d ? l.weights[1].w_hh : l.weights[0].w_hh; }

SK_DEVICE int clip(int x, int most) { return x < 0 ? 0 : x < most ? x : most; }

// The thread's number, as the compiler cannot know it: what derives from it, addresses above all, is computed anew in
// each place and takes no registers between them. The product has none to spare.
SK_DEVICE int fresh_thread() {
  int thread = int(threadIdx.x);
#ifdef __CUDACC__
  asm volatile("" : "+r"(thread));
#endif
  return thread;
}

// The (unit, row) pair of a thread.
template <int kUnits> struct Own {
  int unit, row, j;  // j: the unit within the layer
  SK_DEVICE explicit Own(int cta) {
    const int thread = fresh_thread();
    unit = thread % kUnits;
    row = thread / kUnits;
    j = cta * kUnits + unit;
  }
};

// The rows of a step: [start, end) of all; row b of the batch is start + b. What was loaded is not looked at before it
// is asked for, a step later.
struct StepRows {
  int64_t start, end;
  SK_DEVICE int rows() const { return int(end - start); }
};
SK_DEVICE StepRows step_at(const LayerArgs& l, int t) {
  if (t < 0 || t >= l.steps) return {0, 0};
  if (!l.starts) return {t * l.batch, (t + 1) * l.batch};
  return {l.starts[t], l.starts[t + 1]};
}

// This CTA's rows, and the memory of its tile.
struct Place {
  int ctas, cta, direction, row0, rows, passes, row_bytes;
  char* exchange;  // [2][passes * kPassRows][row_bytes]
  int* flags;      // [passes][ctas]

  SK_DEVICE Place(const GridArgs& a, const Product& p) : ctas(a.ctas), row_bytes(p.row_bytes) {
    const int group = int(blockIdx.x) / a.ctas, tile = group % a.tiles;
    cta = int(blockIdx.x) % a.ctas;
    direction = a.first_direction + group / a.tiles;
    row0 = tile * a.batch_tile;
    rows = clip(int(a.r.layer.batch) - row0, a.batch_tile);
    passes = int(ceil_div(rows, kPassRows));
    const int64_t planned = ceil_div(a.batch_tile, kPassRows);
    exchange = a.r.workspace + (int64_t(direction) * a.tiles + tile) * tile_bytes(p, planned, ctas);
    flags = (int*)(exchange + exchange_bytes(p, planned));
  }
  SK_DEVICE int pass_rows(int pass) const { return clip(rows - pass * kPassRows, kPassRows); }
  // The copy that step i reads; step i + 1 is given for what step i writes.
  SK_DEVICE char* operands(int i, int pass) const {
    return exchange + ((i & 1) * passes + pass) * kPassRows * int64_t(row_bytes);
  }
  SK_DEVICE const int* flags_of(int pass) const { return flags + int64_t(pass) * ctas; }
  SK_DEVICE void publish(int pass, int value) const {
    block_sync();
    if (threadIdx.x == 0) signal_release(flags + int64_t(pass) * ctas + cta, value);
  }
  // For a warp: until the CTAs [begin, end) have published `value`.
  SK_DEVICE void wait(int pass, int begin, int end, int value) const {
    if (value == 0) return;
    for (int c = begin + int(threadIdx.x) % 32; c < end; c += 32) wait_acquire(flags_of(pass) + c, value);
    warp_sync();
  }
};

// Where in a row of 8 floats of the partial sums the column n lies: lanes that write (8 rows, 4 pairs) and lanes that
// read (16 rows, 2 columns; 8 rows, 4 columns) then each meet 32 banks.
SK_DEVICE int swizzle(int row, int n) { return n ^ (((row >> 2 & 1) << 2) | ((row >> 3 & 1) << 1)); }

// Sum over the warps' parts, in their order, of row `m` of the product and row `n` of the pass.
template <int kMTiles> SK_DEVICE float total(const float* sums, int warps, int m, int n) {
  const float* s =
      sums + ((n / 8) * kMTiles + m / kTileRows) * 128 + (m % kTileRows) * 8 + swizzle(m % kTileRows, n % 8);
  float sum = 0;
  for (int w = 0; w < warps; ++w) sum += s[w * (2 * kMTiles * 128)];
  return sum;
}

// One warp's part of the product: kMTiles tiles of weights by its slice of K.
template <class S, int kMTiles> struct Multiplier {
  static constexpr int kHeld = held_chunks(kMTiles);  // chunks whose weights lie in registers
  // Chunks of the operand loaded at once, beside weights in registers and in shared memory: as many as do not spill.
  static constexpr int kAhead = kMTiles == 3 ? 3 : 4, kAheadSpilled = kMTiles == 3 ? 1 : 2;
  uint32_t held[kHeld][kMTiles][2][4];
  Piece* spilled;  // [chunks - kHeld][kMTiles][2][32]
  int first, chunks;

  // weights(row, k) is the piece of row `row` of the CTA's weights at elements [k, k + kPieceSize).
  template <class W> SK_DEVICE Multiplier(const Product& p, char* shared, const W& weights) {
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    first = warp * p.warp_chunks;
    chunks = clip(p.row_bytes / kChunkBytes - first, p.warp_chunks);
    spilled = (Piece*)(shared + int64_t(warp) * p.spilled * kMTiles * kFragmentBytes) + lane;
#pragma unroll
    for (int c = 0; c < kHeld; ++c)
#pragma unroll
      for (int m = 0; m < kMTiles; ++m)
        if (c < chunks) fragment(weights, m, c, held[c][m]);
#pragma unroll 1
    for (int c = kHeld; c < chunks; ++c)
#pragma unroll 1
      for (int m = 0; m < kMTiles; ++m) {
        uint32_t a[2][4];
        fragment(weights, m, c, a);
#pragma unroll
        for (int s = 0; s < 2; ++s) *spilled_at(c, m, s) = {{a[s][0], a[s][1], a[s][2], a[s][3]}};
      }
  }
  template <class W> SK_DEVICE void fragment(const W& weights, int m, int c, uint32_t (&a)[2][4]) const {
    const int thread = fresh_thread(), group = thread % 32 / 4, quarter = thread % 4;
    const int64_t k = int64_t(first + c) * kChunkSize<S> + quarter * kPieceSize<S>;
    const Piece low = weights(m * kTileRows + group, k), high = weights(m * kTileRows + group + 8, k);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      a[s][0] = low.v[2 * s];
      a[s][1] = high.v[2 * s];
      a[s][2] = low.v[2 * s + 1];
      a[s][3] = high.v[2 * s + 1];
    }
  }
  SK_DEVICE Piece* spilled_at(int c, int m, int s) const {
    return spilled + (((c - kHeld) * kMTiles + m) * 2 + s) * 32;
  }

  // CTAs that publish the elements of this warp's slice, `each` elements a CTA.
  SK_DEVICE void wait(const Place& at, int pass, int each, int value) const {
    const int end = int(ceil_div(int64_t(first + chunks) * kChunkSize<S>, each));
    if (chunks) at.wait(pass, first * kChunkSize<S> / each, end < at.ctas ? end : at.ctas, value);
  }

  // The first `rows` rows of `operands` times the weights, to this warp's part of `sums`.
  SK_DEVICE void multiply(int rows, const char* operands, int row_bytes, float* sums) const {
    if (rows > 8) columns<2>(operands, row_bytes, sums);
    else columns<1>(operands, row_bytes, sums);
  }

 private:
  template <int kColumns> SK_DEVICE void columns(const char* operands, int row_bytes, float* sums) const {
    if (chunks == 0) return;
    const int thread = fresh_thread(), warp = thread / 32, group = thread % 32 / 4, quarter = thread % 4;
    const char* b = operands + int64_t(group) * row_bytes + first * kChunkBytes + quarter * 16;
    float d[kMTiles][kColumns][4] = {};
#pragma unroll
    for (int c = 0; c < kHeld; c += kAhead)
      if (c < chunks) part<kColumns, true>(b, row_bytes, c, d);
#pragma unroll 1
    for (int c = kHeld; c < chunks; c += kAheadSpilled) part<kColumns, false>(b, row_bytes, c, d);
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = group + 8 * h;
          float* to = sums + ((warp * 2 + n) * kMTiles + m) * 128 + row * 8 + swizzle(row, 2 * quarter);
          *(Pair*)to = {d[m][n][2 * h], d[m][n][2 * h + 1]};
        }
  }
  template <int kColumns, bool kInRegisters>
  SK_DEVICE void part(const char* b, int row_bytes, int c0, float (&d)[kMTiles][kColumns][4]) const {
    constexpr int kAtOnce = kInRegisters ? kAhead : kAheadSpilled;
    Piece x[kAtOnce][kColumns];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
        if (in_part<kInRegisters>(c0 + i))
          x[i][n] = ld_cg((const Piece*)(b + int64_t(n) * 8 * row_bytes + (c0 + i) * kChunkBytes));
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (in_part<kInRegisters>(c0 + i))
#pragma unroll
        for (int s = 0; s < 2; ++s)
#pragma unroll
          for (int m = 0; m < kMTiles; ++m) {
            uint32_t a[4];
            weights_of<kInRegisters>(c0 + i, m, s, a);
#pragma unroll
            for (int n = 0; n < kColumns; ++n) {
              const uint32_t pair[2] = {x[i][n].v[2 * s], x[i][n].v[2 * s + 1]};
              Operand<S>::mma(d[m][n], a, pair);
            }
          }
  }
  template <bool kInRegisters> SK_DEVICE bool in_part(int c) const {
    return (!kInRegisters || c < kHeld) && c < chunks;
  }
  template <bool kInRegisters> SK_DEVICE void weights_of(int c, int m, int s, uint32_t (&a)[4]) const {
    if (kInRegisters) {
#pragma unroll
      for (int q = 0; q < 4; ++q) a[q] = held[kInRegisters ? c : 0][m][s][q];
    } else {
      const Piece p = *spilled_at(c, m, s);
#pragma unroll
      for (int q = 0; q < 4; ++q) a[q] = p.v[q];
    }
  }
};

// Elements get(0) to get(kPieceSize - 1) as operands.
template <class S, class Get> SK_DEVICE Piece piece_of(const Get& get) {
  Piece p;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    if constexpr (sizeof(S) == 4) p.v[q] = to_tf32(get(q));
    else p.v[q] = Operand<S>::of(get(2 * q)).bits | uint32_t(Operand<S>::of(get(2 * q + 1)).bits) << 16;
  }
  return p;
}

}  // namespace
}}  // namespace seqkern::cuda
