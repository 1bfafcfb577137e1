// The recurrence of a layer, from its projected inputs, for cells beyond torch.nn's (core/variant_cells.h) and for what
// needs a whole row of units at once: layer normalisation, gradients clipped by norm. A thread takes some rows of the
// batch through all steps and never waits for another: a step's product goes to a buffer, then row by row the cell.
#pragma once
#include "../core/variant_cells.h"
#include "direct.h"
#include "options.h"

namespace seqkern { namespace SK_NS { namespace {

// Sums of gradients over rows, in two levels: a chain of thousands of additions loses digits.
template <class T> struct RowSums {
  static constexpr int kRows = 32, kWidth = Pack<T>::kWidth;
  T *near, *far;
  int64_t size;
  int rows;
  RowSums(Arena& m, int64_t n) : near(m.take<T>(n + kWidth)), far(m.take<T>(n + kWidth)), size(n), rows(0) {}
  void clear() {
    memset(near, 0, (size + kWidth) * sizeof(T));
    memset(far, 0, (size + kWidth) * sizeof(T));
  }
  SK_INL void add(int64_t at, Pack<T> v, int64_t lanes) { store(load(near + at) + v, near + at, lanes); }
  void flush() {
    for (int64_t j = 0; j < size; j += kWidth) store(load(far + j) + load(near + j), far + j);
    memset(near, 0, (size + kWidth) * sizeof(T));
    rows = 0;
  }
  void row_done() { if (++rows == kRows) flush(); }
};

template <class T, int kSegment = Pack<T>::kWidth> SK_INL T lane_sum(Pack<T> v) {
  if constexpr (kSegment == 1) return v.v[0];
  else return lane_sum<T, kSegment / 2>(fold<kSegment>(v, v, FirstIndices<Pack<T>::kWidth>{}));
}
// The sum of a row over f(j), vector by vector: four chains, so that an addition does not wait for the one before.
template <class T, class F> SK_INL T row_sum(int64_t n, const F& f) {
  constexpr int64_t kWidth = Pack<T>::kWidth, kChains = 4;
  Pack<T> sums[kChains] = {f(0), Pack<T>(0), Pack<T>(0), Pack<T>(0)};
  int64_t j = kWidth;
  for (; j + (kChains - 1) * kWidth < n; j += kChains * kWidth)
    for (int i = 0; i < kChains; ++i) sums[i] = sums[i] + f(j + i * kWidth);
  for (int i = 1; j < n; j += kWidth, ++i) sums[i] = sums[i] + f(j);
  return lane_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}
template <class T> struct Moments { T mean, scale; };  // scale: 1 / sqrt(variance + 1e-5)
template <class T> Moments<T> moments(const T* v, int64_t n) {
  constexpr int64_t kWidth = Pack<T>::kWidth;
  const int64_t whole = n / kWidth * kWidth;
  T total = whole ? row_sum<T>(whole, [&](int64_t j) { return load(v + j); }) : T(0);
  for (int64_t j = whole; j < n; ++j) total += v[j];
  const T mean = total / T(n);
  const auto square = [&](int64_t j) {
    const Pack<T> e = load(v + j) - Pack<T>(mean);
    return e * e;
  };
  total = whole ? row_sum<T>(whole, square) : T(0);
  for (int64_t j = whole; j < n; ++j) total += (v[j] - mean) * (v[j] - mean);
  return {mean, T(1) / T(__builtin_sqrt(total / T(n) + T(1e-5)))};
}

// Asks for a row of n elements that is about to be read, or written: rows come in an order that the hardware does not
// foresee, a page or more apart.
template <int kWrite, class T> SK_INL void ask_for(const T* row, int64_t n) {
  for (int64_t j = 0; j < n; j += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + j, kWrite, 2);
}

template <class T> struct Recurrence {
  using V = Pack<T>;
  static constexpr int kWidth = V::kWidth;
  static constexpr int64_t kColumns = kWide * kWidth;

  const RecurrenceArgs& a;
  const Variant& k;
  int64_t hidden, width, unit_ld, gate_ld, first, row_size;  // width: G*H; first: columns of the first product
  LayerArgs seen;  // what OptionMath looks at

  explicit Recurrence(const RecurrenceArgs& args) : a(args), k(args.variant), seen{} {
    hidden = a.hidden;
    width = a.gates * hidden;
    unit_ld = ceil_div(hidden, kColumns) * kColumns + kWidth;
    gate_ld = ceil_div(width, kColumns) * kColumns + kColumns;
    first = k.reset_before ? width - hidden : width;
    row_size = k.row(a.cell, a.gates, hidden);
    seen.steps = a.steps;
    seen.batch = a.batch;
    seen.output = seen.hidden = hidden;
    seen.directions = a.directions;
    seen.sizes = a.sizes;
    seen.starts = a.starts;
    seen.options = a.options;
  }

  // ---- packed weights: of each direction those of the first product and, for a reset before it, of n's -------------
  struct Packed { Panels<T> gates, last; };
  Packed take(Arena& m, bool backward) const {
    const int64_t last = width - first;
    if (backward)
      return {m.panels<T>(ceil_div(hidden, kColumns), first, kWide, false),
              m.panels<T>(last ? ceil_div(hidden, kColumns) : 0, hidden, kWide, false)};
    return {m.panels<T>(ceil_div(first, kColumns), hidden, kWide, false),
            m.panels<T>(ceil_div(last, kColumns), hidden, kWide, false)};
  }
  Packed packed(int64_t d, bool backward) const {
    Arena m{a.packed};
    Packed p = take(m, backward);
    for (int64_t i = 0; i < d; ++i) p = take(m, backward);
    return p;
  }
  int64_t panels_of(int64_t columns, bool backward) const {
    return ceil_div(backward ? (columns ? hidden : 0) : columns, kColumns);
  }
  static int64_t packed_bytes(const RecurrenceArgs& args, bool backward) {
    Arena m{nullptr};
    const Recurrence r(args);
    for (int64_t i = 0; i < args.directions; ++i) r.take(m, backward);
    return m.used;
  }
  static int64_t panels(const RecurrenceArgs& args, bool backward) {
    const Recurrence r(args);
    return args.directions * (r.panels_of(r.first, backward) + r.panels_of(r.width - r.first, backward));
  }
  static void pack(const RecurrenceArgs& args, bool backward, int64_t begin, int64_t end) {
    const Recurrence r(args);
    const int64_t gates = r.panels_of(r.first, backward), each = panels(args, backward) / args.directions;
    for (int64_t i = begin; i < end; ++i) {
      const Packed p = r.packed(i / each, backward);
      const T* w = (const T*)args.w_hh + i / each * r.width * r.hidden;
      const int64_t q = i % each;
      if (q < gates) r.pack_panel(p.gates, q, w, r.first, backward);
      else r.pack_panel(p.last, q - gates, w + r.first * r.hidden, r.width - r.first, backward);
    }
  }
  void pack_panel(const Panels<T>& to, int64_t panel, const T* w, int64_t rows, bool backward) const {
    if (backward) return pack_rows(to, panel, panel + 1, hidden, 0, rows, [&](int64_t i) { return w + i * hidden; });
    for (int v = 0; v < kWide; ++v) {
      const int64_t j = panel * kColumns + v * kWidth;
      pack_columns(w + j * hidden, hidden, max64(0, min64(kWidth, rows - j)), to, panel, v);
    }
  }
  // out [rows][ld] = left B, where B has `columns` columns
  static void product(const Rows<T>& left, int64_t rows, const Panels<T>& b, int64_t columns, T* out, int64_t ld) {
    multiply<kWide>(left, rows, b, 0, ceil_div(columns, kColumns), (const T*)nullptr,
                    [&](int64_t panel, int64_t r0, int count, const T* c) {
                      for (int r = 0; r < count; ++r) {
                        T* to = out + (r0 + r) * ld + panel * kColumns;
                        for (int v = 0; v < kWide; ++v) store(load(c + r * kColumns + v * kWidth), to + v * kWidth);
                      }
                    });
  }
  static Rows<T> left(Arena& m, int64_t rows, int64_t ld) { return m.rows<T>(rows, ld, false); }

  // How many of a step's rows to ask for before its product, which gives them time; then each row asks for the next.
  // Not so many that they push the packed weights out of the cache.
  static int64_t early(int64_t rows, int64_t row_elements) {
    constexpr int64_t kMost = 256 << 10;
    return rows * row_elements * int64_t(sizeof(T)) <= kMost ? rows : 1;
  }

  // ---- where things lie --------------------------------------------------------------------------------------------
  template <class X> SK_INL X* of_row(X* all, int64_t t, int64_t b, int64_t d, int64_t n) const {  // [N, D, n]
    return all + ((a.starts[t] + b) * a.directions + d) * n;
  }
  template <class X> SK_INL X* by_direction(X* all, int64_t t, int64_t b, int64_t d, int64_t n) const {  // [D, N, n]
    return all + (d * a.rows + a.starts[t] + b) * n;
  }
  SK_INL V peephole(int64_t d, int which, int64_t j, int64_t lanes) const {  // which: of i, f, o
    const int64_t parts = k.coupled ? 2 : 3;
    if (!k.peephole || (k.coupled && which == 1)) return V(0);
    return load((const T*)a.peephole + (d * parts + (k.coupled && which ? 1 : which)) * hidden + j, lanes);
  }
};

}}}  // namespace seqkern::SK_NS
