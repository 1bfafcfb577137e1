// Backward of recurrence.h: the gradient of the projected inputs, of the product, of the initial state and of the small
// parameters. Those of the matrices are products over all steps, which seqkern/recurrence.py leaves to torch.
#pragma once
#include "recurrence.h"

namespace seqkern { namespace SK_NS { namespace {

template <class T> struct RecurrenceBackward : Recurrence<T> {
  using Base = Recurrence<T>;
  using typename Base::V;
  using Base::kWidth, Base::a, Base::k, Base::hidden, Base::width, Base::unit_ld, Base::gate_ld, Base::first;
  using Base::row_size, Base::seen, Base::product, Base::of_row, Base::by_direction, Base::peephole, Base::packed;

  struct Own {
    Rows<T> grads;  // d(loss)/d(W_hh h), the left side of the product
    T *dh, *dc;     // [rows][unit_ld] of the state that the step leaves, then of the one that it reads
    T* past;        // of h, past the product
    T* back;        // the product
    T *out, *norm;  // [unit_ld] a row's d(o), and d(c') or the normalised c'
    RowSums<T> sums;
  };
  const RecurrencePart& part;
  const int64_t d;
  const OptionMath<T> math;
  int64_t at_bias, at_peephole, at_gain_h, at_gain_c, at_bias_c, all_sums;  // places in the sums

  RecurrenceBackward(const RecurrenceArgs& args, const RecurrencePart& p)
      : Base(args), part(p), d(p.direction), math(seen, int(p.direction)) {
    at_bias = 0;
    at_peephole = at_bias + (a.bias_n ? hidden : 0);
    at_gain_h = at_peephole + (k.peephole ? (k.coupled ? 2 : 3) * hidden : 0);
    at_gain_c = at_gain_h + (k.normal ? width : 0);
    at_bias_c = at_gain_c + (a.gain_c ? hidden : 0);
    all_sums = at_bias_c + (a.gain_c ? hidden : 0);
  }

  Own take(Arena& m, int64_t rows) const {
    const Rows<T> grads = this->left(m, rows, gate_ld);
    T* many[4];
    for (T*& p : many) p = m.take<T>(rows * unit_ld);
    T *out = m.take<T>(unit_ld), *norm = m.take<T>(unit_ld);
    return {grads, many[0], many[1], many[2], many[3], out, norm, RowSums<T>(m, all_sums)};
  }

  void run() const {
    Arena m{part.scratch};
    const int64_t b0 = part.begin;
    Own o = take(m, part.end - b0);
    const auto weights = packed(d, true);
    o.sums.clear();
    auto enter = [&](const void* from, T* to, int64_t b) {
      const T* row = from ? (const T*)from + (d * a.batch + b) * hidden : nullptr;
      for (int64_t j = 0; j < hidden; j += kWidth) store(row ? load(row + j, hidden - j) : V(0), to + j);
    };
    for (int64_t b = b0; b < part.end; ++b) {
      enter(a.dh_n, o.dh + (b - b0) * unit_ld, b);
      enter(a.dc_n, o.dc + (b - b0) * unit_ld, b);
    }
    int64_t asked = 0;  // of the step's rows, by the step before
    for (int64_t i = a.steps - 1; i >= 0; --i) {
      const int64_t t = d ? a.steps - 1 - i : i, rows = min64(part.end, a.sizes[t]) - b0;
      if (rows <= 0) continue;
      for (int64_t r = 0; r < rows; ++r) {
        if (r + 1 >= asked && r + 1 < rows) ask_for_row(t, b0 + r + 1);
        output_row(o, t, b0 + r, r);
        if (a.cell == Cell::kLstm) lstm_row(o, t, b0 + r, r);
        else if (a.cell == Cell::kGru) gru_row(o, t, b0 + r, r);
        else rnn_row(o, t, b0 + r, r);
      }
      if (k.reset_before) {
        product(o.grads.at(0, first), rows, weights.last, hidden, o.back, unit_ld);
        for (int64_t r = 0; r < rows; ++r) reset_row(o, t, b0 + r, r);
      }
      for (int64_t r = 0; r < rows; ++r) finish_gates(o, t, b0 + r, r);
      // The next step's rows; a step that goes to fewer or more of them loses nothing but time.
      asked = this->early(rows, row_size + 2 * (width + hidden));
      for (int64_t r = 0; r < asked && i > 0; ++r) ask_for_row(d ? t + 1 : t - 1, b0 + r);
      product(o.grads, rows, weights.gates, hidden, o.back, unit_ld);
      for (int64_t r = 0; r < rows; ++r) finish_row(o, t, b0 + r, r);
    }
    for (int64_t b = b0; b < part.end; ++b) {
      memcpy((T*)a.dh0 + (d * a.batch + b) * hidden, o.dh + (b - b0) * unit_ld, hidden * sizeof(T));
      if (a.cell == Cell::kLstm)
        memcpy((T*)a.dc0 + (d * a.batch + b) * hidden, o.dc + (b - b0) * unit_ld, hidden * sizeof(T));
    }
    o.sums.flush();
    memcpy(part.sums, o.sums.far, all_sums * sizeof(T));
  }

  // What the step at time t reads and writes of row b.
  void ask_for_row(int64_t t, int64_t b) const {
    ask_for<0>(by_direction((const T*)a.reserve, t, b, d, row_size), row_size);
    if (a.cell == Cell::kGru) ask_for<0>(by_direction((const T*)a.read, t, b, d, hidden), hidden);
    if (a.dy) ask_for<0>(of_row((const T*)a.dy, t, b, d, hidden), hidden);
    ask_for<1>(of_row((const T*)a.dgx, t, b, d, width), width);
    if (a.dgh) ask_for<1>(by_direction((const T*)a.dgh, t, b, d, width), width);
  }

  // All of d(loss)/dh' of the cell in dh; what zoneout takes past it in `past`.
  void output_row(const Own& o, int64_t t, int64_t b, int64_t r) const {
    T *dh = o.dh + r * unit_ld, *past = o.past + r * unit_ld;
    const T* dy = a.dy ? of_row((const T*)a.dy, t, b, d, hidden) : nullptr;
    for (int64_t j = 0; j < hidden; j += kWidth) {
      const int64_t lanes = hidden - j;
      V v = load(dh + j);
      if (dy) v = v + load(dy + j, lanes);
      const V old = a.options.zone_h ? math.zone_h(t, b, j, lanes) * v : V(0);
      store(v - old, dh + j);
      store(old, past + j);
    }
  }

  void lstm_row(Own& o, int64_t t, int64_t b, int64_t r) const {
    const T *dh = o.dh + r * unit_ld, *kept = by_direction((const T*)a.reserve, t, b, d, row_size);
    T *dc = o.dc + r * unit_ld, *dx = of_row((T*)a.dgx, t, b, d, width), *grads = o.grads.plain(r);
    const int64_t at_g = width - 2 * hidden, at_o = width - hidden;
    if (k.normal) read_row(o, dh, kept);
    for (int64_t j = 0; j < hidden; j += kWidth) {
      const int64_t lanes = hidden - j;
      V saved[6];
      for (int q = 0; q < 6; ++q) saved[q] = load(kept + q * hidden + j, lanes);
      V dfresh = load(dc + j), dout, old(0);
      if (a.options.dc_all) dfresh = dfresh + load(math.c_row((const T*)a.options.dc_all, t, b) + j, lanes);
      if (a.options.zone_c) {
        old = math.zone_c(t, b, j, lanes) * dfresh;
        dfresh = dfresh - old;
      }
      if (k.normal) {
        dout = load(o.out + j);
        dfresh = dfresh + load(o.norm + j);
      } else {
        const V read = tanh_(saved[4]), v = load(dh + j);
        dout = v * read * dgate(k.hard, saved[3]);
        dfresh = dfresh + v * saved[3] * dtanh(read);
      }
      const V p[2] = {peephole(d, 0, j, lanes), peephole(d, 1, j, lanes)}, three[3] = {saved[0], saved[1], saved[2]};
      if (k.peephole) dfresh = dfresh + dout * peephole(d, 2, j, lanes);
      V grad[3];
      variant_lstm_backward(k, three, p, saved[5], dfresh, grad);
      store(dfresh + old, dc + j);
      auto put = [&](V v, int64_t at) {
        store(v, dx + at + j, lanes);
        store(v, grads + at + j, lanes);
      };
      put(grad[0], 0);
      if (!k.coupled) put(grad[1], hidden);
      put(grad[2], at_g);
      put(dout, at_o);
      if (!k.peephole) continue;
      o.sums.add(at_peephole + j, grad[0] * saved[5], lanes);
      if (!k.coupled) o.sums.add(at_peephole + hidden + j, grad[1] * saved[5], lanes);
      o.sums.add(at_peephole + (k.coupled ? 1 : 2) * hidden + j, dout * saved[4], lanes);
    }
  }
  // Through h' = o tanh(gain LN(c') + bias): d(o) into o.out, that of c' into o.norm.
  void read_row(Own& o, const T* dh, const T* kept) const {
    const T *fresh = kept + 4 * hidden, *outs = kept + 3 * hidden;
    const T *gain = (const T*)a.gain_c + d * hidden, *bias = (const T*)a.bias_c + d * hidden;
    const Moments<T> m = moments(fresh, hidden);
    V sum(0), dot(0);
    for (int64_t j = 0; j < hidden; j += kWidth) {
      const int64_t lanes = hidden - j;
      const V normal = (load(fresh + j, lanes) - V(m.mean)) * V(m.scale), g = load(gain + j, lanes);
      const V read = tanh_(normal * g + load(bias + j, lanes)), out = load(outs + j, lanes);
      const V v = load(dh + j, lanes), dread = v * out * dtanh(read), dn = dread * g;
      store(v * read * dgate(k.hard, out), o.out + j);
      store(dn, o.norm + j);
      sum = sum + dn;
      dot = dot + dn * normal;
      o.sums.add(at_gain_c + j, dread * normal, lanes);
      o.sums.add(at_bias_c + j, dread, lanes);
    }
    const V mean(lane_sum(sum) / T(hidden)), slope(lane_sum(dot) / T(hidden));
    for (int64_t j = 0; j < hidden; j += kWidth) {
      const V normal = (load(fresh + j, hidden - j) - V(m.mean)) * V(m.scale);
      store((load(o.norm + j) - mean - normal * slope) * V(m.scale), o.norm + j);
    }
  }

  void gru_row(Own& o, int64_t t, int64_t b, int64_t r) const {
    const T *dh = o.dh + r * unit_ld, *kept = by_direction((const T*)a.reserve, t, b, d, row_size);
    const T* read = by_direction((const T*)a.read, t, b, d, hidden);
    T *past = o.past + r * unit_ld, *dx = of_row((T*)a.dgx, t, b, d, width), *grads = o.grads.plain(r);
    for (int64_t j = 0; j < hidden; j += kWidth) {
      const int64_t lanes = hidden - j;
      V saved[4];
      for (int q = 0; q < 4; ++q) saved[q] = load(kept + q * hidden + j, lanes);
      V v = load(dh + j), dz, dn;
      variant_gru_backward(k, saved[1], saved[2], load(read + j, lanes), v, dz, dn);
      store(load(past + j) + v, past + j);
      const V dr = dn * saved[3] * dgate(k.hard, saved[0]), dhn = k.reset_before ? dn : dn * saved[0];
      const V grad[3] = {dr, dz, dhn};
      for (int q = k.reset_before; q < 3; ++q) store(grad[q], grads + q * hidden + j, lanes);
      if (!k.reset_before) store(dr, dx + j, lanes);  // else it comes through the product: reset_row
      store(dz, dx + hidden + j, lanes);
      store(dn, dx + 2 * hidden + j, lanes);
      if (a.bias_n) o.sums.add(at_bias + j, dhn, lanes);
    }
  }
  // From `back`, d(loss)/d(r h): that of r, and of h past the other product.
  void reset_row(const Own& o, int64_t t, int64_t b, int64_t r) const {
    const T* read = by_direction((const T*)a.read, t, b, d, hidden);
    const T* kept = by_direction((const T*)a.reserve, t, b, d, row_size);
    T *past = o.past + r * unit_ld, *dx = of_row((T*)a.dgx, t, b, d, width), *grads = o.grads.plain(r);
    for (int64_t j = 0; j < hidden; j += kWidth) {
      const int64_t lanes = hidden - j;
      const V v = math.masked(load(o.back + r * unit_ld + j), b, j, lanes), reset = load(kept + j, lanes);
      const V dr = v * load(read + j, lanes) * dgate(k.hard, reset);
      store(load(past + j) + v * reset, past + j);
      store(dr, dx + j, lanes);
      store(dr, grads + j, lanes);
    }
  }

  void rnn_row(const Own& o, int64_t t, int64_t b, int64_t r) const {
    const T *dh = o.dh + r * unit_ld, *kept = by_direction((const T*)a.reserve, t, b, d, row_size);
    T* dx = of_row((T*)a.dgx, t, b, d, width);
    for (int64_t j = 0; j < hidden; j += kWidth) {
      const V out = load(kept + j, hidden - j);
      const V grad = load(dh + j) * (a.cell == Cell::kRnnTanh ? dtanh(out) : positive(out));
      store(grad, dx + j, hidden - j);
      store(grad, o.grads.plain(r) + j);
    }
  }

  // From the gradient of gain LN(W_hh h) to that of W_hh h, which is handed out where it is not that of the inputs.
  void finish_gates(Own& o, int64_t t, int64_t b, int64_t r) const {
    T* grads = o.grads.plain(r);
    if (k.normal) {
      const T* normal = by_direction((const T*)a.reserve, t, b, d, row_size) + k.saved(a.cell) * hidden;
      const T* gain = (const T*)a.gain_h + d * width;
      V sum(0), dot(0);
      for (int64_t j = 0; j < width; j += kWidth) {
        const int64_t lanes = width - j;
        const V v = load(grads + j, lanes), n = load(normal + j, lanes), dn = v * load(gain + j, lanes);
        o.sums.add(at_gain_h + j, v * n, lanes);
        store(dn, grads + j);
        sum = sum + dn;
        dot = dot + dn * n;
      }
      const V mean(lane_sum(sum) / T(width)), slope(lane_sum(dot) / T(width)), scale(normal[width]);
      for (int64_t j = 0; j < width; j += kWidth)
        store((load(grads + j) - mean - load(normal + j, width - j) * slope) * scale, grads + j);
    }
    if (all_sums) o.sums.row_done();
    if (a.dgh) memcpy(by_direction((T*)a.dgh, t, b, d, width), grads, width * sizeof(T));
  }

  // The gradient of the state that the step before left.
  void finish_row(const Own& o, int64_t t, int64_t b, int64_t r) const {
    T *dh = o.dh + r * unit_ld, *dc = a.cell == Cell::kLstm ? o.dc + r * unit_ld : nullptr;
    const T *back = o.back + r * unit_ld, *past = o.past + r * unit_ld;
    T squares_h = 0, squares_c = 0;
    for (int64_t j = 0; j < hidden; j += kWidth) {
      const int64_t lanes = hidden - j;
      V v = math.clipped(math.masked(load(back + j), b, j, lanes) + load(past + j));
      store(v, dh + j);
      V c = dc ? math.clipped(load(dc + j)) : V(0);
      if (dc) store(c, dc + j);
      if (a.clip_norm == 0) continue;
      for (int i = 0; i < min64(lanes, kWidth); ++i) {
        squares_h += v.v[i] * v.v[i];
        squares_c += c.v[i] * c.v[i];
      }
    }
    shorten(dh, squares_h, t, b);
    if (dc) shorten(dc, squares_c, t, b);
  }
  // Scales a row down to clip_norm, and by keep.
  void shorten(T* v, T squares, int64_t t, int64_t b) const {
    const T norm = T(__builtin_sqrt(squares)), most = T(a.clip_norm);
    const bool longer = a.clip_norm > 0 && norm > most;
    if (!longer && !a.options.keep) return;
    const V factor(longer ? most / norm : T(1));
    for (int64_t j = 0; j < hidden; j += kWidth) store(math.kept(load(v + j) * factor, t, b), v + j);
  }
};

}}}  // namespace seqkern::SK_NS
