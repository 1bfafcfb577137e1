// Shape and dtype checks of the operators, shared by the devices. Every message says what was wanted and what came.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "args.h"

namespace seqkern {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct CellInfo { const char* name; Cell cell; int64_t gates, saved; };
constexpr CellInfo kCellInfos[kCells] = {
    {"rnn_tanh", Cell::kRnnTanh, 1, 0}, {"rnn_relu", Cell::kRnnRelu, 1, 0}, {"lstm", Cell::kLstm, 4, 5}, {"gru", Cell::kGru, 3, 4}};

inline const CellInfo& cell_info(const std::string& name) {
  for (const CellInfo& c : kCellInfos)
    if (name == c.name) return c;
  STD_TORCH_CHECK(false, "cell must be one of rnn_tanh, rnn_relu, lstm, gru, got ", name);
}

inline const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Double: return "float64";
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    default: return torch::headeronly::toString(t);
  }
}
inline Dtype kernel_dtype(const std::string& cell, ScalarType t) {
  switch (t) {
    case ScalarType::Double: return Dtype::kF64;
    case ScalarType::Float: return Dtype::kF32;
    case ScalarType::BFloat16: return Dtype::kBf16;
    case ScalarType::Half: return Dtype::kF16;
    default: STD_TORCH_CHECK(false, cell, ": x must be float64, float32, bfloat16 or float16, got ", dtype_name(t));
  }
}

inline std::string text(const std::vector<int64_t>& sizes) {
  std::string s = "[";
  for (size_t i = 0; i < sizes.size(); ++i) s += (i ? ", " : "") + std::to_string(sizes[i]);
  return s + "]";
}
inline std::vector<int64_t> sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

struct Wanted {
  const std::string& cell;
  ScalarType dtype;
  // `letters` names the dimensions, as in "[4*H, H]".
  void check(const Tensor& t, const std::string& name, const char* letters, const std::vector<int64_t>& sizes) const {
    STD_TORCH_CHECK(sizes_of(t) == sizes, cell, ": ", name, " must be ", letters, " = ", text(sizes), ", got ",
                    text(sizes_of(t)));
    STD_TORCH_CHECK(t.scalar_type() == dtype, cell, ": ", name, " must be ", dtype_name(dtype), " as x is, got ",
                    dtype_name(t.scalar_type()));
  }
  void check(const std::optional<Tensor>& t, const std::string& name, const char* letters,
             const std::vector<int64_t>& sizes) const {
    if (t) check(*t, name, letters, sizes);
  }
};

// What the operators' arguments describe, checked.
struct Problem {
  CellInfo cell;
  int64_t steps, batch, rows, input, hidden, output, directions;
  int64_t per_direction;  // weights
  bool biased, projected, packed;
  std::vector<int64_t> sizes, starts;
  std::vector<int64_t> y_sizes() const {
    return packed ? std::vector<int64_t>{rows, directions * output}
                  : std::vector<int64_t>{steps, batch, directions * output};
  }
};

inline void read_steps(Problem& p, const std::string& name, const Tensor& x, const std::optional<Tensor>& batch_sizes) {
  p.packed = batch_sizes.has_value();
  STD_TORCH_CHECK(x.dim() == (p.packed ? 2 : 3), name, ": x must be ", p.packed ? "[N, I]" : "[T, B, I]", ", got ",
                  text(sizes_of(x)));
  p.input = x.size(-1);
  if (p.packed) {
    const Tensor& s = *batch_sizes;
    STD_TORCH_CHECK(s.dim() == 1 && s.scalar_type() == ScalarType::Long && s.is_cpu(), name,
                    ": batch_sizes must be [T] int64 on the CPU, got ", text(sizes_of(s)));
    p.steps = s.size(0);
    for (int64_t t = 0; t < p.steps; ++t) p.sizes.push_back(((const int64_t*)s.data_ptr())[t * s.stride(0)]);
  } else {
    p.steps = x.size(0);
    p.sizes.assign(p.steps, x.size(1));
  }
  STD_TORCH_CHECK(p.steps > 0, name, ": Expected sequence length to be larger than 0 in RNN, got 0");
  p.batch = p.sizes[0];
  p.starts.assign(1, 0);
  for (int64_t t = 0; t < p.steps; ++t) {
    STD_TORCH_CHECK(!p.packed || (p.sizes[t] > 0 && (t == 0 || p.sizes[t] <= p.sizes[t - 1])), name,
                    ": batch_sizes must be positive and never grow, got ", text(p.sizes));
    p.starts.push_back(p.starts.back() + p.sizes[t]);
  }
  p.rows = p.starts.back();
  STD_TORCH_CHECK(!p.packed || p.rows == x.size(0), name, ": x must have as many rows as batch_sizes sum to, ", p.rows,
                  ", got ", x.size(0));
}

inline Problem check_problem(const std::string& name, const Tensor& x, const std::optional<Tensor>& h0,
                             const std::optional<Tensor>& c0, const std::vector<Tensor>& weights,
                             const std::optional<Tensor>& batch_sizes, bool bidirectional) {
  Problem p;
  p.cell = cell_info(name);
  kernel_dtype(name, x.scalar_type());
  read_steps(p, name, x, batch_sizes);
  p.directions = bidirectional ? 2 : 1;
  p.per_direction = int64_t(weights.size()) / p.directions;
  STD_TORCH_CHECK(int64_t(weights.size()) == p.per_direction * p.directions && p.per_direction >= 2 &&
                      p.per_direction <= 5,
                  name, ": weights must be w_ih, w_hh[, b_ih, b_hh][, w_hr] for each of ", p.directions,
                  " directions, got ", weights.size(), " tensors");
  p.biased = p.per_direction >= 4;
  p.projected = p.per_direction % 2 == 1;
  STD_TORCH_CHECK(!p.projected || p.cell.cell == Cell::kLstm, name, ": only the LSTM has a projection, got ",
                  weights.size(), " weights");
  const int64_t g = p.cell.gates;
  STD_TORCH_CHECK(weights[0].dim() == 2 && weights[0].size(0) % g == 0 && weights[0].size(0) > 0, name,
                  ": weight_ih must be [", g, "*H, I], got ", text(sizes_of(weights[0])));
  p.hidden = weights[0].size(0) / g;
  p.output = p.projected ? weights[p.per_direction - 1].size(0) : p.hidden;
  Wanted want{name, x.scalar_type()};
  const std::string gh = std::to_string(g) + "*H";
  for (int64_t d = 0; d < p.directions; ++d) {
    const std::string suffix = d ? "_reverse" : "";
    const Tensor* w = weights.data() + d * p.per_direction;
    want.check(w[0], "weight_ih" + suffix, ("[" + gh + ", I]").c_str(), {g * p.hidden, p.input});
    want.check(w[1], "weight_hh" + suffix, ("[" + gh + (p.projected ? ", P]" : ", H]")).c_str(), {g * p.hidden, p.output});
    if (p.biased) want.check(w[2], "bias_ih" + suffix, ("[" + gh + "]").c_str(), {g * p.hidden});
    if (p.biased) want.check(w[3], "bias_hh" + suffix, ("[" + gh + "]").c_str(), {g * p.hidden});
    if (p.projected) want.check(w[p.per_direction - 1], "weight_hr" + suffix, "[P, H]", {p.output, p.hidden});
  }
  STD_TORCH_CHECK(!c0 || p.cell.cell == Cell::kLstm, name, ": only the LSTM has a cell state, got c0 ",
                  c0 ? text(sizes_of(*c0)) : "");
  want.check(h0, "h0", p.projected ? "[D, B, P]" : "[D, B, H]", {p.directions, p.batch, p.output});
  want.check(c0, "c0", "[D, B, H]", {p.directions, p.batch, p.hidden});
  return p;
}

}  // namespace seqkern
