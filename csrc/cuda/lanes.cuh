// Numbers in memory and in registers, and which of them a thread of the `step` engine takes: V units that lie side by
// side, of one row after the other. S is the storage type, W the type of sums (double for double, else float).
#pragma once
#include "math.cuh"
#include "simt.cuh"

namespace seqkern { namespace cuda { namespace {

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

// f(a number of the storage type).
template <class F> void with_storage(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kF64: return f(double{});
    case Dtype::kF32: return f(float{});
    case Dtype::kBf16: return f(bf16{});
    case Dtype::kF16: return f(half_t{});
  }
}

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

}}}  // namespace seqkern::cuda
