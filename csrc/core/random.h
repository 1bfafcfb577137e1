// The bits of random masks; the definition is seqkern/masks.py. Integers alone: the same on every device. No includes
// but for fixed sizes.
#pragma once
#include <stdint.h>

#ifndef SK_HD
#ifdef __CUDACC__
#define SK_HD __host__ __device__ __forceinline__
#else
#define SK_HD inline __attribute__((always_inline))
#endif
#endif

namespace seqkern { namespace SK_NS { namespace {

SK_HD uint32_t hash(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}
// Of a seed and a stream.
SK_HD uint32_t random_key(int64_t seed, int64_t stream) {
  return hash(hash(hash(uint32_t(seed)) ^ uint32_t(uint64_t(seed) >> 32)) + uint32_t(stream));
}
// Of element n; high = (n >> 32) + key.
SK_HD uint32_t random_bits(uint32_t low, uint32_t high, uint32_t key) { return hash(hash(low ^ key) + high); }

}}}  // namespace seqkern::SK_NS
