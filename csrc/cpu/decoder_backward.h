// The backward pass of the attention decoder, against time. What has to go from step to step (the gradients of h, c and
// of the fed-back vector) is kept per row; gradients that are sums over steps are taken after the last, from the stored
// gradients of all steps: per row those of keys and values, then, over all rows, those of the weights.
#pragma once
#include "decoder_sums.h"

namespace seqkern { namespace SK_NS { namespace {

template <class C, class S> struct DecoderBackward : DecoderSums<C, S> {
  using Base = DecoderSums<C, S>;
  using Base::a, Base::ldh, Base::ldk, Base::lda, Base::additive, Base::input, Base::wide_panels, Base::most_rows,
      Base::rows;
  using Base::kWidth, Base::kSkip, Base::kDirect, Base::kWideColumns;
  using Base::rows_of, Base::kept, Base::kept_h, Base::kept_query, Base::mask, Base::meet_all, Base::grads,
      Base::grad_ld;
  using Base::work, Base::sum_weights, Base::sum_tokens, Base::Base;
  using typename Base::Acc, typename Base::V, typename Base::Row, typename Base::Store, typename Base::Work;

  // Whether the stored gradients are operands as they are. Else each step's are rounded into buffers.
  static constexpr bool kOperands = sizeof(typename OperandOf<S>::Type) == sizeof(Acc);

  struct Layer {
    Panels<S> w_x, w_hh;
  };  // right-hand sides [G*H, A or H], [G*H, H]
  struct Shared {
    Panels<S> w_query, w_pre;  // right-hand sides [K, H], [A, H]
    Acc* v;
    Acc* tokens;  // [V][G*H] sums that the output's type cannot hold
    char* layers;
    Store store;
  };
  struct Own {
    Rows<S> grads, pre, query;  // operands of a step's products
    Acc *dh, *carry;            // [L][rows][ldh]; carry: of c, or the part of h's that goes past the cell
    Acc* dfeed;                 // [rows][lda]
    Acc *wide_query, *dq, *dv;  // [ldk] each, a row's
    Acc *alpha, *dalpha;        // [ld_scores]
    Acc* dkeys;                 // [rows][S][K], additive scores in 16 bits
    int64_t rows;
  };

  // The operand for rows whose gradients are stored from `from` on.
  static Rows<S> operand(const Rows<S>& buffer, const Acc* from) {
    return kOperands ? Rows<S>{(char*)from, buffer.ld, false} : buffer;
  }
  static SK_INL void put(V x, Acc* stored, const Rows<S>& buffer, int64_t r, int64_t j, int64_t lanes) {
    store(x, stored + j, lanes);
    if (!kOperands) buffer.put(x, r, j, lanes);
  }

  Layer layer(Arena& m, int64_t l) const {
    Layer w;
    w.w_x = m.panels<S>(wide_panels(input(l)), C::kGates * a.hidden, kWide, false);
    w.w_hh = m.panels<S>(wide_panels(a.hidden), C::kGates * a.hidden, kWide, false);
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
    s.w_query = m.panels<S>(additive() ? wide_panels(a.hidden) : 0, a.key, kWide, false);
    s.w_pre = m.panels<S>(wide_panels(a.hidden), a.vector, kWide, false);
    s.v = m.take<Acc>(ldk);
    s.tokens = m.take<Acc>(a.tokens && !kDirect ? a.vocab * C::kGates * a.hidden : 0);
    s.store.grads = m.take<Acc>(a.layers * rows() * grad_ld());
    s.store.pre = m.take<Acc>(rows() * lda);
    s.store.query = m.take<Acc>(additive() ? rows() * ldk : 0);
    s.store.scores = m.take<Acc>(additive() ? 0 : rows() * a.source);
    s.store.dv = m.take<Acc>(a.threads * ldk);
    s.layers = m.take<char>(0);
    for (int64_t l = 0; l < a.layers; ++l) layer(m, l);
    return s;
  }
  Own own(Arena& m) const {
    Own o;
    o.rows = most_rows();
    const int64_t buffered = kOperands ? 0 : o.rows;
    o.grads = m.rows<S>(buffered, grad_ld(), false);
    o.pre = m.rows<S>(buffered, lda, false);
    o.query = m.rows<S>(additive() ? buffered : 0, ldk, false);
    o.dh = m.take<Acc>(a.layers * o.rows * ldh);
    o.carry = m.take<Acc>(a.layers * o.rows * ldh);
    o.dfeed = m.take<Acc>(o.rows * lda);
    o.wide_query = m.take<Acc>(ldk);
    o.dq = m.take<Acc>(ldk);
    o.dv = m.take<Acc>(ldk);
    o.alpha = m.take<Acc>(ceil_div(a.source, kWidth) * kWidth);
    o.dalpha = m.take<Acc>(ceil_div(a.source, kWidth) * kWidth);
    o.dkeys = m.take<Acc>(!kDirect && additive() && a.dkeys ? o.rows * a.source * a.key : 0);
    return o;
  }
  static int64_t scratch(const DecoderArgs& args) {
    DecoderBackward f(args);
    Arena m{nullptr};
    f.shared(m);
    for (int t = 0; t < args.threads; ++t) {
      f.own(m);
      f.work(m);
    }
    return m.used;
  }

  static void run(const DecoderArgs& args, int tid) {
    DecoderBackward f(args);
    Arena m{args.scratch};
    const Shared s = f.shared(m);
    Own o{};
    Work w{};
    for (int t = 0; t <= tid; ++t) {
      const int64_t before = m.used;
      o = f.own(m);
      if (t == tid) memset(m.base + before, 0, m.used - before);  // what pads a row is multiplied too
      w = f.work(m);
    }
    f.pack(s, tid);
    const Range rows = f.rows_of(tid);
    f.enter(s, o, rows, tid);
    f.meet_all();
    for (int64_t t = args.steps - 1; t >= 0; --t) f.step(s, o, t, rows, tid);
    f.leave(o, rows);
    if (args.dvalues) f.sum_sources(s, o, rows);
    f.meet_all();
    if (args.tokens) f.sum_tokens(s.store, s.tokens, tid);
    if (!args.dw_pre) return;
    f.sum_weights(s.store, w, tid);
    if (f.additive() && tid == 0) f.sum_v(s);
  }

  // Rows in the order of the cell's columns of gradients.
  void pack_by_gate(const S* w, int64_t n, const int (&order)[C::kGates], const Panels<S>& to, int tid) const {
    const Range p = part(wide_panels(n), tid, a.threads);
    pack_rows(to, p.begin, p.end, n, 0, to.k,
              [&](int64_t k) { return w + (order[k / a.hidden] * a.hidden + k % a.hidden) * n; });
  }
  void pack(const Shared& s, int tid) const {
    for (int64_t l = 0; l < a.layers; ++l) {
      const Layer w = layer(s, l);
      pack_by_gate((const S*)a.weights[l].w_x, input(l), C::kOrder, w.w_x, tid);
      pack_by_gate((const S*)a.weights[l].w_hh, a.hidden, C::kOrderH, w.w_hh, tid);
    }
    const Range p = part(wide_panels(a.hidden), tid, a.threads);
    pack_rows(s.w_pre, p.begin, p.end, a.hidden, 0, a.vector,
              [&](int64_t k) { return (const S*)a.w_pre + k * a.hidden; });
    if (!additive()) return;
    pack_rows(s.w_query, p.begin, p.end, a.hidden, 0, a.key,
              [&](int64_t k) { return (const S*)a.w_query + k * a.hidden; });
    for (int64_t j = 0; j < ldk && tid == 0; ++j) s.v[j] = j < a.key ? Acc(widen(((const S*)a.v)[j])) : Acc(0);
  }

  void enter(const Shared& s, const Own& o, Range rows, int tid) const {
    memset(s.store.dv + tid * ldk, 0, ldk * sizeof(Acc));
    if (kDirect && additive() && a.dkeys && rows.end > rows.begin)
      memset((S*)a.dkeys + rows.begin * a.source * a.key, 0, (rows.end - rows.begin) * a.source * a.key * sizeof(S));
    for (int64_t l = 0; l < a.layers; ++l)
      for (int64_t b = rows.begin; b < rows.end; ++b) {
        const int64_t to = (l * o.rows + b - rows.begin) * ldh, from = (l * a.batch + b) * a.hidden;
        for (int64_t j = 0; a.dh_n && j < a.hidden; ++j) o.dh[to + j] = Acc(widen(((const S*)a.dh_n)[from + j]));
        if (C::kCarry == Carry::kCell && a.dc_n)
          for (int64_t j = 0; j < a.hidden; ++j) o.carry[to + j] = Acc(widen(((const S*)a.dc_n)[from + j]));
      }
  }

  void step(const Shared& s, const Own& o, int64_t t, Range rows, int tid) const {
    const int64_t n = rows.end - rows.begin, top = (a.layers - 1) * o.rows;
    memset(o.dv, 0, ldk * sizeof(Acc));
    for (int64_t r = 0; r < n; ++r) attention(s, o, t, rows.begin + r, r);
    Acc* dv = s.store.dv + tid * ldk;
    if (additive())
      for (int64_t j = 0; j < ldk; j += kWidth) store(load(dv + j) + load(o.dv + j), dv + j);
    const auto add_top = [&](int64_t r, int64_t j, int64_t, V x) {
      Acc* at = o.dh + (top + r) * ldh + j;
      store(load(at) + x, at);
    };
    const int64_t row = t * a.batch + rows.begin;
    wide_product(operand(o.pre, s.store.pre + row * lda), n, s.w_pre, a.hidden, (const Acc*)nullptr, add_top);
    if (additive())
      wide_product(operand(o.query, s.store.query + row * ldk), n, s.w_query, a.hidden, (const Acc*)nullptr, add_top);
    for (int64_t l = a.layers - 1; l >= 0; --l) layer_step(s, o, t, l, rows);
  }

  // Row b at step t: from the gradient of its attentional vector to those of the scores and the query.
  void attention(const Shared& s, const Own& o, int64_t t, int64_t b, int64_t r) const {
    const int64_t length = a.lengths[b], row = t * a.batch + b;
    const S *y = (const S*)a.a + row * a.vector, *dy = a.da ? (const S*)a.da + row * a.vector : nullptr;
    Acc* pre = s.store.pre + row * lda;
    for (int64_t j = 0; j < a.vector; j += kWidth) {
      const int64_t lanes = a.vector - j;
      V d = load(o.dfeed + r * lda + j), out = load(y + j, lanes);
      if (dy) d = d + load(dy + j, lanes);
      d = d * (V(1) - out * out);
      put(d, pre, o.pre, r, j, kWidth);  // lanes past A are zeros
    }
    const S *alpha = (const S*)a.alpha + row * a.source,
            *dalpha = a.dalpha ? (const S*)a.dalpha + row * a.source : nullptr;
    Row::dots(pre, (const S*)a.values + b * a.source * a.vector, length, a.vector, a.source * a.vector, o.dalpha);
    for (int64_t i = 0; i < length; i += kWidth) {
      store(load(alpha + i, length - i), o.alpha + i);
      if (dalpha) store(load(o.dalpha + i) + load(dalpha + i, length - i), o.dalpha + i);
    }
    Row::softmax_backward(o.alpha, o.dalpha, length);
    const S* keys = (const S*)a.keys + b * a.source * a.key;
    if (additive()) {
      for (int64_t j = 0; j < a.key; j += kWidth) store(load(kept_query(t, b) + j, a.key - j), o.wide_query + j);
      Acc* dkeys = o.dkeys + r * a.source * a.key;
      if constexpr (kDirect) dkeys = (Acc*)a.dkeys + b * a.source * a.key;
      Row::additive_backward(o.dalpha, o.wide_query, s.v, keys, length, a.key, a.source * a.key, o.dq, o.dv,
                             a.dkeys ? dkeys : nullptr);
      for (int64_t j = 0; j < a.key; j += kWidth)
        put(load(o.dq + j), s.store.query + row * ldk, o.query, r, j, a.key - j);
    } else {
      for (int64_t i = 0; i < a.source; i += kWidth)
        store(i < length ? load(o.dalpha + i, length - i) : V(0), s.store.scores + row * a.source + i, a.source - i);
      Row::weighted(o.dalpha, keys, length, a.key, a.source * a.key, o.dq);
      Acc* dh = o.dh + ((a.layers - 1) * o.rows + r) * ldh;
      for (int64_t j = 0; j < a.hidden; j += kWidth) store(load(dh + j) + load(o.dq + j), dh + j);
    }
  }

  void layer_step(const Shared& s, const Own& o, int64_t t, int64_t l, Range rows) const {
    const int64_t n = rows.end - rows.begin;
    const Layer w = layer(s, l);
    for (int64_t r = 0; r < n; ++r) cells(s, o, t, l, rows.begin + r, r);
    const Rows<S> d = operand(o.grads, grads(s.store, l, t, rows.begin));
    if (l || t || a.dfeed0)
      wide_product(d, n, w.w_x, input(l), (const Acc*)nullptr, [&](int64_t r, int64_t j, int64_t lanes, V x) {
        if (l == 0) return store(x, o.dfeed + r * lda + j);
        if (a.masks) {
          const int64_t b = rows.begin + r;
          if (a.dmasks)
            store(x * load(kept_h(t, l - 1, b) + j, lanes), (S*)a.dmasks + (mask(t, l - 1, b) - (const S*)a.masks) + j,
                  lanes);
          x = x * load(mask(t, l - 1, b) + j, lanes);
        }
        Acc* at = o.dh + ((l - 1) * o.rows + r) * ldh + j;
        store(load(at) + x, at);
      });
    wide_product(d.at(0, kSkip * a.hidden), n, w.w_hh, a.hidden, (const Acc*)nullptr,
                 [&](int64_t r, int64_t j, int64_t, V x) { store(x, o.dh + (l * o.rows + r) * ldh + j); });
  }

  void cells(const Shared& s, const Own& o, int64_t t, int64_t l, int64_t b, int64_t r) const {
    const S *keep = kept(t, l, b), *first = C::kCarry == Carry::kCell ? (const S*)a.c0 : (const S*)a.h0;
    const S* before = t ? kept(t - 1, l, b) + (C::kCarry == Carry::kCell ? C::kSaved - 1 : C::kSaved) * a.hidden
                        : first + (l * a.batch + b) * a.hidden;
    Acc* to = grads(s.store, l, t, b);
    for (int64_t j = 0; j < a.hidden; j += kWidth) {
      const int64_t lanes = a.hidden - j, at = (l * o.rows + r) * ldh + j;
      V saved[C::kSaved ? C::kSaved : 1], grad[C::kGrads], out(0), prev(0);
      for (int q = 0; q < C::kSaved; ++q) saved[q] = load(keep + q * a.hidden + j, lanes);
      if (C::kCarry == Carry::kNone) out = load(keep + j, lanes);
      else prev = load(before + j, lanes);
      // The next row's: of many short streams the hardware foresees none.
      for (int q = 0; q < C::kSaved; ++q) __builtin_prefetch(keep + (Base::kStride + q) * a.hidden + j, 0, 2);
      __builtin_prefetch(before + Base::kStride * a.hidden + j, 0, 2);
      for (int g = 0; g < C::kGrads; ++g) __builtin_prefetch(to + grad_ld() + g * a.hidden + j, 1, 2);
      for (int g = 0; !l && !a.tokens && g < C::kGates; ++g)
        __builtin_prefetch((S*)a.dgx + ((t * a.batch + b + 1) * C::kGates + g) * a.hidden + j, 1, 2);
      V carry = load(o.carry + at);
      C::backward(saved, out, prev, load(o.dh + at), carry, grad);
      store(carry, o.carry + at);
      for (int g = 0; g < C::kGrads; ++g) put(grad[g], to, o.grads, r, g * a.hidden + j, lanes);
      if (l || a.tokens) continue;
      for (int g = 0; g < C::kGates; ++g)
        store(grad[g], (S*)a.dgx + ((t * a.batch + b) * C::kGates + C::kOrder[g]) * a.hidden + j, lanes);
    }
  }

  void leave(const Own& o, Range rows) const {
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      const int64_t r = b - rows.begin;
      for (int64_t j = 0; a.dfeed0 && j < a.vector; ++j) narrow(o.dfeed[r * lda + j], ((S*)a.dfeed0)[b * a.vector + j]);
      for (int64_t l = 0; l < a.layers; ++l) {
        const Acc *dh = o.dh + (l * o.rows + r) * ldh, *carry = o.carry + (l * o.rows + r) * ldh;
        const int64_t to = (l * a.batch + b) * a.hidden;
        for (int64_t j = 0; j < a.hidden; ++j) {
          narrow(C::kCarry == Carry::kHidden ? dh[j] + carry[j] : dh[j], ((S*)a.dh0)[to + j]);
          if (C::kCarry == Carry::kCell) narrow(carry[j], ((S*)a.dc0)[to + j]);
        }
      }
    }
  }

  // Gradients of keys and values, row by row: over all steps at once, so that each is written once.
  void sum_sources(const Shared& s, const Own& o, Range rows) const {
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      const int64_t length = a.lengths[b];
      Row::template outer<S, Acc>({(const S*)a.alpha + b * a.source, a.batch * a.source, s.store.pre + b * lda,
                                   a.batch * lda, a.steps, length, a.source, a.vector,
                                   (S*)a.dvalues + b * a.source * a.vector});
      S* dkeys = (S*)a.dkeys + b * a.source * a.key;
      if (!additive()) {
        Row::template outer<Acc, S>({s.store.scores + b * a.source, a.batch * a.source, kept_h(0, a.layers - 1, b),
                                     a.layers * a.batch * Base::kStride * a.hidden, a.steps, length, a.source, a.key,
                                     dkeys});
      } else if (!kDirect) {
        const Acc* from = o.dkeys + (b - rows.begin) * a.source * a.key;
        for (int64_t i = 0; i < a.source * a.key; ++i) narrow(from[i], dkeys[i]);
      }
    }
  }
  void sum_v(const Shared& s) const {
    for (int64_t j = 0; j < a.key; ++j) {
      Acc sum = 0;
      for (int i = 0; i < a.threads; ++i) sum += s.store.dv[i * ldk + j];
      narrow(sum, ((S*)a.dv)[j]);
    }
  }
};

}}}  // namespace seqkern::SK_NS
