// Products on weights as they lie in memory, for calls with so few rows that packing would cost more than it brings: a
// step of a stream, or a batch of one whose weights are read from an outer cache anyway.
#pragma once
#include "team.h"

namespace seqkern { namespace SK_NS { namespace {

template <int... I> struct Indices {};
template <int N> using FirstIndices = Indices<__integer_pack(N)...>;

// a and b hold segments of kSegment lanes; every segment is folded to half its width, a's before b's.
template <int kSegment, class T, int... I> SK_INL Pack<T> fold(Pack<T> a, Pack<T> b, Indices<I...>) {
  constexpr int kWidth = Pack<T>::kWidth, kHalf = kSegment / 2;
#define SK_LANE (I < kWidth / 2 ? 0 : kWidth) + I % (kWidth / 2) / kHalf * kSegment + I % kHalf
  typename Pack<T>::Vec low = __builtin_shufflevector(a.v, b.v, SK_LANE...);
  typename Pack<T>::Vec high = __builtin_shufflevector(a.v, b.v, SK_LANE + kHalf...);
#undef SK_LANE
  return Pack<T>::wrap(low + high);
}
// Lane i is the sum over the lanes of x[i].
template <int kCount, class T> SK_INL Pack<T> sum_lanes(Pack<T>* x) {
  constexpr int kWidth = Pack<T>::kWidth;
  if constexpr (kCount == 1) {
    return x[0];
  } else {
    for (int i = 0; i < kCount / 2; ++i) x[i] = fold<kCount>(x[2 * i], x[2 * i + 1], FirstIndices<kWidth>{});
    return sum_lanes<kCount / 2>(x);
  }
}

#ifdef __AVX512BF16__
// 32 elements of a row in bf16, zero where the mask is.
SK_INL __m512bh pairs_of(const Bf16* p, __mmask32 there) { return (__m512bh)_mm512_maskz_loadu_epi16(there, p); }
SK_INL __m512bh pairs_of(const float* p, __mmask32 there) {
  const __m512 low = _mm512_maskz_loadu_ps(__mmask16(there), p);
  return _mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(__mmask16(there >> 16), p + 16), low);
}
#endif

// Lane i: the dot product of row [k] with w + i * ld [k], for i < n; 0 beyond. bf16 goes in dots where the CPU has them:
// even at half the rate of multiply-adds, as on Intel, that is faster than widening what is read once.
template <class A, class S>
SK_INL Pack<typename AccOf<S>::Type> dots(const A* row, const S* w, int64_t n, int64_t k, int64_t ld) {
  using V = Pack<typename AccOf<S>::Type>;
  constexpr int kWidth = V::kWidth;
  V sums[kWidth];
  for (int i = 0; i < kWidth; ++i) sums[i] = V(0);
#ifdef __AVX512BF16__
  if constexpr (kIsBf16<S>) {
    constexpr int kStep = 2 * kWidth;
    const auto add = [&](int64_t j, __mmask32 there) {
      const __m512bh x = pairs_of(row + j, there);
      for (int i = 0; i < kWidth; ++i)
        if (i < n)
          sums[i].v = (typename V::Vec)_mm512_dpbf16_ps((__m512)sums[i].v, x, pairs_of(w + i * ld + j, there));
    };
    int64_t j = 0;
    if (n >= kWidth)
      for (; j + kStep <= k; j += kStep) {
        const __m512bh x = pairs_of(row + j, ~__mmask32(0));
        for (int i = 0; i < kWidth; ++i)
          sums[i].v = (typename V::Vec)_mm512_dpbf16_ps((__m512)sums[i].v, x, (__m512bh)_mm512_loadu_si512(w + i * ld + j));
      }
    for (; j < k; j += kStep) add(j, k - j >= kStep ? ~__mmask32(0) : (__mmask32(1) << (k - j)) - 1);
    return sum_lanes<kWidth>(sums);
  }
#endif
  if (n >= kWidth) {
    int64_t j = 0;
    for (; j + kWidth <= k; j += kWidth) {
      V x = load(row + j);
      for (int i = 0; i < kWidth; ++i) sums[i].v += x.v * load(w + i * ld + j).v;
    }
    if (j < k) {
      V x = load(row + j, k - j);
      for (int i = 0; i < kWidth; ++i) sums[i].v += x.v * load(w + i * ld + j, k - j).v;
    }
  } else {
    for (int64_t j = 0; j < k; j += kWidth) {
      V x = load(row + j, k - j);
      for (int i = 0; i < kWidth; ++i)
        if (i < n) sums[i].v += x.v * load(w + i * ld + j, k - j).v;
    }
  }
  return sum_lanes<kWidth>(sums);
}

template <class A, class S> SK_INL Pack<typename AccOf<S>::Type> dots(const A* row, const S* w, int64_t n, int64_t k) {
  return dots(row, w, n, k, k);
}

// As multiply() on a cell's packed weights (team.h), but on w [G*H, k] itself, one row at a time.
template <class C, class S, class Acc, class Done>
SK_INL void multiply_direct(const Rows<S>& a, int64_t rows, const S* w, int64_t hidden, int64_t k, Range p, const Acc* init,
                            const Done& done, bool back = false) {
  constexpr int kWidth = Pack<Acc>::kWidth, kColumns = kCellVectors<C> * kWidth;
  alignas(64) Acc c[kColumns];
  for (int64_t q = p.begin; q < p.end; ++q)
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t panel = back ? p.begin + p.end - 1 - q : q;
      for (int u = 0; u < kUnitBlocks<C>; ++u)
        for (int g = 0; g < C::kGates; ++g) {
          const int v = u * C::kGates + g;
          const int64_t j = (panel * kUnitBlocks<C> + u) * kWidth, n = hidden - j;
          Pack<Acc> first = load(init + panel * kColumns + v * kWidth);
          if (n > 0) first = first + dots(a.plain(r), w + (g * hidden + j) * k, n, k);
          store(first, c + v * kWidth);
        }
      done(panel, r, 1, c);
    }
}

}}}  // namespace seqkern::SK_NS
