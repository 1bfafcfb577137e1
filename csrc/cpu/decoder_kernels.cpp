// The attention decoder's CPU kernels, compiled once per instruction set into one table: see kernels.cpp.
#include <stdint.h>
#include <string.h>
#include "decoder_backward.h"
#include "decoder_forward.h"

namespace seqkern { namespace SK_NS { namespace {

template <class C, class S> constexpr DecoderKernel kForward{&DecoderForward<C, S>::scratch, &DecoderForward<C, S>::run};
template <class C, class S> constexpr DecoderKernel kBackward{&DecoderBackward<C, S>::scratch, &DecoderBackward<C, S>::run};

}  // namespace

#define SK_DTYPES(kernel, C) {kernel<C, double>, kernel<C, float>, kernel<C, Bf16>, kernel<C, F16>}
#define SK_CELLS(kernel) \
  {SK_DTYPES(kernel, RnnTanh), SK_DTYPES(kernel, RnnRelu), SK_DTYPES(kernel, Lstm), SK_DTYPES(kernel, Gru)}
extern const DecoderKernels kDecoderKernels;
const DecoderKernels kDecoderKernels = {SK_CELLS(kForward), SK_CELLS(kBackward)};

}}  // namespace seqkern::SK_NS
