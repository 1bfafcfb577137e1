// The forward pass of the `grid` engine: one launch for all steps of a layer, both directions in it.
//
// A thread owns one (unit, row) pair of a pass through all steps: it adds up the gates from the warps' partial sums,
// computes the cell in fp32, and carries c (LSTM) or h (GRU) in fp32. What the cell needs from memory is loaded before
// the wait for other CTAs; what only the caller reads is stored after the flag is set. With several passes in a tile,
// one pass's exchange is under way while the CTA works on the others.
//
// Expected microseconds per step on an H100 at 1.7 GHz, LSTM in 16 bits (an estimate; not measured): store, flag and
// poll through L2 0.7; the state from L2, kPassRows * H * 2 bytes at about 50 bytes a clock, 0.4 at H = 1024; mma
// 0.4 at H = 1024 with 16 units a CTA (64 by 1024 by 16 products at 1200 a clock), partly under the loads; partial sums
// 0.15; cell 0.3. In sum about 1.9 at H = 1024 and B <= 16, 1.3 at H = 256 (bound by the hand-off), 3 at H = 2048.
#pragma once
#include "grid_product.cuh"

namespace seqkern { namespace cuda { namespace {

// Rows of W_hh [G*H, H]: row g * kUnits + u of the CTA is gate g of unit first + u.
template <class S, int kGates, int kUnits> struct RowsOfGates {
  const S* w;
  int64_t hidden, first;
  bool aligned;  // rows begin at multiples of 16 bytes
  SK_DEVICE RowsOfGates(const void* weights, int64_t h, int cta)
      : w((const S*)weights),
        hidden(h),
        first(int64_t(cta) * kUnits),
        aligned(h % kPieceSize<S> == 0 && (uintptr_t)weights % 16 == 0) {}
  SK_DEVICE Piece operator()(int row, int64_t k) const {
    const int64_t j = first + row % kUnits;
    if (row >= kGates * kUnits || j >= hidden || k >= hidden) return {};
    const S* from = w + (row / kUnits * hidden + j) * hidden + k;
    if (sizeof(S) == 2 && aligned) return *(const Piece*)from;
    return piece_of<S>([&](int e) { return k + e < hidden ? load(from + e) : 0.f; });
  }
};

template <class C, class S, int kUnits> struct GridForward {
  static constexpr int kGates = C::kGates, kMTiles = forward_tiles(kGates, kUnits);
  using Mine = Own<kUnits>;
  struct Values {
    S gates_x[kGates];
    float saved[C::kSaved ? C::kSaved : 1], carry, out;
  };

  const GridArgs& a;
  const LayerArgs& l;
  Product p;
  Place at;
  float* sums;
  float* bias;     // [2][kGates][kUnits]: b_ih, b_hh
  float* carried;  // [passes][kThreads]

  SK_DEVICE GridForward(const GridArgs& args, char* shared)
      : a(args), l(args.r.layer), p(kMTiles, int64_t(args.ctas) * kUnits * int64_t(sizeof(S))), at(args, p) {
    sums = (float*)(shared + p.weight_bytes());
    bias = sums + p.sum_bytes() / 4;
    carried = bias + 2 * kGates * kUnits + int(threadIdx.x);
  }
  SK_DEVICE bool owns(const Mine& m, int rows) const { return m.j < l.hidden && m.row < rows; }
  SK_DEVICE int64_t state_at(const Mine& m, int pass) const {  // in h0, c0, h_n, c_n [D, B, H]
    return (at.direction * l.batch + at.row0 + pass * kPassRows + m.row) * l.hidden + m.j;
  }
  SK_DEVICE int64_t row_of(const Mine& m, const StepRows& step, int pass) const {  // of all N
    return step.start + at.row0 + pass * kPassRows + m.row;
  }
  SK_DEVICE void exchange(const Mine& m, int copy, int pass, float h) const {
    st_cg((S*)(at.operands(copy, pass) + int64_t(m.row) * at.row_bytes) + m.j, Operand<S>::of(h));
  }

  SK_DEVICE void load_bias() const {
    const Weights& w = at.direction ? l.weights[1] : l.weights[0];
    for (int q = int(threadIdx.x); q < 2 * kGates * kUnits; q += kThreads) {
      const int64_t j = int64_t(at.cta) * kUnits + q % kUnits;
      const void* from = q < kGates * kUnits ? w.b_ih : w.b_hh;
      bias[q] = j < l.hidden ? load_or_zero<S>(from, q / kUnits % kGates * l.hidden + j) : 0.f;
    }
  }
  // The state before the first step, in both copies: in reverse a row may begin at any step.
  SK_DEVICE void enter() const {
    const Mine m(at.cta);
    for (int pass = 0; pass < at.passes; ++pass) {
      if (owns(m, at.pass_rows(pass))) {
        const int64_t from = state_at(m, pass);
        const float h = load_or_zero<S>(l.h0, from);
        if (C::kCarry == Carry::kHidden) carried[pass * kThreads] = h;
        if (C::kCarry == Carry::kCell) carried[pass * kThreads] = load_or_zero<S>(l.c0, from);
        for (int copy = 0; l.h0 && copy < 2; ++copy) exchange(m, copy, pass, h);
      }
      if (l.h0) at.publish(pass, 1);
    }
    block_sync();
  }
  SK_DEVICE void load_gates(const StepRows& now, int pass, int live, Values& v) const {
    const Mine m(at.cta);
    if (!owns(m, live)) return;
    const S* gates = (const S*)of(a.r.gates_x, at.direction) + row_of(m, now, pass) * kGates * l.hidden + m.j;
#pragma unroll
    for (int g = 0; g < kGates; ++g) v.gates_x[g] = gates[g * l.hidden];
  }
  SK_DEVICE void cell(int i, int pass, int live, Values& v) const {
    const Mine m(at.cta);
    if (!owns(m, live)) return;
    float x[kGates], h[kGates];
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      x[g] = to_float(v.gates_x[g]) + bias[g * kUnits + m.unit];
      h[g] = total<kMTiles>(sums, p.warps, g * kUnits + m.unit, m.row) + bias[(kGates + g) * kUnits + m.unit];
    }
    if (C::kCarry != Carry::kNone) v.carry = carried[pass * kThreads];
    C::forward(x, h, v.carry, v.out, v.saved);
    if (C::kCarry != Carry::kNone) carried[pass * kThreads] = v.carry;
    exchange(m, i + 1, pass, v.out);
  }
  SK_DEVICE void keep(const StepRows& now, const StepRows& next, int pass, int live, const Values& v) const {
    const Mine m(at.cta);
    if (!owns(m, live)) return;
    const int64_t n = row_of(m, now, pass);
    store<S>(v.out, l.y, (n * l.directions + at.direction) * l.hidden + m.j);
    if (C::kSaved && l.reserve) {
      const int64_t to = (at.direction * l.rows + n) * C::kSaved * l.hidden + m.j;
#pragma unroll
      for (int q = 0; q < C::kSaved; ++q) store<S>(v.saved[q], l.reserve, to + q * l.hidden);
    }
    if (next.rows() > at.row0 + pass * kPassRows + m.row) return;  // else this was the row's last step
    store<S>(v.out, l.h_n, state_at(m, pass));
    if (C::kCarry == Carry::kCell) store<S>(v.carry, l.c_n, state_at(m, pass));
  }

  SK_DEVICE void run(char* shared) const {
    load_bias();
    enter();
    const Multiplier<S, kMTiles> product(p, shared,
                                         RowsOfGates<S, kGates, kUnits>(w_hh_of(l, at.direction), l.hidden, at.cta));
    const int steps = int(l.steps);
    const auto time = [&](int i) { return at.direction ? steps - 1 - i : i; };
    StepRows now = step_at(l, time(0)), next;
    int before = 0;  // rows of the step before
    for (int i = 0; i < steps; ++i, before = now.rows(), now = next) {
      next = step_at(l, time(i + 1));
      for (int pass = 0; pass < at.passes; ++pass) {
        const int base = at.row0 + pass * kPassRows, live = clip(now.rows() - base, at.pass_rows(pass));
        if (live == 0) continue;
        Values v = {};
        load_gates(now, pass, live, v);
        // Flags count what was published: the state before step i is number i + 1, or, where no row had a step before
        // this one, h0.
        product.wait(at, pass, kUnits, before > base ? i + 1 : l.h0 ? 1 : 0);
        product.multiply(live, at.operands(i, pass), at.row_bytes, sums);
        block_sync();
        cell(i, pass, live, v);
        at.publish(pass, i + 2);
        keep(now, next, pass, live, v);
      }
    }
  }
};

template <class C, class S, int kUnits> SK_GRID_KERNEL grid_forward_kernel(SK_PARAMETER GridArgs a) {
  SK_SHARED(char, shared);
  GridForward<C, S, kUnits>(a, shared).run(shared);
}

}}}  // namespace seqkern::cuda
