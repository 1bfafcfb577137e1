// The kernels of the compiled searches, compiled once per instruction set as kernels.cpp is, and by its rules.
#include <stdint.h>
#include <string.h>
#include "search.h"

namespace seqkern { namespace SK_NS {
namespace {
template <class S> constexpr SearchKernel kSearch{&SearchPack<S>::packed_bytes, &SearchPack<S>::pack,
                                                  &Searcher<S>::scratch, &Searcher<S>::run};
}
extern const SearchKernels kSearchKernels;
const SearchKernels kSearchKernels = {SK_VEC_BYTES, {kSearch<double>, kSearch<float>}};
}}  // namespace seqkern::SK_NS
