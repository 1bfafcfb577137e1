// What the options of a layer (core/args.h, LayerOptions; seqkern/reference.py, Options) do to the vectors of a step.
// A step reads keep times the state that the step before left; h goes into the product times h_mask as well. With
// lengths, row b takes part in step t while t < lengths[b]; elsewhere its state stays and its outputs are 0.
#pragma once
#include "lanes.cuh"
#include "step_args.h"

namespace seqkern { namespace cuda { namespace {

SK_MATH bool inside(const LayerOptions& o, int64_t time, int64_t b) { return !o.lengths || time < o.lengths[b]; }

// v as the step of row `row` (of all steps) reads it. A factor of 0 clears what is not a number, too.
template <class S, int V> SK_MATH void keep_state(const LayerOptions& o, int64_t row, Wide<S> (&v)[V]) {
  if (!o.keep) return;
  const Wide<S> k = ((const Wide<S>*)o.keep)[row];
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] = k == Wide<S>(0) ? Wide<S>(0) : v[i] * k;
}
// at: of the element in [D, B, P].
template <class S, int V> SK_MATH void mask_state(const LayerOptions& o, int64_t at, Wide<S> (&v)[V]) {
  if (!o.h_mask) return;
  Wide<S> m[V];
  load_wide<S>(o.h_mask, at, m);
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] *= m[i];
}

// v becomes z old + (1 - z) v.
template <class S, int V> SK_MATH void mix(const void* zone, int64_t at, const Wide<S> (&old)[V], Wide<S> (&v)[V]) {
  Wide<S> z[V];
  load_wide<S>(zone, at, z);
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] = z[i] * old[i] + (Wide<S>(1) - z[i]) * v[i];
}
// The gradient v of such a mixture: `old` becomes z v, and v the rest, which is the new state's.
template <class S, int V> SK_MATH void share(const void* zone, int64_t at, Wide<S> (&old)[V], Wide<S> (&v)[V]) {
  Wide<S> z[V];
  load_wide<S>(zone, at, z);
#pragma unroll
  for (int i = 0; i < V; ++i) old[i] = z[i] * v[i], v[i] -= old[i];
}
// Places of row `row`'s zones: of h, [N or 1, D*P], and of c, [N or 1, D*H].
SK_MATH int64_t zone_h_at(const LayerOptions& o, int64_t row, int64_t d, int64_t output, int64_t j) {
  return row * o.zone_h_row + d * output + j;
}
SK_MATH int64_t zone_c_at(const LayerOptions& o, int64_t row, int64_t d, int64_t hidden, int64_t j) {
  return row * o.zone_c_row + d * hidden + j;
}

// d(loss)/d(state) on its way to the step before. at: of the row in scale [D, B], which may be null.
template <class S, int V>
SK_MATH void clip(const LayerOptions& o, const void* scale, int64_t at, Wide<S> (&v)[V]) {
  using W = Wide<S>;
  const W most = W(o.clip_value), factor = scale ? ((const W*)scale)[at] : W(1);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (o.clip_value > 0) {  // a NaN passes
      v[i] = v[i] > most ? most : v[i];
      v[i] = v[i] < -most ? -most : v[i];
    }
    if (scale) v[i] *= factor;
  }
}

// d(loss)/d(h that the step after read), of row b and units j to j + V of P: what its product brought, `dh`, and what
// went past its cell. row: of the step after, among all steps.
template <class S, int V, class Args>
SK_MATH void state_gradient(const Args& s, int64_t width, int d, int64_t b, int64_t j, int64_t row, Wide<S> (&dh)[V]) {
  const int64_t at = (d * s.batch + b) * width + j;
  load<V>(s.dh, at, dh);
  mask_state<S>(s.o, at, dh);
  if (s.past) {
    Wide<S> past[V];
    load<V>(s.past, at, past);
#pragma unroll
    for (int i = 0; i < V; ++i) dh[i] += past[i];
  }
  clip<S>(s.o, s.scale, d * s.batch + b, dh);
  keep_state<S>(s.o, row, dh);
}

// Squares of d(loss)/dh (which = 0) or d(loss)/dc to [2, D, N, flow_panels] W.
template <class S, int V, class Args>
SK_MATH void watch(const Args& s, int which, int d, int64_t row, int64_t j, const Wide<S> (&v)[V]) {
  if (!s.o.flow) return;
  Wide<S>* to = (Wide<S>*)s.o.flow + ((which * s.directions + d) * s.all_rows + row) * s.o.flow_panels + j;
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = v[i] * v[i];
}

// n side by side at `at`, zeros: rows of S.
template <class S, int V> SK_MATH void store_zeros(void* to, int64_t at) {
  Wide<S> none[V];
  clear(none);
  store<S>(to, at, none);
}

}}}  // namespace seqkern::cuda
