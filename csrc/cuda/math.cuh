// Cells on float and double: the functions that core/cells.h asks for, and the cells themselves, in seqkern::cuda.
// The same source is compiled by nvcc and, for host execution, by a C++ compiler.
#pragma once
#ifndef SK_NS
#define SK_NS cuda
#endif
#ifdef SK_HOST
#include <math.h>
#endif
#include "../core/args.h"
#ifdef __CUDACC__
#define SK_MATH __device__ __forceinline__
#else
#define SK_MATH inline
#endif

namespace seqkern { namespace SK_NS { namespace {

// e^-x overflows to infinity where the sigmoid is below the normal numbers, and 1 / infinity is its limit. NaN passes.
// On the device 1 / x is off by 1 ulp at most, and 0 where x is above 2^126.
SK_MATH float inverse(float x) {
#ifdef __CUDACC__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.f / x;
#endif
}
SK_MATH float sigmoid(float x) { return inverse(1.f + expf(-x)); }
SK_MATH double sigmoid(double x) { return 1. / (1. + exp(-x)); }
SK_MATH float tanh_(float x) { return tanhf(x); }
SK_MATH double tanh_(double x) { return tanh(x); }
SK_MATH float root(float x) { return sqrtf(x); }
SK_MATH double root(double x) { return sqrt(x); }
template <class V> SK_MATH V relu(V x) { return x < V(0) ? V(0) : x; }  // written so that a NaN passes
// clamp(x / 6 + 1/2, 0, 1); a NaN passes
template <class V> SK_MATH V hard_sigmoid(V x) {
  const V y = x * V(1. / 6) + V(0.5);
  return y < V(0) ? V(0) : y > V(1) ? V(1) : y;
}
template <class V> SK_MATH V positive(V x) { return x > V(0) ? V(1) : V(0); }

}}}  // namespace seqkern::SK_NS

#include "../core/cells.h"

namespace seqkern { namespace SK_NS { namespace {

// f(a cell of the type that the number stands for).
template <class F> void with_cell(Cell cell, const F& f) {
  switch (cell) {
    case Cell::kRnnTanh: return f(RnnTanh{});
    case Cell::kRnnRelu: return f(RnnRelu{});
    case Cell::kLstm: return f(Lstm{});
    case Cell::kGru: return f(Gru{});
  }
}

}}}  // namespace seqkern::SK_NS
