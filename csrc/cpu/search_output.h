// The output layer: of its product only what a search needs is kept, tile by tile. Per row that is the logarithm of the
// sum of all exponentials, and the likeliest token or tokens; memory does not grow with V.
//
// Sums are taken in at most kBlocks blocks of the vocabulary, which do not depend on how many threads there are, and
// these are added up in their order.
#pragma once
#include "search_step.h"

namespace seqkern { namespace SK_NS { namespace {

constexpr int64_t kBlocks = 64;

// Bit i: whether lane i of x is above the bound.
template <class T> SK_INL uint32_t lanes_above(Pack<T> x, T bound) {
#if SK_VEC_BYTES == 64
  if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask((__m512)x.v, _mm512_set1_ps(bound), _CMP_GT_OQ);
  else return _mm512_cmp_pd_mask((__m512d)x.v, _mm512_set1_pd(bound), _CMP_GT_OQ);
#elif SK_VEC_BYTES == 32
  if constexpr (sizeof(T) == 4)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x.v, _mm256_set1_ps(bound), _CMP_GT_OQ));
  else return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)x.v, _mm256_set1_pd(bound), _CMP_GT_OQ));
#else
  uint32_t bits = 0;
  for (int i = 0; i < Pack<T>::kWidth; ++i) bits |= uint32_t(x.v[i] > bound) << i;
  return bits;
#endif
}

// A sum of exponentials: sum e^top.
template <class S> struct ExpSum {
  S top, sum;
};
// log p = (x - top) - log_sum.
struct LogSum {
  double top, log_sum;
  SK_INL double log_p(double x) const { return x - top - log_sum; }
};
template <class S> SK_INL LogSum log_sum(const ExpSum<S>* blocks, int64_t n) {
  double top = double(blocks[0].top), sum = 0;
  for (int64_t i = 1; i < n; ++i) top = blocks[i].top > top ? blocks[i].top : top;
  for (int64_t i = 0; i < n; ++i)
    sum += blocks[i].sum * (blocks[i].top == top ? 1. : __builtin_exp(double(blocks[i].top) - top));
  return {top, __builtin_log(sum)};
}

// The most likely tokens that a row has shown, likeliest first, of equals the lower id.
template <class S> struct BestList {
  S* values;
  int32_t* ids;
  int64_t* count;
  int64_t most;
  SK_INL S bound() const { return *count < most ? S(-__builtin_inff()) : values[most - 1]; }
  // Tokens come in the order of their ids.
  SK_INL void add(S x, int32_t id) const {
    int64_t at = *count < most ? (*count)++ : most - 1;
    for (; at > 0 && values[at - 1] < x; --at) {
      values[at] = values[at - 1];
      ids[at] = ids[at - 1];
    }
    values[at] = x;
    ids[at] = id;
  }
};

template <class S> struct SearchOutput {
  using V = Pack<S>;
  using Int = typename V::Int;
  using Step = SearchStep<S>;
  static constexpr int kWidth = V::kWidth;
  static constexpr int64_t kColumns = kWide * kWidth;

  const SearchArgs& a;
  const SearchPart& part_of;
  const SearchPack<S>& p;
  const int64_t vocab, blocks, list;  // list: tokens kept for each row, 0 where the likeliest is all
  const int64_t most;
  ExpSum<S>*sums, *scaled_sums;  // [rows][blocks]; the second at the temperature, of the tokens that may be drawn
  S* eos;                        // [rows] its logit
  S* lanes;                      // [members][rows][6][kWidth]: ExpSum twice; the likeliest, and its vector's number
  S* values;                     // [members][rows][list]
  int32_t* ids;
  int64_t* counts;  // [members][rows]
  enum Lane { kTop, kSum, kScaledTop, kScaledSum, kBest, kWhere, kLanes };

  SearchOutput(const SearchArgs& args, const SearchPart& part, const SearchPack<S>& pack, int64_t rows, Arena& m)
      : a(args),
        part_of(part),
        p(pack),
        vocab(pack.shape.vocab),
        blocks(min64(kBlocks, pack.out_panels)),
        list(list_size(args)),
        most(rows) {
    sums = m.take<ExpSum<S>>(most * blocks);
    scaled_sums = m.take<ExpSum<S>>(scales() ? most * blocks : 0);
    eos = m.take<S>(most);
    lanes = m.take<S>(part.count * most * kLanes * kWidth);
    values = m.take<S>(part.count * most * list);
    ids = m.take<int32_t>(part.count * most * list);
    counts = m.take<int64_t>(part.count * most);
  }
  static constexpr int64_t kNucleus = 256;  // candidates of top-p that are looked for at a time
  int64_t list_size(const SearchArgs& args) const {
    if (args.search == Search::kBeam) return min64(args.beam, vocab);
    if (args.search == Search::kGreedy) return 0;
    if (args.top_k) return min64(args.top_k, vocab);
    return args.top_p < 1 ? min64(kNucleus, vocab) : 0;
  }
  bool scales() const { return a.search == Search::kSample && !a.top_k; }

  S* lane(int64_t row, Lane which) const { return lanes + ((part_of.member * most + row) * kLanes + which) * kWidth; }
  BestList<S> best(int member, int64_t row) const {
    const int64_t i = member * most + row;
    return {values + i * list, ids + i * list, counts + i, list};
  }
  // Whether a panel has tokens that are not chosen like others.
  bool special(int64_t panel) const {
    return panel == p.out_panels - 1 || panel == a.pad / kColumns || panel == a.bos / kColumns ||
           panel == a.eos / kColumns;
  }

  void bar(int64_t panel, const S* t, S* open) const {
    memcpy(open, t, kColumns * sizeof(S));
    const S never = S(-__builtin_inff());
    const int64_t first = panel * kColumns;
    const int64_t barred[3] = {a.pad, a.bos, a.search == Search::kBeam ? a.eos : a.pad};
    for (int64_t id : barred)
      if (id / kColumns == panel) open[id - first] = never;
    for (int64_t j = max64(0, vocab - first); j < kColumns; ++j) open[j] = never;
  }

  static SK_INL void add_exps(const S* tile, S* top, S* sum, S scale) {
    V old = load(top), most = old, x[kWide];
    for (int v = 0; v < kWide; ++v) {
      x[v] = load(tile + v * kWidth);
      most.v = x[v].v > most.v ? x[v].v : most.v;
    }
    V total = load(sum) * exp_((old - most) * V(scale));
    for (int v = 0; v < kWide; ++v) total = total + exp_((x[v] - most) * V(scale));
    store(most, top);
    store(total, sum);
  }
  static SK_INL ExpSum<S> fold_lanes(const S* top, const S* sum, S scale) {
    const S most = highest(load(top));
    return {most, sum_of(load(sum) * exp_((load(top) - V(most)) * V(scale)))};
  }

  // The product for `rows` rows, in this thread's blocks. see(row, panel, tile): the row's logits of a panel, -inf
  // where a token may not be chosen.
  template <class See> void product(const Rows<S>& left, int64_t rows, Range own, bool sum, const See& see) const {
    const S scale = S(1 / a.temperature);
    for (int64_t i = own.begin; i < own.end; ++i) {
      const Range range = part(p.out_panels, int(i), int(blocks));
      for (int64_t r = 0; sum && r < rows; ++r)
        for (int first = kTop; first <= kScaledTop; first += kScaledTop - kTop) {
          store(V(S(kNever)), lane(r, Lane(first)));
          store(V(0), lane(r, Lane(first + 1)));
        }
      multiply<kWide, true>(left, rows, p.w_out, range.begin, range.end, p.b_out,
                            [&](int64_t panel, int64_t r0, int n, const S* t) {
                              alignas(64) S open[kColumns];
                              for (int r = 0; r < n; ++r, t += kColumns) {
                                if (sum) add_exps(t, lane(r0 + r, kTop), lane(r0 + r, kSum), S(1));
                                const S* seen = t;
                                if (special(panel)) {
                                  bar(panel, t, open);
                                  if (sum && panel == a.eos / kColumns) eos[r0 + r] = t[a.eos % kColumns];
                                  seen = open;
                                }
                                if (sum && scales())
                                  add_exps(seen, lane(r0 + r, kScaledTop), lane(r0 + r, kScaledSum), scale);
                                see(r0 + r, panel, seen);
                              }
                            });
      for (int64_t r = 0; sum && r < rows; ++r) {
        sums[r * blocks + i] = fold_lanes(lane(r, kTop), lane(r, kSum), S(1));
        if (scales()) scaled_sums[r * blocks + i] = fold_lanes(lane(r, kScaledTop), lane(r, kScaledSum), scale);
      }
    }
  }
  // All that the search wants of the rows. Threads meet at the end; then the first may call `likeliest`, `best(0,
  // row)`.
  void run(const Rows<S>& left, int64_t rows) const {
    const Range own = part(blocks, part_of.member, part_of.count);
    if (list) {
      for (int64_t r = 0; r < rows; ++r) *best(part_of.member, r).count = 0;
      product(left, rows, own, true,
              [&](int64_t r, int64_t panel, const S* t) { collect(best(part_of.member, r), panel, t); });
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        store(V(S(-__builtin_inff())), lane(r, kBest));
        memset(lane(r, kWhere), 0, kWidth * sizeof(S));
      }
      product(left, rows, own, true, [&](int64_t r, int64_t panel, const S* t) {
        if (a.search == Search::kSample) return;
        V top = load(lane(r, kBest));
        Int where;
        memcpy(&where, lane(r, kWhere), sizeof where);
        for (int v = 0; v < kWide; ++v) {
          const V x = load(t + v * kWidth);
          const Int higher = x.v > top.v;
          top.v = higher ? x.v : top.v;
          where = higher ? Int{} + typename IntOf<S>::Type(panel * kWide + v) : where;
        }
        store(top, lane(r, kBest));
        memcpy(lane(r, kWhere), &where, sizeof where);
      });
    }
    meet(*part_of.barrier, part_of.count);
    if (list && part_of.member == 0)
      for (int member = 1; member < part_of.count; ++member)
        for (int64_t r = 0; r < rows; ++r) {
          const BestList<S> more = best(member, r), all = best(0, r);
          for (int64_t i = 0; i < *more.count; ++i)
            if (more.values[i] > all.bound()) all.add(more.values[i], more.ids[i]);
        }
  }
  static SK_INL void collect(const BestList<S>& to, int64_t panel, const S* t) {
    for (int v = 0; v < kWide; ++v)
      for (uint32_t bits = lanes_above(load(t + v * kWidth), to.bound()); bits; bits &= bits - 1) {
        const int i = __builtin_ctz(bits);
        if (t[v * kWidth + i] > to.bound()) to.add(t[v * kWidth + i], int32_t(panel * kColumns + v * kWidth + i));
      }
  }
  LogSum log_sum_of(int64_t row) const { return log_sum(sums + row * blocks, blocks); }
  // The likeliest token, of equals the lowest, and its logit. Where there is none, as no logit is a number, the first
  // that may be chosen.
  int64_t likeliest(int64_t row, S& logit) const {
    int64_t found = -1;
    logit = S(-__builtin_inff());
    for (int member = 0; member < part_of.count; ++member) {
      const S* from = lanes + (member * most + row) * kLanes * kWidth;
      Int where;
      memcpy(&where, from + kWhere * kWidth, sizeof where);
      for (int i = 0; i < kWidth; ++i) {
        const S x = from[kBest * kWidth + i];
        const int64_t id = int64_t(where[i]) * kWidth + i;
        if (x > logit || (x == logit && x > S(-__builtin_inff()) && id < found)) {
          logit = x;
          found = id;
        }
      }
    }
    return found >= 0 ? found : first_open();
  }
  int64_t first_open() const {
    int64_t id = 0;
    while (id == a.pad || id == a.bos) ++id;
    return id;
  }
};

}}}  // namespace seqkern::SK_NS
