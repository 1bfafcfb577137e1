// Attention of one row of the batch at one step: scores, softmax, weighted sum, and their derivatives. A row's keys lie
// together and are read once from the outer cache for each of these, so that none has an intermediate in memory.
//
// Keys and values of a large batch come from an outer cache, in pieces that the hardware's prefetcher sees the end of too
// late: `ahead` is how far on, in elements, the next row of the batch has what is read here.
//
// Vectors of type Acc are padded with zeros to whole registers; keys and values, of the storage type S, are not.
#pragma once
#include "team.h"

namespace seqkern { namespace SK_NS { namespace {

template <class T> SK_INL T total(Pack<T> x) {
  T lanes[Pack<T>::kWidth];
  store(x, lanes);
  for (int n = Pack<T>::kWidth / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  return lanes[0];
}

// A vector, of which `lanes` elements are there: all, where kWhole.
template <bool kWhole, class S> SK_INL auto load_part(const S* from, int64_t lanes) {
  if constexpr (kWhole) return load(from);
  else return load(from, lanes);
}

template <class S> struct AttentionRow {
  using Acc = typename AccOf<S>::Type;
  using V = Pack<Acc>;
  static constexpr int kWidth = V::kWidth;
  static constexpr int kBlock = kRegisters == 32 ? 8 : 4;  // vectors that are summed over the source at a time

  // to[s] = q . rows[s] for s < n; rows of k elements.
  static __attribute__((noinline)) void dots(const Acc* q, const S* rows, int64_t n, int64_t k, int64_t ahead, Acc* to) {
    constexpr int kRows = 4;
    for (int64_t s = 0; s < n; s += kRows) {
      const S* row[kRows];
      V sum[kRows];
      for (int i = 0; i < kRows; ++i) {
        row[i] = rows + min64(s + i, n - 1) * k;
        sum[i] = V(0);
      }
      int64_t j = 0;
      for (; j + kWidth <= k; j += kWidth) {
        V x = load(q + j);
        for (int i = 0; i < kRows; ++i) {
          __builtin_prefetch(row[i] + j + ahead, 0, 2);
          sum[i] = sum[i] + x * load(row[i] + j);
        }
      }
      if (j < k)
        for (int i = 0; i < kRows; ++i) sum[i] = sum[i] + load(q + j) * load(row[i] + j, k - j);
      for (int i = 0; i < kRows && s + i < n; ++i) to[s + i] = total(sum[i]);
    }
  }

  // to[s] = v . tanh(q + rows[s]).
  static __attribute__((noinline)) void additive(const Acc* q, const Acc* v, const S* rows, int64_t n, int64_t k, Acc* to) {
    for (int64_t s = 0; s < n; ++s) {
      const S* row = rows + s * k;
      V sum(0);
      int64_t j = 0;
      for (; j + kWidth <= k; j += kWidth) sum = sum + load(v + j) * tanh_(load(q + j) + load(row + j));
      if (j < k) sum = sum + load(v + j) * tanh_(load(q + j) + load(row + j, k - j));
      to[s] = total(sum);
    }
  }

  // scores[0, n) to weights; [n, size) to zeros.
  static __attribute__((noinline)) void softmax(Acc* scores, int64_t n, int64_t size) {
    for (int64_t s = n; s < size; ++s) scores[s] = 0;
    if (n == 0) return;
    Acc most = scores[0];
    for (int64_t s = 1; s < n; ++s) most = scores[s] > most ? scores[s] : most;
    V sum(0);
    for (int64_t s = 0; s < n; s += kWidth) {
      store(exp_(load(scores + s, n - s) - V(most)), scores + s, n - s);
      sum = sum + load(scores + s, n - s);
    }
    const V scale(Acc(1) / total(sum));
    for (int64_t s = 0; s < n; s += kWidth) store(load(scores + s, n - s) * scale, scores + s, n - s);
  }

  // to[j] = sum over s < n of w[s] rows[s][j], j < k; `to` is padded.
  static __attribute__((noinline)) void weighted(const Acc* w, const S* rows, int64_t n, int64_t k, int64_t ahead, Acc* to) {
    int64_t j = 0;
    for (; j + kBlock * kWidth <= k; j += kBlock * kWidth) weighted_block<kBlock, true>(w, rows + j, n, k, k - j, ahead, to + j);
    for (; j + kWidth <= k; j += kWidth) weighted_block<1, true>(w, rows + j, n, k, k - j, ahead, to + j);
    if (j < k) weighted_block<1, false>(w, rows + j, n, k, k - j, ahead, to + j);
  }
  template <int kCount, bool kWhole>
  static SK_INL void weighted_block(const Acc* w, const S* rows, int64_t n, int64_t ld, int64_t lanes,
                                    int64_t ahead, Acc* to) {
    V sum[kCount];
    for (int i = 0; i < kCount; ++i) sum[i] = V(0);
    for (int64_t s = 0; s < n; ++s)
      for (int i = 0; i < kCount; ++i) {
        __builtin_prefetch(rows + s * ld + i * kWidth + ahead, 0, 2);
        sum[i] = sum[i] + V(w[s]) * load_part<kWhole>(rows + s * ld + i * kWidth, lanes);
      }
    for (int i = 0; i < kCount; ++i) store(sum[i], to + i * kWidth);
  }

  // d[s], the gradient of the weights, to that of the scores: w (d - w . d).
  static SK_INL void softmax_backward(const Acc* w, Acc* d, int64_t n) {
    V sum(0);
    for (int64_t s = 0; s < n; s += kWidth) sum = sum + load(w + s, n - s) * load(d + s, n - s);
    const V mean(total(sum));
    for (int64_t s = 0; s < n; s += kWidth) store(load(w + s, n - s) * (load(d + s, n - s) - mean), d + s, n - s);
  }

  // From the gradients d of the scores v . tanh(q + rows[s]): that of q into dq, those of v and, where wanted, of the
  // rows are added to. tanh is computed again: it would take T times as much memory as the keys.
  static __attribute__((noinline)) void additive_backward(const Acc* d, const Acc* q, const Acc* v, const S* rows,
                                                          int64_t n, int64_t k, Acc* dq, Acc* dv, Acc* drows) {
    constexpr int kCount = 2;
    int64_t j = 0;
    for (; j + kCount * kWidth <= k; j += kCount * kWidth)
      additive_block<kCount, true>(d, q + j, v + j, rows + j, n, k, k - j, dq + j, dv + j, drows ? drows + j : nullptr);
    for (; j + kWidth <= k; j += kWidth)
      additive_block<1, true>(d, q + j, v + j, rows + j, n, k, k - j, dq + j, dv + j, drows ? drows + j : nullptr);
    if (j < k) additive_block<1, false>(d, q + j, v + j, rows + j, n, k, k - j, dq + j, dv + j, drows ? drows + j : nullptr);
  }
  template <int kCount, bool kWhole>
  static SK_INL void additive_block(const Acc* d, const Acc* q, const Acc* v, const S* rows, int64_t n, int64_t ld,
                                    int64_t lanes, Acc* dq, Acc* dv, Acc* drows) {
    V sum_q[kCount], sum_v[kCount], query[kCount], weight[kCount];
    for (int i = 0; i < kCount; ++i) {
      sum_q[i] = sum_v[i] = V(0);
      query[i] = load(q + i * kWidth);
      weight[i] = load(v + i * kWidth);
    }
    for (int64_t s = 0; s < n; ++s) {
      const V ds(d[s]);
      for (int i = 0; i < kCount; ++i) {
        V y = tanh_(query[i] + load_part<kWhole>(rows + s * ld + i * kWidth, lanes));
        V g = ds * weight[i] * (V(1) - y * y);
        sum_v[i] = sum_v[i] + ds * y;
        sum_q[i] = sum_q[i] + g;
        if (!drows) continue;
        Acc* to = drows + s * ld + i * kWidth;
        if constexpr (kWhole) store(load(to) + g, to);
        else store(load(to, lanes) + g, to, lanes);
      }
    }
    for (int i = 0; i < kCount; ++i) {
      store(sum_q[i], dq + i * kWidth);
      if constexpr (kWhole) store(load(dv + i * kWidth) + sum_v[i], dv + i * kWidth);
      else store(load(dv, lanes) + sum_v[i], dv, lanes);
    }
  }

  // to[s][j] = sum over t of left[t][s] right[t][j] for s < n, zeros for the rows from n to `size`.
  template <class L, class R> struct Outer {
    const L* left;
    int64_t left_ld;
    const R* right;
    int64_t right_ld, steps, n, size, k;
    S* to;
    void run() const {
      int64_t s = 0;
      for (; s + 4 <= n; s += 4) rows<4>(s);
      for (; s < n; ++s) rows<1>(s);
      memset(to + n * k, 0, (size - n) * k * sizeof(S));
    }
    template <int kRows> SK_INL void rows(int64_t s) const {
      constexpr int kCount = kRegisters == 32 ? 4 : 2;
      int64_t j = 0;
      for (; j + kCount * kWidth <= k; j += kCount * kWidth) block<kRows, kCount, true>(s, j);
      for (; j + kWidth <= k; j += kWidth) block<kRows, 1, true>(s, j);
      if (j < k) block<kRows, 1, false>(s, j);
    }
    template <int kRows, int kCount, bool kWhole> SK_INL void block(int64_t s, int64_t j) const {
      V sum[kRows][kCount];
      for (int r = 0; r < kRows; ++r)
        for (int i = 0; i < kCount; ++i) sum[r][i] = V(0);
      for (int64_t t = 0; t < steps; ++t) {
        V x[kCount];
        for (int i = 0; i < kCount; ++i) x[i] = load_part<kWhole>(right + t * right_ld + j + i * kWidth, k - j);
        for (int r = 0; r < kRows; ++r) {
          const V w(Acc(widen(left[t * left_ld + s + r])));
          for (int i = 0; i < kCount; ++i) sum[r][i] = sum[r][i] + w * x[i];
        }
      }
      for (int r = 0; r < kRows; ++r)
        for (int i = 0; i < kCount; ++i) {
          S* at = to + (s + r) * k + j + i * kWidth;
          if constexpr (kWhole) store(sum[r][i], at);
          else store(sum[r][i], at, k - j);
        }
    }
  };
  template <class L, class R>
  static __attribute__((noinline)) void outer(const Outer<L, R>& o) { o.run(); }
};

}}}  // namespace seqkern::SK_NS
