// The forward pass of the `grid` engine: one launch for all steps of a layer, both directions in it.
//
// A thread owns one unit and one row of a pass, or two, through all steps: it adds up the gates from the warps' partial
// sums, computes the cell in fp32, and carries c (LSTM) or h (GRU) in fp32. What the cell needs from memory is loaded before
// the wait for other CTAs; what only the caller reads is stored after the state is. With several passes in a tile, one
// pass's exchange is under way while the CTA works on the others. With options (grid_options.cuh) the kernels are others,
// so that a plain call pays nothing.
//
// Microseconds per step on an H200, LSTM in bf16: 1.68, 1.83, 2.06 and 4.25 at H = 256, 512, 1024 and 2048 with B = 16;
// 1.83, 2.29 and 4.37 with B = 64. One way through L2 is 0.47 of it; the chain of instructions from the arrival of the
// last word through mma, partial sums and cell to the store of the next is what most of the rest is.
#pragma once
#include "grid_options.cuh"

namespace seqkern { namespace cuda { namespace {

// Rows of W_hh [G*H, H]: row g * kUnits + u of the CTA is gate g of unit first + u.
template <class S, int kGates> struct RowsOfGates {
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

template <class C, class S, int kRows, bool kOptions> struct GridForward {
  static constexpr int kGates = C::kGates, kPass = kRows * kPassRows, kSlot = kSlots<C, kOptions>;
  struct Values {
    S gates_x[kGates];
    float saved[C::kSaved ? C::kSaved : 1], carry, out;
    RowOptions<S, kOptions> o;
  };

  const GridArgs& a;
  const LayerArgs& l;
  Product p;
  Place<kRows> at;
  float* sums;     // two sets in turn
  float* bias;     // [2][kGates][kUnits]: b_ih, b_hh
  float* carried;  // [passes][kRows][kSlot][kThreads]

  SK_DEVICE GridForward(const GridArgs& args, char* shared)
      : a(args), l(args.r.layer), p(kGates, int64_t(args.ctas) * kUnits * int64_t(sizeof(S)), kOptions), at(args, p) {
    sums = (float*)(shared + p.weight_bytes());
    bias = sums + 2 * set_size();
    carried = bias + 2 * kGates * kUnits + int(threadIdx.x);
  }
  SK_DEVICE int sum_size() const { return int(p.sum_bytes() / 4); }
  SK_DEVICE int set_size() const { return kRows * sum_size(); }
  SK_DEVICE int64_t state_at(const Own& m, int pass, int r) const {  // in h0, c0, h_n, c_n [D, B, H]
    return (at.direction * l.batch + at.row0 + pass * kPass + r * kPassRows + m.row) * l.hidden + m.j;
  }
  SK_DEVICE Words<S, 1> words(const Own& m, int copy, int pass, int r) const {
    const unsigned column = unsigned(at.cta) * (kUnits * sizeof(S)), row = unsigned(r * kPassRows + m.row);
    return {at.operands(copy, pass) + (row * unsigned(at.row_bytes) + column), m.unit};
  }
  SK_DEVICE float& slot(int pass, int r, int which) const {
    return carried[((pass * kRows + r) * kSlot + which) * kThreads];
  }
  // The state of before the row's first step.
  SK_DEVICE float initial(const Own& m, int pass, int r) const {
    return m.j < at.hidden ? load_or_zero<S>(l.h0, state_at(m, pass, r)) : 0.f;
  }

  SK_DEVICE void load_bias() const {
    const Weights& w = at.direction ? l.weights[1] : l.weights[0];
    for (int q = int(threadIdx.x); q < 2 * kGates * kUnits; q += kThreads) {
      const int64_t j = int64_t(at.cta) * kUnits + q % kUnits;
      const void* from = q < kGates * kUnits ? w.b_ih : w.b_hh;
      bias[q] = j < l.hidden ? load_or_zero<S>(from, q / kUnits % kGates * l.hidden + j) : 0.f;
    }
  }
  // The state before the first step, of the rows that have one then.
  SK_DEVICE void enter(const StepRows& first) const {
    const Own m(at.cta);
    for (int pass = 0; pass < at.passes; ++pass)
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int row = m.row + r * kPassRows;
        const bool known = row < at.pass_rows(pass), inside = known && m.j < at.hidden;
        const float h = known ? initial(m, pass, r) : 0.f;
        float carry = C::kCarry == Carry::kHidden ? h : 0.f;
        if (C::kCarry == Carry::kCell && inside) carry = load_or_zero<S>(l.c0, state_at(m, pass, r));
        if (C::kCarry != Carry::kNone) slot(pass, r, 0) = carry;
        const bool begins = known && at.row0 + pass * kPass + row < first.rows();
        float entering = h;
        if constexpr (kOptions) {
          if (C::kCarry != Carry::kHidden) slot(pass, r, kSlotOfH<C>) = h;
          if (begins && inside) {
            RowOptions<S, true> o;
            o.load_mask(l.options, state_at(m, pass, r));
            entering = o.entering(l.options, o.keep_of(l.options, at.first_row(first, pass) + row), h);
          }
        }
        words(m, 0, pass, r).store(&entering, begins);
      }
  }
  SK_DEVICE void load_options(const StepRows& now, const StepRows& next, int pass, int live, int then,
                              Values (&v)[kRows]) const {
    if constexpr (kOptions) {
      const Own m(at.cta);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int row = m.row + r * kPassRows;
        if (row >= live && row >= then) return;
        RowOptions<S, true>& o = v[r].o;
        o.load_length(l.options, at.row0 + pass * kPass + row);
        if (m.j >= at.hidden) continue;
        o.load_mask(l.options, state_at(m, pass, r));
        if (row < then) o.keep_after = o.keep_of(l.options, at.first_row(next, pass) + row);
        if (row >= live) continue;
        o.keep = o.keep_of(l.options, at.first_row(now, pass) + row);
        o.load_zones(l.options, at.first_row(now, pass) + row, int64_t(at.direction) * at.hidden + m.j);
      }
    }
  }
  SK_DEVICE void load_gates(const StepRows& now, int pass, int live, Values (&v)[kRows]) const {
    const Own m(at.cta);
    if (m.j >= at.hidden) return;
    const S* rows = (const S*)of(a.r.gates_x, at.direction) + at.first_row(now, pass) * (kGates * at.hidden);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = m.row + r * kPassRows;
      if (row >= live) return;
      const S* gates = rows + unsigned(row * kGates * at.hidden + m.j);
#pragma unroll
      for (int g = 0; g < kGates; ++g) v[r].gates_x[g] = gates[g * at.hidden];
    }
  }
  // Of several rows all are computed where the first is live, so that their arithmetic overlaps.
  SK_DEVICE void cell(const float* set, int t, int pass, int live, Values (&v)[kRows]) const {
    const Own m(at.cta);
    if (m.j >= at.hidden || m.row >= live) return;
    float x[kRows][kGates], h[kRows][kGates], old[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        x[r][g] = to_float(v[r].gates_x[g]) + bias[g * kUnits + m.unit];
        h[r][g] = total<kGates>(set + r * sum_size(), m, g) + bias[(kGates + g) * kUnits + m.unit];
      }
      if (C::kCarry != Carry::kNone) v[r].carry = slot(pass, r, 0);
      if constexpr (kOptions)
        if (l.options.keep) v[r].carry = kept(v[r].o.keep, v[r].carry);
      old[r] = v[r].carry;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) C::forward(x[r], h[r], v[r].carry, v[r].out, v[r].saved);
    if constexpr (kOptions) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) zone(pass, r, old[r], v[r]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (m.row + r * kPassRows < live && v[r].o.inside(t)) {
        if (C::kCarry != Carry::kNone) slot(pass, r, 0) = v[r].carry;
        if (kOptions && C::kCarry != Carry::kHidden) slot(pass, r, kSlotOfH<C>) = v[r].out;
      }
  }
  // old: the carry that the step read.
  SK_DEVICE void zone(int pass, int r, float old, Values& v) const {
    if constexpr (kOptions) {
      const LayerOptions& o = l.options;
      if (C::kCarry == Carry::kCell) v.carry = v.o.mixed(o.zone_c, v.o.zone_c, old, v.carry);
      if (o.zone_h) {
        float h = old;
        if (C::kCarry != Carry::kHidden) {
          h = slot(pass, r, kSlotOfH<C>);
          if (o.keep) h = kept(v.o.keep, h);
        }
        v.out = v.o.mixed(o.zone_h, v.o.zone_h, h, v.out);
      }
      if (C::kCarry == Carry::kHidden) v.carry = v.out;
    }
  }
  // What step i + 1 reads: the state of the rows that have one then.
  SK_DEVICE void publish(int i, int t, int pass, int live, int next, const Values (&v)[kRows]) const {
    const Own m(at.cta);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = m.row + r * kPassRows;
      float h = v[r].out;
      if constexpr (kOptions) {
        const bool fed = row < live && v[r].o.inside(t), then = row < next && v[r].o.inside(time_after(t));
        if (then && !fed) h = initial(m, pass, r);
        h = then && m.j < at.hidden ? v[r].o.entering(l.options, v[r].o.keep_after, h) : 0.f;
      } else if (next > live && row >= live && row < next) {
        h = initial(m, pass, r);  // in reverse a row may begin at any step
      }
      words(m, i + 1, pass, r).store(&h, row < next);
    }
  }
  SK_DEVICE int time_after(int t) const { return at.direction ? t - 1 : t + 1; }
  SK_DEVICE void keep(const StepRows& now, int t, int pass, int live, int next, const Values (&v)[kRows]) const {
    const Own m(at.cta);
    if (m.j >= at.hidden) return;
    const int64_t first = at.first_row(now, pass);
    S* y = (S*)l.y + (first * l.directions + at.direction) * at.hidden;
    S* reserve = (S*)l.reserve + (at.direction * l.rows + first) * (C::kSaved * at.hidden);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = m.row + r * kPassRows;
      if (row >= live) return;
      const bool part = v[r].o.inside(t);  // else its outputs are zeros
      const unsigned column = unsigned(row * int(l.directions) * at.hidden + m.j);
      store<S>(part ? v[r].out : 0.f, y, column);
      if (C::kSaved && l.reserve) {
#pragma unroll
        for (int q = 0; q < C::kSaved; ++q)
          store<S>(part ? v[r].saved[q] : 0.f, reserve + q * at.hidden, unsigned(row * C::kSaved * at.hidden + m.j));
      }
      if (kOptions && C::kCarry == Carry::kCell && l.options.c_all)
        store<S>(part ? v[r].carry : 0.f,
                 (S*)l.options.c_all + (first * l.directions + at.direction) * at.hidden, column);
      if (!part || (row < next && v[r].o.inside(time_after(t)))) continue;  // else this was the row's last step
      store<S>(v[r].out, l.h_n, state_at(m, pass, r));
      if (C::kCarry == Carry::kCell) store<S>(v[r].carry, l.c_n, state_at(m, pass, r));
    }
  }
  SK_DEVICE void empty(int copy, int pass) const {
    const Own m(at.cta);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (m.row + r * kPassRows < at.pass_rows(pass)) words(m, copy, pass, r).empty();
  }

  SK_DEVICE void run(char* shared) const {
    const int steps = int(l.steps);
    const auto time = [&](int i) { return at.direction ? steps - 1 - i : i; };
    StepRows now = step_at(l, time(0)), next;
    load_bias();
    clear(sums, 2 * set_size());
    enter(now);
    at.fill_padding(a.ctas * kUnits * int(sizeof(S)));
    const Multiplier<S, kGates, kOptions> product(p, shared,
                                                  RowsOfGates<S, kGates>(w_hh_of(l, at.direction), l.hidden, at.cta));
    float* set = sums;
    for (int i = 0; i < steps; ++i, now = next) {
      next = step_at(l, time(i + 1));
      for (int pass = 0; pass < at.passes; ++pass) {
        const int base = at.row0 + pass * kPass, rows = at.pass_rows(pass);
        const int live = clip(now.rows() - base, rows), then = clip(next.rows() - base, rows);
        if (live == 0 && then == 0) continue;
        Values v[kRows] = {};
        load_options(now, next, pass, live, then, v);
        load_gates(now, pass, live, v);
#pragma unroll 1
        for (int r = 0; r < kRows && r * kPassRows < live; ++r)
          product.multiply(live - r * kPassRows, at.operands(i, pass) + r * kPassRows * at.row_bytes, at.row_bytes,
                           set + r * sum_size(), [] {});
        block_sync();  // the sums are there; those of the other set have been read
        cell(set, time(i), pass, live, v);
        publish(i, time(i), pass, live, then, v);
        keep(now, time(i), pass, live, then, v);
        empty(i + 1 + kEmptyAhead, pass);
        set = set == sums ? sums + set_size() : sums;
      }
      at.fence(i);
    }
  }
};

template <class C, class S, int kRows, bool kOptions> SK_GRID_KERNEL grid_forward_kernel(SK_PARAMETER GridArgs a) {
  SK_SHARED(char, shared);
  GridForward<C, S, kRows, kOptions>(a, shared).run(shared);
}

}}}  // namespace seqkern::cuda
