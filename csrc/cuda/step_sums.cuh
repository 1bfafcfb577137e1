// Kernels of the `step` engine over all steps at once: what the weight gradients' products read, the sums of the
// biases' gradients, copies between dtypes; and, with options, the state at a layer's ends and the norms of its
// gradients' rows. Letters as in step_args.h.
#pragma once
#include "../core/random.h"
#include "launch.h"
#include "step_options.cuh"

namespace seqkern { namespace cuda { namespace {

// The step t that row `row` belongs to: the last with starts[t] <= row.
template <class G> SK_MATH int64_t step_of(const G& g, int64_t row) {
  if (!g.starts) return row / g.batch;
  int64_t low = 0, high = g.steps;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (g.starts[middle] <= row) low = middle;
    else high = middle;
  }
  return low;
}
template <class G> SK_MATH int64_t start_of(const G& g, int64_t t) { return g.starts ? g.starts[t] : t * g.batch; }

// to [D, N, P] S: the state h as each row's product read it.
template <class S, class G> SK_MATH void gather_rows(const G& g) {
  const int d = blockIdx.z;
  const int64_t j = first_unit<1>();
  for (int64_t row = first_row(); row < g.all_rows; row += row_stride()) {
    const int64_t t = step_of(g, row), b = row - start_of(g, t), from = d ? t + 1 : t - 1;
    bool fed = from >= 0 && from < g.steps && b < start_of(g, from + 1) - start_of(g, from), read = true;
    if constexpr (G::kOptions) read = inside(g.o, t, b), fed = fed && inside(g.o, from, b);
    if (j >= g.output) continue;
    const int64_t state = (d * g.batch + b) * g.output + j;
    S h;
    if (fed) h = ((const S*)g.y)[((start_of(g, from) + b) * g.directions + d) * g.output + j];
    else if (g.h0 && read) h = ((const S*)g.h0)[state];
    else narrow(Wide<S>(0), h);
    if constexpr (G::kOptions) {
      Wide<S> v[1] = {widen(h)};
      keep_state<S>(g.o, row, v);
      mask_state<S>(g.o, state, v);
      narrow(read ? v[0] : Wide<S>(0), h);
    }
    ((S*)g.to)[(d * g.all_rows + row) * g.output + j] = h;
  }
}
template <class S> __global__ void __launch_bounds__(128) gather_states(Gather g) { gather_rows<S>(g); }
template <class S> __global__ void __launch_bounds__(128) option_gather_states(OptionGather g) { gather_rows<S>(g); }

// to [D, N, H] S: what the LSTM's projection multiplied.
template <class S> __global__ void __launch_bounds__(128) gather_unprojected(Gather g) {
  const int d = blockIdx.z;
  const int64_t j = first_unit<1>();
  if (j >= g.hidden) return;
  for (int64_t row = first_row(); row < g.all_rows; row += row_stride()) {
    Wide<S> saved[Lstm::kSaved];
#pragma unroll
    for (int q = 0; q < Lstm::kSaved; ++q)
      saved[q] = widen(((const S*)g.reserve)[((d * g.all_rows + row) * Lstm::kSaved + q) * g.hidden + j]);
    narrow(Lstm::unprojected(saved), ((S*)g.to)[(d * g.all_rows + row) * g.hidden + j]);
  }
}

// Sums over rows in a fixed order: a block takes 32 columns of a chunk of rows, its warps every kSumWarps-th row.
constexpr int kSumWarps = 8;
template <class S> __global__ void __launch_bounds__(32 * kSumWarps) sum_rows(BiasSums s) {
  using W = Wide<S>;
  SK_SHARED_STATIC(W, part, kSumWarps * 32);
  const int64_t column = int64_t(blockIdx.x) * 32 + threadIdx.x;
  const int64_t begin = blockIdx.y * s.chunk, end = begin + s.chunk < s.rows ? begin + s.chunk : s.rows;
  W sum = 0;
  if (column < s.columns)
    for (int64_t row = begin + threadIdx.y; row < end; row += kSumWarps)
      sum += widen(((const S*)s.dgates)[row * s.columns + column]);
  part[threadIdx.y * 32 + threadIdx.x] = sum;
  block_sync();
  if (threadIdx.y || column >= s.columns) return;
  for (int w = 1; w < kSumWarps; ++w) sum += part[w * 32 + threadIdx.x];
  ((W*)s.partial)[blockIdx.y * s.columns + column] = sum;
}

// A column's sum to the gates that it stands for. kOrder may only be read where the index is known when compiling.
template <class C, class S, int g = 0> SK_MATH void place_sum(const BiasSums& s, int64_t column, Wide<S> sum) {
  if constexpr (g < C::kGates) {
    constexpr int x = C::kOrder[g], h = C::kOrderH[g];
    const int64_t k = column / s.hidden, j = column % s.hidden;
    if (k == g) narrow(sum, ((S*)s.b_ih)[x * s.hidden + j]);
    if (k == g + C::kGrads - C::kGates) narrow(sum, ((S*)s.b_hh)[h * s.hidden + j]);
    place_sum<C, S, g + 1>(s, column, sum);
  }
}
template <class C, class S> __global__ void __launch_bounds__(128) sum_chunks(BiasSums s) {
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= s.columns) return;
  Wide<S> sum = 0;
  for (int64_t i = 0; i < s.chunks; ++i) sum += ((const Wide<S>*)s.partial)[i * s.columns + column];
  place_sum<C, S>(s, column, sum);
}

// n values of S as W, and W (and, where it is not null, `add`) as S.
template <class S> __global__ void __launch_bounds__(128) widen_all(const void* from, void* to, int64_t n) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) ((Wide<S>*)to)[i] = widen(((const S*)from)[i]);
}
template <class S>
__global__ void __launch_bounds__(128) narrow_all(const void* from, const void* add, void* to, int64_t n) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  Wide<S> x = ((const Wide<S>*)from)[i];
  if (add) x += ((const Wide<S>*)add)[i];
  narrow(x, ((S*)to)[i]);
}

template <class S> __global__ void __launch_bounds__(128) random_mask(Random r) {
  const uint32_t key = random_key(*r.seed, r.stream);
  S one, none;
  narrow(Wide<S>(r.value), one);
  narrow(Wide<S>(0), none);
  for (int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; n < r.n; n += int64_t(gridDim.x) * blockDim.x) {
    const uint32_t bits = random_bits(uint32_t(n), uint32_t(n >> 32) + key, key);
    ((S*)r.to)[n] = int64_t(bits) < r.limit ? one : none;
  }
}

__global__ void __launch_bounds__(128) upload_table(Table t) {
  for (int i = threadIdx.x; i < t.count; i += blockDim.x) t.to[i] = t.values[i];
}

// The first step, in the order of the forward pass, that row b takes part in; -1 where there is none.
SK_MATH int64_t first_time(const Ends& e, int d, int64_t b) {
  if (e.o.lengths) {
    const int64_t length = e.o.lengths[b] < e.steps ? e.o.lengths[b] : e.steps;
    return d || length < 1 ? length - 1 : 0;
  }
  if (!d || !e.starts) return d ? e.steps - 1 : 0;
  int64_t low = 0, high = e.steps;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (e.starts[middle + 1] - e.starts[middle] > b) low = middle;
    else high = middle;
  }
  return low;
}

// h0 as each row's first product reads it.
template <class S> __global__ void __launch_bounds__(128) enter_states(Ends e) {
  const int d = blockIdx.z;
  const int64_t j = first_unit<1>();
  if (j >= e.width) return;
  for (int64_t b = first_row(); b < e.batch; b += row_stride()) {
    const int64_t at = (d * e.batch + b) * e.width + j, t = first_time(e, d, b);
    Wide<S> v[1] = {widen(((const S*)e.from)[at])};
    if (t >= 0) keep_state<S>(e.o, start_of(e, t) + b, v);
    mask_state<S>(e.o, at, v);
    store<S>(e.to, at, v);
  }
}
// The gradient of h0 or c0 from what each row's first step left.
template <class S> __global__ void __launch_bounds__(128) leave_states(Ends e) {
  const int d = blockIdx.z;
  const int64_t j = first_unit<1>();
  if (j >= e.width) return;
  for (int64_t b = first_row(); b < e.batch; b += row_stride()) {
    const int64_t at = (d * e.batch + b) * e.width + j, t = first_time(e, d, b);
    Wide<S> v[1];
    if (t < 0) {
      if (e.last) load_wide<S>(e.last, at, v);
      else clear(v);
    } else {
      load<1>(e.from, at, v);
      mask_state<S>(e.o, at, v);
      if (e.past) v[0] += ((const Wide<S>*)e.past)[at];
      clip<S>(e.o, e.scale, d * e.batch + b, v);
      keep_state<S>(e.o, start_of(e, t) + b, v);
    }
    store<S>(e.to, at, v);
  }
}

// A block takes one row at a time, of h (blockIdx.y = 0) or c.
template <class S> __global__ void __launch_bounds__(128) row_norms(RowNorms r) {
  using W = Wide<S>;
  SK_SHARED_STATIC(W, part, 128);
  const int d = blockIdx.z, thread = int(threadIdx.x);
  const bool of_c = blockIdx.y != 0;
  const int64_t width = of_c ? r.hidden : r.output;
  for (int64_t b = blockIdx.x; b < r.rows; b += gridDim.x) {
    W sum = 0;
    for (int64_t j = thread; j < width; j += blockDim.x) {
      const int64_t at = (d * r.batch + b) * width + j;
      W v[1];
      load<1>(of_c ? r.carry : r.dh, at, v);
      if (!of_c) mask_state<S>(r.o, at, v);
      if (!of_c && r.past) v[0] += ((const W*)r.past)[at];
      sum += v[0] * v[0];
    }
    part[thread] = sum;
    for (int n = 64; n > 0; n /= 2) {
      block_sync();
      if (thread < n) part[thread] += part[thread + n];
    }
    if (thread == 0) {
      const W norm = root(part[0]), most = W(r.o.clip_norm);
      ((W*)r.scale)[((of_c ? r.directions : 0) + d) * r.batch + b] = norm > most ? most / norm : W(1);
    }
    block_sync();
  }
}

}  // namespace
}}  // namespace seqkern::cuda
