// The CPU kernels, compiled once per instruction set with -DSK_NS=<isa> and that set's flags, into one table.
// Only C headers are included, directly or not, and all code is in an anonymous namespace: an inline function compiled
// here with AVX-512 could otherwise be the copy that the linker keeps for the whole library.
#include <stdint.h>
#include <string.h>
#include "backward.h"
#include "forward.h"

namespace seqkern { namespace SK_NS { namespace {

template <class C, class S> constexpr Kernel kForward{&Forward<C, S>::scratch, &Forward<C, S>::run};
template <class C, class S> constexpr Kernel kBackward{&Backward<C, S>::scratch, &Backward<C, S>::run};

template <class T> void math(const char* name, const T* x, T* y, int64_t n) {
  for (int64_t i = 0; i < n; i += Pack<T>::kWidth) {
    Pack<T> v = load(x + i, n - i);
    v = name[0] == 'e' ? exp_(v) : name[0] == 't' ? tanh_(v) : sigmoid(v);
    store(v, y + i, n - i);
  }
}

SK_INL void multiply_add(Pack<float>& c, Pack<float> a, Pack<float> b) { c.v += a.v * b.v; }
SK_INL void multiply_add(Pack<double>& c, Pack<double> a, Pack<double> b) { c.v += a.v * b.v; }
template <class A> constexpr bool kDots = false;
#ifdef SK_BF16_DOT
template <> constexpr bool kDots<Bf16> = true;
SK_INL void dot(Pack<float>& c, Pack<float> a, Pack<float> b) {
  c.v = (Pack<float>::Vec)_mm512_dpbf16_ps((__m512)c.v, (__m512bh)a.v, (__m512bh)b.v);
}
#else
template <class T> SK_INL void dot(Pack<T>& c, Pack<T> a, Pack<T> b) { multiply_add(c, a, b); }
#endif

// Independent sums in registers; the empty assembly keeps the compiler from folding them.
template <class S> int64_t burst(int64_t n) {
  using V = Pack<typename AccOf<S>::Type>;
  constexpr bool kDot = kDots<typename OperandOf<S>::Type>;
  constexpr int kSums = kRegisters / 4 * 3;
  V sums[kSums], a(0), b(0);
  for (int j = 0; j < kSums; ++j) sums[j] = V(0);
  asm volatile("" : "+v"(a.v), "+v"(b.v));
  for (int64_t i = 0; i < n; ++i) {
#pragma GCC unroll 32
    for (int j = 0; j < kSums; ++j) {
      if constexpr (kDot) dot(sums[j], a, b);
      else multiply_add(sums[j], a, b);
    }
#pragma GCC unroll 32
    for (int j = 0; j < kSums; ++j) asm volatile("" : "+v"(sums[j].v));
  }
  return n * kSums * V::kWidth * (kDot ? 4 : 2);
}

}  // namespace

#define SK_TEXT_(x) #x
#define SK_TEXT(x) SK_TEXT_(x)
#define SK_DTYPES(kernel, C) {kernel<C, double>, kernel<C, float>, kernel<C, Bf16>, kernel<C, F16>}
#define SK_CELLS(kernel) \
  {SK_DTYPES(kernel, RnnTanh), SK_DTYPES(kernel, RnnRelu), SK_DTYPES(kernel, Lstm), SK_DTYPES(kernel, Gru)}
extern const CpuKernels kKernels;
const CpuKernels kKernels = {SK_TEXT(SK_NS), SK_CELLS(kForward), SK_CELLS(kBackward), &math<float>, &math<double>,
                             {&burst<double>, &burst<float>, &burst<Bf16>, &burst<F16>}};

}}  // namespace seqkern::SK_NS
