// The recurrences of scan_cells.h, h_t = a_t h_{t-1} + b_t with a_t = keep_t a(p_t), over a piece of time for a range of
// vectors of units. The state goes along in a small buffer; memory is read and written front to back.
//
// Pieces of time are independent once their first states are known: `summarise` finds what a piece does to a state, the
// factor and the summand, and scan_ops.cpp chains the pieces.
#pragma once
#include "../core/args.h"
#include "../core/scan_cells.h"
#include "pack.h"

namespace seqkern { namespace SK_NS { namespace {

template <class T> SK_INL Pack<T> positive_or_zero(Pack<T> x) {  // 1 where x >= 0, else 0
  return Pack<T>::wrap(x.v >= Pack<T>(0).v ? Pack<T>(1).v : Pack<T>(0).v);
}
template <class T> SK_INL Pack<T> minimum(Pack<T> a, Pack<T> b) { return Pack<T>::wrap(a.v < b.v ? a.v : b.v); }
// A piece's factor after a step: `after`, but 0 where, and only where, the state was cleared, so that a state that is not
// a number outlives a factor too small to tell from 0, and no reset.
template <class T> SK_INL Pack<T> factor_after(Pack<T> before, Pack<T> after) {
  const auto least = Pack<T>(sizeof(T) == 8 ? T(2.2250738585072014e-308) : T(1.17549435e-38f)).v;  // normal
  return Pack<T>::wrap(before.v > Pack<T>(0).v ? (after.v > least ? after.v : least) : Pack<T>(0).v);
}

template <class C, class S> struct Scan {
  using Acc = typename AccOf<S>::Type;
  using V = Pack<Acc>;
  static constexpr int kWidth = V::kWidth;

  // Calls use(b, j, lanes, state) for the vectors [part.first, part.last) of the batch's units.
  template <class Use> static SK_INL void vectors(const ScanArgs& a, const ScanPart& part, const Use& use) {
    const int64_t per_row = (a.hidden + kWidth - 1) / kWidth;
    for (int64_t q = part.first; q < part.last; ++q) {
      const int64_t b = q / per_row, j = q % per_row * kWidth;
      use(b, j, a.hidden - j, (Acc*)part.state + (q - part.first) * kWidth,
          (Acc*)part.factor + (q - part.first) * kWidth);
    }
  }
  static SK_INL void gates(const ScanArgs& a, int64_t t, int64_t b, int64_t j, int64_t lanes, V (&p)[C::kGates]) {
    const S* row = (const S*)a.p + (t * a.batch + b) * C::kGates * a.hidden + j;
    for (int g = 0; g < C::kGates; ++g) p[g] = load(row + g * a.hidden, lanes);
  }
  // A factor of 0 clears what is not a number, too.
  static SK_INL V kept(const ScanArgs& a, int64_t t, int64_t b, V v) {
    if (!a.keep) return v;
    const Acc k = ((const Acc*)a.keep)[t * a.batch + b];
    return k == 0 ? V(0) : v * V(k);
  }

  // The state before the first step of the piece goes in, the one after the last comes out.
  static void forward(const ScanArgs& a, const ScanPart& part) {
    for (int64_t t = part.begin; t < part.end; ++t)
      vectors(a, part, [&](int64_t b, int64_t j, int64_t lanes, Acc* state, Acc* factor) {
        V p[C::kGates], f, s;
        gates(a, t, b, j, lanes, p);
        C::forward(p, f, s);
        V h = f * kept(a, t, b, load(state)) + s;
        store(h, state);
        const V before = part.summary ? kept(a, t, b, load(factor)) : V(0);
        if (part.summary) store(factor_after(before, f * before), factor);
        else store(h, (S*)a.h + (t * a.batch + b) * a.hidden + j, lanes);
      });
  }
  // Against time: the gradient of the state after the last step, from what follows, goes in; that of the state before
  // the first comes out.
  static void backward(const ScanArgs& a, const ScanPart& part) {
    for (int64_t t = part.end - 1; t >= part.begin; --t)
      vectors(a, part, [&](int64_t b, int64_t j, int64_t lanes, Acc* state, Acc* factor) {
        V p[C::kGates], f, s;
        gates(a, t, b, j, lanes, p);
        C::forward(p, f, s);
        V dh = load(state) + load((const S*)a.dh + (t * a.batch + b) * a.hidden + j, lanes);
        store(kept(a, t, b, f * dh), state);
        if (part.summary)
          return store(kept(a, t, b, factor_after(load(factor), f * load(factor))), factor);
        const S* before = t ? (const S*)a.h + ((t - 1) * a.batch + b) * a.hidden + j
                            : a.h0 ? (const S*)a.h0 + b * a.hidden + j : nullptr;
        V dp[C::kGates], h = before ? kept(a, t, b, load(before, lanes)) : V(0);
        C::backward(p, dh * h, dh, dp);
        S* row = (S*)a.dp + (t * a.batch + b) * C::kGates * a.hidden + j;
        for (int g = 0; g < C::kGates; ++g) store(dp[g], row + g * a.hidden, lanes);
      });
  }
};

}}}  // namespace seqkern::SK_NS
