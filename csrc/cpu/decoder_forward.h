// The forward pass of the attention decoder. Per step and layer, panel by panel: the product with what comes from below
// (for the bottom layer, the fed-back vector), then the recurrent product with the cell on its tiles; then the row's
// attention, and the product for the attentional vector.
#pragma once
#include "decoder.h"

namespace seqkern { namespace SK_NS { namespace {

template <class C, class S> struct DecoderForward : Decoder<C, S> {
  using Base = Decoder<C, S>;
  using Base::a, Base::ldh, Base::ldk, Base::lda, Base::additive, Base::input, Base::wide_panels, Base::most_rows;
  using Base::kWidth, Base::kBlocks, Base::kVectors, Base::kColumns, Base::kWideColumns;
  using Base::rows_of, Base::kept, Base::kept_h, Base::kept_query, Base::mask, Base::meet_all;
  using typename Base::Acc, typename Base::V, typename Base::Row;

  int64_t panels, ld_scores;
  explicit DecoderForward(const DecoderArgs& args) : Base(args) {
    panels = ceil_div(a.hidden, kWidth * kBlocks);
    ld_scores = ceil_div(a.source, kWidth) * kWidth;
  }

  struct Layer {
    Panels<S> w_x, w_hh;
    Acc *b_x, *b_hh;
  };
  struct Shared {
    Panels<S> w_query, w_pre;
    Acc *b_pre, *v;
    char* layers;
  };
  struct Own {
    Rows<S> feed, h, below[2];  // h: [2][L][rows], state before and after a step by turns; below: masked h, by turns
    Acc* carry;                 // [L][rows][ldh]
    Acc* gx;                    // [tile][kColumns] a tile of the product with what comes from below
    Acc *query, *context;       // [rows][ldk], [rows][lda]
    Acc* weights;               // [ld_scores]
    int64_t rows;
    Rows<S> state(int64_t turn, int64_t layers, int64_t layer) const { return h.at((turn * layers + layer) * rows); }
  };

  Layer layer(Arena& m, int64_t l) const {
    Layer w;
    w.w_x = m.panels<S>(panels, input(l), kVectors, false);
    w.w_hh = m.panels<S>(panels, a.hidden, kVectors, false);
    w.b_x = m.take<Acc>(panels * kColumns);
    w.b_hh = m.take<Acc>(panels * kColumns);
    return w;
  }
  Layer layer(const Shared& s, int64_t l) const {
    Arena m{s.layers};
    Layer w = layer(m, 0);
    for (int64_t i = 1; i <= l; ++i) w = layer(m, i);
    return w;
  }
  Shared shared(Arena& m) const {
    Shared s;
    s.w_query = m.panels<S>(additive() ? wide_panels(a.key) : 0, a.hidden, kWide, false);
    s.w_pre = m.panels<S>(wide_panels(a.vector), a.hidden, kWide, false);
    s.b_pre = m.take<Acc>(lda);
    s.v = m.take<Acc>(ldk);
    s.layers = m.take<char>(0);
    for (int64_t l = 0; l < a.layers; ++l) layer(m, l);
    return s;
  }
  Own own(Arena& m) const {
    Own o;
    o.rows = most_rows();
    o.feed = m.rows<S>(o.rows, lda, false);
    o.h = m.rows<S>(2 * a.layers * o.rows, ldh, false);
    for (Rows<S>& below : o.below) below = m.rows<S>(a.masks ? o.rows : 0, ldh, false);
    o.carry = m.take<Acc>(a.layers * o.rows * ldh);
    o.gx = m.take<Acc>(tile_rows(kVectors) * kColumns);
    o.query = m.take<Acc>(o.rows * ldk);
    o.context = m.take<Acc>(o.rows * lda);
    o.weights = m.take<Acc>(ld_scores);
    return o;
  }
  static int64_t scratch(const DecoderArgs& args) {
    DecoderForward f(args);
    Arena m{nullptr};
    f.shared(m);
    for (int t = 0; t < args.threads; ++t) f.own(m);
    return m.used;
  }

  static void run(const DecoderArgs& args, int tid) {
    DecoderForward f(args);
    Arena m{args.scratch};
    const Shared s = f.shared(m);
    Own o{};
    for (int t = 0; t <= tid; ++t) {
      const int64_t before = m.used;
      o = f.own(m);
      if (t == tid) memset(m.base + before, 0, m.used - before);  // what pads a row is multiplied too
    }
    f.pack(s, tid);
    const Range rows = f.rows_of(tid);
    f.enter(o, rows);
    f.meet_all();
    for (int64_t t = 0; t < args.steps; ++t) {
      for (int64_t l = 0; l < args.layers; ++l) f.layer_step(s, o, t, l, rows);
      f.attend(s, o, t, rows);
    }
  }

  void pack_wide(const S* w, int64_t n, int64_t k, const Panels<S>& to, int tid) const {
    pack_weights(w, n, k, to, part(wide_panels(n), tid, a.threads));
  }
  void pack(const Shared& s, int tid) const {
    const Range p = part(panels, tid, a.threads);
    for (int64_t l = 0; l < a.layers; ++l) {
      const DecoderWeights& from = a.weights[l];
      const Layer w = layer(s, l);
      pack_gates<C>((const S*)from.w_x, a.hidden, w.w_x, p.begin, p.end);
      pack_gates<C>((const S*)from.w_hh, a.hidden, w.w_hh, p.begin, p.end);
      pack_bias<C>((const S*)from.b_x, a.hidden, w.b_x, p.begin, p.end);
      pack_bias<C>((const S*)from.b_hh, a.hidden, w.b_hh, p.begin, p.end);
    }
    if (additive()) pack_wide((const S*)a.w_query, a.key, a.hidden, s.w_query, tid);
    pack_wide((const S*)a.w_pre, a.vector, a.hidden, s.w_pre, tid);
    if (tid) return;
    for (int64_t j = 0; j < lda; ++j) s.b_pre[j] = j < a.vector ? Acc(widen(((const S*)a.b_pre)[j])) : Acc(0);
    for (int64_t j = 0; j < ldk; ++j) s.v[j] = additive() && j < a.key ? Acc(widen(((const S*)a.v)[j])) : Acc(0);
  }

  void enter(const Own& o, Range rows) const {
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      const int64_t r = b - rows.begin;
      copy_row(a.feed0 ? (const S*)a.feed0 + b * a.vector : nullptr, o.feed, r, a.vector);
      for (int64_t l = 0; l < a.layers; ++l) {
        const S* h = (const S*)a.h0 + (l * a.batch + b) * a.hidden;
        copy_row(h, o.state(0, a.layers, l), r, a.hidden);
        const S* from = C::kCarry == Carry::kCell ? (const S*)a.c0 + (l * a.batch + b) * a.hidden : h;
        for (int64_t j = 0; j < a.hidden; ++j) o.carry[(l * o.rows + r) * ldh + j] = Acc(widen(from[j]));
      }
    }
  }

  void layer_step(const Shared& s, const Own& o, int64_t t, int64_t l, Range rows) const {
    const Layer w = layer(s, l);
    const int64_t n = rows.end - rows.begin;
    const Rows<S> h = o.state(t & 1, a.layers, l), next = o.state((t + 1) & 1, a.layers, l);
    const Rows<S> x = l == 0 ? o.feed : a.masks ? o.below[l & 1] : o.state((t + 1) & 1, a.layers, l - 1);
    // Tile by tile, so that what the first product gives is still in L1 when the second meets it.
    constexpr int kMost = tile_rows(kVectors);
    const int64_t tiles = ceil_div(n, kMost);
    const bool nothing = l == 0 && t == 0 && !a.feed0;  // to multiply, and no bias
    if (nothing) memset(o.gx, 0, kMost * kColumns * sizeof(Acc));
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t i = 0; i < tiles; ++i) {
        const Range some = part(n, int(i), int(tiles));
        const int64_t m = some.end - some.begin;
        if (!nothing)
          multiply<kVectors>(x.at(some.begin), m, w.w_x, p, p + 1, w.b_x,
                             [&](int64_t, int64_t, int count, const Acc* c) {
                               for (int k = 0; k < count * kVectors; ++k)
                                 store(load(c + k * kWidth), o.gx + k * kWidth);
                             });
        multiply<kVectors>(h.at(some.begin), m, w.w_hh, p, p + 1, w.b_hh,
                           [&](int64_t, int64_t, int count, const Acc* c) {
                             for (int k = 0; k < count; ++k)
                               cells(o, {t, l, p, rows.begin + some.begin + k}, some.begin + k, o.gx + k * kColumns,
                                     c + k * kColumns, next);
                           });
      }
  }

  struct Place {
    int64_t t, l, panel, b;
  };
  // The cells of a panel's units for row b of the batch, r of this thread.
  SK_INL void cells(const Own& o, const Place& at, int64_t r, const Acc* from_x, const Acc* from_h,
                    const Rows<S>& next) const {
    const int64_t t = at.t, l = at.l, b = at.b;
    const bool top = l + 1 == a.layers, last = t + 1 == a.steps;
    for (int u = 0; u < kBlocks; ++u) {
      const int64_t j = (at.panel * kBlocks + u) * kWidth, lanes = a.hidden - j;
      if (lanes <= 0) break;
      V gx[C::kGates], gh[C::kGates], saved[C::kSaved ? C::kSaved : 1], out;
      for (int g = 0; g < C::kGates; ++g) {
        gx[g] = load(from_x + (u * C::kGates + g) * kWidth);
        gh[g] = load(from_h + (u * C::kGates + g) * kWidth);
        if (l) continue;
        const S* from = (const S*)a.gx + (this->given(t, b) * C::kGates + g) * a.hidden + j;
        // For the next panel, or step: of many short streams the hardware foresees none.
        __builtin_prefetch(
            lanes > kBlocks * kWidth ? from + kBlocks * kWidth : from - j + a.batch * C::kGates * a.hidden, 0, 2);
        gx[g] = gx[g] + load(from, lanes);
      }
      Acc* held = o.carry + (l * o.rows + r) * ldh + j;
      V carry = load(held);
      C::forward(gx, gh, carry, out, saved);
      store(carry, held);
      next.put(out, r, j, lanes);
      if (top && !additive()) store(out, o.query + r * ldk + j);
      if (!top && a.masks) o.below[(l + 1) & 1].put(out * load(mask(t, l, b) + j, lanes), r, j, lanes);
      if (a.reserve) {
        S* keep = kept(t, l, b) + j;
        for (int q = 0; q < C::kSaved; ++q) store(saved[q], keep + q * a.hidden, lanes);
        store(out, keep + C::kSaved * a.hidden, lanes);
        for (int q = 0; q <= C::kSaved; ++q) __builtin_prefetch(keep + q * a.hidden + kBlocks * kWidth, 1, 2);
      }
      if (!last) continue;
      store(out, (S*)a.h_n + (l * a.batch + b) * a.hidden + j, lanes);
      if (C::kCarry == Carry::kCell) store(carry, (S*)a.c_n + (l * a.batch + b) * a.hidden + j, lanes);
    }
  }

  void attend(const Shared& s, const Own& o, int64_t t, Range rows) const {
    const int64_t n = rows.end - rows.begin;
    const Rows<S> h = o.state((t + 1) & 1, a.layers, a.layers - 1);
    if (additive())
      wide_product(h, n, s.w_query, a.key, (const Acc*)nullptr, [&](int64_t r, int64_t j, int64_t lanes, V q) {
        store(q, o.query + r * ldk + j);
        if (a.reserve) store(q, kept_query(t, rows.begin + r) + j, lanes);
      });
    for (int64_t r = 0; r < n; ++r) {
      const int64_t b = rows.begin + r, length = a.lengths[b];
      const S* keys = (const S*)a.keys + b * a.source * a.key;
      const Acc* q = o.query + r * ldk;
      if (additive()) Row::additive(q, s.v, keys, length, a.key, a.source * a.key, o.weights);
      else Row::dots(q, keys, length, a.key, a.source * a.key, o.weights);
      Row::softmax(o.weights, length, a.source);
      S* alpha = (S*)a.alpha + (t * a.batch + b) * a.source;
      for (int64_t i = 0; i < a.source; i += kWidth) store(load(o.weights + i, a.source - i), alpha + i, a.source - i);
      Row::weighted(o.weights, (const S*)a.values + b * a.source * a.vector, length, a.vector, a.source * a.vector,
                    o.context + r * lda);
    }
    wide_product(h, n, s.w_pre, a.vector, s.b_pre, [&](int64_t r, int64_t j, int64_t lanes, V x) {
      V y = tanh_(x + load(o.context + r * lda + j));
      o.feed.put(y, r, j, lanes);
      store(y, (S*)a.a + (t * a.batch + rows.begin + r) * a.vector + j, lanes);
    });
  }
};

}}}  // namespace seqkern::SK_NS
