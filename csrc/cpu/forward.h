// The forward pass of a layer: for each direction, chunks of time steps small enough that the projected inputs of a
// chunk stay in cache; in a chunk one product for the input projection, then step by step the recurrent product with
// the cell on its tiles. Where a cell only adds the two products and the weights lie near, they are one: `joins`. With a
// projection (LSTM) a second product per step takes the cell's output down to P.
#pragma once
#include "../core/cells.h"
#include "direct.h"
#include "marks.h"
#include "options.h"

namespace seqkern { namespace SK_NS { namespace {

template <class C, class S> struct Forward {
  using Acc = typename AccOf<S>::Type;
  using A = typename OperandOf<S>::Type;
  using V = Pack<Acc>;
  static constexpr int kWidth = V::kWidth, kBlocks = kUnitBlocks<C>, kVectors = kCellVectors<C>;
  static constexpr int kColumns = kVectors * kWidth;
  // Projected inputs of a chunk, a thread: within a usual L2, or more where W_ih itself is far larger, so that it is
  // read from the outer cache for many rows at a time.
  static constexpr int64_t kLeastChunk = (kParts<S> ? 256 : 512) << 10, kMostChunk = 4 << 20;
  static constexpr int64_t kNearWeights = 5 << 18, kExchangeChunk = 1 << 20;
  // Inputs that are copied at a time: little beside the weights in L2, or again more where those do not fit.
  static constexpr int64_t kLeastPass = 64 << 10;
  // All of a call's inputs up to this are projected at once, and each panel of W_ih is packed when it is used: its way to
  // an outer cache and back would take as long as the packing.
  static constexpr int64_t kNearInputs = 256 << 10;

  // Packing takes about a cycle an element. Reading weights where they lie costs, a row and element, about a twentieth
  // more; nothing where they come from an outer cache either way.
  static constexpr int64_t kDirectRows = 24, kDirectBatch = 2, kDirectBytes = kIsBf16<S> && kParts<S> ? 1 << 17 : 3 << 19;

  const LayerArgs& a;
  bool direct_x, direct_h, tiles_x, tiles_h, joint, in_turn;
  int64_t panels, out_panels, wide, ldh, ldu, ldx, carry_ld, chunk, chunk_rows, pass_rows;

  struct Packed { Panels<S> w_ih, w_hh, w_hr; };
  // Shared by the threads of a direction.
  struct Shared : Packed {
    Acc *b_ih, *b_hh;
    Rows<S> h[2];  // [B][ldh] state before and after a step, by turns
    Rows<S> full;  // [B][ldu] the LSTM's output before projection
    Acc* carry;  // [B][carry_ld]
  };
  // A thread's own.
  struct Own {
    Rows<S> x;  // [pass_rows][ldx] inputs of part of a chunk, dense
    Acc* gx;    // [chunk_rows][own panels][kColumns] projected inputs of a chunk
    Panels<S> w_ih;  // one panel, where each is packed only when its turn has come
  };

  explicit Forward(const LayerArgs& args) : a(args) {
    panels = ceil_div(a.hidden, kWidth * kBlocks);
    wide = kWide * kWidth;
    out_panels = projected() ? ceil_div(a.output, wide) : 0;
    ldh = ceil_div(max64(a.output, projected() ? out_panels * wide : panels * kBlocks * kWidth), 32) * 32 + 32;
    ldu = ceil_div(panels * kBlocks * kWidth, 32) * 32 + 32;
    ldx = ceil_div(a.input, 32) * 32 + 32;
    carry_ld = panels * kBlocks * kWidth;
    const int64_t most = Member::most_rows(a);
    const int64_t row_bytes = ceil_div(panels, a.plan.units) * kColumns * int64_t(sizeof(Acc));
    const int64_t weight_bytes = a.input * row_bytes;
    // The tile unit is so fast that it feels each exchange of W_ih and W_hh in L2 where both do not fit.
    const bool exchanged = kParts<S> > 0 && (a.input + a.output) * row_bytes * kParts<S> / 2 > kNearWeights;
    const int64_t bytes = max64(exchanged ? kExchangeChunk : kLeastChunk, min64(kMostChunk, weight_bytes / 4));
    chunk = min64(max64(bytes / max64(1, row_bytes * most), 1), a.steps);
    chunk_rows = chunk * most;
    direct_x = a.rows <= kDirectBatch;
    const int64_t packed_bytes = kParts<S> ? kParts<S> * 2 : sizeof(A);
    direct_h = (!a.keep || kParts<S>) && a.batch <= kDirectBatch &&
               (a.rows <= kDirectRows || a.output * ceil_div(panels, a.plan.units) * kColumns * packed_bytes > kDirectBytes);
    tiles_x = !direct_x && use_tiles<S>(chunk_rows);
    tiles_h = !direct_h && use_tiles<S>(most);
    joint = joins(most);
    if (joint) ldh = ceil_div(a.output + a.input, 32) * 32 + 32;
    const Rows<S> x{nullptr, ldx, tiles_x};
    pass_rows = bytes > kLeastChunk ? chunk_rows : kLeastPass / (x.row() * x.element_bytes(tiles_x));
    pass_rows = min64(chunk_rows, max64(pass_rows / kTilePad, 1) * kTilePad);
    in_turn = !a.keep && !direct_x && !tiles_x && !joint && a.plan.rows == 1 && chunk >= a.steps &&
              chunk_rows * x.row() * x.element_bytes(false) <= kNearInputs;
    if (in_turn) pass_rows = chunk_rows;
  }
  bool projected() const { return a.weights[0].w_hr != nullptr; }
  // What the last gate has of h stands apart from what it has of x: the GRU's n = tanh(x_n + r h_n).
  static constexpr bool kApart = C::kCarry == Carry::kHidden;
  // Whether [h x] [W_hh W_ih] is one product, step by step: the sums of a step's inputs are neither stored nor read, and a
  // tile is begun and ended once for both. W_ih is then read at every step: from L2, or by enough rows to hide it. One
  // row waits for W_hh already.
  bool joins(int64_t most) const {
    constexpr int64_t kFewRows = 4, kManyRows = 12, kInner = 3 << 17, kNear = 3 << 18, kFar = 3 << 20;
    const int64_t bytes = (a.input + a.output) * ceil_div(panels, a.plan.units) * kColumns * int64_t(sizeof(A));
    return !projected() && !direct_x && !direct_h && !tiles_x && !tiles_h && most > 1 &&
           a.hidden % (kWidth * kBlocks) == 0 &&
           bytes <= (most < kFewRows ? kInner : most < kManyRows ? kNear : kFar);
  }

  Packed packed(Arena& m) const {
    Packed p;
    p.w_ih = m.panels<S>(direct_x || joint || in_turn ? 0 : panels, a.input, kVectors, tiles_x, a.plan.units);
    p.w_hh = m.panels<S>(direct_h ? 0 : panels, a.output + (joint ? a.input : 0), kVectors, tiles_h, a.plan.units);
    p.w_hr = m.panels<S>(out_panels, a.hidden, kWide, tiles_h, a.plan.units);
    return p;
  }
  Packed kept(int d) const {
    Arena m{a.kept};
    Packed p = packed(m);
    for (; d > 0; --d) p = packed(m);
    return p;
  }
  int64_t marks() const { return 2 * panels + out_panels; }  // of a direction
  static Packing packing(const LayerArgs& args) {
    const Forward f(args);
    Arena m{nullptr};
    for (int d = 0; d < args.directions; ++d) f.packed(m);
    return {m.used, args.directions * f.marks(),
            f.direct_x | f.direct_h << 1 | f.joint << 2 | f.tiles_x << 3 | f.tiles_h << 4 | args.plan.units << 5};
  }
  Shared shared(Arena& m) const {
    Shared s;
    if (!a.kept) (Packed&)s = packed(m);
    s.b_ih = m.take<Acc>(panels * kColumns);
    s.b_hh = m.take<Acc>(panels * kColumns);
    for (Rows<S>& h : s.h) h = m.rows<S>(a.batch, ldh, tiles_h);
    s.full = m.rows<S>(projected() ? a.batch : 0, ldu, tiles_h);
    s.carry = m.take<Acc>(C::kCarry == Carry::kNone ? 0 : a.batch * carry_ld);
    return s;
  }
  Own own(Arena& m) const {
    Own o;
    o.x = m.rows<S>(joint ? 0 : pass_rows, ldx, tiles_x);
    o.w_ih = m.panels<S>(in_turn ? 1 : 0, a.input, kVectors, tiles_x);
    o.gx = m.take<Acc>(joint ? kColumns : chunk_rows * ceil_div(panels, a.plan.units) * kColumns);
    return o;
  }
  static int64_t scratch(const LayerArgs& args) {
    const Forward f(args);
    Arena m{nullptr};
    for (int d = 0; d < args.plan.directions; ++d) f.shared(m);
    for (int t = 0; t < args.plan.threads(); ++t) f.own(m);
    return m.used;
  }

  static void run(const LayerArgs& args, int tid) {
    const Forward f(args);
    Member me(args, tid);
    TileUse tiles(f.tiles_x || f.tiles_h);
    Arena m{args.scratch};
    Shared s;
    Own o;
    for (int d = 0; d < args.plan.directions; ++d) {
      Shared other = f.shared(m);
      if (d == me.direction) s = other;
    }
    for (int t = 0; t <= tid; ++t) o = f.own(m);
    if (args.plan.directions == args.directions) {
      if (args.kept) (Packed&)s = f.kept(me.direction);
      f.direction(me, me.direction, s, o);
    } else {
      for (int d = 0; d < args.directions; ++d) {
        if (args.kept) (Packed&)s = f.kept(d);
        f.direction(me, d, s, o);
        me.meet_direction();  // before the next direction's weights overwrite these
      }
    }
  }

  // Whether panel `i` was packed from other weights than w [rows of the cell's units][k], or never.
  bool changed(int d, int64_t i, const void* w, int64_t k, int gates, int64_t first, int64_t last) const {
    if (!a.kept) return true;
    uint64_t mark = 0;
    const int64_t row = k * int64_t(sizeof(S)), n = min64(a.hidden, last) - first;
    for (int g = 0; g < gates; ++g) mark = mixed(mark, mark_of((const char*)w + (g * a.hidden + first) * row, n * row));
    mark = mark ? mark : 1;
    uint64_t& known = a.marks[d * marks() + i];
    const bool other = mark != known;
    known = mark;
    return other;
  }

  void pack(const Member& me, int d, const Shared& s) const {
    const Weights& w = a.weights[d];
    Range p = part(panels, me.in_direction(), me.direction_size());
    for (int64_t i = p.begin; i < p.end; ++i) {
      const int64_t first = i * kBlocks * kWidth, last = first + kBlocks * kWidth;
      if (!direct_x && !in_turn && changed(d, i, w.w_ih, a.input, C::kGates, first, last)) {
        if (joint) pack_gates<C>((const S*)w.w_ih, a.hidden, s.w_hh, i, i + 1, a.output, a.input);
        else pack_gates<C>((const S*)w.w_ih, a.hidden, s.w_ih, i, i + 1);
      }
      if (!direct_h && changed(d, panels + i, w.w_hh, a.output, C::kGates, first, last))
        pack_gates<C>((const S*)w.w_hh, a.hidden, s.w_hh, i, i + 1, 0, a.output);
    }
    pack_bias<C>((const S*)w.b_ih, a.hidden, s.b_ih, p.begin, p.end);
    pack_bias<C>((const S*)w.b_hh, a.hidden, s.b_hh, p.begin, p.end);
    for (int64_t i = p.begin * kColumns; joint && i < p.end * kColumns; ++i)
      if (!kApart || i / kWidth % C::kGates != C::kGates - 1) s.b_hh[i] += s.b_ih[i];
    Range q = part(out_panels, me.in_direction(), me.direction_size());
    for (int64_t i = q.begin; i < q.end; ++i) {
      if (!changed(d, 2 * panels + i, w.w_hr, a.hidden, 1, i * wide, min64(a.output, (i + 1) * wide))) continue;
      for (int v = 0; v < kWide; ++v) {
        const int64_t j = i * wide + v * kWidth;
        pack_columns((const S*)w.w_hr + j * a.hidden, a.hidden, max64(0, min64(kWidth, a.output - j)), s.w_hr, i, v);
      }
    }
  }

  // Initial state of the rows [begin, end), into the buffer that their first step, at time t, reads.
  void enter(int d, const Shared& s, int buffer, int64_t t, int64_t begin, int64_t end) const {
    const S* h0 = (const S*)a.h0;
    const OptionMath<S> math(a, d);
    // What pads a row is multiplied too, by zeros: it must be finite.
    s.h[1 - buffer].clear(begin, end, a.output);
    if (projected()) s.full.clear(begin, end, a.hidden);
    const S* from = C::kCarry == Carry::kHidden ? h0 : (const S*)a.c0;
    const int64_t n = C::kCarry == Carry::kHidden ? a.output : a.hidden;
    for (int64_t b = begin; b < end; ++b) {
      const S* row = h0 ? h0 + (d * a.batch + b) * a.output : nullptr;
      copy_row(row, s.h[buffer], b, a.output);
      for (int64_t j = 0; row && a.options.any && j < a.output; j += kWidth)
        s.h[buffer].put(math.entering(load(row + j, a.output - j), t, b, j, a.output - j), b, j, a.output - j);
      if (C::kCarry == Carry::kNone) continue;
      for (int64_t j = 0; j < carry_ld; ++j)
        s.carry[b * carry_ld + j] = from && j < n ? Acc(widen(from[(d * a.batch + b) * n + j])) : Acc(0);
    }
  }

  void direction(const Member& me, int d, const Shared& s, const Own& o) const {
    const Direction dir{a, d};
    const Range p = part(panels, me.unit_part, a.plan.units), q = part(out_panels, me.unit_part, a.plan.units);
    const int64_t b0 = me.row_begin(), b1 = me.row_end();
    auto rows_of = [&](int64_t i) { return i < a.steps ? max64(b0, min64(b1, a.sizes[dir.time(i)])) : b1; };
    pack(me, d, s);
    int64_t entered = rows_of(0);
    if (me.unit_part == 0) enter(d, s, 0, dir.time(0), b0, entered);
    if (me.unit_part == 0) join(dir, s, 0, b0, entered);
    me.meet_direction();
    for (int64_t j = 0; joint && j < kColumns; ++j) o.gx[j] = 0;
    for (int64_t i0 = 0; i0 < a.steps; i0 += chunk) {
      const int64_t i1 = min64(i0 + chunk, a.steps);
      if (!joint) project(dir, o, s, i0, i1, b0, b1, p);
      int64_t row = 0;  // of the chunk's dense rows
      for (int64_t i = i0; i < i1; ++i) {
        const int64_t end = rows_of(i), n = end - b0;
        step(dir, s, i, b0, end, p, joint ? o.gx : o.gx + row * (p.end - p.begin) * kColumns);
        if (projected()) {
          me.meet_units();
          output(dir, s, i, b0, end, q);
        }
        row += n;
        const int64_t next = rows_of(i + 1);
        if (next > entered && i + 1 < a.steps) {
          if (me.unit_part == 0) enter(d, s, (i + 1) & 1, dir.time(i + 1), entered, next);
          entered = next;
        }
        if (me.unit_part == 0) join(dir, s, i + 1, b0, next);
        me.meet_units();
      }
    }
    if (me.unit_part == 0) finish(dir, s, b0, b1);
  }

  // gx = W_ih x + b_ih for the rows of this thread in the steps [i0, i1), in the panels p.
  void project(const Direction& dir, const Own& o, const Shared& s, int64_t i0, int64_t i1, int64_t b0, int64_t b1,
               Range p) const {
    const int64_t ld = (p.end - p.begin) * kColumns;
    int64_t done = 0, rows = 0;  // of the chunk, and copied since
    const auto pass = [&] {
      auto keep = [&](int64_t panel, int64_t r0, int n, const Acc* c) {
        for (int r = 0; r < n; ++r)
          for (int v = 0; v < kVectors; ++v)
            store(load(c + (r * kVectors + v) * kWidth),
                  o.gx + (done + r0 + r) * ld + (panel - p.begin) * kColumns + v * kWidth);
      };
      if (direct_x)
        multiply_direct<C>(o.x, rows, (const S*)a.weights[dir.d].w_ih, a.hidden, a.input, p, s.b_ih, keep);
      else if (in_turn)
        for (int64_t i = p.begin; i < p.end; ++i) {
          Panels<S> one = o.w_ih;
          one.data -= i * one.bytes();
          pack_gates<C>((const S*)a.weights[dir.d].w_ih, a.hidden, one, i, i + 1);
          multiply<kVectors>(o.x, rows, one, i, i + 1, s.b_ih, keep);
        }
      else
        multiply<kVectors>(o.x, rows, s.w_ih, p.begin, p.end, s.b_ih, keep);
      done += rows;
      rows = 0;
    };
    for (int64_t i = i0; i < i1; ++i) {
      const int64_t t = dir.time(i);
      for (int64_t b = b0; b < min64(b1, a.sizes[t]); ++b) {
        copy_row(at<const S>(a.x, a, t, b), o.x, rows, a.input);
        if (++rows == pass_rows) pass();
      }
    }
    pass();
  }

  // c with its share of the old one, and into c of every step.
  SK_INL void zone_c(const OptionMath<S>& math, int64_t t, int64_t b, int64_t j, V old, V& c) const {
    const int64_t lanes = a.hidden - j;
    if (a.options.zone_c) c = math.mix(math.zone_c(t, b, j, lanes), old, c);
    if (a.options.c_all) store(c, math.c_row((S*)a.options.c_all, t, b) + j, lanes);
  }
  // h with its share of the old one, which a cell that carries h has at hand.
  SK_INL void zone_h(const Direction& dir, const OptionMath<S>& math, int64_t t, int64_t b, int64_t j, V old,
                     V& h) const {
    if (!a.options.zone_h) return;
    const int64_t lanes = a.output - j;
    if (C::kCarry != Carry::kHidden) {
      const S* before = dir.previous_output<const S>(t, b);
      old = before ? math.kept(load(before + j, lanes), t, b) : V(0);
    }
    h = math.mix(math.zone_h(t, b, j, lanes), old, h);
  }

  // The inputs of the i-th step, if there is one, beside the states that it reads.
  void join(const Direction& dir, const Shared& s, int64_t i, int64_t b0, int64_t end) const {
    for (int64_t b = b0; joint && i < a.steps && b < end; ++b) {
      const S* x = at<const S>(a.x, a, dir.time(i), b);
      for (int64_t j = 0; j < a.input; j += kWidth)
        s.h[i & 1].put(load(x + j, a.input - j), b, a.output + j, a.input - j);
    }
  }

  // The i-th step of rows [b0, end): recurrent product and cell, in the panels p. gx: of these rows, or, where the
  // product is joint, zeros.
  void step(const Direction& dir, const Shared& s, int64_t i, int64_t b0, int64_t end, Range p, const Acc* gx) const {
    const int64_t t = dir.time(i), ld = (p.end - p.begin) * kColumns;
    const Rows<S>& next = projected() ? s.full : s.h[(i + 1) & 1];
    const OptionMath<S> math(a, dir.d);
    // apart: what the last gate has of h, where the product is joint and keeps it apart.
    auto cells = [&](int64_t panel, int64_t r0, int n, const Acc* c, const Acc* apart = nullptr) {
      for (int r = 0; r < n; ++r) {
        const int64_t b = b0 + r0 + r;
        const Acc* gx_row = joint ? gx : gx + (r0 + r) * ld + (panel - p.begin) * kColumns;
        for (int u = 0; u < kBlocks; ++u) {
          const int64_t j = (panel * kBlocks + u) * kWidth, lanes = a.hidden - j;
          if (lanes <= 0) break;
          using Cell = typename CellPackOf<S>::Type;
          Cell x[C::kGates], h[C::kGates], saved[C::kSaved ? C::kSaved : 1], out, carry(0);
          for (int g = 0; g < C::kGates; ++g) {
            x[g] = load(gx_row + (u * C::kGates + g) * kWidth);
            h[g] = load(c + r * kColumns + (u * C::kGates + g) * kWidth);
          }
          if (kApart && apart) {
            x[C::kGates - 1] = h[C::kGates - 1];
            h[C::kGates - 1] = load(apart + r * kColumns + (u * C::kGates + C::kGates - 1) * kWidth);
          }
          if (C::kCarry != Carry::kNone) carry = load(s.carry + b * carry_ld + j);
          V old = carry = a.options.any ? math.kept(carry, t, b) : carry;
          C::forward(x, h, carry, out, saved);
          if (a.options.any) {
            if (C::kCarry == Carry::kCell) zone_c(math, t, b, j, old, carry);
            if (!projected()) zone_h(dir, math, t, b, j, old, out);
            if (C::kCarry == Carry::kHidden) carry = out;
          }
          if (C::kCarry != Carry::kNone) store(carry, s.carry + b * carry_ld + j);
          next.put(a.options.any && !projected() ? math.entering(out, dir.time(i + 1), b, j, lanes) : out, b, j);
          if (!projected())
            store(out, (S*)a.y + ((a.starts[t] + b) * a.directions + dir.d) * a.output + j, lanes);
          if (a.reserve && C::kSaved) {
            S* keep = dir.reserve<S, C::kSaved>(t, b) + j;
            for (int q = 0; q < C::kSaved; ++q) store(saved[q], keep + q * a.hidden, lanes);
          }
        }
      }
    };
    const Rows<S> h = s.h[i & 1].at(b0);
    if constexpr (kApart)
      if (joint)
        return multiply_apart<kVectors, C::kGates>(h, end - b0, s.w_hh, a.output, p.begin, p.end, s.b_hh, s.b_ih, cells, i & 1);
    if (direct_h)
      multiply_direct<C>(h, end - b0, (const S*)a.weights[dir.d].w_hh, a.hidden, a.output, p, s.b_hh, cells, i & 1);
    else
      multiply<kVectors>(h, end - b0, s.w_hh, p.begin, p.end, s.b_hh, cells, i & 1);
  }

  // h = W_hr full, in the output panels q.
  void output(const Direction& dir, const Shared& s, int64_t i, int64_t b0, int64_t end, Range q) const {
    const int64_t t = dir.time(i);
    const OptionMath<S> math(a, dir.d);
    const Rows<S>& next = s.h[(i + 1) & 1];
    multiply<kWide>(s.full.at(b0), end - b0, s.w_hr, q.begin, q.end, (const Acc*)nullptr,
                    [&](int64_t panel, int64_t r0, int n, const Acc* c) {
                      for (int r = 0; r < n; ++r)
                        for (int v = 0; v < kWide; ++v) {
                          const int64_t b = b0 + r0 + r, j = panel * wide + v * kWidth, lanes = a.output - j;
                          if (lanes <= 0) break;
                          V out = load(c + r * wide + v * kWidth);
                          if (a.options.any) zone_h(dir, math, t, b, j, V(0), out);
                          next.put(a.options.any ? math.entering(out, dir.time(i + 1), b, j, lanes) : out, b, j);
                          store(out, (S*)a.y + ((a.starts[t] + b) * a.directions + dir.d) * a.output + j, lanes);
                        }
                    }, i & 1);
  }

  // h_n from each row's last output, which may be the same memory; c_n from what it carried.
  void finish(const Direction& dir, const Shared& s, int64_t b0, int64_t b1) const {
    S* h_n = (S*)a.h_n + dir.d * a.batch * a.output;
    S* c_n = (S*)a.c_n + dir.d * a.batch * a.hidden;
    int64_t last = a.steps - 1;
    for (int64_t b = b0; b < b1; ++b) {
      while (a.sizes[last] <= b) --last;  // rows further down ended no later
      const int64_t t = dir.d ? 0 : last;
      memmove(h_n + b * a.output, (const S*)a.y + ((a.starts[t] + b) * a.directions + dir.d) * a.output,
             a.output * sizeof(S));
      if (C::kCarry != Carry::kCell) continue;
      for (int64_t j = 0; j < a.hidden; ++j) narrow(s.carry[b * carry_ld + j], c_n[b * a.hidden + j]);
    }
  }
};

}}}  // namespace seqkern::SK_NS
