// What the kernels of the attention decoder are given: plain pointers and sizes. No torch, no C++ standard library.
// The definition is seqkern/seq2seq/reference.py, attention_decoder.
//
// T target steps, S source steps, B batch, H hidden, G gates, L layers, K key size, A size of the attentional vector.
// Every tensor is dense.
#pragma once
#include "args.h"

namespace seqkern {

struct DecoderWeights {  // of a layer
  void* w_x;             // [G*H, A] of the bottom layer, for the fed-back vector; [G*H, H] of the others
  void* w_hh;            // [G*H, H]
  void* b_x;             // [G*H]; null in the bottom layer, where gx holds it
  void* b_hh;            // [G*H]
};

struct DecoderArgs {
  int64_t steps, batch, hidden, layers, source, key, vector, vocab;
  const void* gx;                 // [T, B, G*H], or with tokens [V, G*H]: a row for each token
  const int64_t* tokens;          // [T, B] in [0, V), or null
  const void* feed0;              // [B, A]; null: zeros
  const void* h0;                 // [L, B, H]
  const void* c0;                 // [L, B, H] (LSTM) or null
  const DecoderWeights* weights;  // [L]
  const void* keys;               // [B, S, K]
  const void* values;             // [B, S, A]
  const int64_t* lengths;         // [B]
  const void* w_query;            // [K, H], or null: the score is h . k
  const void* v;                  // [K] or null
  const void* w_pre;              // [A, H]
  const void* b_pre;              // [A]
  const void* masks;              // [T, L-1, B, H] or null
  // outputs of forward, inputs of backward
  void* a;        // [T, B, A]
  void* alpha;    // [T, B, S]
  void* reserve;  // [T, L, B, saved + 1, H] what the cell saves, and h; then [T, B, K] w_query h. Null: not kept
  // forward
  void* h_n;  // [L, B, H]
  void* c_n;  // [L, B, H] (LSTM) or null
  // backward; null where there is none or it is not wanted
  const void* da;                  // [T, B, A]
  const void* dh_n;                // [L, B, H]
  const void* dc_n;                // [L, B, H]
  const void* dalpha;              // [T, B, S]
  void* dgx;                       // as gx
  void* dfeed0;                    // [B, A]; null without feed0
  void* dh0;                       // [L, B, H]
  void* dc0;                       // [L, B, H]
  const DecoderWeights* dweights;  // [L]; null with the next four
  void* dw_query;
  void* dv;
  void* dw_pre;
  void* db_pre;
  void* dkeys;    // [B, S, K]; null with dvalues
  void* dvalues;  // [B, S, A]
  void* dmasks;   // [T, L-1, B, H]
  // execution
  int threads;       // each has a part of the batch
  Barrier* barrier;  // of all threads
  char* scratch;     // as many bytes as scratch() asked for, 64-byte aligned
};

struct DecoderKernel {
  int64_t (*scratch)(const DecoderArgs&);
  void (*run)(const DecoderArgs&, int tid);
};
struct DecoderKernels {
  DecoderKernel forward[kCells][kDtypes], backward[kCells][kDtypes];
};

}  // namespace seqkern
