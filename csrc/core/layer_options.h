// The options of a layer: from the operators' tensors, checked, to the kernels' LayerOptions (args.h).
#pragma once
#include <algorithm>
#include <cmath>

#include "operands.h"

namespace seqkern {

struct OptionTensors {
  Optional keep, h_mask, zone_h, zone_c, lengths;
  double clip_value = 0, clip_norm = 0;
  bool want_c = false;
  bool want_flow = false;
  Optional c_all, dc_all;  // in forward c_all is an output
  Optional flow;           // an output of backward
};

// Those of backward alone are left out in forward. units: that share an element of flow.
inline void set_options(LayerArgs& a, const Problem& p, const Tensor& x, OptionTensors& o, bool backward,
                        int64_t units) {
  const std::string& cell = p.cell.name;
  const bool f64 = x.scalar_type() == ScalarType::Double;
  Wanted want{cell, x.scalar_type()}, sums{cell, f64 ? ScalarType::Double : ScalarType::Float};
  sums.check(o.keep, "keep", "[N]", {p.rows});
  want.check(o.h_mask, "h_mask", "[D, B, P]", {p.directions, p.batch, p.output});
  auto zone = [&](Optional& z, const char* name, const char* letters, int64_t width) -> int64_t {
    if (!z) return 0;
    z = dense(z);
    want.check(z, name, letters, {z->size(0) == 1 ? 1 : p.rows, width});
    return z->size(0) == 1 ? 0 : width;
  };
  LayerOptions& to = a.options;
  to.zone_h_row = zone(o.zone_h, "zone_h", "[N or 1, D*P]", p.directions * p.output);
  to.zone_c_row = zone(o.zone_c, "zone_c", "[N or 1, D*H]", p.directions * p.hidden);
  if (o.lengths) {
    Wanted{cell, ScalarType::Long}.check(o.lengths, "lengths", "[B]", {p.batch});
    STD_TORCH_CHECK(!p.packed, cell, ": lengths are for padded input, got batch_sizes too");
  }
  STD_TORCH_CHECK(o.clip_value >= 0 && o.clip_norm >= 0, cell,
                  ": bounds of gradients must be positive, or 0 for none, got ", o.clip_value, " and ", o.clip_norm);
  for (Optional* t : {&o.keep, &o.h_mask, &o.dc_all, &o.lengths}) *t = dense(*t);
  to.keep = data(o.keep);
  to.h_mask = data(o.h_mask);
  to.zone_h = data(o.zone_h);
  to.zone_c = data(o.zone_c);
  to.lengths = (const int64_t*)data(o.lengths);
  to.c_all = data(o.c_all);
  if (backward) {
    to.clip_value = o.clip_value;
    to.clip_norm = o.clip_norm;
    to.dc_all = data(o.dc_all);
  }
  if (backward && o.want_flow) {
    to.flow_panels = (std::max(p.hidden, p.output) + units - 1) / units;
    o.flow = torch::stable::new_zeros(x, {2, p.directions, p.rows, to.flow_panels}, sums.dtype);
    to.flow = data(o.flow);
  }
  to.any = to.flow || to.keep || to.h_mask || to.zone_h || to.zone_c || to.lengths || to.clip_value > 0 ||
           to.clip_norm > 0 || to.c_all || to.dc_all;
}

inline std::vector<int64_t> c_all_sizes(const Problem& p) {
  std::vector<int64_t> sizes = p.y_sizes();
  sizes.back() = p.directions * p.hidden;
  return sizes;
}
inline void check_c_all(const Problem& p, const Tensor& x, const OptionTensors& o) {
  if (p.cell.cell != Cell::kLstm) return;
  Wanted want{p.cell.name, x.scalar_type()};
  want.check(o.c_all, "c_all", p.packed ? "[N, D*H]" : "[T, B, D*H]", c_all_sizes(p));
  want.check(o.dc_all, "dc_all", p.packed ? "[N, D*H]" : "[T, B, D*H]", c_all_sizes(p));
}

// Random masks: seqkern/masks.py.
inline void check_bernoulli(const Tensor& seed, double p) {
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, "seed must be [1] int64, got ",
                  text(sizes_of(seed)), " ", dtype_name(seed.scalar_type()));
  STD_TORCH_CHECK(p >= 0 && p <= 1, "p must be a probability, got ", p);
}
inline int64_t limit_of(double p) { return int64_t(std::nearbyint(p * 4294967296.0)); }

}  // namespace seqkern
