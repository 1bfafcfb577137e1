// The backward pass of a layer. Steps run against the forward order, in chunks. In a chunk, step by step, the product
// that brings d(loss)/dh back through W_hh, with the cell's derivative on its tiles; the gate gradients of the chunk
// stay in a buffer. Then, from that buffer, dx = dgates W_ih and the sums over rows dW = dgates^T [x, h], db.
//
// The buffer of gate gradients alternates: a thread may begin the next chunk's steps while others still sum this one's
// weights. Sums run in a fixed order: results repeat bit for bit.
#pragma once
#include "backward_sums.h"

namespace seqkern { namespace SK_NS { namespace {

template <class C, class S> struct Backward : BackwardSums<C, S> {
  using Base = BackwardSums<C, S>;
  using typename Base::Acc, typename Base::V, typename Base::Shared, typename Base::Own, typename Base::Chunk;
  using Base::kWidth, Base::kColumns, Base::kSkip, Base::kDirectSums;
  using Base::a, Base::units, Base::outs, Base::ins, Base::carry_ld, Base::old_ld, Base::chunk, Base::chunk_rows;
  using Base::tiles_h, Base::tiles_sum, Base::projected, Base::sums, Base::shared, Base::own, Base::second_dx;
  using Base::gather, Base::split, Base::input_gradient, Base::sum_weights, Base::narrow_sums;
  using Base::Base;

  static int64_t scratch(const LayerArgs& args) {
    Backward f(args);
    Arena m{nullptr};
    f.second_dx(m);
    for (int d = 0; d < args.plan.directions; ++d) f.shared(m);
    for (int t = 0; t < args.plan.threads(); ++t) f.own(m);
    return m.used;
  }

  static void run(const LayerArgs& args, int tid) {
    Backward f(args);
    Member me(args, tid);
    TileUse tiles(f.tiles_sum);
    Arena m{args.scratch};
    S* dx2 = f.second_dx(m);
    Shared s;
    Own o;
    for (int d = 0; d < args.plan.directions; ++d) {
      Shared other = f.shared(m);
      if (d == me.direction) s = other;
    }
    for (int t = 0; t <= tid; ++t) o = f.own(m);
    if (args.plan.directions == args.directions) {
      f.direction(me, me.direction, s, o, me.direction ? dx2 : (S*)args.dx, false);
      if (args.directions == 2 && args.dx) {
        me.meet_all();
        Range r = part(args.rows * args.input, tid, args.plan.threads());
        S* dx = (S*)args.dx;
        for (int64_t i = r.begin; i < r.end; i += kWidth)
          store(load(dx + i, r.end - i) + load(dx2 + i, r.end - i), dx + i, r.end - i);
      }
    } else {
      for (int d = 0; d < args.directions; ++d) {
        f.direction(me, d, s, o, (S*)args.dx, d == 1);
        me.meet_direction();  // before the next direction's weights overwrite these
      }
    }
  }

  // B[k, n] for k over the columns of gate gradients, each column block being `order[k]`-th gate's rows of w [G*H, n].
  void pack_by_gate(const S* w, int64_t n, const int (&order)[C::kGates], const Panels<S>& to, Range p) const {
    for (int64_t i = p.begin; i < p.end; ++i)
      pack_rows(to, i, i + 1, n, 0, to.k,
                [&](int64_t k) { return w + (order[k / a.hidden] * a.hidden + k % a.hidden) * n; });
  }
  void pack(const Member& me, int d, const Shared& s) const {
    const Weights& w = a.weights[d];
    const int i = me.in_direction(), n = me.direction_size();
    pack_by_gate((const S*)w.w_hh, a.output, C::kOrderH, s.w_hh, part(outs, i, n));
    if (a.dx) pack_by_gate((const S*)w.w_ih, a.input, C::kOrder, s.w_ih, part(ins, i, n));
    if (projected()) {
      const Range p = part(units, i, n);
      pack_rows(s.w_hr, p.begin, p.end, a.hidden, 0, a.output, [&](int64_t k) { return (const S*)w.w_hr + k * a.hidden; });
    }
    // What pads a row is multiplied too, by zeros: it must be finite.
    const Range r = part(chunk_rows, i, n);
    for (int b = 0; b < 2; ++b) {
      s.grads[b].clear(r.begin, r.end, C::kGrads * a.hidden);
      if (projected()) s.dp[b].clear(r.begin, r.end, a.output);
      if (tiles_h == tiles_sum) continue;
      s.grads_sum[b].clear(r.begin, r.end, C::kGrads * a.hidden);
      if (projected()) s.dp_sum[b].clear(r.begin, r.end, a.output);
    }
  }

  void direction(const Member& me, int d, const Shared& s, const Own& o, S* dx, bool add) const {
    const Direction dir{a, d};
    const int64_t b0 = me.row_begin(), b1 = me.row_end();
    const Range q = part(outs, me.unit_part, a.plan.units), p = part(units, me.unit_part, a.plan.units);
    auto time = [&](int64_t i) { return dir.time(a.steps - 1 - i); };
    auto size = [&](int64_t i) { return i >= 0 && i < a.steps ? a.sizes[time(i)] : 0; };
    auto clip = [&](int64_t b) { return max64(b0, min64(b1, b)); };
    pack(me, d, s);
    if (me.unit_part == 0) enter(dir, s, b0, b1);
    me.meet_direction();
    Rows<S> after{};  // gate gradients of the step before in this order, row 0 of the batch
    for (int64_t i0 = 0, k = 0; i0 < a.steps; i0 += chunk, ++k) {
      Chunk c{i0, min64(i0 + chunk, a.steps), 0, 0, 0, int(k & 1)};
      const int64_t t0 = min64(time(c.first), time(c.last - 1)), t1 = max64(time(c.first), time(c.last - 1));
      c.time = t0;
      c.base = a.starts[t0];
      c.rows = a.starts[t1 + 1] - c.base;
      for (int64_t i = c.first; i < c.last; ++i) {
        const int64_t t = time(i), n = clip(size(i)), known = clip(min64(size(i - 1), size(i)));
        const Rows<S> grads = s.grads[c.buffer].at(a.starts[t] - c.base);
        // Rows up to `known` were at the step before; the others begin here, with d(loss)/dh_n.
        if (projected()) {
          const Rows<S> dp = s.dp[c.buffer].at(a.starts[t] - c.base);
          output(dir, s, t, after, b0, known, n, q, dp);
          me.meet_units();
          unproject(dir, s, t, dp, b0, n, p, grads);
        } else {
          output_and_cell(dir, s, t, after, b0, known, n, q, grads);
        }
        me.meet_units();
        leave(dir, s, t, grads, clip(min64(size(i + 1), size(i))), n, q, p);
        after = grads;
      }
      if (tiles_sum && !tiles_h) split(me, dir, s, c, b0, b1);
      me.meet_direction();  // nobody sums over the chunk before any more
      if (sums()) {
        gather(me, dir, s, o, c);
        me.meet_direction();
      }
      if (a.dx) input_gradient(me, s, c, dx, add);
      if (sums()) sum_weights(me, s, o, c, d);
    }
    if (sums() && !kDirectSums) {
      me.meet_direction();
      narrow_sums(me, s, d);
    }
  }

  void enter(const Direction& dir, const Shared& s, int64_t b0, int64_t b1) const {
    if (C::kCarry == Carry::kNone) return;
    const S* dc = C::kCarry == Carry::kCell ? (const S*)a.dc_n : nullptr;
    for (int64_t b = b0; b < b1; ++b)
      for (int64_t j = 0; j < carry_ld; ++j)
        s.carry[b * carry_ld + j] =
            dc && j < a.hidden ? Acc(widen(dc[(dir.d * a.batch + b) * a.hidden + j])) : Acc(0);
  }

  // d(loss)/dh of rows [b0, n) at time t, in the output panels q: through the next step's gates for rows below `known`,
  // from dh_n for the others, and from dy. use(b, j, lanes, value) takes a vector of it.
  template <class Use>
  SK_INL void output_gradient(const Direction& dir, const Shared& s, int64_t t, const Rows<S>& after, int64_t b0,
                              int64_t known, int64_t n, Range q, const Use& use) const {
    const OptionMath<S> math(a, dir.d);
    auto direct = [&](int64_t b, int64_t j, int64_t lanes, V value) {
      if (a.options.any && b < known) value = math.kept(message(math, s, b, j, lanes, value), dir.after(t), b);
      if (a.dy.data) value = value + load(at<const S>(a.dy, a, t, b) + dir.d * a.output + j, lanes);
      if (a.options.any) math.watch(0, t, b, j / kColumns, value);
      if (a.options.any && past()) {  // the cell gets its share, the rest goes to the step before
        V old = a.options.zone_h ? math.zone_h(t, b, j, lanes) * value : V(0);
        store(old, s.old + b * old_ld + j);
        value = value - old;
      }
      use(b, j, lanes, value);
    };
    multiply<kWide>(after.at(b0, kSkip * a.hidden), known - b0, s.w_hh, q.begin, q.end,
                    (const Acc*)nullptr, [&](int64_t panel, int64_t r0, int rows, const Acc* c) {
                      for (int r = 0; r < rows; ++r)
                        for (int v = 0; v < kWide; ++v) {
                          const int64_t j = panel * kColumns + v * kWidth;
                          if (j >= a.output) break;
                          direct(b0 + r0 + r, j, a.output - j, load(c + r * kColumns + v * kWidth));
                        }
                    }, t & 1);
    const S* dh_n = (const S*)a.dh_n;
    for (int64_t b = known; b < n; ++b)
      for (int64_t j = q.begin * kColumns; j < min64(q.end * kColumns, a.output); j += kWidth)
        direct(b, j, a.output - j,
               dh_n ? load(dh_n + (dir.d * a.batch + b) * a.output + j, a.output - j) : V(0));
  }

  // Whether h's gradient goes past the cell as well as through it.
  bool past() const { return C::kCarry == Carry::kHidden || a.options.zone_h; }
  // d(loss)/dh, of the h that a step read, from the part of it that the product brings.
  SK_INL V message(const OptionMath<S>& math, const Shared& s, int64_t b, int64_t j, int64_t lanes, V product) const {
    V value = math.masked(product, b, j, lanes);
    return math.clipped(past() ? value + load(s.old + b * old_ld + j) : value);
  }

  // The cell's derivative for one vector of units of row b.
  SK_INL void cell(const Direction& dir, const Shared& s, int64_t t, int64_t b, int64_t j, int64_t lanes, V dh,
                   const Rows<S>& grads) const {
    const OptionMath<S> math(a, dir.d);
    V saved[C::kSaved ? C::kSaved : 1], grad[C::kGrads], out(0), prev(0), carry(0);
    const int64_t before = dir.before(t, b);
    if (C::kSaved) {
      const S* keep = dir.reserve<const S, C::kSaved>(t, b) + j;
      for (int q = 0; q < C::kSaved; ++q) saved[q] = load(keep + q * a.hidden, lanes);
      if (before >= 0) {  // what the next call for this row reads: many short streams, which the hardware does not foresee
        const S* next = dir.reserve<const S, C::kSaved>(before, b) + j;
        for (int q = 0; q < C::kSaved; ++q) __builtin_prefetch(next + q * a.hidden, 0, 2);
      }
    } else {
      out = load((const S*)a.y + (a.starts[t] + b) * a.directions * a.output + dir.d * a.output + j, lanes);
    }
    if (C::kCarry == Carry::kHidden) {
      const S* h = dir.previous_output<const S>(t, b);
      if (h) prev = load(h + j, lanes);
      if (a.options.any) prev = math.kept(prev, t, b);
    } else if (C::kCarry == Carry::kCell) {
      if (before >= 0 && a.options.c_all)
        prev = load(math.c_row((const S*)a.options.c_all, before, b) + j, lanes);
      else if (before >= 0)
        prev = load(dir.reserve<const S, C::kSaved>(before, b) + (C::kSaved - 1) * a.hidden + j, lanes);
      else if (a.c0) prev = load((const S*)a.c0 + (dir.d * a.batch + b) * a.hidden + j, lanes);
    }
    if (C::kCarry == Carry::kCell && a.options.any) prev = math.kept(prev, t, b);
    if (C::kCarry != Carry::kNone) carry = load(s.carry + b * carry_ld + j);
    V old(0);  // what goes past the cell
    if (a.options.any && C::kCarry == Carry::kHidden) {
      old = carry;
      carry = V(0);
    } else if (a.options.any && C::kCarry == Carry::kCell) {
      if (a.options.dc_all) carry = carry + load(math.c_row((const S*)a.options.dc_all, t, b) + j, lanes);
      if constexpr (C::kCarry == Carry::kCell)  // with zoneout h is read from the c before the mixture
        if (a.options.flow)
          math.watch(1, t, b, j / kColumns, a.options.zone_c ? carry : C::cell_gradient(saved, dh, carry));
      if (a.options.zone_c) old = math.zone_c(t, b, j, lanes) * carry;
      carry = carry - old;
    }
    C::backward(saved, out, prev, dh, carry, grad);
    if (a.options.any) carry = carry + old;
    if (a.options.any && C::kCarry == Carry::kCell) carry = math.kept(math.clipped(carry), t, b);
    if (C::kCarry != Carry::kNone) store(carry, s.carry + b * carry_ld + j);
    for (int g = 0; g < C::kGrads; ++g) grads.put(grad[g], b, g * a.hidden + j, lanes);
  }

  void output_and_cell(const Direction& dir, const Shared& s, int64_t t, const Rows<S>& after, int64_t b0, int64_t known,
                       int64_t n, Range q, const Rows<S>& grads) const {
    output_gradient(dir, s, t, after, b0, known, n, q,
                    [&](int64_t b, int64_t j, int64_t lanes, V dh) { cell(dir, s, t, b, j, lanes, dh, grads); });
  }
  void output(const Direction& dir, const Shared& s, int64_t t, const Rows<S>& after, int64_t b0, int64_t known, int64_t n,
              Range q, const Rows<S>& dp) const {
    output_gradient(dir, s, t, after, b0, known, n, q,
                    [&](int64_t b, int64_t j, int64_t lanes, V dh) { dp.put(dh, b, j, lanes); });
  }
  // d(loss)/d(unprojected h) = dp W_hr, and the cell on it.
  void unproject(const Direction& dir, const Shared& s, int64_t t, const Rows<S>& dp, int64_t b0, int64_t n, Range p,
                 const Rows<S>& grads) const {
    multiply<kWide>(dp.at(b0), n - b0, s.w_hr, p.begin, p.end, (const Acc*)nullptr,
                    [&](int64_t panel, int64_t r0, int rows, const Acc* c) {
                      for (int r = 0; r < rows; ++r)
                        for (int v = 0; v < kWide; ++v) {
                          const int64_t j = panel * kColumns + v * kWidth;
                          if (j >= a.hidden) break;
                          cell(dir, s, t, b0 + r0 + r, j, a.hidden - j, load(c + r * kColumns + v * kWidth), grads);
                        }
                    }, t & 1);
  }

  // Initial state's gradient for the rows [begin, end), whose first step in time this, at t, was.
  void leave(const Direction& dir, const Shared& s, int64_t t, const Rows<S>& grads, int64_t begin,
             int64_t end, Range q,
             Range p) const {
    const OptionMath<S> math(a, dir.d);
    S* dh0 = (S*)a.dh0 + dir.d * a.batch * a.output;
    multiply<kWide>(grads.at(begin, kSkip * a.hidden), end - begin, s.w_hh, q.begin, q.end,
                    (const Acc*)nullptr, [&](int64_t panel, int64_t r0, int rows, const Acc* c) {
                      for (int r = 0; r < rows; ++r)
                        for (int v = 0; v < kWide; ++v) {
                          const int64_t j = panel * kColumns + v * kWidth, b = begin + r0 + r;
                          if (j >= a.output) break;
                          V dh = load(c + r * kColumns + v * kWidth);
                          if (a.options.any) dh = math.kept(message(math, s, b, j, a.output - j, dh), t, b);
                          else if (C::kCarry == Carry::kHidden) dh = dh + load(s.carry + b * carry_ld + j);
                          store(dh, dh0 + b * a.output + j, a.output - j);
                        }
                    });
    if (C::kCarry != Carry::kCell) return;
    S* dc0 = (S*)a.dc0 + dir.d * a.batch * a.hidden;
    for (int64_t b = begin; b < end; ++b)
      for (int64_t j = p.begin * kColumns; j < min64(p.end * kColumns, a.hidden); ++j)
        narrow(s.carry[b * carry_ld + j], dc0[b * a.hidden + j]);
  }
};

}}}  // namespace seqkern::SK_NS
