// The backward pass of the `grid` engine: one launch for all steps of a layer, both directions in it, against the order
// of forward. It yields the gradients of the gates; dx, dW and db are products over all steps after it.
//
// Step i multiplies the gates' gradients of the step before, which all CTAs of the tile published, by the columns of
// W_hh of this CTA's units; that is d(loss)/dh of its units, and the cell's derivative on it gives its own gates'
// gradients. K is counted producer by producer, [CTA][gate][unit], so that a warp's slice comes from few CTAs. A
// row whose sequence begins here in time (its last step in this order) leaves one step later: the product then is dh0.
//
// Microseconds per step on an H200, LSTM in bf16: 2.07, 2.22, 3.26 and 7.06 at H = 256, 512, 1024 and 2048 with B = 16;
// 2.11, 2.70 and 7.43 with B = 64. The exchanged rows are G times as long as forward's.
#pragma once
#include "grid_options.cuh"

namespace seqkern { namespace cuda { namespace {

// Columns of W_hh [G*H, H]: row u of the CTA is column first + u.
template <class S, int kGates> struct ColumnsOfUnits {
  const S* w;
  int64_t hidden, first;
  SK_DEVICE Piece operator()(int row, int64_t k) const {
    const int64_t j = first + row;
    const int64_t producer = k / (kGates * kUnits), gate = k / kUnits % kGates, unit = k % kUnits;
    const int64_t i = producer * kUnits + unit;
    return piece_of<S>(
        [&](int e) { return j < hidden && i + e < hidden ? load(w + (gate * hidden + i + e) * hidden + j) : 0.f; });
  }
};

template <class C, class S, int kRows, bool kOptions> struct GridBackward {
  static constexpr int kGates = C::kGates, kGrads = C::kGrads, kSkip = kGrads - kGates, kPass = kRows * kPassRows;
  static constexpr int kSlot = kSlots<C, kOptions>;
  static constexpr int kLongSlice = 8;  // chunks of a warp
  struct Values {
    S saved[C::kSaved ? C::kSaved : 1], out, previous, dy, dh_n;
    float dh, carry, grad[kGrads];
    RowOptions<S, kOptions> o;
  };

  const GridArgs& a;
  const LayerArgs& l;
  Product p;
  Place<kRows> at;
  float* sums;     // two sets in turn
  float* carried;  // [passes][kRows][kSlot][kThreads]

  SK_DEVICE GridBackward(const GridArgs& args, char* shared)
      : a(args), l(args.r.layer), p(1, int64_t(args.ctas) * kUnits * kGates * int64_t(sizeof(S)), kOptions), at(args, p) {
    sums = (float*)(shared + p.weight_bytes());
    carried = sums + 2 * set_size() + int(threadIdx.x);
  }
  SK_DEVICE int sum_size() const { return int(p.sum_bytes() / 4); }
  SK_DEVICE int set_size() const { return kRows * sum_size(); }
  SK_DEVICE int64_t state_at(const Own& m, int pass, int r) const {  // in h0, c0, dh_n, ... [D, B, H]
    return (at.direction * l.batch + at.row0 + pass * kPass + r * kPassRows + m.row) * l.hidden + m.j;
  }
  SK_DEVICE float& slot(int pass, int r, int which) const {
    return carried[((pass * kRows + r) * kSlot + which) * kThreads];
  }
  SK_DEVICE int time_after(int t) const { return at.direction ? t - 1 : t + 1; }
  SK_DEVICE int time_before(int t) const { return at.direction ? t + 1 : t - 1; }
  // What was kept of a step, for a row of the pass.
  SK_DEVICE S output(const StepRows& step, int pass, int row, int j) const {
    const S* y = (const S*)l.y + (at.first_row(step, pass) * l.directions + at.direction) * at.hidden;
    return y[unsigned(row * int(l.directions) * at.hidden + j)];
  }
  SK_DEVICE const S* kept(const StepRows& step, int pass, int row, int j) const {
    const S* rows = (const S*)l.reserve + (at.direction * l.rows + at.first_row(step, pass)) * (C::kSaved * at.hidden);
    return rows + unsigned(row * C::kSaved * at.hidden + j);
  }

  // c after a step: of the reserve, unless zoneout came between.
  SK_DEVICE S cell_state(const StepRows& step, int pass, int row, int j) const {
    if constexpr (kOptions)
      if (l.options.c_all) {
        const int64_t first = at.first_row(step, pass) * l.directions + at.direction;
        return ((const S*)l.options.c_all + first * at.hidden)[unsigned(row * int(l.directions) * at.hidden + j)];
      }
    return kept(step, pass, row, j)[(C::kSaved - 1) * at.hidden];
  }

  SK_DEVICE void enter() const {
    if (kSlot == 0) return;
    const Own m(at.cta);
    for (int pass = 0; pass < at.passes; ++pass)
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const bool known = C::kCarry == Carry::kCell && m.j < at.hidden && m.row + r * kPassRows < at.pass_rows(pass);
        slot(pass, r, 0) = known ? load_or_zero<S>(l.dc_n, state_at(m, pass, r)) : 0.f;
        if (kSlot > 1) slot(pass, r, kSlot - 1) = 0.f;
      }
  }
  SK_DEVICE void load_options(const StepRows& after, const StepRows& now, int pass, int known, int live,
                              Values (&v)[kRows]) const {
    if constexpr (kOptions) {
      const Own m(at.cta);
      const LayerOptions& options = l.options;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int row = m.row + r * kPassRows;
        if (m.j >= at.hidden || (row >= known && row >= live)) return;
        RowOptions<S, true>& o = v[r].o;
        o.load_length(options, at.row0 + pass * kPass + row);
        o.load_mask(options, state_at(m, pass, r));
        if (row < known) o.keep_after = o.keep_of(options, at.first_row(after, pass) + row);
        if (row >= live) continue;
        const int64_t at_row = at.first_row(now, pass) + row;
        o.keep = o.keep_of(options, at_row);
        o.load_zones(options, at_row, int64_t(at.direction) * at.hidden + m.j);
        o.dc = raw_or_zero<S>(options.dc_all, (at_row * l.directions + at.direction) * at.hidden + m.j);
      }
    }
  }
  // Everything but what comes through W_hh. `before` is the step before in time as forward goes: it feeds this one.
  SK_DEVICE void load_step(int t, const StepRows& now, const StepRows& before, int pass, int known, int live,
                           Values (&v)[kRows]) const {
    const Own m(at.cta);
    if (m.j >= at.hidden) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = m.row + r * kPassRows;
      if (row >= live) return;
      const bool fed = at.row0 + pass * kPass + row < before.rows() && v[r].o.inside(time_before(t));
      const bool with_after = row < known && v[r].o.inside(time_after(t));
      if (C::kSaved) {
        const S* saved = kept(now, pass, row, m.j);
#pragma unroll
        for (int q = 0; q < C::kSaved; ++q) v[r].saved[q] = saved[q * at.hidden];
      } else {
        v[r].out = output(now, pass, row, m.j);
      }
      if (C::kCarry == Carry::kHidden)
        v[r].previous = fed ? output(before, pass, row, m.j) : raw_or_zero<S>(l.h0, state_at(m, pass, r));
      if (C::kCarry == Carry::kCell)
        v[r].previous = fed ? cell_state(before, pass, row, m.j) : raw_or_zero<S>(l.c0, state_at(m, pass, r));
      if (l.dy.data) {
        const int64_t first = (l.starts ? now.start * l.dy.row : t * l.dy.step) +
                              (at.row0 + pass * kPass) * l.dy.row + at.direction * at.hidden;
        v[r].dy = ((const S*)l.dy.data)[first + row * l.dy.row + m.j];
      }
      if (!with_after) v[r].dh_n = raw_or_zero<S>(l.dh_n, state_at(m, pass, r));  // its sequence ends here in time
    }
  }
  // Of several rows all are computed where the first is live, so that their arithmetic overlaps.
  SK_DEVICE void cell(const float* set, const StepRows& now, int t, int pass, int known, int live,
                      Values (&v)[kRows]) const {
    const Own m(at.cta);
    if (m.j >= at.hidden || (m.row >= known && m.row >= live)) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float sum = total<1>(set + r * sum_size(), m, 0);
      v[r].dh = m.row + r * kPassRows < known ? sum : 0.f;
      if (C::kCarry != Carry::kNone) v[r].carry = slot(pass, r, 0);
      if constexpr (kOptions) {
        if (m.row + r * kPassRows < known && v[r].o.inside(time_after(t))) arrive(pass, r, v[r]);
        else v[r].dh = 0.f;
      }
    }
    if (m.row >= live) return;
    float carry[kRows], past[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float saved[C::kSaved ? C::kSaved : 1];
#pragma unroll
      for (int q = 0; q < C::kSaved; ++q) saved[q] = to_float(v[r].saved[q]);
      float dh = v[r].dh + to_float(v[r].dy) + to_float(v[r].dh_n), previous = to_float(v[r].previous), past_c = 0.f;
      carry[r] = v[r].carry;
      if constexpr (kOptions) {
        const RowOptions<S, true>& o = v[r].o;
        const bool watched = l.options.flow && m.row + r * kPassRows < live && o.inside(t);
        const int64_t row = at.first_row(now, pass) + m.row + r * kPassRows;
        if (watched) watch(0, row, m.j, dh);
        past[r] = o.past(l.options.zone_h, o.zone_h, dh);
        if (C::kCarry == Carry::kHidden) carry[r] = 0.f, past_c = past[r];  // of what the step after left, dh has it
        if (C::kCarry == Carry::kCell) {
          carry[r] += to_float(o.dc);
          // With zoneout h' is read from the c' before the mixture.
          if (watched) watch(1, row, m.j, l.options.zone_c ? carry[r] : cell_gradient(saved, dh, carry[r]));
          past_c = o.past(l.options.zone_c, o.zone_c, carry[r]);
        }
        if (l.options.keep) previous = cuda::kept(o.keep, previous);
      }
      C::backward(saved, to_float(v[r].out), previous, dh, carry[r], v[r].grad);
      if (kOptions) carry[r] += past_c;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (m.row + r * kPassRows < live && v[r].o.inside(t)) {
        v[r].carry = carry[r];
        if (C::kCarry != Carry::kNone) slot(pass, r, 0) = carry[r];
        if (kOptions && C::kCarry != Carry::kHidden) slot(pass, r, kSlotOfH<C>) = past[r];
      } else if (kOptions) {
#pragma unroll
        for (int g = 0; g < kGrads; ++g) v[r].grad[g] = 0.f;
      }
    }
  }
  // The square of d(loss)/dh (which = 0) or d(loss)/dc of a row of all N.
  SK_DEVICE void watch(int which, int64_t row, int j, float v) const {
    const LayerOptions& o = l.options;
    ((float*)o.flow)[((which * l.directions + at.direction) * l.rows + row) * o.flow_panels + j] = v * v;
  }
  template <class Saved> SK_DEVICE static float cell_gradient(const Saved& saved, float dh, float dc) {
    if constexpr (C::kCarry == Carry::kCell) return C::cell_gradient(saved, dh, dc);
    else return dc;
  }
  // d(loss)/dh and d(loss)/dc as the row's step after read them, from what that step left.
  SK_DEVICE void arrive(int pass, int r, Values& v) const {
    if constexpr (kOptions) {
      const LayerOptions& o = l.options;
      if (o.h_mask) v.dh *= to_float(v.o.mask);
      v.dh = v.o.arriving(o, v.dh + (C::kCarry == Carry::kHidden ? v.carry : slot(pass, r, kSlotOfH<C>)));
      if (C::kCarry == Carry::kCell) v.carry = v.o.arriving(o, v.carry);
    }
  }
  SK_DEVICE Words<S, kGates> words(const Own& m, int copy, int pass, int r) const {
    const unsigned column = unsigned(at.cta) * (kGates * kUnits * sizeof(S)), row = unsigned(r * kPassRows + m.row);
    return {at.operands(copy, pass) + (row * unsigned(at.row_bytes) + column), m.unit};
  }
  // What step i + 1 reads.
  SK_DEVICE void publish(int i, int pass, int live, const Values (&v)[kRows]) const {
    const Own m(at.cta);
#pragma unroll
    for (int r = 0; r < kRows; ++r) words(m, i + 1, pass, r).store(v[r].grad + kSkip, m.row + r * kPassRows < live);
  }
  SK_DEVICE void keep(const StepRows& now, int t, int pass, int known, int live, const Values (&v)[kRows]) const {
    const Own m(at.cta);
    if (m.j >= at.hidden) return;
    S* rows = (S*)of(a.r.dgates, at.direction) + at.first_row(now, pass) * (kGrads * at.hidden);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = m.row + r * kPassRows;
      if (row < live) {
#pragma unroll
        for (int g = 0; g < kGrads; ++g)
          store<S>(v[r].grad[g], rows + g * at.hidden, unsigned(row * kGrads * at.hidden + m.j));
      }
      const bool part = row < live && v[r].o.inside(t);
      if (!part && row < known && v[r].o.inside(time_after(t))) {  // it left at the step before
        const bool apart = C::kCarry == Carry::kHidden && !kOptions;
        store<S>(apart ? v[r].dh + v[r].carry : v[r].dh, l.dh0, state_at(m, pass, r));
        if (C::kCarry == Carry::kCell) store<S>(v[r].carry, l.dc0, state_at(m, pass, r));
      }
    }
  }
  SK_DEVICE void empty(int copy, int pass) const {
    const Own m(at.cta);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (m.row + r * kPassRows < at.pass_rows(pass)) words(m, copy, pass, r).empty();
  }

  SK_DEVICE void run(char* shared) const {
    clear(sums, 2 * set_size());
    at.fill_padding(a.ctas * (kUnits * kGates) * int(sizeof(S)));
    enter();
    const Multiplier<S, 1, kOptions> product(
        p, shared, ColumnsOfUnits<S, kGates>{(const S*)w_hh_of(l, at.direction), l.hidden, int64_t(at.cta) * kUnits});
    float* set = sums;
    const int steps = int(l.steps);
    const auto time = [&](int i) { return at.direction ? i : steps - 1 - i; };
    StepRows now = step_at(l, time(0)), next;
    StepRows after = {0, 0};  // the step after in time as forward goes, which this pass has done
    for (int i = 0; i <= steps; ++i, after = now, now = next) {
      next = step_at(l, time(i + 1));
      for (int pass = 0; pass < at.passes; ++pass) {
        const int base = at.row0 + pass * kPass, rows = at.pass_rows(pass);
        const int known = clip(after.rows() - base, rows), live = clip(now.rows() - base, rows);
        if (known == 0 && live == 0) continue;
        Values v[kRows] = {};
        // Of a long K it takes a while until all is loaded; of a short one what is asked for too early is not there yet.
        load_options(after, now, pass, known, live, v);
        bool loaded = known == 0 || product.chunks <= kLongSlice;
        if (loaded) load_step(time(i), now, next, pass, known, live, v);
#pragma unroll 1
        for (int r = 0; r < kRows && r * kPassRows < known; ++r)
          product.multiply(known - r * kPassRows, at.operands(i, pass) + r * kPassRows * at.row_bytes, at.row_bytes,
                           set + r * sum_size(), [&] {
                             if (!loaded) load_step(time(i), now, next, pass, known, live, v);
                             loaded = true;
                           });
        block_sync();  // the sums are there; those of the other set have been read
        cell(set, now, time(i), pass, known, live, v);
        publish(i, pass, live, v);
        keep(now, time(i), pass, known, live, v);
        empty(i + 1 + kEmptyAhead, pass);
        set = set == sums ? sums + set_size() : sums;
      }
      at.fence(i);
    }
  }
};

template <class C, class S, int kRows, bool kOptions> SK_GRID_KERNEL grid_backward_kernel(SK_PARAMETER GridArgs a) {
  SK_SHARED(char, shared);
  GridBackward<C, S, kRows, kOptions>(a, shared).run(shared);
}

}}}  // namespace seqkern::cuda
