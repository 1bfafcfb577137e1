// Products whose columns mean nothing to a cell: C = A B in panels of kWide vectors; and sums over many rows, d^T x, as
// the gradients of weights are.
#pragma once
#include "team.h"

namespace seqkern { namespace SK_NS { namespace {

template <class S> constexpr int64_t kWideColumns = kWide * Pack<typename AccOf<S>::Type>::kWidth;
template <class S> int64_t wide_panels(int64_t n) { return ceil_div(n, kWideColumns<S>); }
// Elements from row to row of a left-hand side of n columns: all panels can be read, and rows do not share cache sets.
template <class S> int64_t padded_row(int64_t n) { return wide_panels<S>(n) * kWideColumns<S> + 32; }

// use(row, column, lanes, value) for each vector of C's first n columns.
template <class S, class Use>
SK_INL void wide_product(const Rows<S>& left, int64_t rows, const Panels<S>& b, int64_t n,
                         const typename AccOf<S>::Type* init, const Use& use) {
  constexpr int kWidth = Pack<typename AccOf<S>::Type>::kWidth, kColumns = kWide * kWidth;
  multiply<kWide>(left, rows, b, 0, ceil_div(n, kColumns), init,
                  [&](int64_t panel, int64_t r0, int count, const typename AccOf<S>::Type* c) {
                    for (int r = 0; r < count; ++r)
                      for (int v = 0; v < kWide; ++v) {
                        const int64_t j = panel * kColumns + v * kWidth;
                        if (j >= n) break;
                        use(r0 + r, j, n - j, load(c + r * kColumns + v * kWidth));
                      }
                  });
}

// Weights [n, k], whose rows are the columns of the panels [begin, end) of `to`.
template <class S> void pack_weights(const S* w, int64_t n, int64_t k, const Panels<S>& to, Range panels) {
  for (int64_t p = panels.begin; p < panels.end; ++p)
    for (int v = 0; v < kWide; ++v) {
      const int64_t j = p * kWideColumns<S> + v * to.kWidth;
      pack_columns(w + j * k, k, max64(0, min64(to.kWidth, n - j)), to, p, v);
    }
}

// Row k of `to` from n elements of any storage type; zeros where `row` is null.
template <class T, class Acc> SK_INL void put_row(const Panels<Acc>& to, int64_t k, const T* row, int64_t n) {
  using V = Pack<Acc>;
  if (!row) n = 0;
  for (int64_t p = 0, j = 0; p == 0 || j < n; ++p)
    for (int v = 0; v < kWide; ++v, j += V::kWidth) {
      const int64_t lanes = n - j;
      store(lanes >= V::kWidth ? load(row + j)
            : lanes > 0        ? load(row + j, lanes)
                               : V(0),
            to.panel(p) + (k * kWide + v) * V::kWidth);
    }
}

// Sums over a block of rows: to[i][j] (+)= sum over k of left[k][i] x[k][j], a tile of rows i at a time.
template <class Acc> struct TileSums {
  using V = Pack<Acc>;
  static constexpr int kWidth = V::kWidth, kTile = tile_rows(kWide), kLeft = 8;
  static constexpr int64_t kMostRows = kLongest<Acc> * 3 / 2;  // one chain of additions
  static_assert(kTile <= kLeft);
  Acc* left;  // [rows + 1][kLeft] one tile's columns of the gradients

  static TileSums take(Arena& m, int64_t rows) { return {m.take<Acc>(rows ? (rows + 1) * kLeft : 0)}; }
  // `count` columns of n rows, at(k) being where row k's begin.
  template <class At> SK_INL void take_columns(int64_t n, int64_t count, const At& at) const {
    if (count == kTile)
      for (int64_t k = 0; k < n; ++k)
        for (int r = 0; r < kTile; ++r) left[k * kLeft + r] = Acc(widen(at(k)[r]));
    else
      for (int64_t k = 0; k < n; ++k)
        for (int64_t r = 0; r < count; ++r) left[k * kLeft + r] = Acc(widen(at(k)[r]));
  }
  // Over the rows in `of`, to n columns.
  void sum(const Panels<Acc>& x, int64_t count, Range of, int64_t n, Acc* to, bool add) const {
    if (of.begin >= of.end && add) return;
    alignas(64) Acc c[kTile * kWide * kWidth];
    const Left<Acc> from{left + of.begin * kLeft, 1, kLeft};
    for (int64_t p = 0; p * kWide * kWidth < n; ++p) {
      const Acc* panel = x.panel(p) + of.begin * kWide * kWidth;
      tile_any<kWide>(int(count), TileArgs<Acc>{from, panel, max64(0, of.end - of.begin), nullptr, c, false});
      for (int64_t r = 0; r < count; ++r)
        for (int v = 0; v < kWide; ++v) {
          const int64_t j = (p * kWide + v) * kWidth, lanes = n - j;
          if (lanes <= 0) break;
          V sum = load(c + (r * kWide + v) * kWidth);
          Acc* at = to + r * n + j;
          store(add ? sum + load(at, lanes) : sum, at, lanes);
        }
    }
  }
  // to[i] (+)= sum over k of left[k][i].
  void sum_bias(int64_t n, int64_t count, Acc* to, bool add) const {
    constexpr int kLanes = kWidth > kLeft ? kWidth : kLeft;
    Acc sum[kLanes] = {};
    for (int r = 0; r < kLeft; ++r) left[n * kLeft + r] = 0;  // two rows go at a time
    for (int64_t k = 0; k < n; k += kLanes / kLeft)
      for (int i = 0; i < kLanes; ++i) sum[i] += left[k * kLeft + i];
    for (int64_t r = 0; r < count; ++r) {
      Acc all = 0;
      for (int i = int(r); i < kLanes; i += kLeft) all += sum[i];
      to[r] = add ? to[r] + all : all;
    }
  }
};

}}}  // namespace seqkern::SK_NS
