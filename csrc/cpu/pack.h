// The SIMD value types of the instruction set that this file is compiled for: load, store, arithmetic, exp, sigmoid
// and tanh. C headers only, everything in an anonymous namespace: see kernels.cpp.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef SK_VEC_BYTES
#define SK_VEC_BYTES 16
#endif
#define SK_INL inline __attribute__((always_inline))

namespace seqkern { namespace SK_NS { namespace {

struct Bf16 { uint16_t bits; };
struct F16 { uint16_t bits; };
template <class S> constexpr bool kIsBf16 = false;
template <> constexpr bool kIsBf16<Bf16> = true;

template <class T> struct IntOf;
template <> struct IntOf<float> { using Type = int32_t; };
template <> struct IntOf<double> { using Type = int64_t; };

template <class T> struct Pack {
  static constexpr int kWidth = SK_VEC_BYTES / sizeof(T);
  typedef T Vec __attribute__((vector_size(SK_VEC_BYTES)));
  typedef T Unaligned __attribute__((vector_size(SK_VEC_BYTES), aligned(sizeof(T)), may_alias));
  typedef typename IntOf<T>::Type Int __attribute__((vector_size(SK_VEC_BYTES)));
  Vec v;
  SK_INL Pack() {}
  SK_INL explicit Pack(T x) : v(x - Vec{}) {}
  SK_INL static Pack wrap(Vec x) { Pack p; p.v = x; return p; }
};
template <class T> SK_INL Pack<T> operator+(Pack<T> a, Pack<T> b) { return Pack<T>::wrap(a.v + b.v); }
template <class T> SK_INL Pack<T> operator-(Pack<T> a, Pack<T> b) { return Pack<T>::wrap(a.v - b.v); }
template <class T> SK_INL Pack<T> operator*(Pack<T> a, Pack<T> b) { return Pack<T>::wrap(a.v * b.v); }

// ---- scalars of the storage types ----------------------------------------------------------------------------------

SK_INL float float_of(Bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float f; memcpy(&f, &bits, 4); return f;
}
SK_INL Bf16 bf16_of(float f) {  // round to nearest even; a NaN stays one
  uint32_t bits; memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40)};
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}
SK_INL float float_of(F16 x) {
  uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, mag = x.bits & 0x7fffu, bits;
  if (mag >= 0x7c00u) {
    bits = 0x7f800000u | (mag & 0x3ffu) << 13;
  } else {  // the product is exact, for subnormals too
    uint32_t shifted = mag << 13;
    float f; memcpy(&f, &shifted, 4);
    f *= 0x1p112f;
    memcpy(&bits, &f, 4);
  }
  bits |= sign;
  float f; memcpy(&f, &bits, 4); return f;
}
SK_INL F16 f16_of(float f) {  // round to nearest even, overflow to infinity, gradual underflow
  uint32_t bits; memcpy(&bits, &f, 4);
  uint16_t sign = uint16_t(bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (bits >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};
  if (bits < 0x38800000u) {  // below 2^-14: adding 0.5 puts the 10 bits that remain at the end of the mantissa
    float mag; memcpy(&mag, &bits, 4);
    mag += 0.5f;
    memcpy(&bits, &mag, 4);
    return {uint16_t(sign | (bits - 0x3f000000u))};
  }
  bits += 0xfffu + ((bits >> 13) & 1);
  return {uint16_t(sign | ((bits - 0x38000000u) >> 13))};
}
SK_INL float widen(float x) { return x; }
SK_INL double widen(double x) { return x; }
SK_INL float widen(Bf16 x) { return float_of(x); }
SK_INL float widen(F16 x) { return float_of(x); }
SK_INL void narrow(float x, float& y) { y = x; }
SK_INL void narrow(double x, double& y) { y = x; }
SK_INL void narrow(float x, Bf16& y) { y = bf16_of(x); }
SK_INL void narrow(float x, F16& y) { y = f16_of(x); }

// ---- vector load and store: kWidth elements, or the first n with the rest zero ---------------------------------------

template <class T> SK_INL Pack<T> load(const T* p) { return Pack<T>::wrap(*(const typename Pack<T>::Unaligned*)p); }
template <class T> SK_INL void store(Pack<T> x, T* p) { *(typename Pack<T>::Unaligned*)p = x.v; }

typedef uint16_t U16s __attribute__((vector_size(SK_VEC_BYTES / 2), aligned(2), may_alias));
typedef uint32_t U32s __attribute__((vector_size(SK_VEC_BYTES)));

SK_INL Pack<float> load(const Bf16* p) {
  U32s wide = __builtin_convertvector(*(const U16s*)p, U32s) << 16;
  return Pack<float>::wrap((Pack<float>::Vec)wide);
}
SK_INL void store(Pack<float> x, Bf16* p) {
#if defined(__AVX512BF16__)  // denormal results become zero
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)x.v));
  return;
#endif
  U32s bits = (U32s)x.v, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  U32s nan = (bits >> 16) | 0x40u;
  U32s kept = (bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
  *(U16s*)p = __builtin_convertvector(kept, U16s);
}
SK_INL Pack<float> load(const F16* p) {
#if SK_VEC_BYTES == 64
  return Pack<float>::wrap((Pack<float>::Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)));
#elif SK_VEC_BYTES == 32
  return Pack<float>::wrap((Pack<float>::Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
#else
  Pack<float> x;
  for (int i = 0; i < Pack<float>::kWidth; ++i) x.v[i] = float_of(p[i]);
  return x;
#endif
}
SK_INL void store(Pack<float> x, F16* p) {
#if SK_VEC_BYTES == 64
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x.v, _MM_FROUND_TO_NEAREST_INT));
#elif SK_VEC_BYTES == 32
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x.v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < Pack<float>::kWidth; ++i) p[i] = f16_of(x.v[i]);
#endif
}

template <class S> struct AccOf { using Type = float; };  // the type that sums and cells are computed in
template <> struct AccOf<double> { using Type = double; };

template <class S> SK_INL Pack<typename AccOf<S>::Type> load(const S* p, int64_t n) {
  constexpr int kWidth = Pack<typename AccOf<S>::Type>::kWidth;
  if (n >= kWidth) return load(p);
  S full[kWidth];
  memset(full, 0, sizeof full);
  for (int64_t i = 0; i < n; ++i) full[i] = p[i];
  return load(full);
}
template <class T, class S> SK_INL void store(Pack<T> x, S* p, int64_t n) {
  if (n >= Pack<T>::kWidth) return store(x, p);
  S full[Pack<T>::kWidth];
  store(x, full);
  for (int64_t i = 0; i < n; ++i) p[i] = full[i];
}

#if SK_VEC_BYTES == 64
// 16 x 16 elements of 32 bits, transposed in registers.
SK_INL void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int h = 0; h < 2; ++h) {
      r[i + 2 * h] = _mm512_unpacklo_epi64(t[i + h], t[i + 2 + h]);
      r[i + 2 * h + 1] = _mm512_unpackhi_epi64(t[i + h], t[i + 2 + h]);
    }
  // r[4 g + c]: in each of the four 128-bit lanes l, column 4 l + c of rows 4 g to 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512i a = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88), b = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
    const __m512i d = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88), e = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    t[c] = _mm512_shuffle_i32x4(a, d, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(a, d, 0xdd);
    t[4 + c] = _mm512_shuffle_i32x4(b, e, 0x88);
    t[12 + c] = _mm512_shuffle_i32x4(b, e, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}
#endif

#if SK_VEC_BYTES == 32
// 8 x 8 elements of 32 bits, transposed in registers.
SK_INL void transpose(__m256 (&r)[8]) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  // r[4 g + c]: in each of the two 128-bit lanes l, column 4 l + c of rows 4 g to 4 g + 3.
  for (int i = 0; i < 8; i += 4)
    for (int h = 0; h < 2; ++h) {
      r[i + 2 * h] = _mm256_shuffle_ps(t[i + h], t[i + 2 + h], 0x44);
      r[i + 2 * h + 1] = _mm256_shuffle_ps(t[i + h], t[i + 2 + h], 0xee);
    }
  for (int c = 0; c < 4; ++c) {
    t[c] = _mm256_permute2f128_ps(r[c], r[4 + c], 0x20);
    t[4 + c] = _mm256_permute2f128_ps(r[c], r[4 + c], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}
#endif

// ---- functions -------------------------------------------------------------------------------------------------------

// With x = n ln 2 + r, |r| <= ln(2)/2: expm1(r) = r + r^2 q(r). q is fitted for the least relative error of expm1(r):
// 1.3e-8 (float, a quarter of a rounding) and 4e-17 (double).
template <class T> struct ExpTable;
template <> struct ExpTable<float> {
  static constexpr int kTerms = 5, kMantissa = 23, kBias = 127;
  static constexpr float kQ[kTerms] = {0.49999997f, 0.16666543f, 0.0416672f, 0.0083665475f, 0.0013882517f};
  static constexpr float kMagic = 0x1.8p23f, kLog2e = 1.44269504f, kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;
  static constexpr float kMax = 89.f, kMin = -104.f, kTanhMax = 10.f, kSigmoidMax = 87.f;
};
template <> struct ExpTable<double> {
  static constexpr int kTerms = 10, kMantissa = 52, kBias = 1023;
  static constexpr double kQ[kTerms] = {
      0.50000000000000010262, 0.16666666666666667456, 0.041666666666623991516, 0.0083333333333300513464,
      0.0013888888917881793308, 0.00019841269863105968748, 0.000024801521190217727651, 2.7557268378684192873e-6,
      2.7620138719733995569e-7, 2.5100424157005066788e-8};
  static constexpr double kMagic = 0x1.8p52, kLog2e = 1.4426950408889634074;
  static constexpr double kLn2Hi = 0x1.62e42fefa3800p-1, kLn2Lo = 0x1.ef35793c76730p-45;
  static constexpr double kMax = 710., kMin = -746., kTanhMax = 20., kSigmoidMax = 708.;
};

template <class T> struct Reduced { Pack<T> n, expm1; };  // e^x = 2^n (1 + expm1), n a whole number

template <class T> SK_INL Reduced<T> reduce(Pack<T> x) {
  using E = ExpTable<T>;
  using V = Pack<T>;
  V n = x * V(E::kLog2e) + V(E::kMagic) - V(E::kMagic);
  V r = x - n * V(E::kLn2Hi) - n * V(E::kLn2Lo);
  V q(E::kQ[E::kTerms - 1]);
  for (int i = E::kTerms - 2; i >= 0; --i) q = q * r + V(E::kQ[i]);
  return {n, r * r * q + r};
}
// 2^n for a whole n within the exponent's range.
template <class T> SK_INL Pack<T> power_of_two(Pack<T> n) {
  using E = ExpTable<T>;
  using Int = typename Pack<T>::Int;
  Int bits = (Int)(n + Pack<T>(E::kMagic + E::kBias)).v;  // the integer stands in the low bits of the mantissa
  return Pack<T>::wrap((typename Pack<T>::Vec)(bits << E::kMantissa));
}

// 1/x for finite x, to about one ulp. A division takes three times as long in the widest registers.
template <class T> SK_INL Pack<T> reciprocal(Pack<T> x) { return Pack<T>::wrap(Pack<T>(1).v / x.v); }
#if SK_VEC_BYTES == 64
SK_INL Pack<float> reciprocal(Pack<float> x) {
  Pack<float> y = Pack<float>::wrap((Pack<float>::Vec)_mm512_rcp14_ps((__m512)x.v));  // 14 bits, and one Newton step
  return y + y * (Pack<float>(1) - x * y);
}
#endif

// The larger and the smaller of x and a bound. A NaN in x stays.
template <class T> SK_INL Pack<T> at_least(Pack<T> x, T low) { return Pack<T>::wrap(x.v < Pack<T>(low).v ? Pack<T>(low).v : x.v); }
template <class T> SK_INL Pack<T> at_most(Pack<T> x, T high) { return Pack<T>::wrap(x.v > Pack<T>(high).v ? Pack<T>(high).v : x.v); }
#if SK_VEC_BYTES == 64
// One instruction instead of two; of its operands it takes the second where either is a NaN.
SK_INL Pack<float> at_least(Pack<float> x, float low) {
  return Pack<float>::wrap((Pack<float>::Vec)_mm512_max_ps(_mm512_set1_ps(low), (__m512)x.v));
}
SK_INL Pack<float> at_most(Pack<float> x, float high) {
  return Pack<float>::wrap((Pack<float>::Vec)_mm512_min_ps(_mm512_set1_ps(high), (__m512)x.v));
}
#endif

template <class T> SK_INL Pack<T> exp_(Pack<T> x) {
  using E = ExpTable<T>;
  using V = Pack<T>;
  Reduced<T> e = reduce(at_least(at_most(x, E::kMax), E::kMin));
  V half = e.n * V(T(0.5)) + V(E::kMagic) - V(E::kMagic);  // two factors: neither over- nor underflows by itself
  return (V(1) + e.expm1) * power_of_two(half) * power_of_two(e.n - half);
}
// 1 / (1 + e^-x), zero below the normal numbers' range of e^x.
template <class T> SK_INL Pack<T> sigmoid(Pack<T> x) {
  using V = Pack<T>;
  constexpr T kMost = ExpTable<T>::kSigmoidMax;
  Reduced<T> e = reduce(V(0) - at_most(at_least(x, -kMost), kMost));
  V scale = power_of_two(e.n), y = reciprocal(scale * e.expm1 + (V(1) + scale));
  return V::wrap(x.v < V(-kMost).v ? V(0).v : y.v);
}
// The quotient m / (m + 2), rounded once: the error of the first guess, m - q m - 2 q, is exact but for its last bits.
template <class T> SK_INL Pack<T> divide_by_two_more(Pack<T> m) {
  using V = Pack<T>;
  V r = reciprocal(m + V(2)), q = m * r;
  return q + r * ((m - q * m) - (q + q));
}
#if SK_VEC_BYTES == 64
SK_INL Pack<float> divide_by_two_more(Pack<float> m) {  // 14 bits of 1 / (m + 2) are enough for one correction
  using V = Pack<float>;
  V r = V::wrap((V::Vec)_mm512_rcp14_ps((__m512)(m + V(2)).v)), q = m * r;
  return q + r * ((m - q * m) - V(2) * q);
}
#endif
// With m = expm1(2 |x|), tanh |x| is m / (m + 2): relatively exact near zero, and absolutely near one, where the cell's
// derivative 1 - tanh^2 cancels and an error of two ulp would show. One from 10 (float) or 20 (double) on.
template <class T> SK_INL Pack<T> tanh_(Pack<T> x) {
  using V = Pack<T>;
  using Int = typename V::Int;
  Int sign = (Int)x.v & (Int)V(T(-0.0)).v;
  V a = at_most(V::wrap((typename V::Vec)((Int)x.v ^ sign)), ExpTable<T>::kTanhMax);
  Reduced<T> e = reduce(a + a);
  V scale = power_of_two(e.n), t = divide_by_two_more(e.expm1 * scale + (scale - V(1)));
  return V::wrap((typename V::Vec)((Int)t.v | sign));
}
// What a cell of storage type S computes in: where it is bf16, whose half ulp is 2^-9, functions to 2^-13 are enough.
template <class S> struct CellPackOf { using Type = Pack<typename AccOf<S>::Type>; };
#if SK_VEC_BYTES == 64
struct Coarse : Pack<float> {
  SK_INL Coarse() {}
  SK_INL Coarse(Pack<float> x) : Pack<float>(x) {}
  SK_INL explicit Coarse(float x) : Pack<float>(x) {}
};
template <> struct CellPackOf<Bf16> { using Type = Coarse; };
SK_INL Coarse operator+(Coarse a, Coarse b) { return Pack<float>::wrap(a.v + b.v); }
SK_INL Coarse operator-(Coarse a, Coarse b) { return Pack<float>::wrap(a.v - b.v); }
SK_INL Coarse operator*(Coarse a, Coarse b) { return Pack<float>::wrap(a.v * b.v); }
SK_INL __m512 power_of_two(__m512 by, __m512 x) { return _mm512_scalef_ps(x, by); }  // x 2^floor(by), to 0 and infinity

// 1 / (1 + 2^t), t = -x log2(e): 2^f by a polynomial in what is left of t above its floor, relative error 2^-13.7.
SK_INL Coarse sigmoid(Coarse x) {
  using V = Pack<float>;
  constexpr int kAboveFloor = 0x01 | 0x08;
  const V t = V(x) * V(-1.44269504f);
  const V f = V::wrap((V::Vec)_mm512_reduce_ps((__m512)t.v, kAboveFloor));
  const V p = V(0.99992526f) + f * (V(0.69583321f) + f * (V(0.22606757f) + f * V(0.07802449f)));
  const V e = V::wrap((V::Vec)power_of_two((__m512)t.v, (__m512)p.v));
  return V::wrap((V::Vec)_mm512_rcp14_ps((__m512)(V(1) + e).v));
}
// m / (m + 2) with m = 2^t - 1, t = 2 x log2(e) = n + f: 2^f - 1 to 2^-16 of itself, so that small x come out as exactly.
SK_INL Coarse tanh_(Coarse x) {
  using V = Pack<float>;
  constexpr int kNearest = 0x00 | 0x08;
  const V t = at_most(x, 20.f) * V(2.88539008f);
  const V n = V::wrap((V::Vec)_mm512_roundscale_ps((__m512)t.v, kNearest));
  const V f = V::wrap((V::Vec)_mm512_reduce_ps((__m512)t.v, kNearest));  // t - n, and 0 where both are infinite
  const V q = V(0.69313687f) + f * (V(0.24023253f) + f * (V(0.05583733f) + f * V(0.00961811f)));
  const V scale = V::wrap((V::Vec)power_of_two((__m512)n.v, (__m512)V(1).v));
  const V m = f * q * scale + (scale - V(1));
  return m * V::wrap((V::Vec)_mm512_rcp14_ps((__m512)(m + V(2)).v));
}
#endif
template <class T> SK_INL Pack<T> relu(Pack<T> x) {
  Pack<T> zero(0);
  return Pack<T>::wrap(x.v < zero.v ? zero.v : x.v);
}
template <class T> SK_INL Pack<T> hard_sigmoid(Pack<T> x) {  // clamp(x / 6 + 1/2, 0, 1)
  return at_least(at_most(x * Pack<T>(T(1) / 6) + Pack<T>(T(0.5)), T(1)), T(0));
}
template <class T> SK_INL Pack<T> positive(Pack<T> x) {  // 1 where x > 0, else 0
  Pack<T> zero(0);
  return Pack<T>::wrap(x.v > zero.v ? Pack<T>(1).v : zero.v);
}

}}}  // namespace seqkern::SK_NS
