// Products on the tile unit (AMX): C[16, 16] += A[16, 32] B[32, 16] of bf16 numbers in one instruction, summed in float.
//
// A float is the exact sum of three bf16 numbers of eight bits each, its parts; float16 of two; bf16 is one. A product
// of two floats takes the parts' products down to 2^-16 of the largest, six of the nine: what is left out is below one
// rounding of the float product itself. An infinity times a part that is zero gives NaN: infinite inputs end as NaN.
//
// Left-hand operands stand in rows, the parts of a row one after the other (struct Rows, gemm.h). Right-hand ones stand
// in tiles [k / 2][column][2] of 1 KiB, in the order in which 32 rows of A read them: for each stretch of k that keeps
// those rows in L1, each pair of vectors of columns, block of 32 k, part and vector. As one stream they arrive from L2
// twice as fast as vector by vector: 430 against 220 GF/s of float products. What comes from further away is better read
// in one stretch (26 against 17 GB/s): between stretches the sums pass through memory, and nothing is fetched meanwhile.
#pragma once
#include "pack.h"

namespace seqkern { namespace SK_NS { namespace {

template <class S> constexpr int kParts = 0;  // 0: no tile unit, or not for this type
#ifdef SK_AMX
template <> constexpr int kParts<float> = 3;
template <> constexpr int kParts<F16> = 2;
template <> constexpr int kParts<Bf16> = 1;
#endif
template <class S> struct PartOf { using Type = Bf16; };  // double has none, and its own type stands in
template <> struct PartOf<double> { using Type = double; };
constexpr int kTileRows = 16, kTileK = 32, kTileSize = kTileRows * kTileK;

SK_INL int64_t tile_blocks(int64_t k) { return (k + kTileK - 1) / kTileK; }

// ---- parts -----------------------------------------------------------------------------------------------------------

// Takes the leading bf16 number off x, which keeps the rest; rounded only if it is to stand alone.
template <int kCount> SK_INL U16s take_part(Pack<float>& x) {
  U32s bits = (U32s)x.v;
  if (kCount == 1) {
    U16s rounded;
    store(x, (Bf16*)&rounded);
    return rounded;
  }
  x.v -= (Pack<float>::Vec)(bits & 0xffff0000u);
  return __builtin_convertvector(bits >> 16, U16s);
}
// 16 lanes of x as parts at to, to + ld, ...
template <int kCount> SK_INL void store_parts(Pack<float> x, Bf16* to, int64_t ld) {
  for (int p = 0; p < kCount; ++p) *(U16s*)(to + p * ld) = take_part<kCount>(x);
}
template <int kCount> SK_INL Pack<float> load_parts(const Bf16* from, int64_t ld) {
  Pack<float> x = load(from + (kCount - 1) * ld);
  for (int p = kCount - 2; p >= 0; --p) x = x + load(from + p * ld);
  return x;
}

#ifdef SK_AMX
// Tiles 0 to 3 sum; the others hold operands.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// While one is alive this thread's tiles are set up.
struct TileUse {
  const bool used;
  explicit TileUse(bool use) : used(use) {
    TileShapes shapes;
    if (used) asm volatile("ldtilecfg %0" : : "m"(shapes));
  }
  ~TileUse() {
    if (used) asm volatile("tilerelease" : : : "memory");
  }
};
template <int kTile> SK_INL void load_tile(const void* from, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row_bytes), "i"(kTile) : "memory");
}
template <int kTile> SK_INL void store_tile(void* to, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row_bytes), "i"(kTile) : "memory");
}
template <int kTile> SK_INL void zero_tile() { asm volatile("tilezero %%tmm%c0" : : "i"(kTile) : "memory"); }
template <int kSum, int kLeft, int kRight> SK_INL void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kLeft), "i"(kRight) : "memory");
}

struct TileLeft {
  const Bf16* rows;
  int64_t row, part;  // distance between rows, and between a row's parts
};
// The first value of a sum's 16 columns, or zero. A row distance of zero repeats it in every row.
template <int kTile> SK_INL void begin_sum(const float* init) {
  if (init) load_tile<kTile>(init, 0); else zero_tile<kTile>();
}

template <int kTile, bool kAgain> SK_INL void begin_sum(const float* init, const float* c, int64_t ldc) {
  if (kAgain) load_tile<kTile>(c, ldc * 4); else begin_sum<kTile>(init);
}

// 32 rows by one or two vectors of columns, a stretch of k: two or four sums. aside() is called between the products.
template <int kCount, int kWidth, bool kAgain, class Aside>
SK_INL void sum_32(TileLeft a, const Bf16* b, int64_t blocks, const float* init, float* c, int64_t ldc, const Aside& aside) {
  const float* init1 = init ? init + 16 : nullptr;
  begin_sum<0, kAgain>(init, c, ldc);
  begin_sum<2, kAgain>(init, c + 16 * ldc, ldc);
  if constexpr (kWidth == 2) {
    begin_sum<1, kAgain>(init1, c + 16, ldc);
    begin_sum<3, kAgain>(init1, c + 16 * ldc + 16, ldc);
  }
  const int64_t row = a.row * 2;
  for (int64_t k = 0; k < blocks; ++k, a.rows += kTileK, b += kCount * kWidth * kTileSize)
    for (int i = 0; i < kCount; ++i) {
      load_tile<4>(a.rows + i * a.part, row);
      load_tile<5>(a.rows + i * a.part + 16 * a.row, row);
      for (int j = 0; i + j < kCount; ++j) {
        load_tile<6>(b + j * kWidth * kTileSize, 64);
        multiply_tiles<0, 4, 6>(); multiply_tiles<2, 5, 6>();
        if constexpr (kWidth == 2) {
          load_tile<7>(b + (j * kWidth + 1) * kTileSize, 64);
          multiply_tiles<1, 4, 7>(); multiply_tiles<3, 5, 7>();
        }
      }
      aside();
    }
  store_tile<0>(c, ldc * 4);
  store_tile<2>(c + 16 * ldc, ldc * 4);
  if constexpr (kWidth == 2) {
    store_tile<1>(c + 16, ldc * 4);
    store_tile<3>(c + 16 * ldc + 16, ldc * 4);
  }
}

// 16 rows by up to four vectors: each tile of B is read once and meets all parts of A.
template <int kCount, int kSum> SK_INL void sum_vector(const Bf16* b, int64_t part) {
  load_tile<7>(b, 64);
  multiply_tiles<kSum, 4, 7>();
  if constexpr (kCount > 1) multiply_tiles<kSum, 5, 7>();
  if constexpr (kCount > 2) multiply_tiles<kSum, 6, 7>();
  if constexpr (kCount > 1) {
    load_tile<7>(b + part, 64);
    multiply_tiles<kSum, 4, 7>();
    if constexpr (kCount > 2) multiply_tiles<kSum, 5, 7>();
  }
  if constexpr (kCount > 2) {
    load_tile<7>(b + 2 * part, 64);
    multiply_tiles<kSum, 4, 7>();
  }
}
template <int kCount, int kVectors, bool kAgain, class Aside>
SK_INL void sum_16(TileLeft a, const Bf16* b, int64_t blocks, const float* init, float* c, int64_t ldc, const Aside& aside) {
  constexpr int kLast = kVectors - 2;  // vectors in the second pair
  const auto begin = [&](int v) { return init ? init + v * 16 : nullptr; };
  begin_sum<0, kAgain>(begin(0), c, ldc);
  begin_sum<1, kAgain>(begin(1), c + 16, ldc);
  begin_sum<2, kAgain>(begin(2), c + 32, ldc);
  if constexpr (kLast == 2) begin_sum<3, kAgain>(begin(3), c + 48, ldc);
  const Bf16* second = b + blocks * kCount * 2 * kTileSize;
  for (int64_t k = 0; k < blocks; ++k, a.rows += kTileK) {
    load_tile<4>(a.rows, a.row * 2);
    if constexpr (kCount > 1) load_tile<5>(a.rows + a.part, a.row * 2);
    if constexpr (kCount > 2) load_tile<6>(a.rows + 2 * a.part, a.row * 2);
    const Bf16 *b0 = b + k * kCount * 2 * kTileSize, *b1 = second + k * kCount * kLast * kTileSize;
    sum_vector<kCount, 0>(b0, 2 * kTileSize);
    aside();
    sum_vector<kCount, 1>(b0 + kTileSize, 2 * kTileSize);
    aside();
    sum_vector<kCount, 2>(b1, kLast * kTileSize);
    if constexpr (kLast == 2) sum_vector<kCount, 3>(b1 + kTileSize, kLast * kTileSize);
    aside();
  }
  store_tile<0>(c, ldc * 4);
  store_tile<1>(c + 16, ldc * 4);
  store_tile<2>(c + 32, ldc * 4);
  if constexpr (kLast == 2) store_tile<3>(c + 48, ldc * 4);
}

template <int kCount> constexpr int64_t kShortStretch = 12 / kCount;  // blocks of k: 32 rows of A take 24 KiB

// Where the tiles of a panel stand.
template <int kCount> struct TilePanel {
  Bf16* data;
  int64_t blocks, stretch;
  int vectors;
  SK_INL int64_t length(int64_t block) const { return blocks - block < stretch ? blocks - block : stretch; }
  // Where one block of k stands: its stretch, its place in it, and how long that is.
  struct Block { Bf16 *start; int64_t in_stretch, length; };
  SK_INL Block block(int64_t k) const {
    const int64_t start = k / stretch * stretch;
    return {data + start * vectors * kCount * kTileSize, k - start, length(start)};
  }
  SK_INL Bf16* tile(const Block& b, int v, int part) const {
    const int64_t first = v / 2 * 2, width = vectors - first < 2 ? 1 : 2;
    return b.start + ((b.length * first + b.in_stretch * width) * kCount + part * width + v - first) * kTileSize;
  }
};

template <int kCount, int kVectors, bool kAgain, class Aside>
SK_INL void stretch_product(TileLeft a, int64_t rows, const Bf16* b, int64_t blocks, const float* init, float* c,
                            const Aside& aside) {
  static_assert(kVectors == 3 || kVectors == 4);
  constexpr int64_t ldc = kVectors * 16;
  if (rows <= kTileRows) return sum_16<kCount, kVectors, kAgain>(a, b, blocks, init, c, ldc, aside);
  sum_32<kCount, 2, kAgain>(a, b, blocks, init, c, ldc, aside);
  sum_32<kCount, kVectors - 2, kAgain>(a, b + blocks * kCount * 2 * kTileSize, blocks, init ? init + 32 : nullptr, c + 32, ldc,
                                     aside);
}
// c [32][kVectors * 16] = A B for up to 32 rows of A. All rows of a started tile are read: the memory must be there.
// aside() is called between the instructions, tile_pauses() times: the tile unit leaves the vector unit free, and what
// waits for both to take turns takes nearly the sum of their times and the time that each needs to start.
template <int kCount, int kVectors, class Aside>
SK_INL void tile_product(TileLeft a, int64_t rows, const TilePanel<kCount>& b, const float* init, float* c, const Aside& aside) {
  stretch_product<kCount, kVectors, false>(a, rows, b.data, b.length(0), init, c, aside);
  for (int64_t k = b.stretch; k < b.blocks; k += b.stretch) {
    a.rows += b.stretch * kTileK;
    stretch_product<kCount, kVectors, true>(a, rows, b.data + k * kCount * kVectors * kTileSize, b.length(k), init, c, aside);
  }
}
template <int kCount> SK_INL int64_t tile_pauses(int64_t rows, int64_t blocks) {
  return blocks * (rows <= kTileRows ? 3 : 2 * kCount);
}

// ---- packing ---------------------------------------------------------------------------------------------------------

// The leading parts of 32 consecutive numbers, as 32 words in order; `low` and `high` keep the rest.
template <int kCount> SK_INL __m512i take_words(Pack<float>& low, Pack<float>& high) {
  const U16s a = take_part<kCount>(low), b = take_part<kCount>(high);
  return _mm512_inserti64x4(_mm512_castsi256_si512((__m256i)a), (__m256i)b, 1);
}
// n lanes of from, the rest zero; none where from is null.
template <class S> SK_INL Pack<float> lanes(const S* from, int64_t n) {
  return from && n > 0 ? load(from, n) : Pack<float>(0);
}

// Vector v of the columns of B, each column a row of w (n rows there, at distance ld) of k numbers.
template <class S> void pack_tile_columns(const S* w, int64_t ld, int64_t n, int64_t k, int v,
                       const TilePanel<kParts<S>>& to) {
  constexpr int kCount = kParts<S>;
  for (int64_t block = 0; block < tile_blocks(k); ++block) {
    __m512i words[kCount][16];
    for (int64_t i = 0; i < 16; ++i) {
      const S* from = i < n ? w + i * ld + block * kTileK : nullptr;
      const int64_t left = k - block * kTileK;
      Pack<float> low = lanes(from, left), high = lanes(from ? from + 16 : nullptr, left - 16);
      for (int p = 0; p < kCount; ++p) words[p][i] = take_words<kCount>(low, high);
    }
    for (int p = 0; p < kCount; ++p) {
      transpose(words[p]);
      Bf16* tile = to.tile(to.block(block), v, p);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(tile + i * kTileK, words[p][i]);
    }
  }
}
// Rows k and k + 1 (k even) of vector v of the columns of B; null gives zeros.
template <int kCount, class S>
SK_INL void pack_tile_rows(const S* even, const S* odd, int64_t n, int64_t k, int v, const TilePanel<kCount>& to,
                           const typename TilePanel<kCount>::Block& block) {
  Pack<float> a = lanes(even, n), b = lanes(odd, n);
  for (int p = 0; p < kCount; ++p) {
    U32s pair;
    if (kCount == 1) {
      pair = __builtin_convertvector(take_part<1>(a), U32s) | __builtin_convertvector(take_part<1>(b), U32s) << 16;
    } else {
      pair = (U32s)a.v >> 16 | ((U32s)b.v & 0xffff0000u);
      a.v -= (Pack<float>::Vec)((U32s)a.v & 0xffff0000u);
      b.v -= (Pack<float>::Vec)((U32s)b.v & 0xffff0000u);
    }
    _mm512_storeu_si512(to.tile(block, v, p) + k % kTileK * 16, (__m512i)pair);
  }
}
// 16 columns of `from`, rows [0, n), as 16 rows of left-hand operands: part p of column i at to + i * row + p * part,
// n rounded up to whole blocks with zeros.
template <int kCount>
void transpose_columns(const TileLeft& from, int64_t n, Bf16* to, int64_t row, int64_t part) {
  for (int64_t block = 0; block < tile_blocks(n); ++block)
    for (int p = 0; p < kCount; ++p) {
      __m512i pairs[16];
      for (int i = 0; i < 16; ++i) {
        const int64_t k = block * kTileK + 2 * i;
        const Bf16* at = from.rows + k * from.row + p * from.part;
        U32s even{}, odd{};
        if (k < n) even = __builtin_convertvector(*(const U16s*)at, U32s);
        if (k + 1 < n) odd = __builtin_convertvector(*(const U16s*)(at + from.row), U32s);
        pairs[i] = (__m512i)(even | odd << 16);
      }
      transpose(pairs);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * row + p * part + block * kTileK, pairs[i]);
    }
}
#else
struct TileUse { explicit TileUse(bool) {} };
#endif

}}}  // namespace seqkern::SK_NS
