// What forward and backward share: which part of a call is this thread's, where the rows of a step lie, how threads
// meet, and how scratch memory is handed out.
#pragma once
#include <limits.h>
#include <sched.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include "../core/args.h"
#include "gemm.h"

namespace seqkern { namespace SK_NS { namespace {

SK_INL int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
SK_INL int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
SK_INL int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

SK_INL void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Waits for all `count` threads: about 0.1 ms of spinning, far more than threads that all run need, and then asleep. With
// another busy process on the machine the thread that is waited for may not be running at all. A sleeper, unlike one that
// yields, is put back on its core as soon as it is woken.
inline void meet(Barrier& b, int count) {
  if (count == 1) return;
  const int phase = __atomic_load_n(&b.phase, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&b.arrived, 1, __ATOMIC_ACQ_REL) == count) {
    __atomic_store_n(&b.arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&b.phase, phase + 1, __ATOMIC_SEQ_CST);
#if defined(__linux__)
    if (__atomic_load_n(&b.sleepers, __ATOMIC_SEQ_CST)) syscall(SYS_futex, &b.phase, FUTEX_WAKE_PRIVATE, INT_MAX, 0, 0, 0);
#endif
    return;
  }
  for (int spins = 0; spins < 4000; ++spins) {
    if (__atomic_load_n(&b.phase, __ATOMIC_ACQUIRE) != phase) return;
    relax();
  }
  __atomic_add_fetch(&b.sleepers, 1, __ATOMIC_SEQ_CST);
  while (__atomic_load_n(&b.phase, __ATOMIC_SEQ_CST) == phase) {
#if defined(__linux__)
    syscall(SYS_futex, &b.phase, FUTEX_WAIT_PRIVATE, phase, 0, 0, 0);  // returns at once if the phase has changed
#else
    sched_yield();
#endif
  }
  __atomic_sub_fetch(&b.sleepers, 1, __ATOMIC_RELAXED);
}

// Part i of n of [0, size).
struct Range { int64_t begin, end; };
SK_INL Range part(int64_t size, int i, int n) { return {size * i / n, size * (i + 1) / n}; }

// Hands out consecutive pieces of scratch memory; with a null base it only measures.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class T> T* take(int64_t n) {
    T* p = (T*)(base + used);
    used += ceil_div(n * int64_t(sizeof(T)), 64) * 64;
    return p;
  }
  template <class S> Rows<S> rows(int64_t n, int64_t ld, bool tiles) {
    Rows<S> r{nullptr, ld, tiles};
    r.data = take<char>(n ? (n + (tiles ? kTilePad : 0)) * r.row() * r.element_bytes(tiles) : 0);
    return r;
  }
  // `readers`: threads that each read their part of it again and again.
  template <class S> Panels<S> panels(int64_t count, int64_t k, int vectors, bool tiles, int readers = 1) {
    constexpr int64_t kNear = 3 << 19;  // what stays in a core's L2
    Panels<S> p{nullptr, k, vectors, tiles, max64(1, tile_blocks(k))};
    if (kParts<S> > 0 && count * p.bytes() <= kNear * readers) p.stretch = 12 / max64(1, kParts<S>);
    p.data = take<char>(count * p.bytes());
    return p;
  }
};

// From how many rows on a product goes to the tile unit. Six instructions of 16 rows make a float product there: below
// about half of that the vector unit is as fast. bf16 takes one, and half the memory.
template <class S> SK_INL bool use_tiles(int64_t rows) { return kParts<S> == 1 || (kParts<S> > 1 && rows >= 8); }

// This thread's place in the plan.
struct Member {
  const LayerArgs& a;
  int direction, row_part, unit_part;
  Member(const LayerArgs& args, int tid) : a(args) {
    unit_part = tid % a.plan.units;
    row_part = tid / a.plan.units % a.plan.rows;
    direction = tid / (a.plan.units * a.plan.rows);
  }
  static int64_t most_rows(const LayerArgs& a) {  // of any row part
    int64_t most = 0;
    for (int r = 0; r < a.plan.rows; ++r) most = max64(most, a.row_bounds[r + 1] - a.row_bounds[r]);
    return most;
  }
  int64_t row_begin() const { return a.row_bounds[row_part]; }
  int64_t row_end() const { return a.row_bounds[row_part + 1]; }
  int in_direction() const { return row_part * a.plan.units + unit_part; }  // of direction_size()
  int direction_size() const { return a.plan.rows * a.plan.units; }
  void meet_all() const { meet(a.barriers[0], a.plan.threads()); }
  void meet_direction() const { meet(a.barriers[1 + direction * (1 + a.plan.rows)], direction_size()); }
  void meet_units() const { meet(a.barriers[2 + direction * (1 + a.plan.rows) + row_part], a.plan.units); }
};

// One direction seen as a sequence of steps. Rows of a step are those of the batch that have not ended: [0, size).
struct Direction {
  const LayerArgs& a;
  int d;
  int64_t time(int64_t i) const { return d ? a.steps - 1 - i : i; }  // of the i-th step that forward takes
  // The time of the step before (in this direction), whose output row b feeds step t; -1 where h0 does.
  int64_t before(int64_t t, int64_t b) const {
    const int64_t p = d ? t + 1 : t - 1;
    return p >= 0 && p < a.steps && b < a.sizes[p] ? p : -1;
  }
  int64_t after(int64_t t) const { return d ? t - 1 : t + 1; }  // forward's next step
  // h_{t-1} of row b: a row of y, of h0, or null for zeros.
  template <class S> const S* previous_output(int64_t t, int64_t b) const {
    const int64_t p = before(t, b);
    if (p >= 0) return (const S*)a.y + (a.starts[p] + b) * a.directions * a.output + d * a.output;
    return a.h0 ? (const S*)a.h0 + (d * a.batch + b) * a.output : nullptr;
  }
  template <class S, int kSaved> S* reserve(int64_t t, int64_t b) const {
    return (S*)a.reserve + (d * a.rows + a.starts[t] + b) * kSaved * a.hidden;
  }
};

template <class S> SK_INL S* at(const Sequence& s, const LayerArgs& a, int64_t t, int64_t b) {
  return (S*)s.data + (s.packed ? a.starts[t] * s.row : t * s.step) + b * s.row;
}

// Vectors per panel of a cell's recurrent product. A panel holds whole units, all gates of a unit side by side, so that
// a finished tile is all that the cell needs.
template <class C> constexpr int kUnitBlocks = C::kGates == 1 ? kWide : 1;
template <class C> constexpr int kCellVectors = C::kGates * kUnitBlocks<C>;

// Weights [G*H, k] of the forward products, in a cell's panels [first, last); in their rows from `at`, which is 0 or even.
template <class C, class S>
void pack_gates(const S* w, int64_t hidden, const Panels<S>& to, int64_t first, int64_t last, int64_t at, int64_t k) {
  for (int64_t p = first; p < last; ++p)
    for (int u = 0; u < kUnitBlocks<C>; ++u)
      for (int g = 0; g < C::kGates; ++g) {
        const int64_t j = (p * kUnitBlocks<C> + u) * to.kWidth;
        pack_columns(w + (g * hidden + j) * k, k, max64(0, min64(to.kWidth, hidden - j)), to, p, u * C::kGates + g, at, k);
      }
}
template <class C, class S> void pack_gates(const S* w, int64_t hidden, const Panels<S>& to, int64_t first, int64_t last) {
  pack_gates<C>(w, hidden, to, first, last, 0, to.k);
}
// Bias [G*H] in the same order; null gives zeros.
template <class C, class S, class Acc>
void pack_bias(const S* bias, int64_t hidden, Acc* to, int64_t first, int64_t last) {
  constexpr int kWidth = Pack<Acc>::kWidth, kBlocks = kUnitBlocks<C>;
  for (int64_t p = first; p < last; ++p)
    for (int u = 0; u < kBlocks; ++u)
      for (int g = 0; g < C::kGates; ++g)
        for (int i = 0; i < kWidth; ++i) {
          const int64_t j = (p * kBlocks + u) * kWidth + i;
          to[(p * kCellVectors<C> + u * C::kGates + g) * kWidth + i] =
              bias && j < hidden ? Acc(widen(bias[g * hidden + j])) : Acc(0);
        }
}

}}}  // namespace seqkern::SK_NS
