// What the options (core/args.h) do to the vectors of a step; forward and backward call these only where one is set.
// The state that a step reads is what the step before left, times keep; h goes into the product times h_mask as well.
#pragma once
#include "team.h"

namespace seqkern { namespace SK_NS { namespace {

template <class S> struct OptionMath {
  using Acc = typename AccOf<S>::Type;
  using V = Pack<Acc>;
  static constexpr int kWidth = V::kWidth;

  const LayerArgs& a;
  const LayerOptions& o;
  int d;
  OptionMath(const LayerArgs& args, int direction) : a(args), o(args.options), d(direction) {}

  // v as the step at time t of row b reads it. A factor of 0 clears what is not a number, too.
  SK_INL V kept(V v, int64_t t, int64_t b) const {
    if (!o.keep) return v;
    const Acc k = ((const Acc*)o.keep)[a.starts[t] + b];
    return k == 0 ? V(0) : v * V(k);
  }
  SK_INL V masked(V v, int64_t b, int64_t j, int64_t lanes) const {
    return o.h_mask ? v * load((const S*)o.h_mask + (d * a.batch + b) * a.output + j, lanes) : v;
  }
  // h on its way into the product of step t, or as it is where row b has no step t.
  SK_INL V entering(V h, int64_t t, int64_t b, int64_t j, int64_t lanes) const {
    return t >= 0 && t < a.steps && b < a.sizes[t] ? masked(kept(h, t, b), b, j, lanes) : h;
  }
  // The share of the old state in the new one, at time t of row b.
  SK_INL V zone_h(int64_t t, int64_t b, int64_t j, int64_t lanes) const {
    return load((const S*)o.zone_h + (a.starts[t] + b) * o.zone_h_row + d * a.output + j, lanes);
  }
  SK_INL V zone_c(int64_t t, int64_t b, int64_t j, int64_t lanes) const {
    return load((const S*)o.zone_c + (a.starts[t] + b) * o.zone_c_row + d * a.hidden + j, lanes);
  }
  static SK_INL V mix(V z, V old, V fresh) { return z * old + (V(1) - z) * fresh; }

  template <class T> SK_INL T* c_row(T* all, int64_t t, int64_t b) const {
    return all + ((a.starts[t] + b) * a.directions + d) * a.hidden;
  }
  // Adds a vector's squares to those of row b at time t: of d(loss)/dh (which = 0) or d(loss)/dc.
  SK_INL void watch(int which, int64_t t, int64_t b, int64_t panel, V v) const {
    if (!o.flow) return;
    Acc sum = 0;
    for (int i = 0; i < kWidth; ++i) sum += v.v[i] * v.v[i];
    ((Acc*)o.flow)[((which * a.directions + d) * a.rows + a.starts[t] + b) * o.flow_panels + panel] += sum;
  }
  // d(loss)/d(state) on its way to the step before.
  SK_INL V clipped(V v) const {
    if (o.clip_value == 0) return v;
    const V high(Acc(o.clip_value)), low(Acc(-o.clip_value));
    v = V::wrap(v.v > high.v ? high.v : v.v);
    return V::wrap(v.v < low.v ? low.v : v.v);
  }
};

}}}  // namespace seqkern::SK_NS
