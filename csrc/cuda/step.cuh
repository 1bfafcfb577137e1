// Kernels of the `step` engine: the cell of one time step, forward and backward, on the results of its matrix products,
// and the few kernels over all steps that no matrix product does. Any shape, any dtype, any GPU.
//
// Letters as in step_args.h. A thread takes V units that lie side by side, of one row; the second direction is
// blockIdx.z.
#pragma once
#include "step_options.cuh"

namespace seqkern { namespace cuda { namespace {

// The outputs of a row that takes no part in the step; its state stays.
template <class C, class S, int V>
SK_MATH void idle_forward(const OptionForwardStep& s, int d, int64_t row, int64_t j) {
  if (s.y) store_zeros<S, V>(s.y, (row * s.directions + d) * s.output + j);
  if (s.o.c_all) store_zeros<S, V>(s.o.c_all, (row * s.directions + d) * s.hidden + j);
  for (int q = 0; s.reserve && q < C::kSaved; ++q)
    store_zeros<S, V>(s.reserve, ((d * s.all_rows + row) * C::kSaved + q) * s.hidden + j);
}

// h with its share of the old one, which a cell that carries h has at hand as `old`. at: in [D, B, P].
template <class S, int V, bool kAtHand, class Step>
SK_MATH void zone_h(const Step& s, int d, int64_t row, int64_t at, int64_t j, Wide<S> (&old)[V], Wide<S> (&h)[V]) {
  if (!s.o.zone_h) return;
  if (!kAtHand) {
    load_wide<S>(s.h, at, old);
    keep_state<S>(s.o, row, old);
  }
  mix<S>(s.o.zone_h, zone_h_at(s.o, row, d, s.output, j), old, h);
}
// h on its way into the product of the step after.
template <class S, int V, class Step>
SK_MATH void enter(const Step& s, int d, int64_t b, int64_t at, const Wide<S> (&h)[V]) {
  if (!s.entering || b >= pick(s.near.both, d)) return;
  Wide<S> v[V];
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] = h[i];
  keep_state<S>(s.o, pick(s.near.after, d) + b, v);
  mask_state<S>(s.o, at, v);
  store<S>(s.entering, at, v);
}

template <class C, class S, int V, class Step> SK_MATH void cell_forward(const Step& s, int d, int64_t b, int64_t j) {
  using W = Wide<S>;
  constexpr int kG = C::kGates, kSaved = C::kSaved;
  const int64_t row = pick(s.step.first, d) + b, state = (d * s.batch + b) * s.hidden + j;
  if constexpr (Step::kOptions)
    if (!inside(s.o, pick(s.near.time, d), b)) return idle_forward<C, S, V>(s, d, row, j);
  const void *b_ih = pick(s.b_ih, d), *b_hh = pick(s.b_hh, d);
  W x[kG][V], h[kG][V], carry[V], out[V], saved[kSaved ? kSaved : 1][V];
#pragma unroll
  for (int g = 0; g < kG; ++g) {
    load_wide<S>(s.gates_x, ((d * s.all_rows + row) * kG + g) * s.hidden + j, x[g]);
    if (s.gates_h) load<V>(s.gates_h, ((d * s.batch + b) * kG + g) * s.hidden + j, h[g]);
    else clear(h[g]);
    W bias[V];
    if (b_ih) {
      load_wide<S>(b_ih, g * s.hidden + j, bias);
#pragma unroll
      for (int i = 0; i < V; ++i) x[g][i] += bias[i];
      load_wide<S>(b_hh, g * s.hidden + j, bias);
#pragma unroll
      for (int i = 0; i < V; ++i) h[g][i] += bias[i];
    }
  }
  if (C::kCarry != Carry::kNone) load<V>(s.carry, state, carry);
  else clear(carry);
  W old[V];
  if constexpr (Step::kOptions) {
    keep_state<S>(s.o, row, carry);
#pragma unroll
    for (int i = 0; i < V; ++i) old[i] = carry[i];
  }
#pragma unroll
  for (int i = 0; i < V; ++i) {
    W xi[kG], hi[kG], si[kSaved ? kSaved : 1];
#pragma unroll
    for (int g = 0; g < kG; ++g) xi[g] = x[g][i], hi[g] = h[g][i];
    C::forward(xi, hi, carry[i], out[i], si);
#pragma unroll
    for (int q = 0; q < kSaved; ++q) saved[q][i] = si[q];
  }
  if constexpr (Step::kOptions) {
    if (C::kCarry == Carry::kCell) {
      if (s.o.zone_c) mix<S>(s.o.zone_c, zone_c_at(s.o, row, d, s.hidden, j), old, carry);
      if (s.o.c_all) store<S>(s.o.c_all, (row * s.directions + d) * s.hidden + j, carry);
    }
    if (s.y) {  // else the projection's result is h
      zone_h<S, V, C::kCarry == Carry::kHidden>(s, d, row, state, j, old, out);
      enter<S>(s, d, b, state, out);
    }
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (C::kCarry == Carry::kHidden) carry[i] = out[i];
  }
  if (C::kCarry != Carry::kNone) store<W>(s.carry, state, carry);
  store<S>(s.h, state, out);
  if (s.y) store<S>(s.y, (row * s.directions + d) * s.output + j, out);
  if (s.reserve) {
#pragma unroll
    for (int q = 0; q < kSaved; ++q)
      store<S>(s.reserve, ((d * s.all_rows + row) * kSaved + q) * s.hidden + j, saved[q]);
  }
}

template <class C, class S, int V, class Step> SK_MATH void forward_rows(const Step& s) {
  const int d = blockIdx.z;
  const int64_t j = first_unit<V>(), rows = pick(s.step.rows, d);
  if (j >= s.hidden) return;
  for (int64_t b = first_row(); b < rows; b += row_stride()) cell_forward<C, S, V>(s, d, b, j);
}
template <class C, class S, int V> __global__ void __launch_bounds__(128) forward_step(ForwardStep s) {
  forward_rows<C, S, V>(s);
}
// Left to itself, ptxas spills a register here to have one block more on an SM.
template <class C, class S, int V> __global__ void __launch_bounds__(128, 4) option_forward_step(OptionForwardStep s) {
  forward_rows<C, S, V>(s);
}

// The part of d(loss)/d(output) that comes from the steps after, or from the projection.
template <class S, int V, class Args>
SK_MATH void known_gradient(const Args& s, int64_t width, int d, int64_t b, int64_t j, Wide<S> (&dh)[V]) {
  if constexpr (Args::kOptions)
    if (s.of_h) return state_gradient<S>(s, width, d, b, j, pick(s.near.after, d) + b, dh);
  load<V>(s.dh, (d * s.batch + b) * width + j, dh);
}
// d(loss)/d(output) of row b, units j to j + V, of a state with `width` units.
template <class S, int V, class Args>
SK_MATH void output_gradient(const Args& s, int64_t width, int d, int64_t b, int64_t j, Wide<S> (&dh)[V]) {
  const int64_t state = (d * s.batch + b) * width + j;
  bool known = b < pick(s.known, d);
  if constexpr (Args::kOptions) known = known && (!s.of_h || inside(s.o, pick(s.near.time_after, d), b));
  if (known) known_gradient<S>(s, width, d, b, j, dh);
  else if (s.dh_n) load_wide<S>(s.dh_n, state, dh);
  else clear(dh);
  if (!s.dy.data) return;
  const int64_t first = pick(s.step.first, d);
  const int64_t at = s.dy.packed ? (first + b) * s.dy.row : first / s.batch * s.dy.step + b * s.dy.row;
  Wide<S> dy[V];
  load_wide<S>(s.dy.data, at + d * width + j, dy);
#pragma unroll
  for (int i = 0; i < V; ++i) dh[i] += dy[i];
}
// What of dh, which is h's, goes past the cell; dh keeps what is the cell's.
template <class S, int V, class Args>
SK_MATH void past_cell(const Args& s, int d, int64_t row, int64_t j, Wide<S> (&dh)[V], Wide<S> (&past)[V]) {
  watch<S>(s, 0, d, row, j, dh);
  if (s.o.zone_h) share<S>(s.o.zone_h, zone_h_at(s.o, row, d, s.output, j), past, dh);
}

// c of row `row` of all steps: of the reserve, unless zoneout came between.
template <class C, class S, int V, class Step>
SK_MATH void previous_cell(const Step& s, int d, int64_t row, int64_t j, Wide<S> (&c)[V]) {
  if constexpr (Step::kOptions)
    if (s.o.c_all) return load_wide<S>(s.o.c_all, (row * s.directions + d) * s.hidden + j, c);
  load_wide<S>(s.reserve, ((d * s.all_rows + row) * C::kSaved + C::kSaved - 1) * s.hidden + j, c);
}
// The state that the step read: h for the GRU, c for the LSTM.
template <class C, class S, int V, class Step>
SK_MATH void previous(const Step& s, int d, int64_t b, int64_t j, Wide<S> (&prev)[V]) {
  const bool cell = C::kCarry == Carry::kCell;
  const int64_t row = pick(s.before, d) + b;
  const void* initial = cell ? s.c0 : s.h0;
  bool fed = b < pick(s.fed, d);
  if constexpr (Step::kOptions) fed = fed && inside(s.o, pick(s.near.time_before, d), b);
  if (C::kCarry == Carry::kNone) clear(prev);
  else if (fed && cell) previous_cell<C, S>(s, d, row, j, prev);
  else if (fed) load_wide<S>(s.y, (row * s.directions + d) * s.output + j, prev);
  else if (initial) load_wide<S>(initial, (d * s.batch + b) * s.hidden + j, prev);
  else clear(prev);
  if constexpr (Step::kOptions) keep_state<S>(s.o, pick(s.step.first, d) + b, prev);
}

// The gradient of all of c' from `carry`, which the step after left, without what h' brings; then what is the cell's
// of it, and in `past` what goes past the cell.
template <class C, class S, int V>
SK_MATH void carry_gradient(const OptionBackwardStep& s, int d, int64_t b, int64_t j, const Wide<S> (&dh)[V],
                            const Wide<S> (&saved)[C::kSaved ? C::kSaved : 1][V], Wide<S> (&carry)[V],
                            Wide<S> (&past)[V]) {
  using W = Wide<S>;
  const int64_t row = pick(s.step.first, d) + b, at = (row * s.directions + d) * s.hidden + j;
  if (b < pick(s.near.both, d) && inside(s.o, pick(s.near.time_after, d), b)) {
    clip<S>(s.o, s.scale, (s.directions + d) * s.batch + b, carry);
    keep_state<S>(s.o, pick(s.near.after, d) + b, carry);
  }
  if (s.o.dc_all) {
    W more[V];
    load_wide<S>(s.o.dc_all, at, more);
#pragma unroll
    for (int i = 0; i < V; ++i) carry[i] += more[i];
  }
  if constexpr (C::kCarry == Carry::kCell) {
    if (s.o.flow && s.o.zone_c) {  // h' is read from the c' before the mixture
      watch<S>(s, 1, d, row, j, carry);
    } else if (s.o.flow) {
      W all[V];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        W si[C::kSaved];
#pragma unroll
        for (int q = 0; q < C::kSaved; ++q) si[q] = saved[q][i];
        all[i] = C::cell_gradient(si, dh[i], carry[i]);
      }
      watch<S>(s, 1, d, row, j, all);
    }
  }
  if (s.o.zone_c) share<S>(s.o.zone_c, zone_c_at(s.o, row, d, s.hidden, j), past, carry);
}

template <class C, class S, int V, class Step> SK_MATH void cell_backward(const Step& s, int d, int64_t b, int64_t j) {
  using W = Wide<S>;
  constexpr int kSaved = C::kSaved, kK = C::kGrads;
  const int64_t row = pick(s.step.first, d) + b, state = (d * s.batch + b) * s.hidden + j;
  W dh[V], prev[V], carry[V], out[V], saved[kSaved ? kSaved : 1][V], grad[kK][V];
  W past_h[V], past_c[V];  // with options
  if constexpr (Step::kOptions) {
    if (!inside(s.o, pick(s.near.time, d), b)) {
#pragma unroll
      for (int k = 0; k < kK; ++k) store_zeros<S, V>(s.dgates, ((d * s.all_rows + row) * kK + k) * s.hidden + j);
      return;
    }
    clear(past_h);
    clear(past_c);
  }
  output_gradient<S>(s, s.hidden, d, b, j, dh);
  if constexpr (Step::kOptions)
    if (s.of_h) past_cell<S>(s, d, row, j, dh, past_h);
  previous<C, S>(s, d, b, j, prev);
#pragma unroll
  for (int q = 0; q < kSaved; ++q)
    load_wide<S>(s.reserve, ((d * s.all_rows + row) * kSaved + q) * s.hidden + j, saved[q]);
  if (kSaved) clear(out);
  else load_wide<S>(s.y, (row * s.directions + d) * s.output + j, out);
  if (C::kCarry == Carry::kCell || (C::kCarry == Carry::kHidden && !Step::kOptions)) load<V>(s.carry, state, carry);
  else clear(carry);
  if constexpr (Step::kOptions && C::kCarry == Carry::kCell) carry_gradient<C, S>(s, d, b, j, dh, saved, carry, past_c);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    W si[kSaved ? kSaved : 1], gi[kK];
#pragma unroll
    for (int q = 0; q < kSaved; ++q) si[q] = saved[q][i];
    C::backward(si, out[i], prev[i], dh[i], carry[i], gi);
#pragma unroll
    for (int k = 0; k < kK; ++k) grad[k][i] = gi[k];
  }
  if constexpr (Step::kOptions) {
#pragma unroll
    for (int i = 0; i < V; ++i) carry[i] += C::kCarry == Carry::kHidden ? past_h[i] : past_c[i];
    if (C::kCarry != Carry::kHidden && s.of_h && s.past) store<W>(s.past, state, past_h);
  }
  if (C::kCarry != Carry::kNone) store<W>(s.carry, state, carry);
#pragma unroll
  for (int k = 0; k < kK; ++k) {
    store<S>(s.dgates, ((d * s.all_rows + row) * kK + k) * s.hidden + j, grad[k]);
    store<S>(s.now, ((d * s.batch + b) * kK + k) * s.hidden + j, grad[k]);
  }
}

template <class C, class S, int V, class Step> SK_MATH void backward_rows(const Step& s) {
  const int d = blockIdx.z;
  const int64_t j = first_unit<V>(), rows = pick(s.step.rows, d);
  if (j >= s.hidden) return;
  for (int64_t b = first_row(); b < rows; b += row_stride()) cell_backward<C, S, V>(s, d, b, j);
}
template <class C, class S, int V> __global__ void __launch_bounds__(128) backward_step(BackwardStep s) {
  backward_rows<C, S, V>(s);
}
template <class C, class S, int V> __global__ void __launch_bounds__(128, 4)
    option_backward_step(OptionBackwardStep s) {
  backward_rows<C, S, V>(s);
}

// What the projection yielded, into the state and the output.
template <class S, class Step> SK_MATH void output_rows(const Step& s) {
  const int d = blockIdx.z;
  const int64_t j = first_unit<1>();
  if (j >= s.output) return;
  for (int64_t b = first_row(); b < pick(s.step.rows, d); b += row_stride()) {
    const int64_t state = (d * s.batch + b) * s.output + j, row = pick(s.step.first, d) + b;
    S* y = (S*)s.y + (row * s.directions + d) * s.output + j;
    S h = ((const S*)s.from)[state];
    if constexpr (Step::kOptions) {
      if (!inside(s.o, pick(s.near.time, d), b)) {
        store_zeros<S, 1>(y, 0);
        continue;
      }
      Wide<S> old[1], v[1] = {widen(h)};
      zone_h<S, 1, false>(s, d, row, state, j, old, v);
      enter<S>(s, d, b, state, v);
      narrow(v[0], h);
    }
    ((S*)s.h)[state] = h;
    *y = h;
  }
}
template <class S> __global__ void __launch_bounds__(128) output_step(OutputStep s) { output_rows<S>(s); }
template <class S> __global__ void __launch_bounds__(128) option_output_step(OptionOutputStep s) { output_rows<S>(s); }

// d(loss)/d(projection's result).
template <class S, class Step> SK_MATH void output_gradient_rows(const Step& s) {
  const int d = blockIdx.z;
  const int64_t j = first_unit<1>();
  if (j >= s.output) return;
  for (int64_t b = first_row(); b < pick(s.step.rows, d); b += row_stride()) {
    const int64_t row = pick(s.step.first, d) + b, state = (d * s.batch + b) * s.output + j;
    const int64_t at = (d * s.all_rows + row) * s.output + j;
    Wide<S> dh[1];
    if constexpr (Step::kOptions)
      if (!inside(s.o, pick(s.near.time, d), b)) {
        store_zeros<S, 1>(s.dp, at);
        continue;
      }
    output_gradient<S>(s, s.output, d, b, j, dh);
    if constexpr (Step::kOptions) {
      Wide<S> past[1] = {Wide<S>(0)};
      past_cell<S>(s, d, row, j, dh, past);
      if (s.past) store<Wide<S>>(s.past, state, past);
    }
    store<S>(s.dp, at, dh);
    store<S>(s.now, state, dh);
  }
}
template <class S> __global__ void __launch_bounds__(128) output_gradient_step(OutputStep s) {
  output_gradient_rows<S>(s);
}
template <class S> __global__ void __launch_bounds__(128) option_output_gradient_step(OptionOutputStep s) {
  output_gradient_rows<S>(s);
}

}  // namespace
}}  // namespace seqkern::cuda
