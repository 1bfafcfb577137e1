// What the kernels of the compiled searches are given: plain pointers and sizes. No torch, no C++ standard library.
//
// B sources, S places of a source, M size of what the encoder says of a place, V vocabulary, E embedding, H hidden, G
// gates, L layers, K key size, A size of the attentional vector, N hypotheses of a source that are returned. All
// tensors are dense.
#pragma once
#include <stdint.h>
#include "args.h"

namespace seqkern {

enum class Attend : int { kNone = 0, kDot, kAdditive };
constexpr int kMaxSearchLayers = 16;

// Stands at the beginning of a packed decoder.
struct SearchShape {
  int64_t magic, vector_bytes, dtype, cell, gates;
  int64_t vocab, embed, hidden, layers, attend, memory, key, pre, feed;  // memory: M; pre: A, 0 without; feed: 0 or 1
  int64_t keyed;   // whether keys are projected, or the encoder's values themselves
  int64_t folded;  // the embedding is multiplied by the bottom layer's weights already
  int64_t read() const { return pre ? pre : hidden; }  // what the output layer reads
};
constexpr int64_t kSearchMagic = 0x5365617263683031, kSearchHeader = 256;

struct SearchWeights {
  const void* table;  // [V, G*H] where folded
  const void* w_ih;   // [G*H, A] of the fed back vector, or, where not folded, all: [G*H, E or E+A]
  const void* b_ih;   // [G*H] where not folded
  const void* layers[4 * kMaxSearchLayers];  // w_hh, b_hh of the bottom layer; w_ih, w_hh, b_ih, b_hh of the others
  const void* w_context;                     // [A, M]
  const void *w_key, *b_key;                 // [K, M], [K] or null
  const void *w_query, *v;                   // [K, H], [K] of additive attention
  const void *w_pre, *b_pre;                 // [A, H], [A]
  const void *w_out, *b_out;                 // [V, A or H], [V]
};

enum class Search : int { kGreedy = 0, kSample, kBeam };

struct SearchArgs {
  const char* packed;
  const void* embedding;   // [V, E] where not folded
  const void* memory;      // [S, B, M]
  const int64_t* lengths;  // [B]
  const void* h0;          // [L, B, H]
  const void* c0;          // [L, B, H] or null
  int64_t batch, places;
  int64_t pad, bos, eos, max_len;
  Search search;
  const int64_t* forced;  // greedy: [max_len + 1, B], the token to go on with, -1 for the search's own; or null
  double temperature, top_p;
  int64_t top_k, seed;
  int64_t beam, n_best, min_len;  // beam and n_best are 1 for the other searches
  double length_penalty, coverage_penalty;
  bool early_stop;
  // Beam search's memory of its steps: which hypothesis a live one came from and by which token; its weights.
  int32_t *parents, *chosen;  // [max_len + 1, B, beam]
  void* weights;              // [max_len + 1, B, beam, S] or null
  // Results, filled beforehand with what stands where there is nothing.
  int64_t* tokens;         // [N, max_len, B]
  int64_t* found_lengths;  // [N, B]
  double* scores;          // [N, B]
  void* attention;         // [N, max_len, B, S] or null
};

// The sources [begin, end) searched by `count` threads together, of which this is number `member`.
struct SearchPart {
  int64_t begin, end;
  int member, count;
  Barrier* barrier;
  char* scratch;  // 64-byte aligned, one for all of them
};

struct SearchKernel {
  int64_t (*packed_bytes)(const SearchShape&);
  void (*pack)(const SearchShape&, const SearchWeights&, char* to, int part, int parts);
  int64_t (*scratch)(const SearchArgs&, int64_t sources, int count);
  void (*run)(const SearchArgs&, const SearchPart&);
};
struct SearchKernels {
  int64_t vector_bytes;
  SearchKernel of[2];  // Dtype::kF64, kF32
};

}  // namespace seqkern
