// What a beam search keeps in mind between steps. The definition is seqkern/seq2seq/beam.py.
#pragma once
#include "search_output.h"

namespace seqkern { namespace SK_NS { namespace {

template <class S> struct BeamState {
  using V = Pack<S>;
  static constexpr int kWidth = V::kWidth;

  const SearchArgs& a;
  const int64_t begin, sources, width, n_best;
  int64_t live;                // sources that are not done
  int64_t* active;             // [sources] which
  int64_t *first, *new_first;  // [sources + 1] the first row of each active one
  double *log_p, *new_log_p;   // [rows]
  S *covered, *new_covered;    // [rows][S], with a coverage penalty
  int64_t *from, *new_source, *new_token;
  LogSum* log_sums;  // [rows]
  int64_t* heads;    // [width] of the lists of a source's rows
  // The best that have ended, best first: [sources][n_best].
  double* scores;
  int32_t *steps, *which;
  int64_t *count, *ended;  // [sources]: how many, and how many in all
  bool covers, attends;

  BeamState(const SearchArgs& args, int64_t begin, int64_t sources, bool attention, Arena& m)
      : a(args), begin(begin), sources(sources), width(args.beam), n_best(args.n_best), attends(attention) {
    const int64_t rows = sources * width;
    covers = attends && a.coverage_penalty > 0;
    active = m.take<int64_t>(sources);
    first = m.take<int64_t>(sources + 1);
    new_first = m.take<int64_t>(sources);
    log_p = m.take<double>(rows);
    new_log_p = m.take<double>(rows);
    covered = m.take<S>(covers ? rows * a.places : 0);
    new_covered = m.take<S>(covers ? rows * a.places : 0);
    from = m.take<int64_t>(rows);
    new_source = m.take<int64_t>(rows);
    new_token = m.take<int64_t>(rows);
    log_sums = m.take<LogSum>(rows);
    heads = m.take<int64_t>(width);
    scores = m.take<double>(sources * n_best);
    steps = m.take<int32_t>(sources * n_best);
    which = m.take<int32_t>(sources * n_best);
    count = m.take<int64_t>(sources);
    ended = m.take<int64_t>(sources);
  }

  void enter() {
    live = sources;
    for (int64_t i = 0; i < sources; ++i) {
      active[i] = first[i] = i;
      log_p[i] = 0;
      count[i] = ended[i] = 0;
      if (covers) memset(covered + i * a.places, 0, a.places * sizeof(S));
    }
    first[sources] = sources;
  }
  double penalty(int64_t length) const { return __builtin_pow(double(5 + length) / 6, a.length_penalty); }

  // beta times the sum of the logarithms of what each place of the source has got.
  double coverage(int64_t row, int64_t source) const {
    double sum = 0;
    const int64_t n = min64(a.lengths[source], a.places);
    for (int64_t s = 0; s < n; ++s) {
      const double share = double(covered[row * a.places + s]);
      if (share < 1) sum += __builtin_log(share > 0x1p-126 ? share : 0x1p-126);
    }
    return a.coverage_penalty * sum;
  }
  // Row `row`, hypothesis k of its source, ends at step t with log-probability p.
  void finish(int64_t i, int64_t row, int64_t k, int64_t t, double p, double divisor) {
    if (!(p > -__builtin_inf())) return;
    ++ended[i];
    double score = p / divisor;
    double* best = scores + i * n_best;
    if (count[i] == n_best && !(score > best[n_best - 1])) return;
    if (covers) score += coverage(row, begin + i);
    int64_t at = count[i];
    if (at == n_best) {
      if (!(score > best[--at])) return;
    } else {
      ++count[i];
    }
    for (; at > 0 && best[at - 1] < score; --at) move(i, at - 1, at);
    best[at] = score;
    steps[i * n_best + at] = int32_t(t);
    which[i * n_best + at] = int32_t(k);
  }
  void move(int64_t i, int64_t from, int64_t to) {
    const int64_t at = i * n_best;
    scores[at + to] = scores[at + from];
    steps[at + to] = steps[at + from];
    which[at + to] = which[at + from];
  }

  // Ends, extends and drops hypotheses after step t. Returns how many rows go on: row r is then row from[r].
  int64_t advance(int64_t t, SearchStep<S>& step, const SearchOutput<S>& out) {
    const double divisor = penalty(t + 1), last = penalty(a.max_len + 1);
    int64_t rows = 0, kept = 0;
    for (int64_t s = 0; s < live; ++s) {
      const int64_t i = active[s], b = begin + i, r0 = first[s], hyps = first[s + 1] - r0;
      for (int64_t k = 0; k < hyps; ++k) {
        log_sums[r0 + k] = out.log_sum_of(r0 + k);
        if (covers)
          for (int64_t j = 0; j < a.places; ++j)
            covered[(r0 + k) * a.places + j] += step.alpha[(r0 + k) * step.lds + j];
        if (a.weights)
          memcpy((S*)a.weights + ((t * a.batch + b) * width + k) * a.places, step.alpha + (r0 + k) * step.lds,
                 a.places * sizeof(S));
        heads[k] = 0;
      }
      const int64_t found = t < a.max_len ? extend(b, r0, hyps, rows, t, out) : 0;
      const double least = found == width ? new_log_p[rows + width - 1] : -__builtin_inf();
      if (t >= a.min_len)
        for (int64_t k = 0; k < hyps; ++k) {
          const double p = log_p[r0 + k] + log_sums[r0 + k].log_p(double(out.eos[r0 + k]));
          if (!a.early_stop || p >= least) finish(i, r0 + k, k, t, p, divisor);
        }
      const double bound = found ? new_log_p[rows] / last : 0;
      const bool beaten = count[i] == n_best && !(scores[i * n_best + n_best - 1] < bound);
      if (!found || beaten || (a.early_stop && ended[i] >= width)) continue;
      active[kept] = i;
      new_first[kept++] = rows;
      rows += found;
    }
    live = kept;
    settle(rows, step);
    return rows;
  }
  // The likeliest extensions of the `hyps` rows from r0 on become the rows from `to` on.
  int64_t extend(int64_t b, int64_t r0, int64_t hyps, int64_t to, int64_t t, const SearchOutput<S>& out) {
    for (int64_t found = 0; found < width; ++found) {
      double best = -__builtin_inf();
      int64_t from_k = -1;
      for (int64_t k = 0; k < hyps; ++k) {
        const BestList<S> list = out.best(0, r0 + k);
        if (heads[k] == *list.count) continue;
        const double p = log_p[r0 + k] + log_sums[r0 + k].log_p(double(list.values[heads[k]]));
        if (p > best) {
          best = p;
          from_k = k;
        }
      }
      if (from_k < 0) return found;
      const int64_t at = (t * a.batch + b) * width + found;
      const int32_t id = out.best(0, r0 + from_k).ids[heads[from_k]++];
      a.parents[at] = int32_t(from_k);
      a.chosen[at] = id;
      new_log_p[to + found] = best;
      new_source[to + found] = b;
      new_token[to + found] = id;
      from[to + found] = r0 + from_k;
    }
    return width;
  }
  void settle(int64_t rows, SearchStep<S>& step) {
    for (int64_t s = 0; s < live; ++s) first[s] = new_first[s];
    first[live] = rows;
    memcpy(log_p, new_log_p, rows * sizeof(double));
    memcpy(step.source, new_source, rows * sizeof(int64_t));
    memcpy(step.token, new_token, rows * sizeof(int64_t));
    if (!covers) return;
    for (int64_t r = 0; r < rows; ++r)
      memcpy(new_covered + r * a.places, covered + from[r] * a.places, a.places * sizeof(S));
    S* swap = covered;
    covered = new_covered;
    new_covered = swap;
  }

  // Writes what has ended.
  void results() const {
    for (int64_t i = 0; i < sources; ++i)
      for (int64_t n = 0; n < count[i]; ++n) {
        const int64_t b = begin + i;
        int64_t t = steps[i * n_best + n], k = which[i * n_best + n];
        a.scores[n * a.batch + b] = scores[i * n_best + n];
        a.found_lengths[n * a.batch + b] = t;
        for (--t; t >= 0; --t) {
          const int64_t at = (t * a.batch + b) * width + k, to = (n * a.max_len + t) * a.batch + b;
          a.tokens[to] = a.chosen[at];
          k = a.parents[at];
          if (a.weights)
            memcpy((S*)a.attention + to * a.places, (S*)a.weights + ((t * a.batch + b) * width + k) * a.places,
                   a.places * sizeof(S));
        }
      }
  }
};

}}}  // namespace seqkern::SK_NS
