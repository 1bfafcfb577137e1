// What the options of a layer (core/args.h, LayerOptions; seqkern/reference.py, Options) add to a thread's unit and row
// in the `grid` engine: as step_options.cuh's, but what a step needs is loaded before it waits, and converted after.
//
// A row takes part in step t while t is below its length. In the steps where it takes none its words are zeros, so that
// nobody waits for them.
#pragma once
#include "grid_product.cuh"

namespace seqkern { namespace cuda { namespace {

// How many values a thread carries for a row from step to step: the cell's, and with options h, or the part of
// d(loss)/dh past the cell, where the cell's is not that.
template <class C, bool kOptions>
constexpr int kSlots = int(C::kCarry != Carry::kNone) + int(kOptions && C::kCarry != Carry::kHidden);
// Which of them is h's.
template <class C> constexpr int kSlotOfH = C::kCarry == Carry::kCell ? 1 : 0;

SK_DEVICE float kept(float keep, float v) { return keep == 0.f ? 0.f : v * keep; }  // 0 clears what is not a number

template <class S, bool kOptions> struct RowOptions {
  SK_DEVICE bool inside(int) const { return true; }
};
template <class S> struct RowOptions<S, true> {
  int length;
  float keep, keep_after;  // of this step, and of the one after it as forward goes
  S mask, zone_h, zone_c, dc;

  SK_DEVICE bool inside(int t) const { return t < length; }

  SK_DEVICE void load_length(const LayerOptions& o, int b) { length = o.lengths ? int(o.lengths[b]) : int(kMaxSteps); }
  // row: of all N; j: of the layer's units; d: of `directions`. at: of the element in [D, B, H].
  SK_DEVICE void load_mask(const LayerOptions& o, int64_t at) { mask = raw_or_zero<S>(o.h_mask, at); }
  SK_DEVICE void load_zones(const LayerOptions& o, int64_t row, int64_t unit) {
    zone_h = raw_or_zero<S>(o.zone_h, row * o.zone_h_row + unit);
    zone_c = raw_or_zero<S>(o.zone_c, row * o.zone_c_row + unit);
  }
  static SK_DEVICE float keep_of(const LayerOptions& o, int64_t row) { return o.keep ? ((const float*)o.keep)[row] : 1; }

  // h on its way into a product, before the step of `keep`.
  SK_DEVICE float entering(const LayerOptions& o, float keep, float h) const {
    if (o.keep) h = kept(keep, h);
    return o.h_mask ? h * to_float(mask) : h;
  }
  static SK_DEVICE float mixed(const void* zone, S share, float old, float fresh) {
    if (!zone) return fresh;
    const float z = to_float(share);
    return z * old + (1.f - z) * fresh;
  }
  // Takes from v, the gradient of such a mixture, what is the old value's.
  static SK_DEVICE float past(const void* zone, S share, float& v) {
    if (!zone) return 0.f;
    const float old = to_float(share) * v;
    v -= old;
    return old;
  }
  // d(loss)/d(state) that the step after read, as this step has it.
  SK_DEVICE float arriving(const LayerOptions& o, float v) const {
    if (o.clip_value > 0) {  // a NaN passes
      const float most = float(o.clip_value);
      v = v > most ? most : v;
      v = v < -most ? -most : v;
    }
    return o.keep ? kept(keep_after, v) : v;
  }
};

}  // namespace
}}  // namespace seqkern::cuda
