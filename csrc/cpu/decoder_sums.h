// What backward of the attention decoder sums over all steps and rows: dW = d^T x and db for each of its matrices,
// where d are the stored gradients of what the matrix gave and x is what it multiplied. Sums run in the type of the
// accumulators, over blocks of rows so small that their x stays in L2, in a fixed order.
#pragma once
#include "decoder.h"

namespace seqkern { namespace SK_NS { namespace {

template <class C, class S> struct DecoderSums : Decoder<C, S> {
  using Base = Decoder<C, S>;
  using Base::a, Base::ldh, Base::ldk, Base::lda, Base::additive, Base::input, Base::kept_h, Base::mask;
  using Base::kWidth, Base::kSkip, Base::Base;
  using typename Base::Acc, typename Base::V;
  using Tiles = TileSums<Acc>;
  static constexpr int kTile = Tiles::kTile;
  static constexpr bool kDirect = sizeof(S) == sizeof(Acc);  // no wider place is needed for the sums

  // Gradients of all steps, row t * B + b.
  struct Store {
    Acc* grads;   // [L][T*B][ldg], columns as the cell orders them
    Acc* pre;     // [T*B][lda] of what the attentional vector's tanh is taken of
    Acc* query;   // [T*B][ldk] of w_query h
    Acc* scores;  // [T*B][S]
    Acc* dv;      // [threads][ldk]
  };
  int64_t rows() const { return a.steps * a.batch; }
  // An odd number of cache lines: the columns of a tile then lie in all sets of the cache.
  int64_t grad_ld() const { return ceil_div(C::kGrads * a.hidden + kWidth, 32) * 32 + 64 / int64_t(sizeof(Acc)); }
  Acc* grads(const Store& s, int64_t l, int64_t t, int64_t b) const {
    return s.grads + (l * rows() + t * a.batch + b) * grad_ld();
  }

  // Sums with one left-hand side, of which groups of columns are taken once for all. A group has the gradients of a
  // gate.
  enum Source { kFeed, kBefore, kBelow, kTop };
  struct Sum {
    Source source;
    int64_t layer, n;       // n columns of x
    int64_t first, groups;  // of the left-hand side
    const int* order;       // the gate of each group
    S *to, *bias;
  };
  struct Pass {
    const Acc* left;  // [T*B][ld]
    int64_t ld, per_group, groups;
    int count;
    Sum of[2];
    int64_t tiles() const { return groups * ceil_div(per_group, kTile); }
  };
  int64_t passes() const { return a.layers + 1 + additive(); }
  Pass pass(const Store& s, int64_t i) const {
    static constexpr int kNone[1] = {0};
    if (i == a.layers)
      return {s.pre, lda, a.vector, 1, 1, {{kTop, 0, a.hidden, 0, 1, kNone, (S*)a.dw_pre, (S*)a.db_pre}}};
    if (i > a.layers) return {s.query, ldk, a.key, 1, 1, {{kTop, 0, a.hidden, 0, 1, kNone, (S*)a.dw_query, nullptr}}};
    const DecoderWeights& to = a.dweights[i];
    const Sum x{i ? kBelow : kFeed, i, input(i), 0, C::kGates, C::kOrder, (S*)to.w_x, (S*)to.b_x};
    const Sum h{kBefore, i, a.hidden, kSkip, C::kGates, C::kOrderH, (S*)to.w_hh, (S*)to.b_hh};
    return {s.grads + i * rows() * grad_ld(), grad_ld(), a.hidden, C::kGrads, 2, {x, h}};
  }
  // What step t multiplied for row b; null: zeros.
  const S* multiplied(const Sum& m, int64_t t, int64_t b) const {
    switch (m.source) {
      case kFeed:
        if (t) return (const S*)a.a + ((t - 1) * a.batch + b) * a.vector;
        return a.feed0 ? (const S*)a.feed0 + b * a.vector : nullptr;
      case kBefore: return t ? kept_h(t - 1, m.layer, b) : (const S*)a.h0 + (m.layer * a.batch + b) * a.hidden;
      case kBelow: return kept_h(t, m.layer - 1, b);
      default: return kept_h(t, a.layers - 1, b);
    }
  }

  struct Work {
    Tiles sums;
    Panels<Acc> x[2];  // [block rows, n]
    Acc* wide;         // [tiles of a thread * kTile][n of both] sums that the output's type cannot hold
    Acc* bias;         // [tiles of a thread][2][kTile]
    Acc* masked;       // [ldh]
  };
  // Rows whose right-hand sides stay in L2 beside what else is read.
  int64_t block_rows() const {
    constexpr int64_t kNear = 576 << 10;
    const int64_t row = (a.hidden + max64(a.hidden, a.vector)) * int64_t(sizeof(Acc));
    return min64(Tiles::kMostRows, max64(128, kNear / row / 8 * 8));
  }
  Work work(Arena& m) const {
    Work w;
    const int64_t most = a.dw_pre ? max64(a.hidden, a.vector) : 0;
    int64_t tiles = 0;
    for (int64_t i = 0; most && i < passes(); ++i) tiles = max64(tiles, ceil_div(pass(Store{}, i).tiles(), a.threads));
    w.sums = Tiles::take(m, most ? block_rows() : 0);
    for (Panels<Acc>& x : w.x) x = m.panels<Acc>(wide_panels<Acc>(most), block_rows(), kWide, false);
    w.wide = m.take<Acc>(kDirect ? 0 : tiles * kTile * 2 * most);
    w.bias = m.take<Acc>(tiles * 2 * kTile);
    w.masked = m.take<Acc>(ldh);
    return w;
  }

  // This thread's share of the tiles of all sums.
  void sum_weights(const Store& s, const Work& w, int tid) const {
    for (int64_t i = 0; i < passes(); ++i) {
      const Pass p = pass(s, i);
      sum_pass(p, w, part(p.tiles(), tid, a.threads));
    }
  }
  void sum_pass(const Pass& p, const Work& w, Range tiles) const {
    for (int64_t k0 = 0; k0 < rows(); k0 += block_rows()) {
      const int64_t n = min64(block_rows(), rows() - k0);
      for (int m = 0; m < p.count; ++m) pack_block(p.of[m], w, w.x[m], k0, n);
      each_tile(p, tiles, [&](int64_t i, int64_t group, int64_t j, int64_t count) {
        const Acc* from = p.left + k0 * p.ld + group * p.per_group + j;
        w.sums.take_columns(n, count, [&](int64_t k) { return from + k * p.ld; });
        each_sum(p, w, i, group, j, [&](const Sum& m, int which, int64_t row, Acc* to, Acc* bias) {
          if constexpr (kDirect) to = (Acc*)m.to + row * m.n;
          w.sums.sum(w.x[which], count, {zero_rows(m, k0, n), n}, m.n, to, k0 > 0);
          if (m.bias) w.sums.sum_bias(n, count, bias, k0 > 0);
        });
      });
    }
    each_tile(p, tiles, [&](int64_t i, int64_t group, int64_t j, int64_t count) {
      each_sum(p, w, i, group, j, [&](const Sum& m, int, int64_t row, Acc* from, Acc* bias) {
        for (int64_t k = 0; !kDirect && k < count * m.n; ++k) narrow(from[k], m.to[row * m.n + k]);
        for (int64_t r = 0; m.bias && r < count; ++r) narrow(bias[r], m.bias[row + r]);
      });
    });
  }
  // use(its place among this thread's, group, first column in the group, columns) for each tile.
  template <class Use> static SK_INL void each_tile(const Pass& p, Range tiles, const Use& use) {
    const int64_t per_group = ceil_div(p.per_group, kTile);
    for (int64_t i = tiles.begin; i < tiles.end; ++i) {
      const int64_t j = i % per_group * kTile;
      use(i - tiles.begin, i / per_group, j, min64(kTile, p.per_group - j));
    }
  }
  // use(sum, its number, row of its matrix, places for sums and bias) for those sums that a group belongs to.
  template <class Use>
  static SK_INL void each_sum(const Pass& p, const Work& w, int64_t i, int64_t group, int64_t j, const Use& use) {
    Acc* wide = w.wide + i * kTile * (p.of[0].n + p.of[1].n);
    for (int m = 0; m < p.count; ++m) {
      const Sum& of = p.of[m];
      if (group >= of.first && group < of.first + of.groups)
        use(of, m, of.order[group - of.first] * p.per_group + j, wide + (m ? kTile * p.of[0].n : 0),
            w.bias + (i * 2 + m) * kTile);
    }
  }
  // How many rows from k0 on multiplied nothing but zeros.
  int64_t zero_rows(const Sum& m, int64_t k0, int64_t n) const {
    return m.source == kFeed && !a.feed0 ? max64(0, min64(n, a.batch - k0)) : 0;
  }
  void pack_block(const Sum& m, const Work& w, const Panels<Acc>& to, int64_t k0, int64_t n) const {
    for (int64_t k = zero_rows(m, k0, n); k < n; ++k) {
      const int64_t t = (k0 + k) / a.batch, b = (k0 + k) % a.batch;
      const S* row = multiplied(m, t, b);
      if (m.source != kBelow || !a.masks) {
        put_row(to, k, row, m.n);
        continue;
      }
      const S* factor = mask(t, m.layer - 1, b);
      for (int64_t j = 0; j < m.n; j += kWidth) store(load(row + j, m.n - j) * load(factor + j, m.n - j), w.masked + j);
      put_row(to, k, w.masked, m.n);
    }
  }

  // The gradient of each token's row: of the gates wherever it was given, in the order of steps and rows. This thread
  // has some of the columns.
  void sum_tokens(const Store& s, Acc* wide, int tid) const {
    const int64_t columns = C::kGates * a.hidden, vectors = ceil_div(a.hidden, kWidth);
    if constexpr (kDirect) wide = (Acc*)a.dgx;
    const Range own = part(C::kGates * vectors, tid, a.threads);
    for (int g = 0; g < C::kGates; ++g) {
      const int64_t first = max64(0, own.begin - g * vectors) * kWidth;
      const int64_t last = min64(a.hidden, min64(vectors, own.end - g * vectors) * kWidth);
      if (first >= last) continue;
      Acc* to = wide + C::kOrder[g] * a.hidden;
      for (int64_t v = 0; v < a.vocab; ++v) memset(to + v * columns + first, 0, (last - first) * sizeof(Acc));
      for (int64_t r = 0; r < rows(); ++r) {
        Acc* sum = to + a.tokens[r] * columns;
        const Acc* from = s.grads + r * grad_ld() + g * a.hidden;
        int64_t j = first;
        for (; j + kWidth <= last; j += kWidth) {
          __builtin_prefetch(from + 2 * grad_ld() + j, 0, 2);
          store(load(sum + j) + load(from + j), sum + j);
        }
        if (j < last) store(load(sum + j, last - j) + load(from + j, last - j), sum + j, last - j);
      }
      S* out = (S*)a.dgx + C::kOrder[g] * a.hidden;
      for (int64_t v = 0; !kDirect && v < a.vocab; ++v)
        for (int64_t j = first; j < last; ++j) narrow(to[v * columns + j], out[v * columns + j]);
    }
  }
};

}}}  // namespace seqkern::SK_NS
