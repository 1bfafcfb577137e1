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
#include "grid_product.cuh"

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

template <class C, class S, int kRows> struct GridBackward {
  static constexpr int kGates = C::kGates, kGrads = C::kGrads, kSkip = kGrads - kGates, kPass = kRows * kPassRows;
  static constexpr int kLongSlice = 8;  // chunks of a warp
  struct Values {
    S saved[C::kSaved ? C::kSaved : 1], out, previous, dy, dh_n;
    float dh, carry, grad[kGrads];
  };

  const GridArgs& a;
  const LayerArgs& l;
  Product p;
  Place<kRows> at;
  float* sums;     // two sets in turn
  float* carried;  // [passes][kRows][kThreads]

  SK_DEVICE GridBackward(const GridArgs& args, char* shared)
      : a(args), l(args.r.layer), p(1, int64_t(args.ctas) * kUnits * kGates * int64_t(sizeof(S))), at(args, p) {
    sums = (float*)(shared + p.weight_bytes());
    carried = sums + 2 * set_size() + int(threadIdx.x);
  }
  SK_DEVICE int sum_size() const { return int(p.sum_bytes() / 4); }
  SK_DEVICE int set_size() const { return kRows * sum_size(); }
  SK_DEVICE int64_t state_at(const Own& m, int pass, int r) const {  // in h0, c0, dh_n, ... [D, B, H]
    return (at.direction * l.batch + at.row0 + pass * kPass + r * kPassRows + m.row) * l.hidden + m.j;
  }
  // What was kept of a step, for a row of the pass.
  SK_DEVICE S output(const StepRows& step, int pass, int row, int j) const {
    const S* y = (const S*)l.y + (at.first_row(step, pass) * l.directions + at.direction) * at.hidden;
    return y[unsigned(row * int(l.directions) * at.hidden + j)];
  }
  SK_DEVICE const S* kept(const StepRows& step, int pass, int row, int j) const {
    const S* rows = (const S*)l.reserve + (at.direction * l.rows + at.first_row(step, pass)) * (C::kSaved * at.hidden);
    return rows + unsigned(row * C::kSaved * at.hidden + j);
  }

  SK_DEVICE void enter() const {
    if (C::kCarry == Carry::kNone) return;
    const Own m(at.cta);
    for (int pass = 0; pass < at.passes; ++pass)
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const bool known = C::kCarry == Carry::kCell && m.j < at.hidden && m.row + r * kPassRows < at.pass_rows(pass);
        carried[(pass * kRows + r) * kThreads] = known ? load_or_zero<S>(l.dc_n, state_at(m, pass, r)) : 0.f;
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
      const bool fed = at.row0 + pass * kPass + row < before.rows();
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
        v[r].previous = fed ? kept(before, pass, row, m.j)[(C::kSaved - 1) * at.hidden]
                            : raw_or_zero<S>(l.c0, state_at(m, pass, r));
      if (l.dy.data) {
        const int64_t first = (l.starts ? now.start * l.dy.row : t * l.dy.step) +
                              (at.row0 + pass * kPass) * l.dy.row + at.direction * at.hidden;
        v[r].dy = ((const S*)l.dy.data)[first + row * l.dy.row + m.j];
      }
      if (row >= known) v[r].dh_n = raw_or_zero<S>(l.dh_n, state_at(m, pass, r));  // its sequence ends here in time
    }
  }
  // Of several rows all are computed where the first is live, so that their arithmetic overlaps.
  SK_DEVICE void cell(const float* set, int pass, int known, int live, Values (&v)[kRows]) const {
    const Own m(at.cta);
    if (m.j >= at.hidden || (m.row >= known && m.row >= live)) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float sum = total<1>(set + r * sum_size(), m, 0);
      v[r].dh = m.row + r * kPassRows < known ? sum : 0.f;
      if (C::kCarry != Carry::kNone) v[r].carry = carried[(pass * kRows + r) * kThreads];
    }
    if (m.row >= live) return;
    float carry[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float saved[C::kSaved ? C::kSaved : 1];
#pragma unroll
      for (int q = 0; q < C::kSaved; ++q) saved[q] = to_float(v[r].saved[q]);
      const float dh = v[r].dh + to_float(v[r].dy) + to_float(v[r].dh_n);
      carry[r] = v[r].carry;
      C::backward(saved, to_float(v[r].out), to_float(v[r].previous), dh, carry[r], v[r].grad);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (m.row + r * kPassRows < live) {
        v[r].carry = carry[r];
        if (C::kCarry != Carry::kNone) carried[(pass * kRows + r) * kThreads] = carry[r];
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
  SK_DEVICE void keep(const StepRows& now, int pass, int known, int live, const Values (&v)[kRows]) const {
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
      } else if (row < known) {  // it left at the step before
        store<S>(C::kCarry == Carry::kHidden ? v[r].dh + v[r].carry : v[r].dh, l.dh0, state_at(m, pass, r));
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
    const Multiplier<S, 1> product(
        p, shared, ColumnsOfUnits<S, kGates>{(const S*)w_hh_of(l, at.direction), l.hidden, int64_t(at.cta) * kUnits});
    float* set = sums;
    const int steps = int(l.steps);
    const auto time = [&](int i) { return at.direction ? i : steps - 1 - i; };
    StepRows now = step_at(l, time(0)), next;
    int after = 0;  // rows of the step after in time as forward goes, which this pass has done
    for (int i = 0; i <= steps; ++i, after = now.rows(), now = next) {
      next = step_at(l, time(i + 1));
      for (int pass = 0; pass < at.passes; ++pass) {
        const int base = at.row0 + pass * kPass, rows = at.pass_rows(pass);
        const int known = clip(after - base, rows), live = clip(now.rows() - base, rows);
        if (known == 0 && live == 0) continue;
        Values v[kRows] = {};
        // Of a long K it takes a while until all is loaded; of a short one what is asked for too early is not there yet.
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
        cell(set, pass, known, live, v);
        publish(i, pass, live, v);
        keep(now, pass, known, live, v);
        empty(i + 1 + kEmptyAhead, pass);
        set = set == sums ? sums + set_size() : sums;
      }
      at.fence(i);
    }
  }
};

template <class C, class S, int kRows> SK_GRID_KERNEL grid_backward_kernel(SK_PARAMETER GridArgs a) {
  SK_SHARED(char, shared);
  GridBackward<C, S, kRows>(a, shared).run(shared);
}

}}}  // namespace seqkern::cuda
