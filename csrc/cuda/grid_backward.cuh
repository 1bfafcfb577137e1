// The backward pass of the `grid` engine: one launch for all steps of a layer, both directions in it, against the order
// of forward. It yields the gradients of the gates; dx, dW and db are products over all steps after it.
//
// Step i multiplies the gates' gradients of the step before, which all CTAs of the tile published, by the columns of
// W_hh of this CTA's units; that is d(loss)/dh of its units, and the cell's derivative on it gives its own gates'
// gradients. K is counted producer by producer, [CTA][gate][unit], so that a warp's slice comes from few CTAs. A
// row whose sequence begins here in time (its last step in this order) leaves one step later: the product then is dh0.
//
// Expected microseconds per step on an H100, LSTM in 16 bits (an estimate; not measured): as forward, but the exchanged
// rows are G times as long, kPassRows * 4 * H * 2 bytes to each SM, 1.5 at H = 1024, which is what bounds it: about 3
// at H = 1024 and B <= 16, 5 at H = 2048, 1.5 at H = 256.
#pragma once
#include "grid_product.cuh"

namespace seqkern { namespace cuda { namespace {

// Columns of W_hh [G*H, H]: row u of the CTA is column first + u.
template <class S, int kGates> struct ColumnsOfUnits {
  const S* w;
  int64_t hidden, first;
  SK_DEVICE Piece operator()(int row, int64_t k) const {
    const int64_t j = first + row;
    const int64_t producer = k / (kGates * kFullUnits), gate = k / kFullUnits % kGates, unit = k % kFullUnits;
    const int64_t i = producer * kFullUnits + unit;
    return piece_of<S>(
        [&](int e) { return j < hidden && i + e < hidden ? load(w + (gate * hidden + i + e) * hidden + j) : 0.f; });
  }
};

template <class C, class S> struct GridBackward {
  static constexpr int kGates = C::kGates, kGrads = C::kGrads, kSkip = kGrads - kGates, kUnits = kFullUnits;
  using Mine = Own<kUnits>;
  struct Values {
    S saved[C::kSaved ? C::kSaved : 1], out, previous, dy, dh_n;
    float dh, carry, grad[kGrads];
  };

  const GridArgs& a;
  const LayerArgs& l;
  Product p;
  Place at;
  float* sums;
  float* carried;  // [passes][kThreads]

  SK_DEVICE GridBackward(const GridArgs& args, char* shared)
      : a(args), l(args.r.layer), p(1, int64_t(args.ctas) * kUnits * kGates * int64_t(sizeof(S))), at(args, p) {
    sums = (float*)(shared + p.weight_bytes());
    carried = sums + p.sum_bytes() / 4 + int(threadIdx.x);
  }
  SK_DEVICE int batch_row(const Mine& m, int pass) const { return at.row0 + pass * kPassRows + m.row; }
  SK_DEVICE int64_t state_at(const Mine& m, int pass) const {  // in h0, c0, dh_n, ... [D, B, H]
    return (at.direction * l.batch + batch_row(m, pass)) * l.hidden + m.j;
  }
  SK_DEVICE S output(int64_t n, int j) const {
    return ((const S*)l.y)[(n * l.directions + at.direction) * l.hidden + j];
  }
  SK_DEVICE S kept(int64_t n, int q, int j) const {
    return ((const S*)l.reserve)[((at.direction * l.rows + n) * C::kSaved + q) * l.hidden + j];
  }

  SK_DEVICE void enter() const {
    if (C::kCarry == Carry::kNone) return;
    const Mine m(at.cta);
    for (int pass = 0; pass < at.passes; ++pass) {
      const bool known = C::kCarry == Carry::kCell && m.j < l.hidden && m.row < at.pass_rows(pass);
      carried[pass * kThreads] = known ? load_or_zero<S>(l.dc_n, state_at(m, pass)) : 0.f;
    }
  }
  // Everything but what comes through W_hh. `before` is the step before in time as forward goes: it feeds this one.
  SK_DEVICE void load_step(int t, const StepRows& now, const StepRows& before, int pass, int known, int live,
                           Values& v) const {
    const Mine m(at.cta);
    if (m.j >= l.hidden || m.row >= live) return;
    const int b = batch_row(m, pass);
    const int64_t n = now.start + b;
    const bool fed = b < before.rows();
#pragma unroll
    for (int q = 0; q < C::kSaved; ++q) v.saved[q] = kept(n, q, m.j);
    if (C::kSaved == 0) v.out = output(n, m.j);
    if (C::kCarry == Carry::kHidden)
      v.previous = fed ? output(before.start + b, m.j) : raw_or_zero<S>(l.h0, state_at(m, pass));
    if (C::kCarry == Carry::kCell)
      v.previous = fed ? kept(before.start + b, C::kSaved - 1, m.j) : raw_or_zero<S>(l.c0, state_at(m, pass));
    if (l.dy.data) {
      const int64_t first = l.starts ? now.start * l.dy.row : t * l.dy.step;
      v.dy = ((const S*)l.dy.data)[first + b * l.dy.row + at.direction * l.hidden + m.j];
    }
    if (m.row >= known) v.dh_n = raw_or_zero<S>(l.dh_n, state_at(m, pass));  // the row's sequence ends here in time
  }
  SK_DEVICE void cell(int i, int pass, int known, int live, Values& v) const {
    const Mine m(at.cta);
    if (m.j >= l.hidden) return;
    if (m.row < known) v.dh = total<1>(sums, p.warps, m.unit, m.row);
    if (C::kCarry != Carry::kNone) v.carry = carried[pass * kThreads];
    if (m.row >= live) return;
    float saved[C::kSaved ? C::kSaved : 1];
#pragma unroll
    for (int q = 0; q < C::kSaved; ++q) saved[q] = to_float(v.saved[q]);
    const float dh = v.dh + to_float(v.dy) + to_float(v.dh_n);
    C::backward(saved, to_float(v.out), to_float(v.previous), dh, v.carry, v.grad);
    if (C::kCarry != Carry::kNone) carried[pass * kThreads] = v.carry;
    S* to = (S*)(at.operands(i + 1, pass) + int64_t(m.row) * at.row_bytes) + at.cta * (kGates * kUnits) + m.unit;
#pragma unroll
    for (int g = 0; g < kGates; ++g) st_cg(to + g * kUnits, Operand<S>::of(v.grad[kSkip + g]));
  }
  SK_DEVICE void keep(const StepRows& now, int pass, int known, int live, const Values& v) const {
    const Mine m(at.cta);
    if (m.j >= l.hidden) return;
    if (m.row < live) {
      S* to = (S*)of(a.r.dgates, at.direction) + (now.start + batch_row(m, pass)) * kGrads * l.hidden + m.j;
#pragma unroll
      for (int g = 0; g < kGrads; ++g) store<S>(v.grad[g], to, g * l.hidden);
    } else if (m.row < known) {  // it left at the step before
      store<S>(C::kCarry == Carry::kHidden ? v.dh + v.carry : v.dh, l.dh0, state_at(m, pass));
      if (C::kCarry == Carry::kCell) store<S>(v.carry, l.dc0, state_at(m, pass));
    }
  }

  SK_DEVICE void run(char* shared) const {
    enter();
    const Multiplier<S, 1> product(
        p, shared, ColumnsOfUnits<S, kGates>{(const S*)w_hh_of(l, at.direction), l.hidden, int64_t(at.cta) * kUnits});
    const int steps = int(l.steps);
    const auto time = [&](int i) { return at.direction ? i : steps - 1 - i; };
    StepRows now = step_at(l, time(0)), next;
    int after = 0;  // rows of the step after in time as forward goes, which this pass has done
    for (int i = 0; i <= steps; ++i, after = now.rows(), now = next) {
      next = step_at(l, time(i + 1));
      for (int pass = 0; pass < at.passes; ++pass) {
        const int base = at.row0 + pass * kPassRows;
        const int known = clip(after - base, at.pass_rows(pass)), live = clip(now.rows() - base, at.pass_rows(pass));
        if (known == 0 && live == 0) continue;
        Values v = {};
        load_step(time(i), now, next, pass, known, live, v);
        if (known > 0) {
          product.wait(at, pass, kUnits * kGates, i);
          product.multiply(known, at.operands(i, pass), at.row_bytes, sums);
        }
        block_sync();
        cell(i, pass, known, live, v);
        at.publish(pass, i + 1);
        keep(now, pass, known, live, v);
      }
    }
  }
};

template <class C, class S> SK_GRID_KERNEL grid_backward_kernel(SK_PARAMETER GridArgs a) {
  SK_SHARED(char, shared);
  GridBackward<C, S>(a, shared).run(shared);
}

}}}  // namespace seqkern::cuda
