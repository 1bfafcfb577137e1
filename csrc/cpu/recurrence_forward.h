// Forward of recurrence.h.
#pragma once
#include "recurrence.h"

namespace seqkern { namespace SK_NS { namespace {

template <class T> struct RecurrenceForward : Recurrence<T> {
  using Base = Recurrence<T>;
  using typename Base::V;
  using Base::kWidth, Base::a, Base::k, Base::hidden, Base::width, Base::unit_ld, Base::gate_ld, Base::first;
  using Base::row_size, Base::seen, Base::product, Base::of_row, Base::by_direction, Base::peephole, Base::packed;

  // A part's own: rows of its share of the batch.
  struct Own {
    Rows<T> h;      // the state
    Rows<T> enter;  // h as it goes into the product, where a mask changes it
    Rows<T> reset;  // r h, where the reset gate comes before the product
    T* c;           // [rows][unit_ld]
    T* gh;          // [rows][gate_ld] the product
    T* last;        // [rows][unit_ld] that of n
    T* fresh;       // [unit_ld] a row of c'
  };
  const RecurrencePart& part;
  const int64_t d;
  const OptionMath<T> math;

  RecurrenceForward(const RecurrenceArgs& args, const RecurrencePart& p)
      : Base(args), part(p), d(p.direction), math(seen, int(p.direction)) {}

  Own take(Arena& m, int64_t rows) const {
    Own o;
    o.h = this->left(m, rows, unit_ld);
    o.enter = a.options.h_mask ? this->left(m, rows, unit_ld) : o.h;
    o.reset = this->left(m, k.reset_before ? rows : 0, unit_ld);
    o.c = m.take<T>(a.cell == Cell::kLstm ? rows * unit_ld : 0);
    o.gh = m.take<T>(rows * gate_ld);
    o.last = m.take<T>(k.reset_before ? rows * unit_ld : 0);
    o.fresh = m.take<T>(unit_ld);
    return o;
  }

  void run() const {
    Arena m{part.scratch};
    const int64_t b0 = part.begin;
    const Own o = take(m, part.end - b0);
    const auto weights = packed(d, false);
    auto enter = [&](const void* from, T* to, int64_t b) {
      const T* row = from ? (const T*)from + (d * a.batch + b) * hidden : nullptr;
      for (int64_t j = 0; j < hidden; j += kWidth) store(row ? load(row + j, hidden - j) : V(0), to + j);
    };
    for (int64_t b = b0; b < part.end; ++b) {
      enter(a.h0, o.h.plain(b - b0), b);
      if (a.cell == Cell::kLstm) enter(a.c0, o.c + (b - b0) * unit_ld, b);
    }
    for (int64_t i = 0; i < a.steps; ++i) {
      const int64_t t = d ? a.steps - 1 - i : i, rows = min64(part.end, a.sizes[t]) - b0;
      if (rows <= 0) continue;
      for (int64_t r = 0; r < rows; ++r) begin_row(o, t, b0 + r, r);
      const int64_t asked = this->early(rows, width + row_size);
      for (int64_t r = 0; r < asked; ++r) ask_for_row(t, b0 + r);
      product(o.enter, rows, weights.gates, first, o.gh, gate_ld);
      if (k.reset_before) {
        for (int64_t r = 0; r < rows; ++r) reset_row(o, t, b0 + r, r);
        product(o.reset, rows, weights.last, hidden, o.last, unit_ld);
      }
      for (int64_t r = 0; r < rows; ++r) {
        if (r + 1 >= asked && r + 1 < rows) ask_for_row(t, b0 + r + 1);
        if (a.cell == Cell::kLstm) lstm_row(o, t, b0 + r, r);
        else if (a.cell == Cell::kGru) gru_row(o, t, b0 + r, r);
        else rnn_row(o, t, b0 + r, r);
      }
    }
    auto leave = [&](const T* from, void* to, int64_t b) {
      memcpy((T*)to + (d * a.batch + b) * hidden, from, hidden * sizeof(T));
    };
    for (int64_t b = b0; b < part.end; ++b) {
      leave(o.h.plain(b - b0), a.h_n, b);
      if (a.cell == Cell::kLstm) leave(o.c + (b - b0) * unit_ld, a.c_n, b);
    }
  }

  // What the step at time t reads and writes of row b.
  void ask_for_row(int64_t t, int64_t b) const {
    ask_for<0>(of_row((const T*)a.gx, t, b, d, width), width);
    if (a.reserve) ask_for<1>(by_direction((const T*)a.reserve, t, b, d, row_size), row_size);
  }

  // The state as the step reads it: in place, into what is kept for backward, and on its way into the product.
  void begin_row(const Own& o, int64_t t, int64_t b, int64_t r) const {
    T* h = o.h.plain(r);
    T* c = o.c + r * unit_ld;
    T* kept = a.read ? by_direction((T*)a.read, t, b, d, hidden) : nullptr;
    for (int64_t j = 0; j < hidden; j += kWidth) {
      const int64_t lanes = hidden - j;
      V v = load(h + j);
      if (a.options.keep) {
        store(v = math.kept(v, t, b), h + j);
        if (a.cell == Cell::kLstm) store(math.kept(load(c + j), t, b), c + j);
      }
      if (kept) store(v, kept + j, lanes);
      if (a.options.h_mask) store(math.masked(v, b, j, lanes), o.enter.plain(r) + j);
    }
  }
  // r into its place in gh, and what it leaves of h.
  void reset_row(const Own& o, int64_t t, int64_t b, int64_t r) const {
    const T* x = of_row((const T*)a.gx, t, b, d, width);
    T* g = o.gh + r * gate_ld;
    for (int64_t j = 0; j < hidden; j += kWidth) {
      const int64_t lanes = hidden - j;
      const V reset = gate(k.hard, load(x + j, lanes) + load(g + j));
      store(reset, g + j, lanes);
      store(math.masked(reset * load(o.h.plain(r) + j), b, j, lanes), o.reset.plain(r) + j);
    }
  }
  // The product's row normalised, times its gain; the normalised one is kept.
  void normalise(T* g, T* kept, int64_t n) const {
    const Moments<T> m = moments(g, n);
    const T* gain = (const T*)a.gain_h + d * n;
    for (int64_t j = 0; j < n; j += kWidth) {
      const int64_t lanes = n - j;
      const V v = (load(g + j) - V(m.mean)) * V(m.scale);
      if (kept) store(v, kept + j, lanes);
      store(v * load(gain + j, lanes), g + j);
    }
    if (!kept) return;
    kept[n] = m.scale;
    memset(kept + n + 1, 0, (row_size - k.saved(a.cell) * hidden - n - 1) * sizeof(T));
  }

  void put_h(const Own& o, int64_t t, int64_t b, int64_t r, int64_t j, V h) const {
    const int64_t lanes = hidden - j;
    T* state = o.h.plain(r) + j;
    if (a.options.zone_h) h = math.mix(math.zone_h(t, b, j, lanes), load(state), h);
    store(h, state);
    store(h, of_row((T*)a.y, t, b, d, hidden) + j, lanes);
  }

  void lstm_row(const Own& o, int64_t t, int64_t b, int64_t r) const {
    const T* x = of_row((const T*)a.gx, t, b, d, width);
    T* g = o.gh + r * gate_ld;
    T* c = o.c + r * unit_ld;
    T* kept = a.reserve ? by_direction((T*)a.reserve, t, b, d, row_size) : nullptr;
    if (k.normal) normalise(g, kept ? kept + 6 * hidden : nullptr, width);
    const int64_t at_g = width - 2 * hidden, at_o = width - hidden;
    for (int64_t j = 0; j < hidden; j += kWidth) {
      const int64_t lanes = hidden - j;
      auto sum = [&](int64_t at) { return load(x + at + j, lanes) + load(g + at + j); };
      const V sums[3] = {sum(0), k.coupled ? V(0) : sum(hidden), sum(at_g)};
      const V p[2] = {peephole(d, 0, j, lanes), peephole(d, 1, j, lanes)};
      const V old = load(c + j);
      V saved[3], fresh = variant_lstm_state(k, sums, p, old, saved), out = sum(at_o);
      if (k.peephole) out = out + peephole(d, 2, j, lanes) * fresh;
      out = gate(k.hard, out);
      if (kept) {
        const V all[6] = {saved[0], saved[1], saved[2], out, fresh, old};
        for (int q = 0; q < 6; ++q) store(all[q], kept + q * hidden + j, lanes);
      }
      V next = fresh;
      if (a.options.zone_c) next = math.mix(math.zone_c(t, b, j, lanes), old, fresh);
      if (a.options.c_all) store(next, math.c_row((T*)a.options.c_all, t, b) + j, lanes);
      store(next, c + j);
      if (!k.normal) {
        put_h(o, t, b, r, j, out * tanh_(fresh));
        continue;
      }
      store(fresh, o.fresh + j);
      store(out, g + at_o + j);  // the last of the gates: what this overwrites has been read
    }
    if (!k.normal) return;
    const Moments<T> m = moments(o.fresh, hidden);
    const T *gain = (const T*)a.gain_c + d * hidden, *bias = (const T*)a.bias_c + d * hidden;
    for (int64_t j = 0; j < hidden; j += kWidth) {
      const int64_t lanes = hidden - j;
      const V v = (load(o.fresh + j) - V(m.mean)) * V(m.scale);
      put_h(o, t, b, r, j, load(g + at_o + j) * tanh_(v * load(gain + j, lanes) + load(bias + j, lanes)));
    }
  }

  void gru_row(const Own& o, int64_t t, int64_t b, int64_t r) const {
    const T* x = of_row((const T*)a.gx, t, b, d, width);
    T* g = o.gh + r * gate_ld;
    T* kept = a.reserve ? by_direction((T*)a.reserve, t, b, d, row_size) : nullptr;
    if (k.normal) normalise(g, kept ? kept + 4 * hidden : nullptr, width);
    const T* bias = a.bias_n ? (const T*)a.bias_n + d * hidden : nullptr;
    for (int64_t j = 0; j < hidden; j += kWidth) {
      const int64_t lanes = hidden - j;
      V reset = load(g + j), z = gate(k.hard, load(x + hidden + j, lanes) + load(g + hidden + j)), hn;
      if (k.reset_before) {
        hn = load(o.last + r * unit_ld + j);
      } else {
        reset = gate(k.hard, load(x + j, lanes) + reset);
        hn = load(g + 2 * hidden + j);
        if (bias) hn = hn + load(bias + j, lanes);
      }
      const V n = tanh_(load(x + 2 * hidden + j, lanes) + (k.reset_before ? hn : reset * hn));
      if (kept) {
        const V all[4] = {reset, z, n, hn};
        for (int q = 0; q < 4; ++q) store(all[q], kept + q * hidden + j, lanes);
      }
      put_h(o, t, b, r, j, n + z * (load(o.h.plain(r) + j) - n));
    }
  }

  void rnn_row(const Own& o, int64_t t, int64_t b, int64_t r) const {
    const T* x = of_row((const T*)a.gx, t, b, d, width);
    const T* g = o.gh + r * gate_ld;
    T* kept = a.reserve ? by_direction((T*)a.reserve, t, b, d, row_size) : nullptr;
    for (int64_t j = 0; j < hidden; j += kWidth) {
      const V sum = load(x + j, hidden - j) + load(g + j);
      const V out = a.cell == Cell::kRnnTanh ? tanh_(sum) : relu(sum);
      if (kept) store(out, kept + j, hidden - j);
      put_h(o, t, b, r, j, out);
    }
  }
};

}}}  // namespace seqkern::SK_NS
