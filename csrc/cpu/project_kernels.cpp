// The CPU kernels that project a source, compiled once per instruction set into one table: see kernels.cpp.
#include <stdint.h>
#include <string.h>
#include "project.h"

namespace seqkern { namespace SK_NS {
namespace {

template <class S> constexpr ProjectKernel kForward{&Project<S>::forward_scratch, &Project<S>::run_forward};
template <class S> constexpr ProjectKernel kBackward{&Project<S>::backward_scratch, &Project<S>::run_backward};

}  // namespace

#define SK_DTYPES(kernel) {kernel<double>, kernel<float>, kernel<Bf16>, kernel<F16>}
extern const ProjectKernels kProjectKernels;
const ProjectKernels kProjectKernels = {SK_DTYPES(kForward), SK_DTYPES(kBackward)};

}}  // namespace seqkern::SK_NS
