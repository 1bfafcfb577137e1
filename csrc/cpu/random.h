// Random masks from a counter; the definition is seqkern/masks.py.
#pragma once
#include "../core/random.h"
#include "pack.h"

namespace seqkern { namespace SK_NS { namespace {

SK_INL double narrow_to(double x, double) { return x; }
SK_INL float narrow_to(double x, float) { return float(x); }
SK_INL Bf16 narrow_to(double x, Bf16) { return bf16_of(float(x)); }
SK_INL F16 narrow_to(double x, F16) { return f16_of(float(x)); }

// to[n - begin] = value where element n's bits are below `limit` (in 0 .. 2^32), else 0, for n in [begin, end).
template <class S> void bernoulli(void* to, int64_t begin, int64_t end, const RandomArgs& r) {
  const uint32_t key = random_key(r.seed, r.stream);
  const S one = narrow_to(r.value, S{}), zero{};
  S* out = (S*)to;
  for (int64_t n = begin; n < end;) {
    const int64_t block = n >> 32;
    const uint32_t high = uint32_t(block) + key;
    const int64_t stop = end < (block + 1) << 32 ? end : (block + 1) << 32;
    const bool all = r.limit > 0xffffffffu;
    const uint32_t limit = uint32_t(r.limit);
    const uint32_t low = uint32_t(n);
    S* from = out + (n - begin);
    for (int64_t i = 0; i < stop - n; ++i) {
      const uint32_t bits = random_bits(low + uint32_t(i), high, key);
      from[i] = all || bits < limit ? one : zero;
    }
    n = stop;
  }
}

}}}  // namespace seqkern::SK_NS
