// What backward of the attention decoder sums over all steps and rows: dW = d^T x and db for each of its matrices,
// where d are the stored gradients of what the matrix gave and x is what it multiplied. Sums run in the type of the
// accumulators, over blocks of rows so small that their x stays in L2, in a fixed order.
#pragma once
#include "decoder.h"

namespace seqkern { namespace SK_NS { namespace {

template <class C, class S> struct DecoderSums : Decoder<C, S> {
  using Base = Decoder<C, S>;
  using Base::a, Base::ldh, Base::ldk, Base::lda, Base::additive, Base::input, Base::kept_h, Base::mask,
      Base::wide_panels;
  using Base::kWidth, Base::kWideColumns, Base::kSkip, Base::Base;
  using typename Base::Acc, typename Base::V;
  static constexpr int kTile = tile_rows(kWide), kLeft = 8;
  static constexpr int64_t kBlockRows = 256;
  static constexpr bool kDirect = sizeof(S) == sizeof(Acc);  // no wider place is needed for the sums
  static_assert(kTile <= kLeft);

  // Gradients of all steps, row t * B + b.
  struct Store {
    Acc* grads;   // [L][T*B][ldg], columns as the cell orders them
    Acc* pre;     // [T*B][lda] of what the attentional vector's tanh is taken of
    Acc* query;   // [T*B][ldk] of w_query h
    Acc* scores;  // [T*B][S]
    Acc* dv;      // [threads][ldk]
  };
  int64_t rows() const { return a.steps * a.batch; }
  int64_t grad_ld() const { return ceil_div(C::kGrads * a.hidden + kWidth, 32) * 32 + 32; }
  Acc* grads(const Store& s, int64_t l, int64_t t, int64_t b) const {
    return s.grads + (l * rows() + t * a.batch + b) * grad_ld();
  }

  enum Source { kFeed, kBefore, kBelow, kTop };
  struct Sum {
    const Acc* left;  // [T*B][ld], the columns of this sum's rows from `left` on
    int64_t ld, n;    // n columns of x
    int64_t per_group, groups;
    const int* order;  // the gate of each group of rows
    Source source;
    int64_t layer;
    S *to, *bias;
    int64_t tiles() const { return groups * ceil_div(per_group, kTile); }
  };
  int64_t sums() const { return 2 * a.layers + 1 + additive(); }
  Sum sum(const Store& s, int64_t i) const {
    static constexpr int kNone[1] = {0};
    if (i < 2 * a.layers) {
      const int64_t l = i / 2;
      const DecoderWeights& to = a.dweights[l];
      const Acc* from = s.grads + l * rows() * grad_ld();
      if (i % 2 == 0)
        return {from,      grad_ld(),          input(l), a.hidden,   C::kGates,
                C::kOrder, l ? kBelow : kFeed, l,        (S*)to.w_x, (S*)to.b_x};
      return {from + kSkip * a.hidden,
              grad_ld(),
              a.hidden,
              a.hidden,
              C::kGates,
              C::kOrderH,
              kBefore,
              l,
              (S*)to.w_hh,
              (S*)to.b_hh};
    }
    if (i == 2 * a.layers) return {s.pre, lda, a.hidden, a.vector, 1, kNone, kTop, 0, (S*)a.dw_pre, (S*)a.db_pre};
    return {s.query, ldk, a.hidden, a.key, 1, kNone, kTop, 0, (S*)a.dw_query, nullptr};
  }
  // What step t multiplied for row b.
  const S* multiplied(const Sum& m, int64_t t, int64_t b) const {
    switch (m.source) {
      case kFeed: return t ? (const S*)a.a + ((t - 1) * a.batch + b) * a.vector : (const S*)a.feed0 + b * a.vector;
      case kBefore: return t ? kept_h(t - 1, m.layer, b) : (const S*)a.h0 + (m.layer * a.batch + b) * a.hidden;
      case kBelow: return kept_h(t, m.layer - 1, b);
      default: return kept_h(t, a.layers - 1, b);
    }
  }

  struct Work {
    Panels<Acc> x;  // [kBlockRows, n]
    Acc* left;      // [kBlockRows][kLeft] one tile's columns of the gradients
    Acc* wide;      // [tiles of a thread * kTile][n] sums that the output's type cannot hold
    Acc* bias;      // [tiles of a thread * kTile]
    Acc* masked;    // [ldh]
  };
  int64_t all_tiles() const {
    int64_t n = 0;
    for (int64_t i = 0; i < sums(); ++i) n += sum(Store{}, i).tiles();
    return n;
  }
  Work work(Arena& m) const {
    Work w;
    const bool wanted = a.dw_pre;
    const int64_t most = max64(a.hidden, a.vector), tiles = wanted ? ceil_div(all_tiles(), a.threads) : 0;
    w.x = m.panels<Acc>(wanted ? wide_panels(most) : 0, kBlockRows, kWide, false);
    w.left = m.take<Acc>(wanted ? kBlockRows * kLeft + kLeft : 0);
    w.wide = m.take<Acc>(kDirect ? 0 : tiles * kTile * most);
    w.bias = m.take<Acc>(tiles * kTile);
    w.masked = m.take<Acc>(ldh);
    return w;
  }

  // The gradient of each token's row: of the gates wherever it was given, in the order of steps and rows. This thread
  // has some of the columns.
  void sum_tokens(const Store& s, Acc* wide, int tid) const {
    const int64_t columns = C::kGates * a.hidden, vectors = ceil_div(a.hidden, kWidth);
    if constexpr (kDirect) wide = (Acc*)a.dgx;
    const Range own = part(C::kGates * vectors, tid, a.threads);
    const auto each = [&](int64_t row, const auto& use) {
      for (int64_t i = own.begin; i < own.end; ++i) {
        const int64_t g = i / vectors, j = i % vectors * kWidth, lanes = a.hidden - j;
        use(wide + row * columns + C::kOrder[g] * a.hidden + j, g * a.hidden + j, min64(lanes, kWidth));
      }
    };
    for (int64_t v = 0; v < a.vocab; ++v)
      each(v, [&](Acc* to, int64_t, int64_t lanes) { store(V(0), to, lanes); });
    for (int64_t r = 0; r < rows(); ++r)
      each(a.tokens[r], [&](Acc* to, int64_t from, int64_t lanes) {
        store(load(to, lanes) + load(s.grads + r * grad_ld() + from, lanes), to, lanes);
      });
    for (int64_t v = 0; !kDirect && v < a.vocab; ++v)
      each(v, [&](Acc* from, int64_t, int64_t lanes) {
        for (int64_t i = 0; i < lanes; ++i) narrow(from[i], ((S*)a.dgx)[from - wide + i]);
      });
  }

  // This thread's share of the tiles of all sums.
  void sum_weights(const Store& s, const Work& w, int tid) const {
    const Range own = part(all_tiles(), tid, a.threads);
    int64_t first = 0;
    for (int64_t i = 0; i < sums(); ++i) {
      const Sum m = sum(s, i);
      const Range tiles{max64(0, own.begin - first), min64(m.tiles(), own.end - first)};
      first += m.tiles();
      if (tiles.begin < tiles.end) sum_one(m, w, tiles);
    }
  }
  void sum_one(const Sum& m, const Work& w, Range tiles) const {
    const int64_t per_group = ceil_div(m.per_group, kTile);
    for (int64_t k0 = 0; k0 < rows(); k0 += kBlockRows) {
      const int64_t n = min64(kBlockRows, rows() - k0);
      pack_block(m, w, k0, n);
      for (int64_t i = tiles.begin; i < tiles.end; ++i) {
        const int64_t group = i / per_group, j = i % per_group * kTile;
        const int64_t count = min64(kTile, m.per_group - j), row = m.order[group] * m.per_group + j;
        take_columns(m.left + k0 * m.ld + group * m.per_group + j, m.ld, n, count, w.left);
        Acc* to = w.wide + (i - tiles.begin) * kTile * m.n;
        if constexpr (kDirect) to = (Acc*)m.to + row * m.n;
        sum_tile(w, count, n, m.n, to, k0 > 0);
        if (m.bias) sum_bias(w, n, count, w.bias + (i - tiles.begin) * kTile, k0 > 0);
      }
    }
    for (int64_t i = tiles.begin; i < tiles.end; ++i) {
      const int64_t group = i / per_group, j = i % per_group * kTile;
      const int64_t count = min64(kTile, m.per_group - j), row = m.order[group] * m.per_group + j;
      const Acc* from = w.wide + (i - tiles.begin) * kTile * m.n;
      if (!kDirect)
        for (int64_t k = 0; k < count * m.n; ++k) narrow(from[k], m.to[row * m.n + k]);
      for (int64_t r = 0; m.bias && r < count; ++r) narrow(w.bias[(i - tiles.begin) * kTile + r], m.bias[row + r]);
    }
  }
  void pack_block(const Sum& m, const Work& w, int64_t k0, int64_t n) const {
    const int64_t panels = wide_panels(m.n);
    int64_t t = k0 / a.batch, b = k0 % a.batch;
    for (int64_t k = 0; k < n; ++k) {
      const S* row = multiplied(m, t, b);
      const Acc* masked = nullptr;
      if (m.source == kBelow && a.masks) {
        const S* factor = mask(t, m.layer - 1, b);
        for (int64_t j = 0; j < m.n; j += kWidth)
          store(load(row + j, m.n - j) * load(factor + j, m.n - j), w.masked + j);
        masked = w.masked;
      }
      for (int64_t p = 0; p < panels; ++p) {
        Acc* to = w.x.panel(p) + k * kWideColumns;
        for (int v = 0; v < kWide; ++v) {
          const int64_t j = p * kWideColumns + v * kWidth, lanes = m.n - j;
          store(lanes <= 0 ? V(0) : masked ? load(masked + j, lanes) : load(row + j, lanes), to + v * kWidth);
        }
      }
      if (++b == a.batch) {
        b = 0;
        ++t;
      }
    }
  }
  static void take_columns(const Acc* from, int64_t ld, int64_t n, int64_t count, Acc* to) {
    if (count == kTile)
      for (int64_t k = 0; k < n; ++k)
        for (int r = 0; r < kTile; ++r) to[k * kLeft + r] = from[k * ld + r];
    else
      for (int64_t k = 0; k < n; ++k)
        for (int64_t r = 0; r < count; ++r) to[k * kLeft + r] = from[k * ld + r];
  }
  static void sum_tile(const Work& w, int64_t count, int64_t k, int64_t n, Acc* to, bool add) {
    alignas(64) Acc c[kTile * kWideColumns];
    for (int64_t p = 0; p < wide_panels(n); ++p) {
      tile_any<kWide>(int(count), TileArgs<Acc>{{w.left, 1, kLeft}, w.x.panel(p), k, nullptr, c, false});
      for (int64_t r = 0; r < count; ++r)
        for (int v = 0; v < kWide; ++v) {
          const int64_t j = p * kWideColumns + v * kWidth, lanes = n - j;
          if (lanes <= 0) break;
          V x = load(c + r * kWideColumns + v * kWidth);
          Acc* at = to + r * n + j;
          store(add ? x + load(at, lanes) : x, at, lanes);
        }
    }
  }
  static void sum_bias(const Work& w, int64_t n, int64_t count, Acc* to, bool add) {
    constexpr int kLanes = kWidth > kLeft ? kWidth : kLeft;
    Acc sum[kLanes] = {};
    for (int r = 0; r < kLeft; ++r) w.left[n * kLeft + r] = 0;  // two rows go at a time
    for (int64_t k = 0; k < n; k += kLanes / kLeft)
      for (int i = 0; i < kLanes; ++i) sum[i] += w.left[k * kLeft + i];
    for (int64_t r = 0; r < count; ++r) {
      Acc all = 0;
      for (int i = int(r); i < kLanes; i += kLeft) all += sum[i];
      to[r] = add ? to[r] + all : all;
    }
  }
};

}}}  // namespace seqkern::SK_NS
