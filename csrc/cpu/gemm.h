// The micro-kernel and the packing it works on. Every matrix product of a layer, forward and backward, is
//   C[rows, panel] = A[rows, K] B[K, panel]
// with B packed in panels of kVectors SIMD vectors, [panel][K][kVectors][width], so that a tile of C stays in registers
// over the whole of K. For bf16 dot products K goes in pairs: [panel][K/2][kVectors][width][2]. Where the CPU has a tile
// unit, products of enough rows go there instead, on operands in the form of tiles.h.
#pragma once
#include "tiles.h"

namespace seqkern { namespace SK_NS { namespace {

#if SK_VEC_BYTES == 64
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
constexpr int kWide = 4;  // vectors in a panel whose columns mean nothing to a cell

// Operand type A of the products for storage type S: bf16 stays bf16 where the instruction set has a dot product.
template <class S> struct OperandOf { using Type = typename AccOf<S>::Type; };
#ifdef SK_BF16_DOT
template <> struct OperandOf<Bf16> { using Type = Bf16; };
#endif
template <class A> constexpr int kPair = sizeof(A) == 2 ? 2 : 1;  // elements of K that one instruction takes

// Most rows that a tile of `vectors` columns can have, by registers: accumulators, a row of B and one broadcast of A.
// With 16 registers four vectors go in two passes of two: 6 x 2 needs 8 loads for 12 multiply-adds, 3 x 4 needs 15.
constexpr bool two_passes(int vectors) { return kRegisters == 16 && vectors == 4; }
constexpr int tile_rows(int vectors) {
  if (two_passes(vectors)) vectors = 2;
  const int rows = (kRegisters - vectors - 1) / vectors;
  return rows > 8 ? 8 : rows;
}

SK_INL void multiply_add(Pack<float>& c, const float* a, const float* b) { c.v += *a * load(b).v; }
SK_INL void multiply_add(Pack<double>& c, const double* a, const double* b) { c.v += *a * load(b).v; }
#ifdef SK_BF16_DOT
SK_INL void multiply_add(Pack<float>& c, const Bf16* a, const Bf16* b) {
  int32_t pair;
  memcpy(&pair, a, 4);
  c.v = (Pack<float>::Vec)_mm512_dpbf16_ps((__m512)c.v, (__m512bh)_mm512_set1_epi32(pair),
                                           (__m512bh)_mm512_loadu_si512(b));
}
#endif

// A[r, k] at rows + r * row + k * step (k in pairs where kPair is 2, the two elements adjacent).
template <class A> struct Left { const A* rows; int64_t row, step; };

template <class A> struct TileArgs {
  Left<A> a;
  const A* b;
  int64_t k;  // in pairs where kPair is 2
  const typename AccOf<A>::Type* init;  // [kVectors * width] added to every row, or null
  typename AccOf<A>::Type* c;           // [rows][kVectors * width], dense
  bool add;                             // to what c holds
  const A* ahead = nullptr;             // where a vector of every k of the panel after this one begins
  // With kApart: what every kApart-th vector of columns holds after the first `split` of k goes to `apart`, which is like
  // c, and it begins again at `then`, which is like init.
  int64_t split = 0;
  const typename AccOf<A>::Type* then = nullptr;
  typename AccOf<A>::Type* apart = nullptr;
};

// Vectors kFirst to kFirst + kTake of the columns.
// kSame: a row's sums do not depend on how many rows there are.
template <int kRows, int kVectors, bool kSame, int kFirst = 0, int kTake = kVectors, int kApart = 0, class A>
void tile(const TileArgs<A>& t) {
  static_assert(!kApart || kTake == kVectors);
  using Acc = typename AccOf<A>::Type;
  using V = Pack<Acc>;
  constexpr int kColumns = kVectors * V::kWidth;
  // One row has too few independent sums to keep the multipliers busy: even and odd k are summed apart.
  constexpr int kChains = kRows == 1 && !kSame ? 2 : 1;
  V c[kChains][kRows][kTake];
  for (int v = 0; v < kTake; ++v) {
    V first = t.init ? load(t.init + (kFirst + v) * V::kWidth) : V(0);
    for (int r = 0; r < kRows; ++r) {
      c[0][r][v] = first;
      if (kChains == 2) c[kChains - 1][r][v] = V(0);
    }
  }
  const A* a = t.a.rows;
  const A* b = t.b + kFirst * V::kWidth * kPair<A>;
  const int64_t row = t.a.row, step = t.a.step;
  const auto add = [&](int64_t k) __attribute__((always_inline)) {
    if (kChains == 2) {
      for (; k >= 2; k -= 2, a += 2 * step, b += 2 * kColumns * kPair<A>)
        for (int half = 0; half < 2; ++half)
          for (int v = 0; v < kTake; ++v)
            multiply_add(c[half][0][v], a + half * step, b + (half * kColumns + v * V::kWidth) * kPair<A>);
    }
    if (kSame && t.ahead)
      for (const A* ahead = t.ahead; k > 0; --k, a += step, b += kColumns * kPair<A>, ahead += kColumns * kPair<A>) {
        __builtin_prefetch(ahead, 0, 2);
        for (int r = 0; r < kRows; ++r)
          for (int v = 0; v < kTake; ++v) multiply_add(c[0][r][v], a + r * row, b + v * V::kWidth * kPair<A>);
      }
    for (; k > 0; --k, a += step, b += kColumns * kPair<A>) {
      // One page of B ahead, at whose end the hardware's prefetcher stops: worth 8 % where B comes from the outer cache.
      for (int v = 0; v < kTake; ++v) __builtin_prefetch(b + (16 * kVectors + v) * V::kWidth * kPair<A>);
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kTake; ++v) multiply_add(c[0][r][v], a + r * row, b + v * V::kWidth * kPair<A>);
    }
  };
  add(kApart ? t.split : t.k);
  if constexpr (kApart > 0) {
    for (int r = 0; r < kRows; ++r)
      for (int v = kApart - 1; v < kTake; v += kApart) {
        store(kChains == 2 ? c[0][r][v] + c[kChains - 1][r][v] : c[0][r][v], t.apart + r * kColumns + v * V::kWidth);
        c[0][r][v] = load(t.then + v * V::kWidth);
        if (kChains == 2) c[kChains - 1][r][v] = V(0);
      }
    add(t.k - t.split);
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kTake; ++v) {
      V sum = kChains == 2 ? c[0][r][v] + c[kChains - 1][r][v] : c[0][r][v];
      Acc* to = t.c + r * kColumns + (kFirst + v) * V::kWidth;
      store(t.add ? load(to) + sum : sum, to);
    }
}

template <int kRows, int kVectors, bool kSame, int kApart = 0, class A> SK_INL void tile_passes(const TileArgs<A>& t) {
  if constexpr (kRows > tile_rows(kVectors)) {
    __builtin_unreachable();
  } else if constexpr (kApart > 0) {
    tile<kRows, kVectors, kSame, 0, kVectors, kApart>(t);
  } else if constexpr (two_passes(kVectors) && kRows > 3) {
    tile<kRows, kVectors, kSame, 0, 2>(t);
    tile<kRows, kVectors, kSame, 2, 2>(t);
  } else {
    tile<kRows, kVectors, kSame>(t);
  }
}
template <int kVectors, bool kSame, int kApart = 0, class A> SK_INL void tile_rows_of(int rows, const TileArgs<A>& t) {
  switch (rows) {
    case 1: return tile_passes<1, kVectors, kSame, kApart>(t);
    case 2: return tile_passes<2, kVectors, kSame, kApart>(t);
    case 3: return tile_passes<3, kVectors, kSame, kApart>(t);
    case 4: return tile_passes<4, kVectors, kSame, kApart>(t);
    case 5: return tile_passes<5, kVectors, kSame, kApart>(t);
    case 6: return tile_passes<6, kVectors, kSame, kApart>(t);
    case 7: return tile_passes<7, kVectors, kSame, kApart>(t);
    case 8: return tile_passes<8, kVectors, kSame, kApart>(t);
  }
}
// A long K is summed in blocks: the rounding error of a sum grows with the length of its chain of additions. Who
// asks for double wants it small.
template <class A> constexpr int64_t kLongest = sizeof(A) == 8 ? 64 : 256;
template <int kVectors, bool kSame = false, class A> __attribute__((noinline)) void tile_any(int rows, const TileArgs<A>& t) {
  if (t.k <= kLongest<A> * 3 / 2) return tile_rows_of<kVectors, kSame>(rows, t);
  const int64_t blocks = (t.k + kLongest<A> - 1) / kLongest<A>;
  constexpr int64_t kRow = kVectors * Pack<typename AccOf<A>::Type>::kWidth * kPair<A>;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t k0 = t.k * i / blocks, k1 = t.k * (i + 1) / blocks;
    Left<A> a{t.a.rows + k0 * t.a.step, t.a.row, t.a.step};
    tile_rows_of<kVectors, kSame>(rows, TileArgs<A>{a, t.b + k0 * kRow, k1 - k0, i ? nullptr : t.init, t.c, t.add || i > 0, t.ahead ? t.ahead + k0 * kRow : nullptr});
  }
}

// With every kApart-th vector's sum of the first `split` of k apart.
template <int kVectors, int kApart, class A> __attribute__((noinline)) void tile_apart(int rows, TileArgs<A> t) {
  if (t.k <= kLongest<A> * 3 / 2) return tile_rows_of<kVectors, false, kApart>(rows, t);
  using V = Pack<typename AccOf<A>::Type>;
  constexpr int kColumns = kVectors * V::kWidth;
  const int64_t k = t.k;
  t.k = t.split;
  tile_any<kVectors>(rows, t);
  for (int r = 0; r < rows; ++r)
    for (int v = kApart - 1; v < kVectors; v += kApart) {
      typename AccOf<A>::Type* c = t.c + r * kColumns + v * V::kWidth;
      store(load(c), t.apart + r * kColumns + v * V::kWidth);
      store(load(t.then + v * V::kWidth), c);
    }
  t.a.rows += t.split * t.a.step;
  t.b += t.split * kColumns * kPair<A>;
  t.k = k - t.split;
  t.init = nullptr;
  t.add = true;
  tile_any<kVectors>(rows, t);
}

// A matrix whose rows are left-hand operands: [row][ld] of A for the vector unit, [row][part][ld] for the tile unit,
// which reads whole tiles: kTilePad rows more than there are must be readable.
constexpr int64_t kTilePad = 32;
template <class S> struct Rows {
  using A = typename OperandOf<S>::Type;
  using V = Pack<typename AccOf<S>::Type>;
  char* data;
  int64_t ld;
  bool tiles;
  static int64_t element_bytes(bool tiles) { return tiles ? 2 : int64_t(sizeof(A)); }
  SK_INL int64_t row() const { return tiles ? kParts<S> * ld : ld; }
  SK_INL Rows at(int64_t r, int64_t column = 0) const {
    return {data + (r * row() + column) * element_bytes(tiles), ld, tiles};
  }
  SK_INL A* plain(int64_t r) const { return (A*)data + r * ld; }
  SK_INL void put(V x, int64_t r, int64_t j, int64_t lanes = V::kWidth) const {
#ifdef SK_AMX
    if constexpr (kParts<S> > 0) {
      if (tiles) {
        Bf16* to = (Bf16*)data + r * row() + j;
        if (lanes >= V::kWidth) return store_parts<kParts<S>>(x, to, ld);
        for (int p = 0; p < kParts<S>; ++p) {
          U16s words = take_part<kParts<S>>(x);
          memcpy(to + p * ld, &words, lanes * 2);
        }
        return;
      }
    }
#endif
    store(x, plain(r) + j, lanes);
  }
  // Zeroes the columns from j on of rows [begin, end).
  void clear(int64_t begin, int64_t end, int64_t j) const {
    for (int64_t r = begin; r < end; ++r)
      for (int p = 0; p < (tiles ? kParts<S> : 1); ++p)
        memset(data + (r * row() + p * ld + j) * element_bytes(tiles), 0, (ld - j) * element_bytes(tiles));
  }
};

// Packed right-hand side [k, columns], columns padded with zeros to whole panels and k to pairs or to blocks of tiles.
template <class S> struct Panels {
  using A = typename OperandOf<S>::Type;
  static constexpr int kWidth = Pack<typename AccOf<S>::Type>::kWidth;
  char* data;
  int64_t k;
  int vectors;
  bool tiles;
  int64_t stretch;  // of the tile unit's blocks
  SK_INL int64_t pairs() const { return (k + kPair<A> - 1) / kPair<A>; }
  SK_INL int64_t vector_bytes() const {
    return tiles ? tile_blocks(k) * kParts<S> * kTileSize * 2 : pairs() * kWidth * kPair<A> * int64_t(sizeof(A));
  }
  SK_INL int64_t bytes() const { return vectors * vector_bytes(); }  // of a panel
  SK_INL A* panel(int64_t p) const { return (A*)(data + p * bytes()); }
#ifdef SK_AMX
  SK_INL TilePanel<kParts<S>> tile_panel(int64_t p) const { return {(Bf16*)(data + p * bytes()), tile_blocks(k), stretch, vectors}; }
#endif
};

// C = A B over `rows` rows and the panels [first, last_panel); done(panel, row, rows, tile) is called for each tile, whose
// values stand dense in L1. The vector unit's rows are cut evenly: 8 rows are 4 + 4, not 6 + 2.
// back: the last panel first. A product that is done at every step turns at each: the panels with which one step ends are
// those that an inner cache still holds when the next begins.
template <int kVectors, bool kSame = false, class S, class Done>
SK_INL void multiply(const Rows<S>& a, int64_t rows, const Panels<S>& b, int64_t first, int64_t last_panel,
                     const typename AccOf<S>::Type* init, const Done& done, bool back = false) {
  using A = typename OperandOf<S>::Type;
  using Acc = typename AccOf<S>::Type;
  constexpr int kColumns = kVectors * Pack<Acc>::kWidth;
  constexpr int kMost = tile_rows(kVectors);
  if (rows <= 0) return;
  const int64_t ends = first + last_panel - 1;
  const auto begin = [&](int64_t p) { return init ? init + p * kColumns : nullptr; };
#ifdef SK_AMX
  if constexpr (kParts<S> > 0) {
    if (b.tiles) {
      // While a tile is multiplied, done() runs over the rows of the tile before.
      alignas(64) Acc c[2][kTilePad * kColumns];
      struct { int64_t panel, row, at, rows, each; const Acc* c; } last{0, 0, 0, 0, 0, nullptr};
      const auto aside = [&] {
        for (int64_t i = 0; i < last.each && last.at < last.rows; ++i, ++last.at)
          done(last.panel, last.row + last.at, 1, last.c + last.at * kColumns);
      };
      int turn = 0;
      for (int64_t q = first; q < last_panel; ++q)
        for (int64_t r = 0; r < rows; r += kTilePad, turn ^= 1) {
          const int64_t p = back ? ends - q : q;
          const int64_t n = rows - r < kTilePad ? rows - r : kTilePad;
          const TileLeft left{(const Bf16*)a.data + r * a.row(), a.row(), a.ld};
          const int64_t pauses = tile_pauses<kParts<S>>(n, tile_blocks(b.k));
          last.each = (last.rows + pauses - 1) / pauses;
          tile_product<kParts<S>, kVectors>(left, n, b.tile_panel(p), begin(p), c[turn], aside);
          last = {p, r, 0, n, n, c[turn]};
        }
      aside();
      return;
    }
  }
#endif
  const int64_t tiles = (rows + kMost - 1) / kMost;
  alignas(64) Acc c[kMost * kColumns];
  for (int64_t q = first; q < last_panel; ++q)
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t p = back ? ends - q : q;
      const int64_t r0 = rows * i / tiles, r1 = rows * (i + 1) / tiles;
      // The tiles of a panel bring in the next one, a vector of each k each: only the first would wait for it otherwise.
      const A* ahead = kSame && tiles > 1 && i < kVectors && q + 1 < last_panel ? b.panel(back ? p - 1 : p + 1) + i * b.kWidth * kPair<A> : nullptr;
      tile_any<kVectors, kSame>(int(r1 - r0), TileArgs<A>{{a.plain(r0), a.ld, kPair<A>}, b.panel(p), b.pairs(), begin(p), c, false, ahead});
      done(p, r0, int(r1 - r0), c);
    }
}

// The same where every kApart-th vector's sums of the first `split` rows of B (an even number) stay apart from those of
// the others, which begin at `then`; done(panel, row, rows, tile, apart). Not for the tile unit.
template <int kVectors, int kApart, class S, class Done>
SK_INL void multiply_apart(const Rows<S>& a, int64_t rows, const Panels<S>& b, int64_t split, int64_t first,
                           int64_t last_panel, const typename AccOf<S>::Type* init, const typename AccOf<S>::Type* then,
                           const Done& done, bool back = false) {
  using A = typename OperandOf<S>::Type;
  using Acc = typename AccOf<S>::Type;
  constexpr int kColumns = kVectors * Pack<Acc>::kWidth, kMost = tile_rows(kVectors);
  const int64_t tiles = (rows + kMost - 1) / kMost;
  alignas(64) Acc c[kMost * kColumns], apart[kMost * kColumns];
  for (int64_t q = first; q < last_panel; ++q)
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t p = back ? first + last_panel - 1 - q : q;
      const int64_t r0 = rows * i / tiles, r1 = rows * (i + 1) / tiles;
      TileArgs<A> t{{a.plain(r0), a.ld, kPair<A>}, b.panel(p), b.pairs(), init + p * kColumns, c, false};
      t.split = split / kPair<A>;
      t.then = then + p * kColumns;
      t.apart = apart;
      tile_apart<kVectors, kApart>(int(r1 - r0), t);
      done(p, r0, int(r1 - r0), c, apart);
    }
}

// ---- packing -----------------------------------------------------------------------------------------------------

SK_INL void convert(float x, float& y) { y = x; }
SK_INL void convert(double x, double& y) { y = x; }
SK_INL void convert(Bf16 x, Bf16& y) { y = x; }
SK_INL void convert(Bf16 x, float& y) { y = float_of(x); }
SK_INL void convert(F16 x, float& y) { y = float_of(x); }
SK_INL void convert(float x, Bf16& y) { y = bf16_of(x); }

// Row r of `to` from n elements (none where `from` is null), the rest of it zeros.
template <class S> SK_INL void copy_row(const S* from, const Rows<S>& to, int64_t r, int64_t n) {
  using V = typename Rows<S>::V;
  if (!from) n = 0;
  int64_t i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth) to.put(load(from + i), r, i);
  if (i < n) to.put(load(from + i, n - i), r, i, n - i);
  to.clear(r, r + 1, n);
}

// One vector's worth of columns of panel `to` (already offset to that vector): column i is the row of `w` that starts
// at w + i * ld, for i < n; K elements each. The matrix is transposed on the way, 16 by 16, so that reads stay in L1.
template <class S, class A>
SK_INL void pack_transposed(const S* w, int64_t ld, int64_t n, int64_t k, A* to, int64_t columns) {
  constexpr int kWidth = Pack<typename AccOf<A>::Type>::kWidth, kP = kPair<A>;
  const int64_t padded = (k + kP - 1) / kP * kP;
  for (int64_t k0 = 0; k0 < padded; k0 += 16) {
#if SK_VEC_BYTES == 64
    if constexpr (sizeof(A) == 4 && kP == 1) {
      __m512i block[16];
      for (int64_t i = 0; i < 16; ++i)
        block[i] = i < n ? (__m512i)load(w + i * ld + k0, k - k0).v : _mm512_setzero_si512();
      transpose(block);
      for (int64_t kk = 0; kk < 16 && k0 + kk < k; ++kk) _mm512_storeu_si512(to + (k0 + kk) * columns, block[kk]);
      continue;
    }
#ifdef SK_BF16_DOT
    if constexpr (sizeof(S) == 2 && kP == 2) {  // a pair is an element of 32 bits
      if (k0 % 32) continue;
      __m512i block[16];
      const int64_t left = k - k0;
      const __mmask32 there = left >= 32 ? ~__mmask32(0) : (__mmask32(1) << left) - 1;
      for (int64_t i = 0; i < 16; ++i)
        block[i] = i < n ? _mm512_maskz_loadu_epi16(there, w + i * ld + k0) : _mm512_setzero_si512();
      transpose(block);
      for (int64_t kk = 0; kk < 16 && k0 + 2 * kk < k; ++kk) _mm512_storeu_si512(to + (k0 / 2 + kk) * columns * 2, block[kk]);
      continue;
    }
#endif
#endif
#if SK_VEC_BYTES == 32
    if constexpr (sizeof(A) == 4) {
      for (int64_t k1 = k0; k1 < k0 + 16 && k1 < k; k1 += 8) {
        __m256 block[8];
        for (int64_t i = 0; i < 8; ++i)
          block[i] = i < n ? (__m256)load(w + i * ld + k1, k - k1).v : _mm256_setzero_ps();
        transpose(block);
        for (int64_t kk = 0; kk < 8 && k1 + kk < k; ++kk) _mm256_storeu_ps((float*)to + (k1 + kk) * columns, block[kk]);
      }
      continue;
    }
#endif
    const int64_t k1 = k0 + 16 < padded ? k0 + 16 : padded;
    for (int64_t kk = k0; kk < k1; kk += kP)
      for (int64_t i = 0; i < kWidth; ++i)
        for (int h = 0; h < kP; ++h) {
          A& cell = to[(kk / kP) * columns * kP + i * kP + h];
          if (i < n && kk + h < k) convert(w[i * ld + kk + h], cell); else cell = A{};
        }
  }
}
// Vector v of panel p of `to`: column i is the row of w at w + i * ld, for i < n; k elements of it, in the panel's rows
// from `at`. The tile unit's panels are packed as a whole.
template <class S>
SK_INL void pack_columns(const S* w, int64_t ld, int64_t n, const Panels<S>& to, int64_t p, int v, int64_t at, int64_t k) {
#ifdef SK_AMX
  if constexpr (kParts<S> > 0)
    if (to.tiles) return pack_tile_columns(w, ld, n, to.k, v, to.tile_panel(p));
#endif
  using A = typename OperandOf<S>::Type;
  const int64_t columns = int64_t(to.vectors) * to.kWidth;
  pack_transposed(w, ld, n, k, to.panel(p) + at * columns + v * to.kWidth * kPair<A>, columns);
}
template <class S> SK_INL void pack_columns(const S* w, int64_t ld, int64_t n, const Panels<S>& to, int64_t p, int v) {
  pack_columns(w, ld, n, to, p, v, 0, to.k);
}

// Row k of a panel from `columns` consecutive elements (n of them there, the rest zero).
template <class S, class A>
SK_INL void pack_row(const S* from, int64_t n, int64_t k, A* panel, int64_t columns) {
  constexpr int kP = kPair<A>;
  A* to = panel + (k / kP) * columns * kP + k % kP;
  if (!from || n < 0) n = 0;
  if (n > columns) n = columns;
  for (int64_t i = 0; i < n; ++i) convert(from[i], to[i * kP]);
  for (int64_t i = n; i < columns; ++i) to[i * kP] = A{};
}
// Rows [begin, end) of the panels [first, last) of `to` (begin even, end too unless it is the last row there is). at(k)
// is row k, n numbers of which those of all panels are taken, or null: zeros. Rows up to `end` rounded up to what the
// unit reads are zeros where end >= to.k.
template <class S, class At>
SK_INL void pack_rows(const Panels<S>& to, int64_t first, int64_t last, int64_t n, int64_t begin, int64_t end, const At& at) {
  using A = typename OperandOf<S>::Type;
  const int64_t columns = int64_t(to.vectors) * to.kWidth;
  decltype(at(begin)) none = nullptr;
#ifdef SK_AMX
  if constexpr (kParts<S> > 0) {
    if (to.tiles) {
      const int64_t padded = end >= to.k ? tile_blocks(to.k) * kTileK : end;
      for (int64_t k = begin; k < padded; k += 2) {
        const auto even = k < end ? at(k) : none, odd = k + 1 < end ? at(k + 1) : none;
        const auto panel = to.tile_panel(0);
        auto block = panel.block(k / kTileK);
        block.start += first * to.bytes() / 2;
        for (int64_t p = first; p < last; ++p, block.start += to.bytes() / 2)
          for (int v = 0; v < to.vectors; ++v) {
            const int64_t j = p * columns + v * to.kWidth;
            pack_tile_rows<kParts<S>>(even ? even + j : even, odd ? odd + j : odd, n - j, k, v, panel, block);
          }
      }
      return;
    }
  }
#endif
  const int64_t padded = end >= to.k ? to.pairs() * kPair<A> : end;
#ifdef SK_BF16_DOT
  if constexpr (kPair<A> == 2 && sizeof(*at(begin)) == 2) {
    for (int64_t k = begin; k < padded; k += 2) {
      const auto even = k < end ? at(k) : none, odd = k + 1 < end ? at(k + 1) : none;
      for (int64_t p = first; p < last; ++p)
        for (int v = 0; v < to.vectors; ++v) {
          const int64_t j = p * columns + v * to.kWidth, lanes = n - j;
          const __mmask16 there = lanes >= 16 ? ~__mmask16(0) : lanes > 0 ? (__mmask16(1) << lanes) - 1 : 0;
          const __m512i low = even ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, even + j)) : _mm512_setzero_si512();
          const __m512i high = odd ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, odd + j)) : _mm512_setzero_si512();
          _mm512_storeu_si512(to.panel(p) + (k / 2 * columns + v * to.kWidth) * 2,
                              _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
    return;
  }
#endif
  for (int64_t k = begin; k < padded; ++k) {
    const auto row = k < end ? at(k) : none;
    for (int64_t p = first; p < last; ++p) pack_row(row ? row + p * columns : row, n - p * columns, k, to.panel(p), columns);
  }
}

}}}  // namespace seqkern::SK_NS
