// A mark of weights' bits, by which a later call sees whether they are those that it packed.
#pragma once
#include "pack.h"

namespace seqkern { namespace SK_NS { namespace {

typedef uint64_t Words __attribute__((vector_size(SK_VEC_BYTES)));
constexpr uint64_t kOdd = 0x9e3779b97f4a7c15;  // 2^64 / golden ratio: multiplying by it spreads each bit upwards

// Every step is a bijection of the mark before and, for a given one, of the word that comes in: weights that differ in one
// word always have another mark, those that differ in more have the same by chance alone. The product spreads a bit
// upwards, and the shift brings down what it would leave at the top, where numbers have their signs.
template <class W> SK_INL W mixed(W mark, W word) {
  mark = (mark ^ word) * kOdd;
  return mark ^ mark >> 29;
}

// Of `bytes` from `from` on, never 0. Four chains, since one waits for its product.
inline uint64_t mark_of(const void* from, int64_t bytes) {
  constexpr int kChains = 4;
  const char* p = (const char*)from;
  Words chains[kChains];
  for (int c = 0; c < kChains; ++c)
    for (int i = 0; i < int(SK_VEC_BYTES / 8); ++i) chains[c][i] = uint64_t(c * 8 + i + 1) * kOdd;
  Words word;
  for (; bytes >= kChains * SK_VEC_BYTES; bytes -= kChains * SK_VEC_BYTES)
    for (int c = 0; c < kChains; ++c, p += SK_VEC_BYTES) {
      memcpy(&word, p, SK_VEC_BYTES);
      chains[c] = mixed(chains[c], word);
    }
  for (int c = 0; bytes > 0; ++c, p += SK_VEC_BYTES, bytes -= SK_VEC_BYTES) {
    word = Words{};
    memcpy(&word, p, bytes < SK_VEC_BYTES ? bytes : SK_VEC_BYTES);
    chains[c] = mixed(chains[c], word);
  }
  uint64_t mark = 0;
  for (int c = 0; c < kChains; ++c)
    for (int i = 0; i < int(SK_VEC_BYTES / 8); ++i) mark = mixed(mark, uint64_t(chains[c][i]));
  return mark ? mark : 1;
}

}}}  // namespace seqkern::SK_NS
