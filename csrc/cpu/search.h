// The loops of the searches over a part of the sources. What the first thread decides after a step, how many rows go on
// and which, all threads read after they have met.
#pragma once
#include "search_beam.h"
#include "search_draw.h"

namespace seqkern { namespace SK_NS { namespace {

template <class S> struct Searcher {
  struct Control {
    int64_t rows;
    bool moved;  // whether rows changed their places
  };
  const SearchArgs& a;
  const SearchPart& part_of;
  Arena arena;
  const int64_t sources;
  Control* control;
  int64_t* from;
  SearchStep<S> step;
  SearchOutput<S> out;
  BeamState<S> beam;
  Draw<S> drawer;

  Searcher(const SearchArgs& args, const SearchPart& part)
      : a(args),
        part_of(part),
        arena{part.scratch},
        sources(part.end - part.begin),
        control(arena.take<Control>(1)),
        from(arena.take<int64_t>(sources * args.beam)),
        step(args, part, sources * args.beam, arena),
        out(args, part, step.p, sources * args.beam, arena),
        beam(args, part.begin, args.search == Search::kBeam ? sources : 0, Attend(step.s.attend) != Attend::kNone,
             arena),
        drawer(args, out, arena) {}

  static int64_t scratch(const SearchArgs& a, int64_t sources, int count) {
    const SearchPart part{0, sources, 0, count, nullptr, nullptr};
    return Searcher(a, part).arena.used;
  }
  static void run(const SearchArgs& a, const SearchPart& part) {
    Searcher s(a, part);
    if (a.search == Search::kBeam) s.run_beam();
    else s.run_tokens();
  }

  void meet_all() const { meet(*part_of.barrier, part_of.count); }
  bool leads() const { return part_of.member == 0; }
  // All threads leave with the same number of rows.
  int64_t go_on() {
    meet_all();
    const Control c = *control;
    if (c.rows && c.moved) step.gather(a.search == Search::kBeam ? beam.from : from, c.rows);
    meet_all();  // before the next decision
    return c.rows;
  }

  void run_beam() {
    step.project();
    if (leads()) {
      for (int64_t r = 0; r < sources; ++r) {
        step.enter(r, part_of.begin + r);
        step.token[r] = a.bos;
      }
      beam.enter();
    }
    meet_all();
    int64_t rows = sources;
    for (int64_t t = 0; rows; ++t) {
      step.step(rows);
      out.run(step.read(), rows);
      if (leads()) *control = {beam.advance(t, step, out), true};
      rows = go_on();
    }
    if (leads()) beam.results();
  }

  // Greedy search and sampling: one row for each source.
  void run_tokens() {
    step.project();
    if (leads()) {
      int64_t rows = 0;
      for (int64_t b = part_of.begin; b < part_of.end; ++b)
        if (wanted(b, 0)) {
          step.token[rows] = a.forced ? a.forced[b] : a.bos;
          step.enter(rows++, b);
        }
      *control = {rows, false};
    }
    int64_t rows = go_on();
    for (int64_t t = 0; rows; ++t) {
      step.step(rows);
      out.run(step.read(), rows);
      if (leads()) *control = advance(t, rows);
      rows = go_on();
    }
  }
  // Whether row b has a step t or later to take.
  bool wanted(int64_t b, int64_t t) const {
    if (!a.forced) return t < a.max_len;
    for (; t < a.max_len; ++t)
      if (a.forced[(t + 1) * a.batch + b] < 0) return true;
    return false;
  }
  Control advance(int64_t t, int64_t rows) {
    int64_t kept = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t b = step.source[r], given = a.forced ? a.forced[(t + 1) * a.batch + b] : -1;
      int64_t token = given;
      if (given < 0) {
        S logit;
        token = a.search == Search::kSample ? drawer.draw(step.read(), r, b, t, logit) : out.likeliest(r, logit);
        if (!a.forced) a.scores[b] += out.log_sum_of(r).log_p(double(logit));
      }
      if (!a.forced && token == a.eos) continue;
      a.tokens[t * a.batch + b] = token;
      if (a.attention)
        memcpy((S*)a.attention + (t * a.batch + b) * a.places, step.alpha + r * step.lds, a.places * sizeof(S));
      ++a.found_lengths[b];
      if (!wanted(b, t + 1)) continue;
      step.source[kept] = b;
      step.token[kept] = token;
      from[kept++] = r;
    }
    return {kept, kept != rows};
  }
};

}}}  // namespace seqkern::SK_NS
