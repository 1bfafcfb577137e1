// What the forward and backward passes of the `grid` engine share: a CTA's place in the plan, and the product of the
// weights that it keeps on chip with rows that all CTAs of its tile wrote one step before.
//
// The exchange. There are no flags: the words of a row say by themselves whether they are there. All of the workspace
// is empty (kEmptyWord) before the launch, by a memset on the stream, so that a replayed CUDA graph begins afresh. A
// thread stores its unit's word; who multiplies it loads it into the registers of the mma, again and again until it is
// not empty. From a store to its use in another SM is one way through L2, with no fence and no second load behind it.
//
// Copy i % kCopies of the rows is for step i to read. Who has its sums of step i knows that every CTA of the tile has
// done step i - 1, hence has read copies i - 1 and older: in step i it empties its own words of the copy of step
// i + 1 + kEmptyAhead, which last held those of step i + 1 + kEmptyAhead - kCopies, for what it will store there
// kEmptyAhead steps later. That others see them empty before that step: every kFenceSteps steps a thread fences, so that
// between emptying a word and the step that polls it (kEmptyAhead + 1 later) there is a fence of its own, then a word
// that it stores and the poller of the copy takes, then a fence of the poller's. A CTA waits for others of its tile
// only, and all CTAs of a launch are resident (checked before it): no deadlock.
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
  SK_DEVICE uint32_t most(uint32_t x) const {
#pragma unroll
    for (int q = 0; q < 4; ++q) x = x > v[q] ? x : v[q];
    return x;
  }
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
SK_DEVICE unsigned fresh_thread() {
  unsigned thread = threadIdx.x;
#ifdef __CUDACC__
  asm volatile("" : "+r"(thread));
#endif
  return thread;
}

// The unit and row of a thread; of several rows a thread, kPassRows apart, the first.
struct Own {
  int unit, row, j;  // j: the unit within the layer
  SK_DEVICE explicit Own(int cta) {
    const unsigned thread = fresh_thread();
    unit = int(thread % kUnits);
    row = int(thread / kUnits);
    j = cta * kUnits + unit;
  }
};

// The rows of a step: [start, end) of all, which are fewer than 2^31 (cuBLAS multiplies them); row b of the batch is
// start + b. What was loaded is not looked at before it is asked for, a step later.
struct StepRows {
  int start, end;
  SK_DEVICE int rows() const { return end - start; }
};
SK_DEVICE StepRows step_at(const LayerArgs& l, int t) {
  if (t < 0 || t >= int(l.steps)) return {0, 0};
  if (!l.starts) return {t * int(l.batch), (t + 1) * int(l.batch)};
  return {int(l.starts[t]), int(l.starts[t + 1])};
}

// This CTA's rows, and the memory of its tile. A pass has kRows * kPassRows rows.
template <int kRows> struct Place {
  static constexpr int kPass = kRows * kPassRows;
  int cta, direction, row0, rows, passes, row_bytes, hidden;
  char* exchange;  // [kCopies][passes * kPass][row_bytes]

  SK_DEVICE Place(const GridArgs& a, const Product& p) : row_bytes(p.row_bytes) {
    const int group = int(blockIdx.x) / a.ctas, tile = group % a.tiles;
    cta = int(blockIdx.x) % a.ctas;
    direction = a.first_direction + group / a.tiles;
    row0 = tile * a.batch_tile;
    rows = clip(int(a.r.layer.batch) - row0, a.batch_tile);
    passes = int(ceil_div(rows, kPass));
    hidden = int(a.r.layer.hidden);
    exchange = a.r.workspace +
               (int64_t(direction) * a.tiles + tile) * tile_bytes(p, ceil_div(a.batch_tile, kPass) * kPass);
  }
  SK_DEVICE int pass_rows(int pass) const { return clip(rows - pass * kPass, kPass); }
  // The copy that step i reads; step i + 1 is given for what step i writes.
  SK_DEVICE char* operands(int i, int pass) const {
    return exchange + (i % kCopies * passes + pass) * kPass * int64_t(row_bytes);
  }
  // Of all N rows, this tile's first in a pass of a step.
  SK_DEVICE int64_t first_row(const StepRows& step, int pass) const { return int64_t(step.start + row0 + pass * kPass); }
  // What a row has beyond the words of its CTAs, to whole chunks: zeros for good.
  SK_DEVICE void fill_padding(int k_bytes) const {
    const int words = (row_bytes - k_bytes) / 4;
    for (int q = int(threadIdx.x); cta == 0 && q < kCopies * passes * kPass * words; q += kThreads)
      st_word((uint32_t*)(exchange + q / words * int64_t(row_bytes) + k_bytes) + q % words, 0);
  }
  SK_DEVICE void fence(int i) const {
    if (i % kFenceSteps == 0) device_fence();
  }
};

// The words of a unit and row in the columns of its CTA, `to` on: element (value, unit) is number value * kUnits + unit.
template <class S, int kCount> struct Words {
  uint32_t* to;
  int unit;
  SK_DEVICE Words(char* row, int u) : to((uint32_t*)row), unit(u) {}
  // All lanes of a warp call it with values x; those for whose row it is `wanted` store them. In 16 bits two units share
  // a word: of two values the lane of the even unit stores the words of the first, its neighbour those of the second.
  SK_DEVICE void store(const float* x, bool wanted) const {
    if constexpr (sizeof(S) == 4) {
#pragma unroll
      for (int v = 0; v < kCount; ++v)
        if (wanted) st_word(to + v * kUnits + unit, full(to_tf32(x[v])));
    } else {
      const bool odd = unit & 1;
#pragma unroll
      for (int v = 0; v < kCount; v += 2) {
        const float first = x[v], second = v + 1 < kCount ? x[v + 1] : 0.f;
        const float other = shfl_xor(odd ? first : second, 1);
        const uint32_t both = pack<S>(odd ? other : first, odd ? second : other);
        if (wanted && v + odd < kCount) st_word(word(v), full(both));
      }
    }
  }
  SK_DEVICE void empty() const {
    if constexpr (sizeof(S) == 4) {
#pragma unroll
      for (int v = 0; v < kCount; ++v) st_word(to + v * kUnits + unit, kEmptyWord);
    } else {
#pragma unroll
      for (int v = 0; v < kCount; v += 2)
        if (v + (unit & 1) < kCount) st_word(word(v), kEmptyWord);
    }
  }

 private:
  SK_DEVICE uint32_t* word(int v) const { return to + ((v + (unit & 1)) * kUnits + unit) / 2; }
};

// Where in a row of 8 floats of the partial sums the column n lies: lanes that write (8 rows, 4 pairs) and lanes that
// read (16 rows, 2 columns; 8 rows, 4 columns) then each meet 32 banks.
SK_DEVICE int swizzle(int row, int n) { return n ^ (((row >> 2 & 1) << 2) | ((row >> 3 & 1) << 1)); }

// Sum over the warps' parts, in pairs, of tile `tile` of the product for this thread's unit and row.
template <int kMTiles> SK_DEVICE float total(const float* set, const Own& m, int tile) {
  const float* s = set + (m.row / 8 * kMTiles + tile) * 128 + m.unit * 8 + swizzle(m.unit, m.row % 8);
  float part[kProductWarps];
#pragma unroll
  for (int w = 0; w < kProductWarps; ++w) part[w] = s[w * (2 * kMTiles * 128)];
#pragma unroll
  for (int half = kProductWarps / 2; half > 0; half /= 2)
#pragma unroll
    for (int w = 0; w < half; ++w) part[w] += part[w + half];
  return part[0];
}
// All sums, for the parts of warps that have no share in K.
SK_DEVICE void clear(float* sums, int count) {
  for (int q = int(threadIdx.x); q < count; q += kThreads) sums[q] = 0;
  block_sync();
}

// One warp's part of the product: kMTiles tiles of weights by its slice of K.
template <class S, int kMTiles, bool kOptions> struct Multiplier {
  static constexpr int kHeld = held_chunks(kMTiles, kOptions);  // chunks whose weights lie in registers
  // Pieces of the operand loaded at once, beside the weights in registers: as many as do not spill.
  static constexpr int kAhead = kMTiles == 1 ? 16 : 8;
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
    const int thread = int(fresh_thread()), group = thread % 32 / 4, quarter = thread % 4;
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

  // The first `rows` rows of `operands`, once they are there, times the weights, to this warp's part of `set`. Does
  // `meanwhile` while they are on the way.
  template <class F>
  SK_DEVICE void multiply(int rows, const char* operands, int row_bytes, float* set, const F& meanwhile) const {
    if (chunks == 0) meanwhile();
    else if (rows > 8) columns<2>(rows, operands, row_bytes, set, meanwhile);
    else columns<1>(rows, operands, row_bytes, set, meanwhile);
  }

 private:
  // Accumulators that take turns, so that an mma need not wait for the one before.
  static constexpr int chains(int columns) { return kMTiles == 1 ? 4 / columns : 1; }
  template <int kColumns> using Sums = float[chains(kColumns)][kMTiles][kColumns][4];

  template <int kColumns, class F>
  SK_DEVICE void columns(int rows, const char* operands, int row_bytes, float* set, const F& meanwhile) const {
    constexpr int kAtOnce = kAhead / kColumns;
    const unsigned thread = fresh_thread(), warp = thread / 32, group = thread % 32 / 4, quarter = thread % 4;
    const char* b[kColumns];  // what is loaded for columns beyond the rows is some row, and not looked at
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const unsigned row = group + 8 * n < unsigned(rows) ? group + 8 * n : unsigned(rows - 1);
      b[n] = operands + (row * unsigned(row_bytes) + unsigned(first) * kChunkBytes + quarter * 16);
    }
    Sums<kColumns> d = {};
    part<kColumns, 0>(b, 0, d, meanwhile);
    constexpr int kSecond = kHeld > kAtOnce ? kAtOnce : 0;  // a second part with weights in registers, if any
    static_assert(kHeld <= kAtOnce + kSecond);
    if (kSecond && kSecond < chunks) part<kColumns, kSecond>(b, kSecond, d, [] {});
#pragma unroll 1
    for (int c = kAtOnce + kSecond; c < chunks; c += kAtOnce) part<kColumns, kHeld>(b, c, d, [] {});
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const unsigned row = group + 8 * h;
          float* to = set + ((warp * 2 + n) * kMTiles + m) * 128 + row * 8 + swizzle(int(row), 2 * int(quarter));
          Pair sum = {0, 0};
#pragma unroll
          for (int chain = 0; chain < chains(kColumns); ++chain) {
            sum.x += d[chain][m][n][2 * h];
            sum.y += d[chain][m][n][2 * h + 1];
          }
          *(Pair*)to = sum;
        }
  }
  // Chunks c0 to c0 + kAhead / kColumns, as far as there are. From kFrom on, which is c0 or else kHeld, it is known when
  // compiling whose weights lie in registers.
  template <int kColumns, int kFrom, class F>
  SK_DEVICE void part(const char* const (&b)[kColumns], int c0, Sums<kColumns>& d, const F& meanwhile) const {
    constexpr int kAtOnce = kAhead / kColumns;
    Piece x[kAtOnce][kColumns] = {};  // left unset where there is no chunk, it would spill for sm_120
    const auto each = [&](auto&& visit) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (c0 + i < chunks) {
#pragma unroll
          for (int n = 0; n < kColumns; ++n) visit(x[i][n], b[n] + (c0 + i) * kChunkBytes);
        }
    };
    each([](Piece& piece, const char* from) { ld_words(piece.v, from); });
    meanwhile();
    for (;;) {
      uint32_t most = 0;  // empty if any word is
      each([&](const Piece& piece, const char*) { most = piece.most(most); });
      if (most != kEmptyWord) break;
      each([](Piece& piece, const char* from) {
        if (piece.most(0) != kEmptyWord) return;
        poll_again(from);
        ld_words(piece.v, from);
      });
    }
    warp_sync();
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (c0 + i < chunks)
#pragma unroll
        for (int s = 0; s < 2; ++s)
#pragma unroll
          for (int m = 0; m < kMTiles; ++m) {
            uint32_t a[4];
            if (kFrom + i < kHeld) {
#pragma unroll
              for (int q = 0; q < 4; ++q) a[q] = held[kFrom + i < kHeld ? kFrom + i : 0][m][s][q];
            } else {
              const Piece p = *spilled_at(c0 + i, m, s);
#pragma unroll
              for (int q = 0; q < 4; ++q) a[q] = p.v[q];
            }
#pragma unroll
            for (int n = 0; n < kColumns; ++n) {
              const uint32_t pair[2] = {x[i][n].v[2 * s], x[i][n].v[2 * s + 1]};
              Operand<S>::mma(d[(2 * i + s) % chains(kColumns)][m][n], a, pair);
            }
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
