// What forward and backward of the attention decoder share: sizes, and where things lie.
//
// Rows of the batch do not depend on each other, so each thread takes some of them through all steps; threads meet only
// after packing the weights, and before the weights' gradients are summed.
#pragma once
#include "../core/cells.h"
#include "../core/decoder_args.h"
#include "decoder_attention.h"
#include "wide.h"

namespace seqkern { namespace SK_NS { namespace {

template <class C, class S> struct Decoder {
  using Acc = typename AccOf<S>::Type;
  using V = Pack<Acc>;
  using Row = AttentionRow<S>;
  static constexpr int kWidth = V::kWidth, kBlocks = kUnitBlocks<C>, kVectors = kCellVectors<C>;
  static constexpr int kColumns = kVectors * kWidth, kWideColumns = kWide * kWidth;
  static constexpr int kSkip = C::kGrads - C::kGates;
  static constexpr int64_t kStride = C::kSaved + 1;  // in the reserve, of a row and layer, in H

  const DecoderArgs& a;
  int64_t ldh, ldk, lda;  // rows of H, K and A elements, padded
  explicit Decoder(const DecoderArgs& args)
      : a(args), ldh(padded(a.hidden)), ldk(padded(a.key)), lda(padded(a.vector)) {}

  static int64_t padded(int64_t n) { return padded_row<S>(n); }
  static int64_t wide_panels(int64_t n) { return ceil_div(n, kWideColumns); }
  bool additive() const { return a.w_query != nullptr; }
  int64_t input(int64_t layer) const { return layer ? a.hidden : a.vector; }
  Range rows_of(int tid) const { return part(a.batch, tid, a.threads); }
  // The bottom layer's projected input of row b at step t, in units of G*H.
  int64_t given(int64_t t, int64_t b) const { return a.tokens ? a.tokens[t * a.batch + b] : t * a.batch + b; }
  int64_t most_rows() const { return ceil_div(a.batch, a.threads); }

  S* kept(int64_t t, int64_t layer, int64_t b) const {
    return (S*)a.reserve + ((t * a.layers + layer) * a.batch + b) * kStride * a.hidden;
  }
  S* kept_h(int64_t t, int64_t layer, int64_t b) const { return kept(t, layer, b) + C::kSaved * a.hidden; }
  S* kept_query(int64_t t, int64_t b) const {
    return (S*)a.reserve + a.steps * a.layers * a.batch * kStride * a.hidden + (t * a.batch + b) * a.key;
  }
  const S* mask(int64_t t, int64_t layer, int64_t b) const {  // on what goes up from `layer`
    return (const S*)a.masks + ((t * (a.layers - 1) + layer) * a.batch + b) * a.hidden;
  }
  SK_INL void meet_all() const { meet(*a.barrier, a.threads); }
};

}}}  // namespace seqkern::SK_NS
