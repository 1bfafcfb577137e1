// Kernels of seqkern::recurrence: cells beyond torch.nn's (core/variant_cells.h) and what needs a whole row of units at
// once, layer normalisation and gradients bounded by norm. One step at a time, on the results of its products.
//
// A block takes one row of one direction, in some passes over its units. A thread takes the same units in each, with
// all their gates: it reads what it wrote itself, and only sums over the row make the block wait.
#pragma once
#include "step_options.cuh"
#include "step_sums.cuh"
#include "variant_args.h"

#include "../core/variant_cells.h"

namespace seqkern { namespace cuda { namespace {

// Sums over the block, the same to the bit in every thread.
template <int n, class T> SK_MATH void block_sum(T (&v)[n]) {
  constexpr int kWarps = kRowThreads / 32;
  SK_SHARED_STATIC(T, part, n * kWarps);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32;
#pragma unroll
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int x = 16; x > 0; x /= 2) v[i] += shfl_xor(v[i], x);
    if (lane == 0) part[i * kWarps + warp] = v[i];
  }
  block_sync();
#pragma unroll
  for (int i = 0; i < n; ++i) {
    v[i] = part[i * kWarps];
    for (int w = 1; w < warps; ++w) v[i] += part[i * kWarps + w];
  }
  block_sync();
}

template <class T> SK_MATH T kept(const LayerOptions& o, int64_t row, T v) {
  T one[1] = {v};
  keep_state<T>(o, row, one);
  return one[0];
}
template <class T> SK_MATH T masked(const LayerOptions& o, int64_t at, T v) {
  T one[1] = {v};
  mask_state<T>(o, at, one);
  return one[0];
}
template <class T> SK_MATH T clipped(const LayerOptions& o, T v) {
  T one[1] = {v};
  clip<T>(o, nullptr, 0, one);
  return one[0];
}

template <class T> struct Moments {
  T mean, scale;  // scale: 1 / sqrt(variance + 1e-5)
};
template <class T> struct StateGradient {
  T h, c;
};

// A block's row, and where it lies in what the step is given.
template <class T> struct VariantRow {
  const VariantStep& s;
  const RecurrenceArgs& a;
  const Variant& k;
  const LayerOptions& o;
  const int d;
  const int64_t b, row, hidden, width;

  SK_MATH explicit VariantRow(const VariantStep& step)
      : s(step),
        a(s.a),
        k(a.variant),
        o(a.options),
        d(int(blockIdx.z)),
        b(blockIdx.x),
        row(pick(s.step.first, d) + b),
        hidden(a.hidden),
        width(a.gates * hidden) {}

  SK_MATH bool begun() const { return b < pick(s.step.rows, d); }
  SK_MATH bool taken() const { return inside(o, pick(s.near.time, d), b); }
  SK_MATH bool lstm() const { return a.cell == Cell::kLstm; }

  SK_MATH int64_t state_at(int64_t j) const { return (d * a.batch + b) * hidden + j; }
  SK_MATH T* state(const void* of) const { return of ? (T*)of + state_at(0) : nullptr; }  // [D, B, H]
  SK_MATH T* gates(const void* of) const { return (T*)of + (d * a.batch + b) * width; }   // [D, B, G*H]
  SK_MATH T* output(const void* of, int64_t n) const {                                    // [N, D, n]
    return of ? (T*)of + (row * a.directions + d) * n : nullptr;
  }
  SK_MATH T* by_direction(const void* of, int64_t n) const {  // [D, N, n]
    return of ? (T*)of + (d * a.rows + row) * n : nullptr;
  }
  SK_MATH const T* own(const void* of, int64_t n) const { return of ? (const T*)of + d * n : nullptr; }  // [D, n]
  SK_MATH int64_t row_size() const { return k.row(a.cell, a.gates, hidden); }

  template <class F> SK_MATH void each(const F& f) const {
    for (int64_t j = threadIdx.x; j < hidden; j += blockDim.x) f(j);
  }
  // Every column of this thread's units.
  template <class F> SK_MATH void each_gate(const F& f) const {
    for (int64_t g = 0; g < width; g += hidden)
      for (int64_t j = threadIdx.x; j < hidden; j += blockDim.x) f(g + j);
  }
  SK_MATH void clear(T* to, int64_t n) const {
    for (int64_t j = threadIdx.x; to && j < n; j += blockDim.x) to[j] = T(0);
  }
  SK_MATH T peephole(int which, int64_t j) const {  // which: of i, f, o
    if (!k.peephole || (k.coupled && which == 1)) return T(0);
    const int64_t parts = k.coupled ? 2 : 3;
    return ((const T*)a.peephole)[(d * parts + (k.coupled && which ? 1 : which)) * hidden + j];
  }

  // Of n numbers, which `all` calls its argument's argument with.
  template <class All> SK_MATH static Moments<T> moments(int64_t n, const All& all) {
    T sum[1] = {T(0)}, squares[1] = {T(0)};
    all([&](T v) { sum[0] += v; });
    block_sum(sum);
    const T mean = sum[0] / T(n);
    all([&](T v) { squares[0] += (v - mean) * (v - mean); });
    block_sum(squares);
    return {mean, T(1) / root(squares[0] / T(n) + T(1e-5))};
  }
  SK_MATH Moments<T> unit_moments(const T* v) const {
    return moments(hidden, [&](const auto& f) { each([&](int64_t j) { f(v[j]); }); });
  }

  // ---- forward

  SK_MATH void idle_forward() const {
    clear(output(a.y, hidden), hidden);
    clear(output(o.c_all, hidden), hidden);
    clear(by_direction(a.read, hidden), hidden);
    clear(by_direction(a.reserve, row_size()), row_size());
  }
  SK_MATH T read_h(int64_t j) const { return kept(o, row, state(a.h_n)[j]); }

  // The block's shared row, where it has one; else the one in memory.
  SK_MATH T* close_row() const {
    SK_SHARED(T, close);
    return s.close ? close : gates(s.gates);
  }
  // With what the row in memory holds. Loads first: those of a unit are under way at once.
  SK_MATH T* fetched_row() const {
    T *to = close_row(), *from = gates(s.gates);
    if (!s.close) return to;
    each([&](int64_t j) {
      T v[4];
#pragma unroll
      for (int q = 0; q < 4; ++q)
        if (q * hidden < width) v[q] = from[q * hidden + j];
#pragma unroll
      for (int q = 0; q < 4; ++q)
        if (q * hidden < width) to[q * hidden + j] = v[q];
    });
    return to;
  }

  // The product's row normalised, times its gain; the normalised one is kept.
  SK_MATH void normalise(T* g, T* to) const {
    const T* gain = own(a.gain_h, width);
    const Moments<T> m = moments(width, [&](const auto& f) { each_gate([&](int64_t q) { f(g[q]); }); });
    each_gate([&](int64_t q) {
      const T v = (g[q] - m.mean) * m.scale;
      if (to) to[q] = v;
      g[q] = v * gain[q];
    });
    if (!to) return;
    for (int64_t q = width + threadIdx.x; q < row_size() - k.saved(a.cell) * hidden; q += blockDim.x)
      to[q] = q == width ? m.scale : T(0);
  }

  SK_MATH void put_h(int64_t j, T h) const {
    T* to = state(a.h_n);
    if (T* read = by_direction(a.read, hidden)) read[j] = read_h(j);
    if (o.zone_h) {
      const T old[1] = {read_h(j)};
      T mixed[1] = {h};
      mix<T>(o.zone_h, zone_h_at(o, row, d, hidden, j), old, mixed);
      h = mixed[0];
    }
    to[j] = h;
    output(a.y, hidden)[j] = h;
    if (s.enter && b < pick(s.near.both, d))
      state(s.enter)[j] = masked(o, state_at(j), kept(o, pick(s.near.after, d) + b, h));
  }

  SK_MATH void reset_forward() const {
    const T* x = output(a.gx, width);
    T *g = gates(s.gates), *to = state(s.reset);
    each([&](int64_t j) {
      g[j] = gate(k.hard, x[j] + g[j]);
      to[j] = masked(o, state_at(j), g[j] * read_h(j));
    });
  }

  SK_MATH void lstm_forward(const T* x, T* g, T* to) const {
    const int64_t at_g = width - 2 * hidden, at_o = width - hidden;
    T *c = state(a.c_n), *c_all = output(o.c_all, hidden);
    each([&](int64_t j) {
      const T sums[3] = {x[j] + g[j], k.coupled ? T(0) : x[hidden + j] + g[hidden + j], x[at_g + j] + g[at_g + j]};
      const T p[2] = {peephole(0, j), peephole(1, j)}, old[1] = {kept(o, row, c[j])};
      T saved[3];
      const T fresh = variant_lstm_state(k, sums, p, old[0], saved);
      const T out = gate(k.hard, x[at_o + j] + g[at_o + j] + (k.peephole ? peephole(2, j) * fresh : T(0)));
      if (to) {
        const T all[6] = {saved[0], saved[1], saved[2], out, fresh, old[0]};
#pragma unroll
        for (int q = 0; q < 6; ++q) to[q * hidden + j] = all[q];
      }
      T next[1] = {fresh};
      if (o.zone_c) mix<T>(o.zone_c, zone_c_at(o, row, d, hidden, j), old, next);
      if (c_all) c_all[j] = next[0];
      c[j] = next[0];
      if (!k.normal) return put_h(j, out * tanh_(fresh));
      g[at_g + j] = fresh;  // what these overwrite has been read
      g[at_o + j] = out;
    });
    if (!k.normal) return;
    const Moments<T> m = unit_moments(g + at_g);
    const T *gain = own(a.gain_c, hidden), *bias = own(a.bias_c, hidden);
    each([&](int64_t j) { put_h(j, g[at_o + j] * tanh_((g[at_g + j] - m.mean) * m.scale * gain[j] + bias[j])); });
  }
  SK_MATH void gru_forward(const T* x, const T* g, T* to) const {
    const T* bias = own(a.bias_n, hidden);
    each([&](int64_t j) {
      const T r = k.reset_before ? g[j] : gate(k.hard, x[j] + g[j]);
      const T z = gate(k.hard, x[hidden + j] + g[hidden + j]);
      const T hn = g[2 * hidden + j] + (bias ? bias[j] : T(0));
      const T n = tanh_(x[2 * hidden + j] + (k.reset_before ? hn : r * hn));
      if (to) {
        const T all[4] = {r, z, n, hn};
#pragma unroll
        for (int q = 0; q < 4; ++q) to[q * hidden + j] = all[q];
      }
      put_h(j, n + z * (read_h(j) - n));
    });
  }
  SK_MATH void forward() const {
    const T* x = output(a.gx, width);
    T *g = fetched_row(), *to = by_direction(a.reserve, row_size());
    if (k.normal) normalise(g, to ? to + k.saved(a.cell) * hidden : nullptr);
    if (lstm()) return lstm_forward(x, g, to);
    if (a.cell == Cell::kGru) return gru_forward(x, g, to);
    each([&](int64_t j) {
      const T sum = x[j] + g[j], out = a.cell == Cell::kRnnTanh ? tanh_(sum) : relu(sum);
      if (to) to[j] = out;
      put_h(j, out);
    });
  }

  // ---- backward

  SK_MATH void idle_backward() const {
    clear(output(a.dgx, width), width);
    clear(by_direction(a.dgh, width), width);
  }
  SK_MATH bool after() const { return b < pick(s.near.both, d) && inside(o, pick(s.near.time_after, d), b); }

  // d(loss)/d(state that a later step read), before its norm is bounded.
  SK_MATH StateGradient<T> unbounded(int64_t j) const {
    return {clipped(o, masked(o, state_at(j), state(s.back)[j]) + state(s.past)[j]),
            lstm() ? clipped(o, state(s.dc)[j]) : T(0)};
  }
  SK_MATH StateGradient<T> bounds() const {
    if (!(a.clip_norm > 0)) return {T(1), T(1)};
    T squares[2] = {T(0), T(0)};
    each([&](int64_t j) {
      const StateGradient<T> v = unbounded(j);
      squares[0] += v.h * v.h;
      squares[1] += v.c * v.c;
    });
    block_sum(squares);
    const T most = T(a.clip_norm), h = root(squares[0]), c = root(squares[1]);
    return {h > most ? most / h : T(1), c > most ? most / c : T(1)};
  }
  // d(loss)/d(state) as it leaves the step of row `later`, that read it.
  SK_MATH StateGradient<T> through(int64_t later, const StateGradient<T>& factors, int64_t j) const {
    const StateGradient<T> v = unbounded(j);
    return {kept(o, later, v.h * factors.h), kept(o, later, v.c * factors.c)};
  }
  SK_MATH StateGradient<T> given(int64_t j) const {
    const T *h = state(a.dh_n), *c = state(a.dc_n);
    return {h ? h[j] : T(0), c ? c[j] : T(0)};
  }
  // Of the state that this step left, by whoever read it.
  struct Arriving {
    bool after;
    StateGradient<T> factors;
  };
  SK_MATH Arriving arriving() const {
    const bool known = after();
    return {known, known ? bounds() : StateGradient<T>{T(1), T(1)}};
  }
  // All of d(loss)/dh' and d(loss)/dc' of the cell; `past`: what zoneout takes past the cell.
  SK_MATH StateGradient<T> leaving(const Arriving& from, int64_t j, StateGradient<T>& past) const {
    StateGradient<T> v = from.after ? through(pick(s.near.after, d) + b, from.factors, j) : given(j);
    if (const T* dy = output(a.dy, hidden)) v.h += dy[j];
    if (const T* dc = output(o.dc_all, hidden)) v.c += dc[j];
    past = {T(0), T(0)};
    auto apart = [&](const void* zone, int64_t at, T& old, T& all) {
      T one[1], rest[1] = {all};
      share<T>(zone, at, one, rest);
      old = one[0];
      all = rest[0];
    };
    if (o.zone_h) apart(o.zone_h, zone_h_at(o, row, d, hidden, j), past.h, v.h);
    if (o.zone_c) apart(o.zone_c, zone_c_at(o, row, d, hidden, j), past.c, v.c);
    return v;
  }
  SK_MATH void add(int64_t at, T v) const { add_to((T*)s.sums + (b * a.directions + d) * s.sums_size + at, v); }

  SK_MATH void lstm_backward(const Arriving& from, const T* saved_row, T* dx, T* now) const {
    const int64_t at_g = width - 2 * hidden, at_o = width - hidden;
    T *past = state(s.past), *dc = state(s.dc);
    Moments<T> m{T(0), T(0)};
    T means[2] = {T(0), T(0)};
    if (k.normal) {  // through h' = o tanh(gain LN(c') + bias): d(o's sum) and d(LN(c')) to their places in `now`
      const T *fresh = saved_row + 4 * hidden, *gain = own(a.gain_c, hidden), *bias = own(a.bias_c, hidden);
      m = unit_moments(fresh);
      each([&](int64_t j) {
        StateGradient<T> aside;
        const T v = leaving(from, j, aside).h, normal = (fresh[j] - m.mean) * m.scale, out = saved_row[3 * hidden + j];
        const T read = tanh_(normal * gain[j] + bias[j]), dread = v * out * dtanh(read), dn = dread * gain[j];
        now[at_o + j] = v * read * dgate(k.hard, out);
        now[at_g + j] = dn;
        means[0] += dn;
        means[1] += dn * normal;
        add(s.at_gain_c + j, dread * normal);
        add(s.at_gain_c + hidden + j, dread);
      });
      block_sum(means);
      means[0] /= T(hidden);
      means[1] /= T(hidden);
    }
    each([&](int64_t j) {
      T saved[6];
#pragma unroll
      for (int q = 0; q < 6; ++q) saved[q] = saved_row[q * hidden + j];
      StateGradient<T> old;
      const StateGradient<T> v = leaving(from, j, old);
      T dfresh = v.c, dout;
      if (k.normal) {
        dout = now[at_o + j];
        dfresh += (now[at_g + j] - means[0] - (saved[4] - m.mean) * m.scale * means[1]) * m.scale;
      } else {
        const T read = tanh_(saved[4]);
        dout = v.h * read * dgate(k.hard, saved[3]);
        dfresh += v.h * saved[3] * dtanh(read);
      }
      const T p[2] = {peephole(0, j), peephole(1, j)}, three[3] = {saved[0], saved[1], saved[2]};
      if (k.peephole) dfresh += dout * peephole(2, j);
      T grad[3];
      variant_lstm_backward(k, three, p, saved[5], dfresh, grad);
      past[j] = old.h;
      dc[j] = dfresh + old.c;
      auto put = [&](T g, int64_t at) { dx[at + j] = now[at + j] = g; };
      put(grad[0], 0);
      if (!k.coupled) put(grad[1], hidden);
      put(grad[2], at_g);
      put(dout, at_o);
      if (!k.peephole) return;
      add(s.at_peephole + j, grad[0] * saved[5]);
      if (!k.coupled) add(s.at_peephole + hidden + j, grad[1] * saved[5]);
      add(s.at_peephole + (k.coupled ? 1 : 2) * hidden + j, dout * saved[4]);
    });
  }
  SK_MATH void gru_backward(const Arriving& from, const T* saved_row, T* dx, T* now) const {
    const T* read = by_direction(a.read, hidden);
    T* past = state(s.past);
    each([&](int64_t j) {
      T saved[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) saved[q] = saved_row[q * hidden + j];
      StateGradient<T> old;
      T dh = leaving(from, j, old).h, dz, dn;
      variant_gru_backward(k, saved[1], saved[2], read[j], dh, dz, dn);
      past[j] = old.h + dh;
      const T dr = dn * saved[3] * dgate(k.hard, saved[0]), dhn = k.reset_before ? dn : dn * saved[0];
      if (!k.reset_before) dx[j] = now[j] = dr;  // else it comes through the product: reset_backward
      dx[hidden + j] = now[hidden + j] = dz;
      dx[2 * hidden + j] = dn;
      now[2 * hidden + j] = dhn;
      if (a.bias_n) add(j, dhn);
    });
  }
  // From d(loss)/d(r h), the product: that of r, and of h past the other product.
  SK_MATH void reset_backward() const {
    const T *read = by_direction(a.read, hidden), *r = by_direction(a.reserve, row_size()), *back = state(s.reset);
    T *past = state(s.past), *dx = output(a.dgx, width), *now = gates(s.gates);
    each([&](int64_t j) {
      const T v = masked(o, state_at(j), back[j]);
      past[j] += v * r[j];
      dx[j] = now[j] = v * read[j] * dgate(k.hard, r[j]);
    });
  }
  // From the gradient of gain LN(W_hh h) to that of W_hh h.
  SK_MATH void through_norm(const T* normal, T* now) const {
    const T* gain = own(a.gain_h, width);
    T means[2] = {T(0), T(0)};
    each_gate([&](int64_t q) {
      const T dn = now[q] * gain[q];
      means[0] += dn;
      means[1] += dn * normal[q];
      add(s.at_gain_h + q, now[q] * normal[q]);
    });
    block_sum(means);
    const T mean = means[0] / T(width), slope = means[1] / T(width), scale = normal[width];
    T *to = gates(s.gates), *dgh = by_direction(a.dgh, width);
    each_gate([&](int64_t q) {
      const T v = (now[q] * gain[q] - mean - normal[q] * slope) * scale;
      to[q] = v;
      if (dgh) dgh[q] = v;
    });
  }
  SK_MATH void backward() const {
    const T* saved = by_direction(a.reserve, row_size());
    T *dx = output(a.dgx, width), *dgh = by_direction(a.dgh, width), *now = close_row();
    const Arriving from = arriving();
    if (lstm()) lstm_backward(from, saved, dx, now);
    else if (a.cell == Cell::kGru) gru_backward(from, saved, dx, now);
    else
      each([&](int64_t j) {
        StateGradient<T> old;
        const T v = leaving(from, j, old).h, out = saved[j];
        dx[j] = now[j] = v * (a.cell == Cell::kRnnTanh ? dtanh(out) : positive(out));
        state(s.past)[j] = old.h;
      });
    if (k.normal) through_norm(saved + k.saved(a.cell) * hidden, now);
    else if (dgh) each_gate([&](int64_t q) { dgh[q] = now[q]; });
  }
  // The gradient of the initial state, from the first step that the row takes part in; first: its row, or -1.
  SK_MATH void leave(int64_t first) const {
    const StateGradient<T> factors = first < 0 ? StateGradient<T>{} : bounds();
    each([&](int64_t j) {
      const StateGradient<T> v = first < 0 ? given(j) : through(first, factors, j);
      state(a.dh0)[j] = v.h;
      if (lstm()) state(a.dc0)[j] = v.c;
    });
  }
};

template <class T> __global__ void __launch_bounds__(kRowThreads, 1) variant_reset(VariantStep s) {
  const VariantRow<T> r(s);
  if (r.begun() && r.taken()) r.reset_forward();
}
template <class T> __global__ void __launch_bounds__(kRowThreads, 1) variant_step(VariantStep s) {
  const VariantRow<T> r(s);
  if (!r.begun()) return;
  if (r.taken()) r.forward();
  else r.idle_forward();
}
template <class T> __global__ void __launch_bounds__(kRowThreads, 1) variant_step_back(VariantStep s) {
  const VariantRow<T> r(s);
  if (!r.begun()) return;
  if (r.taken()) r.backward();
  else r.idle_backward();
}
template <class T> __global__ void __launch_bounds__(kRowThreads, 1) variant_reset_back(VariantStep s) {
  const VariantRow<T> r(s);
  if (r.begun() && r.taken()) r.reset_backward();
}
template <class T> __global__ void __launch_bounds__(kRowThreads, 1) variant_leave(VariantStep s, Ends e) {
  const VariantRow<T> r(s);
  const int64_t t = first_time(e, r.d, r.b);
  r.leave(t < 0 ? -1 : start_of(e, t) + r.b);
}

}  // namespace
}}  // namespace seqkern::cuda
