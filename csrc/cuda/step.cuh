// Kernels of the `step` engine: the cell of one time step, forward and backward, on the results of its matrix products,
// and the few kernels over all steps that no matrix product does. Any shape, any dtype, any GPU.
//
// T steps, B batch, N rows of all steps together, H hidden, P output (the projection's size where there is one, else
// H), G gates, K gradients kept for each unit (kGrads), D directions, S the storage type, W the type of sums (double
// for double, else float). A thread takes V units that lie side by side, of one row; the second direction is
// blockIdx.z.
#pragma once
#include "math.cuh"
#include "simt.cuh"

namespace seqkern { namespace cuda {

// One time step, each direction's own: its rows b in [0, rows) are the layer's rows first + b.
struct Step {
  int64_t first[kMaxDirections], rows[kMaxDirections];
};

struct ForwardStep {
  Step step;
  int64_t batch, all_rows, hidden, output, directions;
  const void* gates_x;               // [D, N, G*H] S: W_ih x
  const void* gates_h;               // [D, B, G*H] W: W_hh h; null: zeros
  const void* b_ih[kMaxDirections];  // [G*H] S or null
  const void* b_hh[kMaxDirections];
  void* carry;    // [D, B, H] W: the LSTM's c, the GRU's h, as they were before this step and then after it
  void* h;        // [D, B, H] S: the cell's output
  void* y;        // [N, D*P] S; null where there is a projection
  void* reserve;  // [D, N, kSaved, H] S or null
};

struct BackwardStep {
  Step step;
  int64_t batch, all_rows, hidden, output, directions;
  int64_t known[kMaxDirections];   // rows below were in the step before, in this pass's order: dh holds theirs
  int64_t before[kMaxDirections];  // first row of the step whose state this one read
  int64_t fed[kMaxDirections];     // how many rows it has; the others read the initial state
  const void* dh;                  // [D, B, H] W, d(loss)/d(cell's output) through the steps after
  const void* dh_n;                // [D, B, H] S or null: the same for rows from `known` on
  Sequence dy;                     // added to either; data null: nothing
  const void* h0;                  // [D, B, H] S or null
  const void* c0;                  // [D, B, H] S or null
  const void* y;                   // [N, D*P] S
  const void* reserve;
  void* carry;   // [D, B, H] W
  void* dgates;  // [D, N, K*H] S
  void* now;     // [D, B, K*H] S: each row's latest, for the next product
};

// Rows of a state from the layer's output: a projection's result, or its gradient.
struct OutputStep {
  Step step;
  int64_t batch, all_rows, output, directions;
  const void* from;  // forward: [D, B, P] S
  void* h;           // forward: [D, B, P] S
  void* y;           // forward: [N, D*P] S
  int64_t known[kMaxDirections];
  const void* dh;  // backward: [D, B, P] W, and as in BackwardStep
  const void* dh_n;
  Sequence dy;
  void* dp;   // backward: [D, N, P] S
  void* now;  // backward: [D, B, P] S
};

struct Gather {
  int64_t steps, batch, all_rows, hidden, output, directions;
  const int64_t* starts;  // on the device, [T+1]; null: step t starts at t * batch
  const void* y;          // [N, D*P] S
  const void* h0;         // [D, B, P] S or null
  const void* reserve;    // [D, N, 5, H] S
  void* to;
};

struct BiasSums {
  int64_t rows, hidden, columns;  // columns: K*H
  int64_t chunk;                  // rows that a block sums
  const void* dgates;             // [N, K*H] S
  void* partial;                  // [chunks, K*H] W
  int64_t chunks;
  void *b_ih, *b_hh;  // [G*H] S
};

constexpr int kUploaded = 448;
struct Table {
  int64_t values[kUploaded];
  int count;
  int64_t* to;
};

namespace {

template <class S> struct WideOf {
  using Type = float;
};
template <> struct WideOf<double> {
  using Type = double;
};
template <class S> using Wide = typename WideOf<S>::Type;

SK_MATH double widen(double x) { return x; }
SK_MATH float widen(float x) { return x; }
SK_MATH float widen(bf16 x) { return to_float(x); }
SK_MATH float widen(half_t x) { return to_float(x); }
SK_MATH void narrow(double x, double& y) { y = x; }
SK_MATH void narrow(float x, float& y) { y = x; }
SK_MATH void narrow(float x, bf16& y) { y.bits = from_float<bf16>(x).bits; }
SK_MATH void narrow(float x, half_t& y) { y.bits = from_float<half_t>(x).bits; }

template <class S> constexpr int kLanes = sizeof(S) == 8 ? 1 : 4;  // of a vector: 16 bytes of float

template <class S, int V> struct alignas(sizeof(S) * V) Lanes {
  S v[V];
};
template <int V, class S> SK_MATH void load(const void* from, int64_t at, S (&to)[V]) {
  const Lanes<S, V> x = *(const Lanes<S, V>*)((const S*)from + at);
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = x.v[i];
}
// As numbers of type W. S, the type in memory, has to be named.
template <class S, int V> SK_MATH void load_wide(const void* from, int64_t at, Wide<S> (&to)[V]) {
  S x[V];
  load<V>(from, at, x);
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = widen(x[i]);
}
template <class S, int V> SK_MATH void store(void* to, int64_t at, const Wide<S> (&from)[V]) {
  Lanes<S, V> x;
#pragma unroll
  for (int i = 0; i < V; ++i) narrow(from[i], x.v[i]);
  *(Lanes<S, V>*)((S*)to + at) = x;
}
template <class T, int V> SK_MATH void clear(T (&x)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = T(0);
}
template <class T> SK_MATH T pick(const T (&of)[kMaxDirections], int d) { return d ? of[1] : of[0]; }

// The first unit of this thread; rows go from first_row() in steps of row_stride().
template <int V> SK_MATH int64_t first_unit() { return (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V; }
SK_MATH int64_t first_row() { return int64_t(blockIdx.y) * blockDim.y + threadIdx.y; }
SK_MATH int64_t row_stride() { return int64_t(gridDim.y) * blockDim.y; }

template <class C, class S, int V> SK_MATH void cell_forward(const ForwardStep& s, int d, int64_t b, int64_t j) {
  using W = Wide<S>;
  constexpr int kG = C::kGates, kSaved = C::kSaved;
  const int64_t row = pick(s.step.first, d) + b, state = (d * s.batch + b) * s.hidden + j;
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
#pragma unroll
  for (int i = 0; i < V; ++i) {
    W xi[kG], hi[kG], si[kSaved ? kSaved : 1];
#pragma unroll
    for (int g = 0; g < kG; ++g) xi[g] = x[g][i], hi[g] = h[g][i];
    C::forward(xi, hi, carry[i], out[i], si);
#pragma unroll
    for (int q = 0; q < kSaved; ++q) saved[q][i] = si[q];
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

template <class C, class S, int V> __global__ void __launch_bounds__(128) forward_step(ForwardStep s) {
  const int d = blockIdx.z;
  const int64_t j = first_unit<V>(), rows = pick(s.step.rows, d);
  if (j >= s.hidden) return;
  for (int64_t b = first_row(); b < rows; b += row_stride()) cell_forward<C, S, V>(s, d, b, j);
}

// d(loss)/d(output) of row b, units j to j + V, of a state with `width` units.
template <class S, int V, class Args>
SK_MATH void output_gradient(const Args& s, int64_t width, int d, int64_t b, int64_t j, Wide<S> (&dh)[V]) {
  const int64_t state = (d * s.batch + b) * width + j;
  if (b < pick(s.known, d)) load<V>(s.dh, state, dh);
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

// The state that the step read: h for the GRU, c for the LSTM.
template <class C, class S, int V>
SK_MATH void previous(const BackwardStep& s, int d, int64_t b, int64_t j, Wide<S> (&prev)[V]) {
  const bool cell = C::kCarry == Carry::kCell;
  const int64_t row = pick(s.before, d) + b;
  const void* initial = cell ? s.c0 : s.h0;
  if (C::kCarry == Carry::kNone) clear(prev);
  else if (b < pick(s.fed, d) && cell)
    load_wide<S>(s.reserve, ((d * s.all_rows + row) * C::kSaved + C::kSaved - 1) * s.hidden + j, prev);
  else if (b < pick(s.fed, d)) load_wide<S>(s.y, (row * s.directions + d) * s.output + j, prev);
  else if (initial) load_wide<S>(initial, (d * s.batch + b) * s.hidden + j, prev);
  else clear(prev);
}

template <class C, class S, int V> SK_MATH void cell_backward(const BackwardStep& s, int d, int64_t b, int64_t j) {
  using W = Wide<S>;
  constexpr int kSaved = C::kSaved, kK = C::kGrads;
  const int64_t row = pick(s.step.first, d) + b, state = (d * s.batch + b) * s.hidden + j;
  W dh[V], prev[V], carry[V], out[V], saved[kSaved ? kSaved : 1][V], grad[kK][V];
  output_gradient<S>(s, s.hidden, d, b, j, dh);
  previous<C, S>(s, d, b, j, prev);
#pragma unroll
  for (int q = 0; q < kSaved; ++q)
    load_wide<S>(s.reserve, ((d * s.all_rows + row) * kSaved + q) * s.hidden + j, saved[q]);
  if (kSaved) clear(out);
  else load_wide<S>(s.y, (row * s.directions + d) * s.output + j, out);
  if (C::kCarry != Carry::kNone) load<V>(s.carry, state, carry);
  else clear(carry);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    W si[kSaved ? kSaved : 1], gi[kK];
#pragma unroll
    for (int q = 0; q < kSaved; ++q) si[q] = saved[q][i];
    C::backward(si, out[i], prev[i], dh[i], carry[i], gi);
#pragma unroll
    for (int k = 0; k < kK; ++k) grad[k][i] = gi[k];
  }
  if (C::kCarry != Carry::kNone) store<W>(s.carry, state, carry);
#pragma unroll
  for (int k = 0; k < kK; ++k) {
    store<S>(s.dgates, ((d * s.all_rows + row) * kK + k) * s.hidden + j, grad[k]);
    store<S>(s.now, ((d * s.batch + b) * kK + k) * s.hidden + j, grad[k]);
  }
}

template <class C, class S, int V> __global__ void __launch_bounds__(128) backward_step(BackwardStep s) {
  const int d = blockIdx.z;
  const int64_t j = first_unit<V>(), rows = pick(s.step.rows, d);
  if (j >= s.hidden) return;
  for (int64_t b = first_row(); b < rows; b += row_stride()) cell_backward<C, S, V>(s, d, b, j);
}

// What the projection yielded, into the state and the output.
template <class S> __global__ void __launch_bounds__(128) output_step(OutputStep s) {
  const int d = blockIdx.z;
  const int64_t j = first_unit<1>();
  if (j >= s.output) return;
  for (int64_t b = first_row(); b < pick(s.step.rows, d); b += row_stride()) {
    const int64_t state = (d * s.batch + b) * s.output + j, row = pick(s.step.first, d) + b;
    const S h = ((const S*)s.from)[state];
    ((S*)s.h)[state] = h;
    ((S*)s.y)[(row * s.directions + d) * s.output + j] = h;
  }
}

// d(loss)/d(projection's result).
template <class S> __global__ void __launch_bounds__(128) output_gradient_step(OutputStep s) {
  const int d = blockIdx.z;
  const int64_t j = first_unit<1>();
  if (j >= s.output) return;
  for (int64_t b = first_row(); b < pick(s.step.rows, d); b += row_stride()) {
    const int64_t row = pick(s.step.first, d) + b;
    Wide<S> dh[1];
    output_gradient<S>(s, s.output, d, b, j, dh);
    store<S>(s.dp, (d * s.all_rows + row) * s.output + j, dh);
    store<S>(s.now, (d * s.batch + b) * s.output + j, dh);
  }
}

// The step t that row `row` belongs to: the last with starts[t] <= row.
SK_MATH int64_t step_of(const Gather& g, int64_t row) {
  if (!g.starts) return row / g.batch;
  int64_t low = 0, high = g.steps;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (g.starts[middle] <= row) low = middle;
    else high = middle;
  }
  return low;
}
SK_MATH int64_t start_of(const Gather& g, int64_t t) { return g.starts ? g.starts[t] : t * g.batch; }

// to [D, N, P] S: the state h that each row's step read.
template <class S> __global__ void __launch_bounds__(128) gather_states(Gather g) {
  const int d = blockIdx.z;
  const int64_t j = first_unit<1>();
  for (int64_t row = first_row(); row < g.all_rows; row += row_stride()) {
    const int64_t t = step_of(g, row), b = row - start_of(g, t), from = d ? t + 1 : t - 1;
    const bool fed = from >= 0 && from < g.steps && b < start_of(g, from + 1) - start_of(g, from);
    if (j >= g.output) continue;
    S h;
    if (fed) h = ((const S*)g.y)[((start_of(g, from) + b) * g.directions + d) * g.output + j];
    else if (g.h0) h = ((const S*)g.h0)[(d * g.batch + b) * g.output + j];
    else narrow(Wide<S>(0), h);
    ((S*)g.to)[(d * g.all_rows + row) * g.output + j] = h;
  }
}

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

__global__ void __launch_bounds__(128) upload_table(Table t) {
  for (int i = threadIdx.x; i < t.count; i += blockDim.x) t.to[i] = t.values[i];
}

}  // namespace
}}  // namespace seqkern::cuda
