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

}  // namespace

#define SK_TEXT_(x) #x
#define SK_TEXT(x) SK_TEXT_(x)
#define SK_DTYPES(kernel, C) {kernel<C, double>, kernel<C, float>, kernel<C, Bf16>, kernel<C, F16>}
#define SK_CELLS(kernel) \
  {SK_DTYPES(kernel, RnnTanh), SK_DTYPES(kernel, RnnRelu), SK_DTYPES(kernel, Lstm), SK_DTYPES(kernel, Gru)}
extern const CpuKernels kKernels;
const CpuKernels kKernels = {SK_TEXT(SK_NS), SK_CELLS(kForward), SK_CELLS(kBackward), &math<float>, &math<double>};

}}  // namespace seqkern::SK_NS
