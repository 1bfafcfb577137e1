// Keys and values of a source: two products with the same rows, those before each length, in one pass; and their
// gradients. Rows come from a time-major tensor and go to batch-major ones.
#pragma once
#include "../core/project_args.h"
#include "wide.h"

namespace seqkern { namespace SK_NS { namespace {

template <class S> struct Project {
  using Acc = typename AccOf<S>::Type;
  using V = Pack<Acc>;
  using Sums = TileSums<Acc>;
  static constexpr int kWidth = V::kWidth, kTile = Sums::kTile;
  static constexpr int64_t kBlock = 20 * kTile;              // rows that stay in L2 beside a panel
  static constexpr bool kDirect = sizeof(S) == sizeof(Acc);  // no wider place is needed for the sums

  const ProjectArgs& a;
  explicit Project(const ProjectArgs& args) : a(args) {}
  Range rows_of(int tid) const { return part(a.rows, tid, a.threads); }
  int64_t columns() const { return a.of[0].columns + a.of[1].columns; }
  Range outside(int tid) const {
    const Range r = part(a.places - a.rows, tid, a.threads);
    return {a.rows + r.begin, a.rows + r.end};
  }

  // ---- forward
  struct Forward {
    Panels<S> w[2];
    Acc* bias[2];
  };
  Forward forward(Arena& m) const {
    Forward f;
    for (int i = 0; i < 2; ++i) {
      const Projection& p = a.of[i];
      f.w[i] = m.panels<S>(wide_panels<S>(p.columns), a.input, kWide, false);
      f.bias[i] = m.take<Acc>(p.bias ? padded_row<S>(p.columns) : 0);
    }
    return f;
  }
  static int64_t forward_scratch(const ProjectArgs& args) {
    Project p(args);
    Arena m{nullptr};
    p.forward(m);
    for (int t = 0; t < args.threads; ++t) m.rows<S>(kBlock, padded_row<S>(args.input), false);
    return m.used;
  }
  static void run_forward(const ProjectArgs& args, int tid) {
    Project p(args);
    Arena m{args.scratch};
    const Forward f = p.forward(m);
    Rows<S> left{};
    for (int t = 0; t <= tid; ++t) left = m.rows<S>(kBlock, padded_row<S>(args.input), false);
    for (int i = 0; i < 2; ++i) {
      const Projection& of = args.of[i];
      pack_weights((const S*)of.w, of.columns, args.input, f.w[i], part(wide_panels<S>(of.columns), tid, args.threads));
      for (int64_t j = 0; of.bias && tid == 0 && j < padded_row<S>(of.columns); ++j)
        f.bias[i][j] = j < of.columns ? Acc(widen(((const S*)of.bias)[j])) : Acc(0);
    }
    meet(*args.barrier, args.threads);
    const Range rows = p.rows_of(tid), none = p.outside(tid);
    for (int64_t r0 = rows.begin; r0 < rows.end; r0 += kBlock) {
      const int64_t n = min64(kBlock, rows.end - r0);
      for (int64_t r = 0; r < n; ++r) copy_row((const S*)args.x + args.from[r0 + r] * args.input, left, r, args.input);
      for (int i = 0; i < 2; ++i) {
        const Projection& of = args.of[i];
        wide_product(left, n, f.w[i], of.columns, of.bias ? f.bias[i] : (const Acc*)nullptr,
                     [&](int64_t r, int64_t j, int64_t lanes, V x) {
                       store(x, (S*)of.y + args.to[r0 + r] * of.columns + j, lanes);
                     });
      }
    }
    for (const Projection& of : args.of)
      for (int64_t r = none.begin; r < none.end; ++r)
        memset((S*)of.y + args.to[r] * of.columns, 0, of.columns * sizeof(S));
  }

  // ---- backward
  struct Own {
    Rows<S> left;  // [kBlock, K + A] gradients of keys and values side by side
    Sums sums;
    Panels<Acc> x;  // [block rows, M] right-hand side of the sums
    Acc* wide;      // [tiles of a thread * kTile][M] sums that the output's type cannot hold
    Acc* bias;      // [tiles of a thread * kTile]
  };
  int64_t tiles(int i) const { return a.of[i].dw ? ceil_div(a.of[i].columns, kTile) : 0; }
  Panels<S> transposed(Arena& m) const {
    return m.panels<S>(a.dx ? wide_panels<S>(a.input) : 0, columns(), kWide, false);
  }
  // Rows whose x stays in L2 beside what else is read.
  int64_t block_rows() const {
    constexpr int64_t kNear = 576 << 10;
    return min64(Sums::kMostRows, max64(128, kNear / (a.input * int64_t(sizeof(Acc))) / 8 * 8));
  }
  Own own(Arena& m) const {
    Own o;
    const int64_t most = ceil_div(tiles(0) + tiles(1), a.threads) * kTile;
    o.left = m.rows<S>(a.dx ? kBlock : 0, padded_row<S>(columns()), false);
    o.sums = Sums::take(m, most ? block_rows() : 0);
    o.x = m.panels<Acc>(wide_panels<Acc>(most ? a.input : 0), block_rows(), kWide, false);
    o.wide = m.take<Acc>(kDirect ? 0 : most * a.input);
    o.bias = m.take<Acc>(most);
    return o;
  }
  static int64_t backward_scratch(const ProjectArgs& args) {
    Project p(args);
    Arena m{nullptr};
    p.transposed(m);
    for (int t = 0; t < args.threads; ++t) p.own(m);
    return m.used;
  }
  static void run_backward(const ProjectArgs& args, int tid) {
    Project p(args);
    Arena m{args.scratch};
    const Panels<S> w = p.transposed(m);
    Own o{};
    for (int t = 0; t <= tid; ++t) o = p.own(m);
    if (args.dx) {
      const Range panels = part(wide_panels<S>(args.input), tid, args.threads);
      const int64_t keys = args.of[0].columns;
      pack_rows(w, panels.begin, panels.end, args.input, 0, p.columns(), [&](int64_t k) {
        return k < keys ? (const S*)args.of[0].w + k * args.input : (const S*)args.of[1].w + (k - keys) * args.input;
      });
      meet(*args.barrier, args.threads);
      p.inputs(w, o, tid);
    }
    p.weights(o, tid);
  }

  void inputs(const Panels<S>& w, const Own& o, int tid) const {
    const Range rows = rows_of(tid), none = outside(tid);
    for (int64_t r0 = rows.begin; r0 < rows.end; r0 += kBlock) {
      const int64_t n = min64(kBlock, rows.end - r0);
      o.left.clear(0, n, columns());
      for (int64_t r = 0, first = 0; r < n; ++r, first = 0)
        for (const Projection& of : a.of) {
          const S* from = (const S*)of.dy + a.to[r0 + r] * of.columns;
          for (int64_t j = 0; j < of.columns; j += kWidth)
            o.left.put(load(from + j, of.columns - j), r, first + j, min64(kWidth, of.columns - j));
          first += of.columns;
        }
      wide_product(o.left, n, w, a.input, (const Acc*)nullptr, [&](int64_t r, int64_t j, int64_t lanes, V x) {
        store(x, (S*)a.dx + a.from[r0 + r] * a.input + j, lanes);
      });
    }
    for (int64_t r = none.begin; r < none.end; ++r) memset((S*)a.dx + a.from[r] * a.input, 0, a.input * sizeof(S));
  }

  // This thread's share of the rows of both dW = dy^T x, summed over blocks of rows.
  void weights(const Own& o, int tid) const {
    const Range own = part(tiles(0) + tiles(1), tid, a.threads);
    if (own.begin == own.end) return;
    for (int64_t k0 = 0; k0 == 0 || k0 < a.rows; k0 += block_rows()) {
      const int64_t n = min64(block_rows(), a.rows - k0);
      for (int64_t k = 0; k < n; ++k) put_row(o.x, k, (const S*)a.x + a.from[k0 + k] * a.input, a.input);
      each_tile(own, [&](const Projection& of, int64_t j, int64_t count, int64_t at) {
        o.sums.take_columns(n, count, [&](int64_t k) { return (const S*)of.dy + a.to[k0 + k] * of.columns + j; });
        Acc* to = o.wide + at * a.input;
        if constexpr (kDirect) to = (Acc*)of.dw + j * a.input;
        o.sums.sum(o.x, count, {0, n}, a.input, to, k0 > 0);
        if (of.dbias) o.sums.sum_bias(n, count, o.bias + at, k0 > 0);
      });
    }
    each_tile(own, [&](const Projection& of, int64_t j, int64_t count, int64_t at) {
      for (int64_t k = 0; !kDirect && k < count * a.input; ++k)
        narrow(o.wide[at * a.input + k], ((S*)of.dw)[j * a.input + k]);
      for (int64_t r = 0; of.dbias && r < count; ++r) narrow(o.bias[at + r], ((S*)of.dbias)[j + r]);
    });
  }
  // use(projection, its first column, columns, place in this thread's sums) for each tile of `own`.
  template <class Use> void each_tile(Range own, const Use& use) const {
    for (int64_t i = own.begin; i < own.end; ++i) {
      const Projection& of = a.of[i >= tiles(0)];
      const int64_t j = (i - (i >= tiles(0) ? tiles(0) : 0)) * kTile;
      use(of, j, min64(kTile, of.columns - j), (i - own.begin) * kTile);
    }
  }
};

}}}  // namespace seqkern::SK_NS
