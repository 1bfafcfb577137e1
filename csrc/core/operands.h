// Tensors to pointers: what the operators of each device do to their arguments before a kernel sees them.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "check.h"

namespace seqkern {
using Optional = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(like, sizes);
}
inline Tensor zeros(const Tensor& like, const std::vector<int64_t>& sizes) {
  return torch::stable::new_zeros(like, sizes);
}
inline Tensor dense(const Tensor& t) { return torch::stable::contiguous(t); }
inline Optional dense(const Optional& t) { return t ? Optional(dense(*t)) : std::nullopt; }
inline void* data(const Tensor& t) { return t.mutable_data_ptr(); }
inline void* data(const Optional& t) { return t ? data(*t) : nullptr; }

// A sequence's rows must be dense; any strides do between rows and steps.
inline Tensor with_dense_rows(const Tensor& t) { return t.stride(-1) == 1 || t.size(-1) == 1 ? t : dense(t); }
inline Sequence sequence(const Tensor& t, bool packed) {
  return {data(t), packed ? 0 : t.stride(0), t.stride(packed ? 0 : 1), packed};
}

inline Weights weights_at(const Problem& p, const Tensors& w, int64_t d) {
  const Tensor* first = w.data() + d * p.per_direction;
  return {data(first[0]), data(first[1]), p.biased ? data(first[2]) : nullptr, p.biased ? data(first[3]) : nullptr,
          p.projected ? data(first[p.per_direction - 1]) : nullptr};
}

inline LayerArgs common_args(const Problem& p, const Tensor& x, const Optional& h0, const Optional& c0,
                             const Tensors& w, const Tensor& y, const Optional& reserve) {
  LayerArgs a{};
  a.steps = p.steps;
  a.batch = p.batch;
  a.rows = p.rows;
  a.input = p.input;
  a.hidden = p.hidden;
  a.output = p.output;
  a.directions = p.directions;
  a.sizes = p.sizes.data();
  a.starts = p.starts.data();
  a.x = sequence(x, p.packed);
  a.h0 = data(h0);
  a.c0 = data(c0);
  for (int64_t d = 0; d < p.directions; ++d) a.weights[d] = weights_at(p, w, d);
  a.y = data(y);
  a.reserve = data(reserve);
  return a;
}

inline int64_t reserve_size(const Problem& p) { return p.directions * p.rows * p.cell.saved * p.hidden; }

// What the operators return, allocated; and backward's checks of what it is given besides forward's arguments.
using ForwardOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;    // y, h_n, c_n, reserve
using BackwardOutputs = std::tuple<Tensor, Tensor, Tensor, Tensors>;  // dx, dh0, dc0, dweights
inline Tensor state_like(const Problem& p, const Tensor& x) { return empty(x, {p.directions, p.batch, p.output}); }
inline Tensor cell_state_like(const Problem& p, const Tensor& x) {
  return p.cell.cell == Cell::kLstm ? empty(x, {p.directions, p.batch, p.hidden}) : empty(x, {0});
}
inline ForwardOutputs forward_outputs(const Problem& p, const Tensor& x, bool save) {
  return {empty(x, p.y_sizes()), state_like(p, x), cell_state_like(p, x), empty(x, {save ? reserve_size(p) : 0})};
}
inline BackwardOutputs backward_outputs(const Problem& p, const Tensor& x, const Tensors& weights, bool need_dx,
                                        bool need_dw) {
  Tensors dweights;
  for (const Tensor& w : weights)
    if (need_dw) dweights.push_back(p.rows ? empty(w, sizes_of(w)) : zeros(w, sizes_of(w)));
  return {empty(x, need_dx ? sizes_of(x) : std::vector<int64_t>{0}), state_like(p, x), cell_state_like(p, x), dweights};
}
inline void check_cotangents(const Problem& p, const std::string& cell, ScalarType dtype, const Optional& dy,
                             const Optional& dh_n, const Optional& dc_n, const Tensor& y) {
  Wanted want{cell, dtype};
  want.check(dy, "dy", p.packed ? "[N, D*P]" : "[T, B, D*P]", p.y_sizes());
  want.check(y, "y", p.packed ? "[N, D*P]" : "[T, B, D*P]", p.y_sizes());
  want.check(dh_n, "dh_n", "[D, B, P]", {p.directions, p.batch, p.output});
  if (p.cell.cell == Cell::kLstm) want.check(dc_n, "dc_n", "[D, B, H]", {p.directions, p.batch, p.hidden});
}
}  // namespace seqkern
