// One step of a decoder for the rows that are still searched: layers, attention, attentional vector. The definition is
// Decoder.step (seqkern/seq2seq/decoder.py). Where several threads work on the same rows, each takes its part of the
// panels of every product, or of the rows, and they meet in between.
#pragma once
#include "direct.h"
#include "search_pack.h"

namespace seqkern { namespace SK_NS { namespace {

template <class T> SK_INL T highest(Pack<T> x) {
  T most = x.v[0];
  for (int i = 1; i < Pack<T>::kWidth; ++i) most = x.v[i] > most ? x.v[i] : most;
  return most;
}
template <class T> SK_INL T sum_of(Pack<T> x) {
  T sum = x.v[0];
  for (int i = 1; i < Pack<T>::kWidth; ++i) sum += x.v[i];
  return sum;
}

template <class S> struct SearchStep {
  using V = Pack<S>;
  using P = SearchPack<S>;
  static constexpr int kWidth = V::kWidth;
  static constexpr int64_t kWideColumns = P::kWideColumns;

  const SearchArgs& a;
  const SearchPart& part_of;
  P p;
  SearchShape s;
  int64_t ldh, ldx, ldq, lda, ldk, lds;
  // What goes from step to step, twice: the step writes where the one before did not.
  S *h[kMaxSearchLayers][2], *c[kMaxSearchLayers][2], *feed[2];
  S *x, *gx, *q, *alpha, *context;
  // Of the sources of this part: [sources][S][ldk] and [sources][S][lda]. Of additive attention e^(2 key), but where
  // one of a source's is `wild`, too large for that, the keys themselves.
  S *keys, *values;
  int32_t* wild;            // [sources][threads]
  int64_t *source, *token;  // [rows]
  int turn = 0;

  static int64_t padded(int64_t n) { return ceil_div(n, 32) * 32 + 32; }  // off powers of two

  SearchStep(const SearchArgs& args, const SearchPart& part, int64_t most, Arena& m)
      : a(args), part_of(part), p(*(const SearchShape*)args.packed, (char*)args.packed), s(p.shape) {
    ldh = padded(p.columns / s.gates);
    ldx = padded(p.bottom.k);
    ldk = ceil_div(s.key, kWideColumns) * kWideColumns;
    ldq = padded(p.query_panels * kWideColumns);
    lda = padded(p.pre_panels * kWideColumns);
    lds = ceil_div(max64(a.places, 1), kWidth) * kWidth;
    const bool lstm = Cell(s.cell) == Cell::kLstm, attends = Attend(s.attend) != Attend::kNone;
    for (int i = 0; i < 2; ++i) {
      for (int64_t l = 0; l < s.layers; ++l) {
        h[l][i] = m.take<S>(most * ldh);
        c[l][i] = m.take<S>(lstm ? most * ldh : 0);
      }
      feed[i] = m.take<S>(s.pre ? most * lda : 0);
    }
    x = m.take<S>(s.folded ? 0 : most * ldx);
    gx = m.take<S>(p.bottom.k || s.layers > 1 ? most * p.columns : 0);
    q = m.take<S>(p.query_panels ? most * ldq : 0);
    alpha = m.take<S>(attends ? most * lds : 0);
    context = m.take<S>(attends ? most * lda : 0);
    const int64_t places = attends ? (part.end - part.begin) * a.places : 0;
    keys = m.take<S>(places * ldk);
    values = m.take<S>(places * lda);
    wild = m.take<int32_t>(p.query_panels ? (part.end - part.begin) * part.count : 0);
    source = m.take<int64_t>(most);
    token = m.take<int64_t>(most);
  }

  void meet_all() const { meet(*part_of.barrier, part_of.count); }
  SK_INL Range mine(int64_t size) const { return part(size, part_of.member, part_of.count); }
  static SK_INL Rows<S> left(S* data, int64_t ld) { return {(char*)data, ld, false}; }

  // The first state of row r is that of source b.
  void enter(int64_t r, int64_t b) {
    source[r] = b;
    for (int64_t l = 0; l < s.layers; ++l) {
      memcpy(h[l][turn] + r * ldh, (const S*)a.h0 + (l * a.batch + b) * s.hidden, s.hidden * sizeof(S));
      if (a.c0) memcpy(c[l][turn] + r * ldh, (const S*)a.c0 + (l * a.batch + b) * s.hidden, s.hidden * sizeof(S));
    }
    if (s.feed) memset(feed[turn] + r * lda, 0, lda * sizeof(S));
  }
  // Row r of all that goes on is row from[r] of what there is now. All threads call it, and meet.
  void gather(const int64_t* from, int64_t rows) {
    const Range r = mine(rows);
    const auto copy = [&](S* const(&buffers)[2], int64_t ld, int64_t n) {
      for (int64_t i = r.begin; i < r.end; ++i)
        memcpy(buffers[1 - turn] + i * ld, buffers[turn] + from[i] * ld, n * sizeof(S));
    };
    for (int64_t l = 0; l < s.layers; ++l) {
      copy(h[l], ldh, s.hidden);
      if (a.c0) copy(c[l], ldh, s.hidden);
    }
    if (s.feed) copy(feed, lda, s.pre);
    turn ^= 1;
    meet_all();
  }

  const Rows<S> read() const { return s.pre ? left(feed[turn], lda) : left(h[s.layers - 1][turn], ldh); }

  void step(int64_t rows) {
    with_cell(s.cell, [&](auto cell) {
      using C = typename decltype(cell)::Type;
      for (int64_t l = 0; l < s.layers; ++l) {
        input<C>(l, rows);
        recur<C>(l, rows);
        meet_all();
      }
    });
    const Rows<S> top = left(h[s.layers - 1][1 - turn], ldh);
    if (Attend(s.attend) != Attend::kNone) {
      if (p.query_panels) {
        const Range w = mine(p.query_panels);
        multiply<kWide, true>(
            top, rows, p.w_query, w.begin, w.end, (const S*)nullptr, [&](int64_t panel, int64_t r0, int n, const S* t) {
              for (int r = 0; r < n; ++r)
                memcpy(q + (r0 + r) * ldq + panel * kWideColumns, t + r * kWideColumns, kWideColumns * sizeof(S));
            });
        meet_all();
      }
      const Range r = mine(rows);
      for (int64_t i = r.begin; i < r.end; ++i) attend(i);
      meet_all();
    }
    if (s.pre) {
      const bool attends = Attend(s.attend) != Attend::kNone;
      const Range w = mine(p.pre_panels);
      S* to = feed[1 - turn];
      multiply<kWide, true>(top, rows, p.w_pre, w.begin, w.end, p.b_pre,
                            [&](int64_t panel, int64_t r0, int n, const S* t) {
                              for (int r = 0; r < n; ++r)
                                for (int v = 0; v < kWide; ++v) {
                                  const int64_t j = (r0 + r) * lda + panel * kWideColumns + v * kWidth;
                                  V sum = load(t + r * kWideColumns + v * kWidth);
                                  if (attends) sum = sum + load(context + j);
                                  store(tanh_(sum), to + j);
                                }
                            });
      meet_all();
    }
    turn ^= 1;
  }

  // gx: what layer l's cells get from below, where that is not in the table already. A thread makes the panels that it
  // reads itself.
  template <class C> void input(int64_t l, int64_t rows) {
    constexpr int kVectors = kCellVectors<C>, kColumns = kVectors * kWidth;
    const Range w = mine(p.panels);
    if (l == 0 && !s.folded) {
      const Range r = mine(rows);
      for (int64_t i = r.begin; i < r.end; ++i) {
        memcpy(x + i * ldx, (const S*)a.embedding + token[i] * s.embed, s.embed * sizeof(S));
        if (s.feed) memcpy(x + i * ldx + s.embed, feed[turn] + i * lda, s.pre * sizeof(S));
      }
      meet_all();
    }
    if (l == 0 && p.bottom.k == 0) return;
    const bool add = l == 0 && s.folded;
    const Rows<S> from = l ? left(h[l - 1][1 - turn], ldh) : add ? left(feed[turn], lda) : left(x, ldx);
    const S* bias = l ? p.layers[l].b_ih : add ? nullptr : p.b_bottom;
    multiply<kVectors, true>(from, rows, l ? p.layers[l].w_ih : p.bottom, w.begin, w.end, bias,
                             [&](int64_t panel, int64_t r0, int n, const S* t) {
                               for (int r = 0; r < n; ++r)
                                 for (int v = 0; v < kVectors; ++v) {
                                   const int64_t j = panel * kColumns + v * kWidth;
                                   V sum = load(t + r * kColumns + v * kWidth);
                                   if (add) sum = sum + load(p.table + token[r0 + r] * p.columns + j);
                                   store(sum, gx + (r0 + r) * p.columns + j);
                                 }
                             });
  }
  template <class C> void recur(int64_t l, int64_t rows) {
    constexpr int kVectors = kCellVectors<C>, kColumns = kVectors * kWidth;
    const Range w = mine(p.panels);
    const S *old_h = h[l][turn], *old_c = c[l][turn];
    S *new_h = h[l][1 - turn], *new_c = c[l][1 - turn];
    const bool table = l == 0 && p.bottom.k == 0;
    multiply<kVectors, true>(left(h[l][turn], ldh), rows, p.layers[l].w_hh, w.begin, w.end, p.layers[l].b_hh,
                             [&](int64_t panel, int64_t r0, int n, const S* t) {
                               for (int r = 0; r < n; ++r) {
                                 const int64_t row = r0 + r;
                                 const S* from = (table ? p.table + token[row] * p.columns : gx + row * p.columns) +
                                                 panel * kColumns;
                                 for (int u = 0; u < kUnitBlocks<C>; ++u) {
                                   const int64_t j = row * ldh + (panel * kUnitBlocks<C> + u) * kWidth;
                                   V in[C::kGates], rec[C::kGates], saved[C::kSaved ? C::kSaved : 1], out, carry(0);
                                   for (int g = 0; g < C::kGates; ++g) {
                                     in[g] = load(from + (u * C::kGates + g) * kWidth);
                                     rec[g] = load(t + r * kColumns + (u * C::kGates + g) * kWidth);
                                   }
                                   if (C::kCarry == Carry::kHidden) carry = load(old_h + j);
                                   if (C::kCarry == Carry::kCell) carry = load(old_c + j);
                                   C::forward(in, rec, carry, out, saved);
                                   if (C::kCarry == Carry::kCell) store(carry, new_c + j);
                                   store(out, new_h + j);
                                 }
                               }
                             });
  }

  // Keys and values, projected once; only those of places before the source's length.
  void project() {
    if (Attend(s.attend) == Attend::kNone) return;
    const Range k = mine(p.key_panels), c = mine(p.context_panels), own = mine(part_of.end - part_of.begin);
    for (int64_t i = 0; i < part_of.end - part_of.begin; ++i) {
      const int64_t b = part_of.begin + i, n = places_of(b);
      const Rows<S> from = left((S*)a.memory + b * s.memory, a.batch * s.memory);
      V most(0);
      const auto keep = [&](S* to, int64_t ld) {
        return [=](int64_t panel, int64_t r0, int rows, const S* t) {
          for (int r = 0; r < rows; ++r)
            memcpy(to + (r0 + r) * ld + panel * kWideColumns, t + r * kWideColumns, kWideColumns * sizeof(S));
        };
      };
      multiply<kWide, true>(from, n, p.w_context, c.begin, c.end, (const S*)nullptr,
                            keep(values + i * a.places * lda, lda));
      S* to = keys + i * a.places * ldk;
      if (p.key_panels)
        multiply<kWide, true>(from, n, p.w_key, k.begin, k.end, p.b_key,
                              [&](int64_t panel, int64_t r0, int rows, const S* t) {
                                keep(to, ldk)(panel, r0, rows, t);
                                for (int64_t j = 0; p.query_panels && j < rows * kWideColumns; j += kWidth) {
                                  const V x = load(t + j);
                                  most.v = x.v > most.v ? x.v : most.v;
                                  most.v = -x.v > most.v ? -x.v : most.v;
                                }
                              });
      else if (own.begin <= i && i < own.end)
        for (int64_t r = 0; r < n; ++r) memcpy(to + r * ldk, from.plain(r), s.memory * sizeof(S));
      if (p.query_panels) wild[i * part_of.count + part_of.member] = highest(most) > kTame;
    }
    meet_all();
    if (p.query_panels)
      for (int64_t i = own.begin; i < own.end; ++i) {
        if (is_wild(i)) continue;
        S* to = keys + i * a.places * ldk;
        for (int64_t j = 0; j < places_of(part_of.begin + i) * ldk; j += kWidth)
          store(exp_(load(to + j) * V(2)), to + j);
      }
    meet_all();
  }
  int64_t places_of(int64_t b) const { return max64(0, min64(a.lengths[b], a.places)); }
  bool is_wild(int64_t i) const {
    for (int member = 0; member < part_of.count; ++member)
      if (wild[i * part_of.count + member]) return true;
    return false;
  }

  // Lane i: v . tanh(query + key i), for i < n; with tanh x = 1 - 2 / (1 + e^2x) and e^2(q + k) a product. Keys of at
  // most kTame leave what lies beyond kClamp + kTame saturated, so that the query may be cut there; and all products
  // are finite and normal.
  static constexpr S kTame = 12, kClamp = 30;
  SK_INL V additive(const S* query, const S* keys, int64_t n) const {
    V sums[kWidth], all(0);
    for (int i = 0; i < kWidth; ++i) sums[i] = V(0);
    const auto add = [&](int count) __attribute__((always_inline)) {
      for (int64_t j = 0; j < s.key; j += kWidth) {
        const V v = load(p.v + j), q = load(query + j);
        all = all + v;
        for (int i = 0; i < count; ++i)
          sums[i].v += v.v * reciprocal(V::wrap(V(1).v + q.v * load(keys + i * ldk + j).v)).v;
      }
    };
    if (n >= kWidth) add(kWidth);
    else add(int(n));
    return V(sum_of(all)) - V(2) * sum_lanes<kWidth>(sums);
  }
  SK_INL V additive_of_any(const S* query, const S* keys, int64_t n) const {
    V sums[kWidth];
    for (int i = 0; i < kWidth; ++i) sums[i] = V(0);
    for (int64_t j = 0; j < s.key; j += kWidth) {
      const V x = load(query + j), v = load(p.v + j);
      for (int i = 0; i < kWidth && i < n; ++i) sums[i].v += v.v * tanh_(x + load(keys + i * ldk + j)).v;
    }
    return sum_lanes<kWidth>(sums);
  }
  // What a row's query is multiplied with its source's keys as.
  SK_INL const S* query_of(int64_t i, bool tame) const {
    if (!p.query_panels) return h[s.layers - 1][1 - turn] + i * ldh;
    S* query = q + i * ldq;
    if (tame)
      for (int64_t j = 0; j < s.key; j += kWidth)
        store(exp_(at_least(at_most(load(query + j), kClamp), -kClamp) * V(2)), query + j);
    return query;
  }
  // Row i's weights and context. Its sums depend on its source's length alone, not on S.
  void attend(int64_t i) const {
    const int64_t b = source[i], n = places_of(b);
    S *weights = alpha + i * lds, *to = context + i * lda;
    if (n == 0) {
      memset(weights, 0, lds * sizeof(S));
      memset(to, 0, lda * sizeof(S));
      return;
    }
    const int64_t own = b - part_of.begin;
    const S *keys = this->keys + own * a.places * ldk, *values = this->values + own * a.places * lda;
    const bool additive = p.query_panels, tame = additive && !is_wild(own);
    const S* query = query_of(i, tame);
    const S never = S(kNever);
    V most(never), sum(0);
    for (int64_t j = 0; j < n; j += kWidth) {
      const S* from = keys + j * ldk;
      V score = tame       ? this->additive(query, from, n - j)
                : additive ? additive_of_any(query, from, n - j)
                           : dots(query, from, n - j, s.key, ldk);
      for (int64_t k = n - j; k < kWidth; ++k) score.v[k] = never;
      store(score, weights + j);
      most.v = score.v > most.v ? score.v : most.v;
    }
    const V top(highest(most));
    for (int64_t j = 0; j < n; j += kWidth) {
      V e = exp_(load(weights + j) - top);
      for (int64_t k = n - j; k < kWidth; ++k) e.v[k] = 0;
      store(e, weights + j);
      sum = sum + e;
    }
    const V scale(S(1) / sum_of(sum));
    for (int64_t j = 0; j < lds; j += kWidth) store(j < n ? load(weights + j) * scale : V(0), weights + j);
    for (int64_t j = 0; j < s.pre; j += 4 * kWidth) {
      V sums[4];
      for (V& v : sums) v = V(0);
      for (int64_t k = 0; k < n; ++k)
        for (int v = 0; v < 4; ++v) sums[v].v += weights[k] * load(values + k * lda + j + v * kWidth).v;
      for (int v = 0; v < 4; ++v) store(sums[v], to + j + v * kWidth);
    }
  }
};

}}}  // namespace seqkern::SK_NS
