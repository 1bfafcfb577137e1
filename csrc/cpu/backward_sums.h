// What backward sums over the rows of a chunk: the gradients of the weights, dgates^T [x, h], of the biases, and dx; and
// the memory that a call works in.
#pragma once
#include "../core/cells.h"
#include "direct.h"
#include "options.h"

namespace seqkern { namespace SK_NS { namespace {

template <class C, class S> struct BackwardSums {
  using Acc = typename AccOf<S>::Type;
  using A = typename OperandOf<S>::Type;
  using V = Pack<Acc>;
  static constexpr int kWidth = V::kWidth, kColumns = kWide * kWidth, kTile = tile_rows(kWide);
  static constexpr int kSkip = C::kGrads - C::kGates;  // where the columns of the hidden side begin
  static constexpr int kLeft = 8;  // tile rows, padded to what one load takes
  static constexpr int kBiasChains = 4;
  static constexpr int64_t kChunkRows = 256, kPanelBlock = (kParts<S> ? 1024 : 512) << 10;
  using Part = typename PartOf<S>::Type;
  static_assert(kTile <= kLeft);

  const LayerArgs& a;
  int64_t units, outs, ins, ldg, ldp, carry_ld, old_ld, chunk, chunk_rows, left_ld;
  // Whether the tile unit multiplies: the steps' products, and those over the rows of a chunk.
  bool tiles_h, tiles_sum;

  struct Shared {  // by the threads of a direction
    Panels<S> w_hh, w_ih, w_hr;  // right-hand sides [G*H, P], [G*H, I], [P, H]
    Rows<S> grads[2];            // [chunk_rows][ldg] gate gradients, columns as the cell orders them
    Rows<S> dp[2];               // [chunk_rows][ldp] d(loss)/dh of a projected output
    Rows<S> grads_sum[2], dp_sum[2];  // the same in the form that sums take, where that is another
    Panels<S> x, h, u;           // [rows of the chunk, I], [.., P], [.., H] (unprojected output): sums of dW
    Acc* carry;                  // [B][carry_ld]
    Acc* old;                    // [B][old_ld] zoneout: the gradient that goes past the cell; the carry where that is of h
    Acc *dw_ih, *dw_hh, *db_ih, *db_hh, *dw_hr;
  };
  struct Own {
    A* left;         // one tile's columns of the gate gradients: [chunk_rows / kPair][kLeft][kPair], or
    Rows<S> columns;  // for the tile unit, [32][left_ld]
    Acc* pair;       // [2][units * kColumns] two rows of unprojected outputs
    Acc* entering;   // [2][outs * kColumns] two rows of h as it went into the product, where options change it
  };

  explicit BackwardSums(const LayerArgs& args) : a(args) {
    units = ceil_div(a.hidden, kColumns);
    outs = ceil_div(a.output, kColumns);
    ins = ceil_div(a.input, kColumns);
    ldg = ceil_div(C::kGrads * a.hidden + kWidth, 32) * 32 + 32;
    ldp = ceil_div(outs * kColumns, 32) * 32 + 32;
    carry_ld = units * kColumns;
    old_ld = outs * kColumns;
    chunk = min64(a.steps, max64(1, kChunkRows / max64(1, a.batch)));
    chunk_rows = chunk * a.batch;
    left_ld = ceil_div(chunk_rows, 32) * 32 + 32;
    tiles_h = use_tiles<S>(Member::most_rows(a));
    tiles_sum = tiles_h || use_tiles<S>(chunk_rows);
  }
  bool projected() const { return a.weights[0].w_hr != nullptr; }
  bool sums() const { return a.dweights[0].w_ih != nullptr; }
  // float and double sums go straight to the output; 16-bit ones need a wider place first.
  static constexpr bool kDirectSums = sizeof(S) == sizeof(Acc);

  Shared shared(Arena& m) const {
    Shared s{};
    const bool split = tiles_sum && !tiles_h;
    s.w_hh = m.panels<S>(outs, C::kGates * a.hidden, kWide, tiles_h);
    s.w_ih = m.panels<S>(a.dx ? ins : 0, C::kGates * a.hidden, kWide, tiles_sum);
    s.w_hr = m.panels<S>(projected() ? units : 0, a.output, kWide, tiles_h);
    for (int i = 0; i < 2; ++i) {
      s.grads[i] = m.rows<S>(chunk_rows, ldg, tiles_h);
      s.dp[i] = m.rows<S>(projected() ? chunk_rows : 0, ldp, tiles_h);
      s.grads_sum[i] = split ? m.rows<S>(chunk_rows, ldg, true) : s.grads[i];
      s.dp_sum[i] = split ? m.rows<S>(projected() ? chunk_rows : 0, ldp, true) : s.dp[i];
    }
    s.x = m.panels<S>(sums() ? ins : 0, chunk_rows, kWide, tiles_sum);
    s.h = m.panels<S>(sums() ? outs : 0, chunk_rows, kWide, tiles_sum);
    s.u = m.panels<S>(sums() && projected() ? units : 0, chunk_rows, kWide, tiles_sum);
    s.carry = m.take<Acc>(C::kCarry == Carry::kNone ? 0 : a.batch * carry_ld);
    s.old = C::kCarry == Carry::kHidden ? s.carry : m.take<Acc>(a.options.zone_h ? a.batch * old_ld : 0);
    const int64_t n = sums() && !kDirectSums ? C::kGates * a.hidden : 0;
    s.dw_ih = m.take<Acc>(n * a.input);
    s.dw_hh = m.take<Acc>(n * a.output);
    s.db_ih = m.take<Acc>(n);
    s.db_hh = m.take<Acc>(n);
    s.dw_hr = m.take<Acc>(n && projected() ? a.output * a.hidden : 0);
    return s;
  }
  Own own(Arena& m) const {
    Own o;
    o.left = m.take<A>(tiles_sum ? 0 : ceil_div(chunk_rows, kPair<A>) * kLeft * kPair<A>);
    o.columns = m.rows<S>(tiles_sum ? kTilePad : 0, left_ld, tiles_sum);
    o.pair = m.take<Acc>(projected() ? 2 * units * kColumns : 0);
    o.entering = m.take<Acc>(a.options.any ? 2 * outs * kColumns : 0);
    return o;
  }
  // The second direction's dx, where both directions run at once.
  S* second_dx(Arena& m) const { return m.take<S>(a.dx && a.plan.directions == 2 ? a.rows * a.input : 0); }

  struct Chunk {
    int64_t first, last;  // steps, counted in backward's order
    int64_t time;         // the earliest
    int64_t base, rows;   // rows of the whole sequence
    int buffer;
  };

  // Right-hand sides of the weight sums, this thread's share of the chunk's rows: x, the state that each step read,
  // and what the projection multiplied.
  void gather(const Member& me, const Direction& dir, const Shared& s, const Own& o, const Chunk& c) const {
    const Range blocks = part(ceil_div(c.rows, kTileK), me.in_direction(), me.direction_size());
    const int64_t begin = blocks.begin * kTileK, end = min64(blocks.end * kTileK, c.rows);
    if (begin >= end) return;
    int64_t t = c.time;
    const auto row_of = [&](int64_t k) {  // of the batch, at step t; k goes up
      while (a.starts[t + 1] <= c.base + k) ++t;
      return c.base + k - a.starts[t];
    };
    pack_rows(in_chunk(s.x, c), 0, ins, a.input, begin, end, [&](int64_t k) {
      const int64_t b = row_of(k);
      return (const S*)at<const S>(a.x, a, t, b);
    });
    t = c.time;
    if (a.options.any)
      pack_rows(in_chunk(s.h, c), 0, outs, outs * kColumns, begin, end, [&](int64_t k) {
        const int64_t b = row_of(k);
        return compute_entering(dir, t, b, o.entering + k % 2 * outs * kColumns);
      });
    else
      pack_rows(in_chunk(s.h, c), 0, outs, a.output, begin, end, [&](int64_t k) {
        const int64_t b = row_of(k);
        return dir.previous_output<S>(t, b);
      });
    if (!projected()) return;
    t = c.time;
    pack_rows(in_chunk(s.u, c), 0, units, units * kColumns, begin, end, [&](int64_t k) {
      const int64_t b = row_of(k);
      return compute_unprojected(dir, t, b, o.pair + k % 2 * units * kColumns);
    });
  }
  // Panels over the rows of this chunk; another may have more.
  static Panels<S> in_chunk(Panels<S> p, const Chunk& c) {
    p.k = c.rows;
    return p;
  }
  // Gate gradients of rows [b0, b1) in the form that the sums and dx take, this thread's share of the chunk's steps.
  void split(const Member& me, const Direction& dir, const Shared& s, const Chunk& c, int64_t b0, int64_t b1) const {
    const Range steps = part(c.last - c.first, me.unit_part, a.plan.units);
    const auto copy = [&](const Rows<S>& from, const Rows<S>& to, int64_t r, int64_t n) {
      for (int64_t j = 0; j < n; j += kWidth) to.put(load(from.plain(r) + j, n - j), r, j);
    };
    for (int64_t i = steps.begin; i < steps.end; ++i) {
      const int64_t t = dir.time(a.steps - 1 - (c.first + i));
      for (int64_t b = b0; b < min64(b1, a.sizes[t]); ++b) {
        copy(s.grads[c.buffer], s.grads_sum[c.buffer], a.starts[t] + b - c.base, C::kGrads * a.hidden);
        if (projected()) copy(s.dp[c.buffer], s.dp_sum[c.buffer], a.starts[t] + b - c.base, a.output);
      }
    }
  }
  // h as it went into the product of step t.
  const Acc* compute_entering(const Direction& dir, int64_t t, int64_t b, Acc* to) const {
    const S* h = dir.previous_output<const S>(t, b);
    const OptionMath<S> math(a, dir.d);
    for (int64_t j = 0; j < outs * kColumns; j += kWidth) {
      const int64_t lanes = a.output - j;
      store(h && lanes > 0 ? math.entering(load(h + j, lanes), t, b, j, lanes) : V(0), to + j);
    }
    return to;
  }
  template <class Cell = C> auto unprojected(const V* saved) const -> decltype(Cell::unprojected(*(V(*)[5])saved)) {
    return Cell::unprojected(*(V(*)[5])saved);
  }
  V unprojected(...) const { return V(0); }  // cells without a projection never get here
  const Acc* compute_unprojected(const Direction& dir, int64_t t, int64_t b, Acc* u) const {
    const S* keep = dir.reserve<const S, C::kSaved>(t, b);
    for (int64_t j = 0; j < units * kColumns; j += kWidth) {
      const int64_t lanes = a.hidden - j;
      V saved[5];
      for (int q = 0; q < C::kSaved; ++q) saved[q] = lanes > 0 ? load(keep + q * a.hidden + j, lanes) : V(0);
      store(lanes > 0 ? unprojected((const V*)saved) : V(0), u + j);
    }
    return u;
  }

  void input_gradient(const Member& me, const Shared& s, const Chunk& c, S* dx, bool add) const {
    const Range r = part(c.rows, me.in_direction(), me.direction_size());
    multiply<kWide>(s.grads_sum[c.buffer].at(r.begin), r.end - r.begin, s.w_ih, 0, ins,
                    (const Acc*)nullptr, [&](int64_t panel, int64_t r0, int rows, const Acc* t) {
                      for (int i = 0; i < rows; ++i)
                        for (int v = 0; v < kWide; ++v) {
                          const int64_t j = panel * kColumns + v * kWidth, lanes = a.input - j;
                          if (lanes <= 0) break;
                          S* to = dx + (c.base + r.begin + r0 + i) * a.input + j;
                          V sum = load(t + i * kColumns + v * kWidth);
                          if (add) sum = sum + load(to, lanes);
                          store(sum, to, lanes);
                        }
                    });
  }

  int64_t left_rows() const { return tiles_sum ? kTilePad : kTile; }
  // Columns [m, m + rows) of `from`, transposed for the left-hand side of a sum over n rows.
  void take_columns(const Own& o, const Rows<S>& from, int64_t m, int rows, int64_t n) const {
    constexpr int kP = kPair<A>;
#ifdef SK_AMX
    if constexpr (kParts<S> > 0)
      if (tiles_sum) {
        for (int i = 0; i < rows; i += kTileRows)
          transpose_columns<kParts<S>>({(const Bf16*)from.at(0, m + i).data, from.row(), from.ld}, n,
                                       (Bf16*)o.columns.at(i).data, o.columns.row(), left_ld);
        return;
      }
#endif
    const A* first = from.plain(0) + m;
    if (kP == 1) {
      for (int64_t k = 0; k < n; ++k)  // the lanes past `rows` are not read
        for (int r = 0; r < kLeft; ++r) o.left[k * kLeft + r] = first[k * from.ld + r];
      return;
    }
#ifdef SK_BF16_DOT
    if constexpr (kP == 2) {  // the lanes past `rows` are not read
      for (int64_t k = 0; k < n; k += 2) {
        const __m128i even = _mm_loadu_si128((const __m128i*)(first + k * from.ld));
        const __m128i odd = k + 1 < n ? _mm_loadu_si128((const __m128i*)(first + (k + 1) * from.ld)) : _mm_setzero_si128();
        _mm_storeu_si128((__m128i*)(o.left + k * kLeft), _mm_unpacklo_epi16(even, odd));
        _mm_storeu_si128((__m128i*)(o.left + k * kLeft + 8), _mm_unpackhi_epi16(even, odd));
      }
      return;
    }
#endif
    for (int64_t k = 0; k < ceil_div(n, kP); ++k)
      for (int r = 0; r < rows; ++r)
        for (int h = 0; h < kP; ++h)
          o.left[(k * kLeft + r) * kP + h] = k * kP + h < n ? first[(k * kP + h) * from.ld + r] : A{};
  }
  // to [rows][n] (+)= left^T B for the panels p; the first chunk sets, the others add.
  void sum_tile(const Own& o, int rows, const Panels<S>& b, Range p, int64_t n, Acc* to, bool first_chunk) const {
    alignas(64) Acc c[(kParts<S> ? kTilePad : kTile) * kColumns];
    for (int64_t q = p.begin; q < p.end; ++q) {
#ifdef SK_AMX
      if constexpr (kParts<S> > 0) {
        if (tiles_sum)
          tile_product<kParts<S>, kWide>({(const Bf16*)o.columns.data, o.columns.row(), left_ld}, rows,
                                         b.tile_panel(q), nullptr, c, [] {});
      }
#endif
      if (!tiles_sum)
        tile_any<kWide>(rows, TileArgs<A>{{o.left, kPair<A>, kLeft * kPair<A>}, b.panel(q), b.pairs(), nullptr, c, false});
      for (int r = 0; r < rows; ++r)
        for (int v = 0; v < kWide; ++v) {
          const int64_t j = q * kColumns + v * kWidth, lanes = n - j;
          if (lanes <= 0) break;
          V sum = load(c + r * kColumns + v * kWidth);
          if (!first_chunk) sum = sum + load(to + r * n + j, lanes);
          store(sum, to + r * n + j, lanes);
        }
    }
  }
  // One matrix of weight gradients, and its bias. Its rows come from groups of gradient columns, one per gate.
  struct Sum {
    Panels<S> b;        // right-hand side
    int64_t n;          // columns of `to`
    Acc *to, *bias;     // bias: null where there is none
    int first, groups;  // of columns
    const int* gate;    // of each group
  };
  // Adds the chunk's part to each matrix. The panels of the right-hand sides go in blocks that stay in L2 while all tiles
  // pass over them; a tile's columns are taken once for all matrices.
  template <int kCount>
  void sum(const Own& o, const Chunk& c, const Rows<S>& from, int64_t per_group, Range tiles, const Sum (&sums)[kCount]) const {
    int64_t panels[kCount], all = 0, bytes = 0;
    for (int m = 0; m < kCount; ++m) {
      panels[m] = ceil_div(sums[m].n, kColumns);
      all += panels[m];
      bytes += panels[m] * sums[m].b.bytes();
    }
    const int64_t blocks = ceil_div(bytes, kPanelBlock), tiles_per_group = ceil_div(per_group, left_rows());
    for (int64_t block = 0; block < blocks; ++block) {
      const Range p = part(all, int(block), int(blocks));
      for (int64_t i = tiles.begin; i < tiles.end; ++i) {
        const int64_t group = i / tiles_per_group, j = i % tiles_per_group * left_rows();
        const int rows = int(min64(left_rows(), per_group - j));
        bool taken = false;
        for (int64_t m = 0, offset = 0; m < kCount; offset += panels[m++]) {
          const Sum& s = sums[m];
          const Range own{max64(p.begin - offset, 0), min64(p.end - offset, panels[m])};
          if (own.begin >= own.end || group < s.first || group >= s.first + s.groups) continue;
          if (!taken) take_columns(o, from, group * per_group + j, rows, c.rows);
          taken = true;
          const int64_t row = s.gate[group - s.first] * per_group + j;
          sum_tile(o, rows, s.b, own, s.n, s.to + row * s.n, c.first == 0);
          if (s.bias && own.begin == 0) sum_bias(o, rows, c.rows, s.bias + row, c.first == 0);
        }
      }
    }
  }
  void sum_weights(const Member& me, const Shared& s, const Own& o, const Chunk& c, int d) const {
    const Weights& w = a.dweights[d];
    auto pick = [](void* direct, Acc* wide) { return kDirectSums ? (Acc*)direct : wide; };
    const int i = me.in_direction(), n = me.direction_size();
    const Sum gates[2] = {
        {in_chunk(s.x, c), a.input, pick(w.w_ih, s.dw_ih), w.b_ih ? pick(w.b_ih, s.db_ih) : nullptr, 0, C::kGates, C::kOrder},
        {in_chunk(s.h, c), a.output, pick(w.w_hh, s.dw_hh), w.b_hh ? pick(w.b_hh, s.db_hh) : nullptr, kSkip, C::kGates, C::kOrderH}};
    sum(o, c, s.grads_sum[c.buffer], a.hidden, part(C::kGrads * ceil_div(a.hidden, left_rows()), i, n), gates);
    if (!projected()) return;
    constexpr int kNone[1] = {0};
    const Sum output[1] = {{in_chunk(s.u, c), a.hidden, pick(w.w_hr, s.dw_hr), nullptr, 0, 1, kNone}};
    sum(o, c, s.dp_sum[c.buffer], a.output, part(ceil_div(a.output, left_rows()), i, n), output);
  }
  void sum_bias(const Own& o, int rows, int64_t n, Acc* to, bool first) const {
    if (tiles_sum) {
      for (int r0 = 0; r0 < rows; r0 += kWidth) {
        V sums[kWidth];
        for (int i = 0; i < kWidth; ++i) {
          sums[i] = V(0);
          const Part* row = (const Part*)o.columns.data + (r0 + i) * kParts<S> * left_ld;
          for (int64_t p = 0; p < kParts<S> && r0 + i < rows; ++p)
            for (int64_t k = 0; k < n; k += kWidth) sums[i] = sums[i] + load(row + p * left_ld + k);
        }
        V sum = sum_lanes<kWidth>(sums);
        if (!first) sum = sum + load(to + r0, rows - r0);
        store(sum, to + r0, rows - r0);
      }
      return;
    }
    // Lane i of a row of vectors: column i % kLeft of the tile, at every k that is i / kLeft more than a multiple.
    constexpr int kP = kPair<A>, kLanes = kWidth > kLeft ? kWidth : kLeft, kTake = kLanes / kWidth, kSteps = kLanes / kLeft;
    A ones[kP];
    for (int h = 0; h < kP; ++h) convert(1.f, ones[h]);
    V sums[kBiasChains][kTake];
    for (int i = 0; i < kBiasChains; ++i)
      for (int v = 0; v < kTake; ++v) sums[i][v] = V(0);
    const int64_t pairs = ceil_div(n, kP), most = pairs / (kBiasChains * kSteps) * (kBiasChains * kSteps);
    for (int64_t k = 0; k < most; k += kBiasChains * kSteps)
      for (int i = 0; i < kBiasChains; ++i)
        for (int v = 0; v < kTake; ++v)
          multiply_add(sums[i][v], ones, o.left + ((k + i * kSteps) * kLeft + v * kWidth) * kP);
    for (int i = 1; i < kBiasChains; ++i)
      for (int v = 0; v < kTake; ++v) sums[0][v] = sums[0][v] + sums[i][v];
    Acc lanes[kLanes];
    for (int v = 0; v < kTake; ++v) store(sums[0][v], lanes + v * kWidth);
    for (int r = 0; r < rows; ++r) {
      Acc sum = lanes[r];
      for (int i = 1; i < kSteps; ++i) sum += lanes[i * kLeft + r];
      for (int64_t k = most; k < pairs; ++k)
        for (int h = 0; h < kP; ++h) sum += widen(o.left[(k * kLeft + r) * kP + h]);
      to[r] = first ? sum : to[r] + sum;
    }
  }
  void narrow_sums(const Member& me, const Shared& s, int d) const {
    const Weights& w = a.dweights[d];
    auto all = [&](const Acc* from, void* to, int64_t n) {
      const Range r = part(n, me.in_direction(), me.direction_size());
      for (int64_t i = r.begin; to && i < r.end; i += kWidth) store(load(from + i, r.end - i), (S*)to + i, r.end - i);
    };
    const int64_t rows = C::kGates * a.hidden;
    all(s.dw_ih, w.w_ih, rows * a.input);
    all(s.dw_hh, w.w_hh, rows * a.output);
    all(s.db_ih, w.b_ih, rows);
    all(s.db_hh, w.b_hh, rows);
    all(s.dw_hr, w.w_hr, a.output * a.hidden);
  }
};

}}}  // namespace seqkern::SK_NS
