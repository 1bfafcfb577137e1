// Sampling: one number for each row and step, inverted over the tokens in the order of their ids. The definition is
// seqkern/seq2seq/search.py, `draw`.
//
// What the product of the output layer left is enough to find the block of the vocabulary that a token lies in; the
// block alone is then computed again. The candidates of top-k, and of top-p where they are few, stand in the row's
// list.
#pragma once
#include "random.h"
#include "search_output.h"

namespace seqkern { namespace SK_NS { namespace {

template <class S> struct Draw {
  const SearchArgs& a;
  const SearchOutput<S>& out;
  int64_t* order;  // [list] of candidates by id

  Draw(const SearchArgs& args, const SearchOutput<S>& output, Arena& m) : a(args), out(output) {
    order = m.take<int64_t>(args.search == Search::kSample ? out.list : 0);
  }

  // In (0, 1), for source b at step t.
  double uniform(int64_t b, int64_t t) const {
    const uint32_t key = hash(hash(hash(uint32_t(a.seed)) ^ uint32_t(uint64_t(a.seed) >> 32)) + uint32_t(t));
    return (double(hash(hash(uint32_t(b) ^ key) + uint32_t(uint64_t(b) >> 32) + key)) + 0.5) / 4294967296.;
  }
  double weight(double x, double top) const { return __builtin_exp((x - top) / a.temperature); }

  // The token of row r, and its logit.
  int64_t draw(const Rows<S>& left, int64_t r, int64_t b, int64_t t, S& logit) const {
    const double u = uniform(b, t);
    if (!out.list) return from_all(left.at(r), out.scaled_sums + r * out.blocks, nullptr, Bound{}, u, logit);
    return a.top_k ? from_list(r, u, logit) : nucleus(left, r, u, logit);
  }

  // Of the tokens above a bound (of equals to it, those up to an id) or of all.
  struct Bound {
    double value = -__builtin_inf();
    int64_t id = INT64_MAX;
    SK_INL bool holds(double x, int64_t token) const { return x > value || (x == value && token <= id); }
  };
  // sums: [blocks], of all tokens. masses: [blocks], of those within the bound relative to the highest of all, or null
  // where there is no bound.
  int64_t from_all(const Rows<S>& left, const ExpSum<S>* sums, const double* masses, const Bound& bound, double u,
                   S& logit) const {
    double top = -__builtin_inf(), total = 0, before = 0;
    for (int64_t i = 0; i < out.blocks; ++i) top = double(sums[i].top) > top ? double(sums[i].top) : top;
    const auto mass = [&](int64_t i) { return masses ? masses[i] : sums[i].sum * weight(double(sums[i].top), top); };
    for (int64_t i = 0; i < out.blocks; ++i) total += mass(i);
    int64_t block = 0, last = -1;
    for (int64_t i = 0; i < out.blocks; ++i) {
      if (!(mass(i) > 0)) continue;
      last = i;
      if (before + mass(i) > u * total) break;
      before += mass(i);
    }
    logit = S(-__builtin_inff());
    if (last < 0) return out.first_open();
    block = last;
    int64_t found = -1;
    bool done = false;
    out.product(left, 1, {block, block + 1}, false, [&](int64_t, int64_t panel, const S* tile) {
      for (int64_t j = 0; j < out.kColumns && !done; ++j) {
        const int64_t id = panel * out.kColumns + j;
        if (!(double(tile[j]) > -__builtin_inf()) || !bound.holds(double(tile[j]), id)) continue;
        const double w = weight(double(tile[j]), top);
        if (!(w > 0)) continue;
        before += w;
        found = id;  // rounding may leave nothing beyond the last
        logit = tile[j];
        done = before > u * total;
      }
    });
    return found < 0 ? out.first_open() : found;
  }

  // The first `n` of the list, by id.
  int64_t invert(const BestList<S>& list, int64_t n, double u, S& logit) const {
    for (int64_t i = 0; i < n; ++i) order[i] = i;
    for (int64_t gap = n / 2; gap > 0; gap /= 2)  // Shell's sort
      for (int64_t i = gap; i < n; ++i) {
        const int64_t moved = order[i];
        int64_t at = i;
        for (; at >= gap && list.ids[order[at - gap]] > list.ids[moved]; at -= gap) order[at] = order[at - gap];
        order[at] = moved;
      }
    const double top = double(list.values[0]);
    double total = 0, sum = 0;
    for (int64_t i = 0; i < n; ++i) total += weight(double(list.values[i]), top);
    int64_t found = order[0];
    for (int64_t i = 0; i < n; ++i) {
      const double w = weight(double(list.values[order[i]]), top);
      if (!(w > 0)) continue;
      found = order[i];
      sum += w;
      if (sum > u * total) break;
    }
    logit = list.values[found];
    return list.ids[found];
  }
  int64_t from_list(int64_t r, double u, S& logit) const {
    const BestList<S> list = out.best(0, r);
    logit = S(-__builtin_inff());
    if (!*list.count) return out.first_open();
    const double top = double(list.values[0]);
    double total = 0, before = 0;
    for (int64_t i = 0; i < *list.count; ++i) total += weight(double(list.values[i]), top);
    int64_t n = 0;
    for (; n < *list.count && before < a.top_p * total; ++n) before += weight(double(list.values[n]), top);
    return invert(list, max64(n, 1), u, logit);
  }
  // The list holds the likeliest 256. Where their probability is not enough, the next 256 are looked for, and so on.
  int64_t nucleus(const Rows<S>& left, int64_t r, double u, S& logit) const {
    const BestList<S> list = out.best(0, r);
    logit = S(-__builtin_inff());
    if (!*list.count) return out.first_open();
    const ExpSum<S>* sums = out.scaled_sums + r * out.blocks;
    double top = double(list.values[0]), total = 0, before = 0;
    for (int64_t i = 0; i < out.blocks; ++i) total += sums[i].sum * weight(double(sums[i].top), top);
    if (!(total > 0)) return invert(list, 1, u, logit);  // not a number
    Bound bound;
    for (int pass = 0;; ++pass) {
      int64_t n = 0;
      for (; n < *list.count && before < a.top_p * total; ++n) before += weight(double(list.values[n]), top);
      if (pass == 0 && before >= a.top_p * total) return invert(list, n, u, logit);
      bound = {double(list.values[n - 1]), int64_t(list.ids[n - 1])};
      if (before >= a.top_p * total || *list.count < list.most) break;
      *list.count = 0;
      out.product(left.at(r), 1, {0, out.blocks}, false, [&](int64_t, int64_t panel, const S* t) {
        for (int64_t j = 0; j < out.kColumns; ++j) {
          const int64_t id = panel * out.kColumns + j;
          if (t[j] > list.bound() && !bound.holds(double(t[j]), id)) list.add(t[j], int32_t(id));
        }
      });
      if (!*list.count) break;
    }
    double masses[kBlocks];
    for (int64_t i = 0; i < out.blocks; ++i) {
      masses[i] = 0;
      out.product(left.at(r), 1, {i, i + 1}, false, [&](int64_t, int64_t panel, const S* t) {
        for (int64_t j = 0; j < out.kColumns; ++j)
          if (double(t[j]) > -__builtin_inf() && bound.holds(double(t[j]), panel * out.kColumns + j))
            masses[i] += weight(double(t[j]), top);
      });
    }
    return from_all(left.at(r), sums, masses, bound, u, logit);
  }
};

}}}  // namespace seqkern::SK_NS
