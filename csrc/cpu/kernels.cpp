// The CPU kernels, compiled once per instruction set with -DSK_NS=<isa> and that set's flags, into one table.
// Only C headers are included, directly or not, and all code is in an anonymous namespace: an inline function compiled
// here with AVX-512 could otherwise be the copy that the linker keeps for the whole library.
#include <stdint.h>
#include <string.h>
#include "backward.h"
#include "forward.h"
#include "random.h"
#include "scan.h"
#include "single.h"

namespace seqkern { namespace SK_NS { namespace {

template <class C, class S> constexpr Kernel kForward{&Forward<C, S>::scratch, &Forward<C, S>::run, &Forward<C, S>::packing};
template <class C, class S> constexpr Kernel kBackward{&Backward<C, S>::scratch, &Backward<C, S>::run, nullptr};
template <class C, class S> constexpr auto kSingle = &single_step<C, S>;

template <class C, class S> constexpr ScanKernel kScan{&Scan<C, S>::forward, &Scan<C, S>::backward};

template <class T> void math(const char* name, const T* x, T* y, int64_t n) {
  const bool for_bf16 = sizeof(T) == 4 && strstr(name, "_bf16");
  for (int64_t i = 0; i < n; i += Pack<T>::kWidth) {
    Pack<T> v = load(x + i, n - i);
    if constexpr (sizeof(T) == 4) {
      const CellPackOf<Bf16>::Type cell = v;
      if (for_bf16) v = name[0] == 't' ? tanh_(cell) : sigmoid(cell);
    }
    if (!for_bf16) v = name[0] == 'e' ? exp_(v) : name[0] == 't' ? tanh_(v) : sigmoid(v);
    store(v, y + i, n - i);
  }
}

// c = c a + b, or where the products are bf16 dots, c + a . b.
template <class A, class T> SK_INL void round_of(Pack<T>& c, Pack<T> a, Pack<T> b) {
#ifdef SK_BF16_DOT
  if constexpr (kPair<A> == 2) {
    c.v = (typename Pack<T>::Vec)_mm512_dpbf16_ps((__m512)c.v, (__m512bh)a.v, (__m512bh)b.v);
    return;
  }
#endif
  c.v = c.v * a.v + b.v;
}

// Independent sums in registers. The empty assembly hides the factors' values from the compiler.
template <class S> int64_t burst(int64_t n) {
  using A = typename OperandOf<S>::Type;
  using V = Pack<typename AccOf<S>::Type>;
  constexpr int kRows = kRegisters * 3 / 16, kSums = kRows * 4;
  V sums[kRows][4], a(0), b(0);
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < 4; ++v) sums[r][v] = V(0);
  asm volatile("" : "+v"(a.v), "+v"(b.v));
  for (int64_t i = 0; i < n; ++i)
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < 4; ++v) round_of<A>(sums[r][v], a, b);
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < 4; ++v) a = a + sums[r][v];
  asm volatile("" : : "v"(a.v));
  return n * kSums * V::kWidth * kPair<A> * 2;
}

}  // namespace

#define SK_TEXT_(x) #x
#define SK_TEXT(x) SK_TEXT_(x)
#define SK_DTYPES(kernel, C) {kernel<C, double>, kernel<C, float>, kernel<C, Bf16>, kernel<C, F16>}
#define SK_CELLS(kernel) \
  {SK_DTYPES(kernel, RnnTanh), SK_DTYPES(kernel, RnnRelu), SK_DTYPES(kernel, Lstm), SK_DTYPES(kernel, Gru)}
extern const CpuKernels kKernels;
template <class S> constexpr int64_t kMinRows = kParts<S> > 1 ? kTilePad : 4;
const CpuKernels kKernels = {SK_TEXT(SK_NS), kParts<Bf16> > 0, {kMinRows<double>, kMinRows<float>, kMinRows<Bf16>, kMinRows<F16>}, SK_CELLS(kForward), SK_CELLS(kBackward), SK_CELLS(kSingle), &math<float>, &math<double>,
                             {&burst<double>, &burst<float>, &burst<Bf16>, &burst<F16>},
                             {&bernoulli<double>, &bernoulli<float>, &bernoulli<Bf16>, &bernoulli<F16>},
                             {SK_DTYPES(kScan, MinGru<LinearCandidate>), SK_DTYPES(kScan, MinGru<PositiveCandidate>),
                              SK_DTYPES(kScan, MinLstm<LinearCandidate>), SK_DTYPES(kScan, MinLstm<PositiveCandidate>)},
                             SK_VEC_BYTES, &mark_of};

}}  // namespace seqkern::SK_NS
