// A decoder packed for the searches: a header, then every matrix in the panels of gemm.h. The tile unit is left alone:
// a row's sums must not depend on how many rows there are, and it would take over from some number of rows on.
#pragma once
#include "../core/cells.h"
#include "../core/search_args.h"
#include "team.h"

namespace seqkern { namespace SK_NS { namespace {

// Calls use.template operator()<C>() for the cell. (No std here, hence no std::type_identity.)
template <class C> struct CellTag {
  using Type = C;
};
template <class Use> SK_INL auto with_cell(int64_t cell, const Use& use) {
  switch (Cell(cell)) {
    case Cell::kRnnTanh: return use(CellTag<RnnTanh>{});
    case Cell::kRnnRelu: return use(CellTag<RnnRelu>{});
    case Cell::kLstm: return use(CellTag<Lstm>{});
    case Cell::kGru: break;
  }
  return use(CellTag<Gru>{});
}

// What the padding columns of the output layer score: less than anything, and finite, as a difference of infinities is
// none.
constexpr float kNever = -1e30f;

template <class S> struct SearchPack {
  using V = Pack<S>;
  static constexpr int kWidth = V::kWidth;
  static constexpr int64_t kWideColumns = kWide * kWidth;

  SearchShape shape;
  int cell_vectors;         // in a panel of a cell
  int64_t panels, columns;  // of a cell, and of all its panels
  int64_t key_panels, query_panels, context_panels, pre_panels, out_panels;
  S* table;          // [V][columns]
  Panels<S> bottom;  // of the bottom layer's input, k = 0 where the table is all of it
  S* b_bottom;
  struct Layer {
    Panels<S> w_ih, w_hh;
    S *b_ih, *b_hh;
  } layers[kMaxSearchLayers];
  Panels<S> w_key, w_context, w_query, w_pre, w_out;
  S *b_key, *v, *b_pre, *b_out;
  int64_t bytes;

  SearchPack(const SearchShape& s, char* base) : shape(s) {
    cell_vectors = with_cell(s.cell, [](auto c) { return kCellVectors<typename decltype(c)::Type>; });
    const int64_t units = cell_vectors / s.gates * kWidth;
    panels = ceil_div(s.hidden, units);
    columns = panels * cell_vectors * kWidth;
    key_panels = s.keyed ? ceil_div(s.key, kWideColumns) : 0;
    context_panels = Attend(s.attend) == Attend::kNone ? 0 : ceil_div(s.pre, kWideColumns);
    query_panels = Attend(s.attend) == Attend::kAdditive ? ceil_div(s.key, kWideColumns) : 0;
    pre_panels = ceil_div(s.pre, kWideColumns);
    out_panels = ceil_div(s.vocab, kWideColumns);
    Arena m{base, kSearchHeader};
    table = m.take<S>(s.folded ? s.vocab * columns : 0);
    const int64_t k = (s.folded ? 0 : s.embed) + (s.feed ? s.pre : 0);
    bottom = m.panels<S>(k ? panels : 0, k, cell_vectors, false);
    b_bottom = m.take<S>(s.folded ? 0 : columns);
    for (int64_t i = 0; i < s.layers; ++i) {
      Layer& l = layers[i];
      l.w_ih = m.panels<S>(i ? panels : 0, s.hidden, cell_vectors, false);
      l.b_ih = m.take<S>(i ? columns : 0);
      l.w_hh = m.panels<S>(panels, s.hidden, cell_vectors, false);
      l.b_hh = m.take<S>(columns);
    }
    w_key = m.panels<S>(key_panels, s.memory, kWide, false);
    b_key = m.take<S>(key_panels * kWideColumns);
    w_context = m.panels<S>(context_panels, s.memory, kWide, false);
    w_query = m.panels<S>(query_panels, s.hidden, kWide, false);
    v = m.take<S>(query_panels * kWideColumns);
    w_pre = m.panels<S>(pre_panels, s.hidden, kWide, false);
    b_pre = m.take<S>(pre_panels * kWideColumns);
    w_out = m.panels<S>(out_panels, s.read(), kWide, false);
    b_out = m.take<S>(out_panels * kWideColumns);
    bytes = m.used;
  }

  static int64_t packed_bytes(const SearchShape& s) { return SearchPack(s, nullptr).bytes; }

  static void pack_wide(const void* w, int64_t rows, const Panels<S>& to, int64_t count, int part_of, int parts) {
    const Range p = part(count, part_of, parts);
    for (int64_t i = p.begin; i < p.end; ++i)
      for (int v = 0; v < kWide; ++v) {
        const int64_t j = i * kWideColumns + v * kWidth;
        pack_columns((const S*)w + j * to.k, to.k, max64(0, min64(kWidth, rows - j)), to, i, v);
      }
  }
  static void pack_vector(const void* from, int64_t n, S* to, int64_t size, S beyond) {
    for (int64_t i = 0; i < size; ++i) to[i] = i < n ? ((const S*)from)[i] : beyond;
  }
  // Part `i` of `n` of the work.
  static void pack(const SearchShape& s, const SearchWeights& w, char* to, int i, int n) {
    const SearchPack p(s, to);
    if (i == 0) memcpy(to, &s, sizeof s);
    with_cell(s.cell, [&](auto c) {
      using C = typename decltype(c)::Type;
      const Range r = part(p.panels, i, n);
      const auto gates = [&](const void* from, const Panels<S>& panels) {
        pack_gates<C>((const S*)from, s.hidden, panels, r.begin, r.end);
      };
      const auto bias = [&](const void* from, S* at) { pack_bias<C>((const S*)from, s.hidden, at, r.begin, r.end); };
      if (s.folded) {
        const Range tokens = part(s.vocab, i, n);
        for (int64_t t = tokens.begin; t < tokens.end; ++t)
          pack_bias<C>((const S*)w.table + t * s.gates * s.hidden, s.hidden, p.table + t * p.columns, 0, p.panels);
      } else {
        bias(w.b_ih, p.b_bottom);
      }
      if (p.bottom.k) gates(w.w_ih, p.bottom);
      const void* const* from = w.layers;
      for (int64_t l = 0; l < s.layers; ++l, from += l == 1 ? 2 : 4) {
        if (l) {
          gates(from[0], p.layers[l].w_ih);
          bias(from[2], p.layers[l].b_ih);
        }
        gates(from[l ? 1 : 0], p.layers[l].w_hh);
        bias(from[l ? 3 : 1], p.layers[l].b_hh);
      }
    });
    pack_wide(w.w_key, s.key, p.w_key, p.key_panels, i, n);
    pack_wide(w.w_context, s.pre, p.w_context, p.context_panels, i, n);
    pack_wide(w.w_query, s.key, p.w_query, p.query_panels, i, n);
    pack_wide(w.w_pre, s.pre, p.w_pre, p.pre_panels, i, n);
    pack_wide(w.w_out, s.vocab, p.w_out, p.out_panels, i, n);
    if (i) return;
    if (p.key_panels) pack_vector(w.b_key, w.b_key ? s.key : 0, p.b_key, p.key_panels * kWideColumns, S(0));
    if (p.query_panels) pack_vector(w.v, s.key, p.v, p.query_panels * kWideColumns, S(0));
    if (p.pre_panels) pack_vector(w.b_pre, s.pre, p.b_pre, p.pre_panels * kWideColumns, S(0));
    pack_vector(w.b_out, s.vocab, p.b_out, p.out_panels * kWideColumns, S(kNever));
  }
};

}}}  // namespace seqkern::SK_NS
