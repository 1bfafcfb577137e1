// The operators on CPU tensors: check, allocate, share out the work, call the kernel table.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <tuple>

#include "../core/box.h"
#include "../core/layer_options.h"
#include "dispatch.h"
#include "execute.h"
#include "kept_weights.h"
#include "memory.h"
#include "plain.h"
#include "plan.h"

namespace seqkern {
namespace {
const CpuKernels& layer_kernels(Dtype dtype, bool training, bool backward, int64_t batch, int64_t hidden, int64_t output) {
  if (dtype == Dtype::kBf16 && !training && batch == 1) return row_kernels();
  return dtype == Dtype::kF32 && !float_on_tiles(backward, batch, hidden, output) ? vector_kernels() : cpu_kernels();
}

// Calls of one or two rows and few steps read weights as they lie, once or a few times. In training weights change from call
// to call, but not within a loop over a cell's steps.
bool keeps_weights(const LayerArgs& a) {
  constexpr int64_t kFewRows = 2, kFewSteps = 12;
  if (a.batch <= kFewRows) return !a.reserve && a.steps > kFewSteps;
  return !a.reserve || a.steps == 1;
}
KeptWeights* kept_weights(const LayerArgs& a, const Kernel& kernel, Cell cell, Dtype dtype) {
  const Packing p = kernel.packing(a);
  WeightsKey key{int64_t(&kernel), p.bytes, p.form, a.input, a.hidden, a.output, int64_t(cell), int64_t(dtype), a.directions};
  for (int64_t d = 0, i = 9; d < a.directions; ++d)
    for (const void* w : {a.weights[d].w_ih, a.weights[d].w_hh, a.weights[d].w_hr}) key[i++] = int64_t(w);
  return WeightsKeeper::one().take(key, p.bytes, p.marks);
}

void execute(LayerArgs& a, bool backward, const CellInfo& cell, const std::vector<int64_t>& sizes, Dtype dtype) {
  const CpuKernels& all = layer_kernels(dtype, backward || a.reserve, backward, a.batch, a.hidden, a.output);
  const Kernel& kernel = (backward ? all.backward : all.forward)[int(cell.cell)][int(dtype)];
  const int64_t min_rows = all.min_rows[int(dtype)];
  for (int threads = int(torch::stable::get_num_threads());; threads = 1) {
    a.plan = make_plan(a.steps, a.batch, a.input, a.hidden, a.output, cell.gates, a.directions,
                       dtype == Dtype::kF64 ? 8 : 4, min_rows, threads);
    std::vector<int64_t> bounds = cut_rows(sizes, a.batch, a.rows, a.plan.rows);
    std::vector<Barrier> barriers(1 + kMaxDirections * (1 + a.plan.rows));
    a.row_bounds = bounds.data();
    a.barriers = barriers.data();
    a.keep = !backward && keeps_weights(a);
    KeptWeights* weights = a.keep ? kept_weights(a, kernel, cell.cell, dtype) : nullptr;
    a.kept = weights ? weights->memory.bytes : nullptr;
    a.marks = weights ? weights->marks.data() : nullptr;
    static thread_local Scratch kept;
    Scratch own;
    const int64_t bytes = kernel.scratch(a);
    a.scratch = (bytes <= kMostKept ? kept : own).take(bytes);
    const bool done = run_together(a.plan.threads(), [&](int tid) { kernel.run(a, tid); });
    if (weights) WeightsKeeper::one().give_back(weights);
    if (done) return;
  }
}

constexpr int64_t kUnitsOfFlow = 8;  // no panel is narrower
void refuse_others(const std::string& cell, const OptionTensors& o) {
  STD_TORCH_CHECK(!o.lengths && o.clip_norm == 0, cell,
                  ": on the CPU, lengths come as packed rows, and norms are clipped by seqkern::recurrence");
}

ForwardOutputs run_forward(Tensor x, Optional h0, Optional c0, Tensors weights, Optional batch_sizes, std::string cell,
                           bool bidirectional, bool save, OptionTensors& o) {
  const Problem p = check_problem(cell, x, h0, c0, weights, batch_sizes, bidirectional);
  const bool lstm = p.cell.cell == Cell::kLstm;
  auto [y, h_n, c_n, reserve] = forward_outputs(p, x, save);
  in_large_pages(reserve);
  refuse_others(cell, o);
  if (lstm && (o.want_c || (o.zone_c && save))) o.c_all = empty(x, c_all_sizes(p));
  if (p.rows == 0) return {y, h_n, c_n, reserve};
  x = with_dense_rows(x);
  h0 = dense(h0);
  c0 = dense(c0);
  for (Tensor& w : weights) w = dense(w);
  LayerArgs a = common_args(p, x, h0, c0, weights, y, save && p.cell.saved ? Optional(reserve) : std::nullopt);
  a.h_n = data(h_n);
  a.c_n = lstm ? data(c_n) : nullptr;
  set_options(a, p, x, o, false, kUnitsOfFlow);
  const Dtype dtype = kernel_dtype(cell, x.scalar_type());
  execute(a, false, p.cell, p.sizes, dtype);
  return {y, h_n, c_n, reserve};
}

ForwardOutputs forward(Tensor x, Optional h0, Optional c0, Tensors weights, Optional batch_sizes, std::string cell,
                       bool bidirectional, bool save, bool /* tf32: CUDA's */) {
  OptionTensors none;
  return run_forward(x, h0, c0, weights, batch_sizes, cell, bidirectional, save, none);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> option_forward(Tensor x, Optional h0, Optional c0, Tensors weights,
                                                                  Optional batch_sizes, Optional keep, Optional h_mask,
                                                                  Optional zone_h, Optional zone_c, double clip_value,
                                                                  std::string cell, bool bidirectional, bool want_c,
                                                                  bool save, Optional lengths, double clip_norm,
                                                                  bool /* tf32: CUDA's */) {
  OptionTensors o{keep, h_mask, zone_h, zone_c, lengths, clip_value, clip_norm, want_c};
  auto [y, h_n, c_n, reserve] = run_forward(x, h0, c0, weights, batch_sizes, cell, bidirectional, save, o);
  return {y, h_n, c_n, o.c_all ? *o.c_all : empty(x, {0}), reserve};
}

BackwardOutputs run_backward(Optional dy, Optional dh_n, Optional dc_n, Tensor x, Optional h0, Optional c0,
                             Tensors weights, Optional batch_sizes, Tensor y, Tensor reserve, std::string cell,
                             bool bidirectional, bool need_dx, bool need_dw, OptionTensors& o) {
  const Problem p = check_problem(cell, x, h0, c0, weights, batch_sizes, bidirectional);
  const bool lstm = p.cell.cell == Cell::kLstm;
  refuse_others(cell, o);
  check_cotangents(p, cell, x.scalar_type(), dy, dh_n, dc_n, y);
  if (p.cell.saved && reserve.numel() == 0)  // forward kept nothing: run it again
    std::tie(y, std::ignore, std::ignore, reserve) =
        run_forward(x, h0, c0, weights, batch_sizes, cell, bidirectional, true, o);
  check_c_all(p, x, o);
  Wanted{cell, x.scalar_type()}.check(reserve, "reserve", "[D*N*saved*H]", {reserve_size(p)});

  auto [dx, dh0, dc0, dweights] = backward_outputs(p, x, weights, need_dx, need_dw);
  if (p.rows == 0) return {dx, dh0, dc0, dweights};
  x = with_dense_rows(x);
  h0 = dense(h0);
  c0 = dense(c0);
  y = dense(y);
  dh_n = dense(dh_n);
  dc_n = lstm ? dense(dc_n) : std::nullopt;
  reserve = dense(reserve);
  for (Tensor& w : weights) w = dense(w);
  if (dy) dy = with_dense_rows(*dy);
  LayerArgs a = common_args(p, x, h0, c0, weights, y, reserve);
  if (dy) a.dy = sequence(*dy, p.packed);
  a.dh_n = data(dh_n);
  a.dc_n = data(dc_n);
  a.dx = need_dx ? data(dx) : nullptr;
  set_options(a, p, x, o, true, kUnitsOfFlow);
  a.dh0 = data(dh0);
  a.dc0 = lstm ? data(dc0) : nullptr;
  for (int64_t d = 0; d < p.directions && need_dw; ++d) a.dweights[d] = weights_at(p, dweights, d);
  const Dtype dtype = kernel_dtype(cell, x.scalar_type());
  execute(a, true, p.cell, p.sizes, dtype);
  return {dx, dh0, dc0, dweights};
}

BackwardOutputs backward(Optional dy, Optional dh_n, Optional dc_n, Tensor x, Optional h0, Optional c0, Tensors weights,
                         Optional batch_sizes, Tensor y, Tensor reserve, std::string cell, bool bidirectional,
                         bool need_dx, bool need_dw, bool /* tf32: CUDA's */) {
  OptionTensors none;
  return run_backward(dy, dh_n, dc_n, x, h0, c0, weights, batch_sizes, y, reserve, cell, bidirectional, need_dx,
                      need_dw, none);
}

std::tuple<Tensor, Tensor, Tensor, Tensors, Tensor> option_backward(
    Optional dy, Optional dh_n, Optional dc_n, Optional dc_all, Tensor x, Optional h0, Optional c0, Tensors weights,
    Optional batch_sizes, Optional keep, Optional h_mask, Optional zone_h, Optional zone_c, double clip_value, Tensor y,
    Tensor c_all, Tensor reserve, std::string cell, bool bidirectional, bool need_dx, bool need_dw, bool want_flow,
    Optional lengths, double clip_norm, bool /* tf32: CUDA's */) {
  OptionTensors o{keep, h_mask, zone_h, zone_c, lengths, clip_value, clip_norm};
  if (c_all.numel()) o.c_all = dense(c_all);
  o.dc_all = dc_all;
  o.want_flow = want_flow;
  auto [dx, dh0, dc0, dweights] = run_backward(dy, dh_n, dc_n, x, h0, c0, weights, batch_sizes, y, reserve, cell,
                                               bidirectional, need_dx, need_dw, o);
  return {dx, dh0, dc0, dweights, o.flow ? *o.flow : empty(x, {0})};
}

Tensor bernoulli(Tensor like, std::vector<int64_t> size, Tensor seed, int64_t stream, double p, double value) {
  check_bernoulli(seed, p);
  Tensor to = empty(like, size);
  const int dtype = int(kernel_dtype("mask", like.scalar_type()));
  const RandomArgs r{*(const int64_t*)data(seed), stream, limit_of(p), value};
  const int64_t bytes = int64_t(like.element_size());
  torch::stable::parallel_for(0, to.numel(), 1 << 15, [&](int64_t begin, int64_t end) {
    cpu_kernels().bernoulli[dtype]((char*)data(to) + begin * bytes, begin, end, r);
  });
  return to;
}

std::string isa() { return cpu_kernels().isa; }
std::string isas() { return cpu_isas(); }

Tensor math(Tensor x, std::string name) {
  const bool for_bf16 = name == "tanh_bf16" || name == "sigmoid_bf16";  // of float, as a cell of bf16 computes it
  STD_TORCH_CHECK(name == "exp" || name == "tanh" || name == "sigmoid" || for_bf16,
                  "name must be exp, tanh, sigmoid, tanh_bf16 or sigmoid_bf16, got ", name);
  STD_TORCH_CHECK(!for_bf16 || x.scalar_type() == ScalarType::Float, name, " is for float32, got ",
                  dtype_name(x.scalar_type()));
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
                  "x must be float32 or float64, got ", dtype_name(x.scalar_type()));
  x = dense(x);
  Tensor y = empty(x, sizes_of(x));
  const CpuKernels& k = cpu_kernels();
  if (x.scalar_type() == ScalarType::Float) k.math_f32(name.c_str(), (float*)data(x), (float*)data(y), x.numel());
  else k.math_f64(name.c_str(), (double*)data(x), (double*)data(y), x.numel());
  return y;
}

int64_t mark(Tensor x) {
  x = dense(x);
  return int64_t(cpu_kernels().mark(data(x), x.numel() * int64_t(x.element_size())));
}

std::vector<int64_t> kept_weights_held() { return WeightsKeeper::one().held(); }

// GF/s of multiply-adds on registers with `threads` threads at once, the best of ten tries.
double peak(std::string dtype, int64_t threads) {
  int d = 0;
  const ScalarType types[kDtypes] = {ScalarType::Double, ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  while (d < kDtypes && dtype != dtype_name(types[d])) ++d;
  STD_TORCH_CHECK(d < kDtypes, "dtype must be float64, float32, bfloat16 or float16, got ", dtype);
  double best = 0;
  for (int i = 0; i < 10; ++i) {
    std::atomic<int64_t> flops{0};
    const auto start = std::chrono::steady_clock::now();
    run_together(int(threads), [&](int) { flops += cpu_kernels().burst[d](200'000); });
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
    best = std::max(best, double(flops) / time.count() / 1e9);
  }
  return best;
}

std::vector<int64_t> plan(int64_t steps, int64_t batch, int64_t input, int64_t hidden, int64_t output, std::string cell,
                          bool bidirectional) {
  const CpuKernels& all = layer_kernels(Dtype::kF32, false, false, batch, hidden, output);
  const Plan p = make_plan(steps, batch, input, hidden, output, cell_info(cell).gates, bidirectional ? 2 : 1, 4,
                           all.min_rows[int(Dtype::kF32)],
                           int(torch::stable::get_num_threads()));
  return {p.directions, p.rows, p.units, all.tiles};
}

// A step of a stream. Threads take whole vectors of units, whatever the CPU's.
void infer_step(const LayerArgs& a, const CellInfo& cell, Dtype dtype) {
  constexpr int64_t kUnits = 16;
  const auto single = layer_kernels(dtype, false, false, a.batch, a.hidden, a.output).single[int(cell.cell)][int(dtype)];
  for (int threads = int(torch::stable::get_num_threads());; threads = 1) {
    const Plan plan = make_plan(1, a.batch, a.input, a.hidden, a.output, cell.gates, a.directions,
                                dtype == Dtype::kF64 ? 8 : 4, 4, threads);
    const int parts = plan.rows * plan.units;
    const auto first = [&](int64_t part) {
      return std::min((a.hidden + kUnits - 1) / kUnits * part / parts * kUnits, a.hidden);
    };
    const auto work = [&](int tid) {
      for (int64_t d = tid / parts; d < a.directions; d += plan.directions)
        single(a, d, first(tid % parts), first(tid % parts + 1));
    };
    if (run_together(plan.threads(), work)) return;
  }
}

constexpr int64_t kDtypeBytes[kDtypes] = {8, 4, 2, 2};

Weights weights_of(const Plain& s, void* const* w) {
  const bool biased = s.per_direction >= 4, projected = s.per_direction % 2;
  return {w[0], w[1], biased ? w[2] : nullptr, biased ? w[3] : nullptr, projected ? w[s.per_direction - 1] : nullptr};
}

// The rows of each step of a batch without lengths.
struct Steps {
  std::vector<int64_t> sizes, starts;
  explicit Steps(LayerArgs& a) : sizes(a.steps, a.batch), starts(a.steps + 1) {
    for (int64_t t = 0; t <= a.steps; ++t) starts[t] = t * a.batch;
    a.sizes = sizes.data();
    a.starts = starts.data();
  }
};

LayerArgs layer_args(const Plain& s) {
  LayerArgs a{};
  a.steps = s.steps;
  a.batch = s.batch;
  a.rows = s.steps * s.batch;
  a.input = s.input;
  a.hidden = s.hidden;
  a.output = s.output;
  a.directions = s.directions;
  a.x = {s.x, s.batch_first ? s.input : s.batch * s.input, s.batch_first ? s.steps * s.input : s.input, false};
  a.h0 = s.h0;
  a.c0 = s.c0;
  for (int64_t d = 0; d < s.directions; ++d) a.weights[d] = weights_of(s, s.weights + d * s.per_direction);
  a.y = s.y;
  a.reserve = s.reserve;
  return a;
}
}  // namespace

void plain_forward(const Plain& s) {
  const CellInfo& cell = kCellInfos[s.cell];
  LayerArgs a = layer_args(s);
  a.h_n = s.h_n;
  a.c_n = s.c_n;
  if (s.reserve) large_pages(s.reserve, s.directions * a.rows * cell.saved * s.hidden * kDtypeBytes[s.dtype]);
  constexpr int64_t kFewRows = 2;
  if (s.steps == 1 && s.batch <= kFewRows && s.h0 && !a.reserve && !a.weights[0].w_hr &&
      (s.c0 || cell.cell != Cell::kLstm))
    return infer_step(a, cell, Dtype(s.dtype));
  const Steps steps(a);
  execute(a, false, cell, steps.sizes, Dtype(s.dtype));
}

void plain_backward(const Plain& s, const PlainGradients& g) {
  LayerArgs a = layer_args(s);
  const int64_t row = s.directions * s.output;
  if (g.dy) a.dy = {g.dy, s.batch * row, row, false};
  a.dh_n = g.dh_n;
  a.dc_n = g.dc_n;
  a.dx = g.dx;
  a.dh0 = g.dh0;
  a.dc0 = g.dc0;
  for (int64_t d = 0; g.dweights && d < s.directions; ++d) a.dweights[d] = weights_of(s, g.dweights + d * s.per_direction);
  const Steps steps(a);
  execute(a, true, kCellInfos[s.cell], steps.sizes, Dtype(s.dtype));
}

int64_t saved_per_unit(int64_t cell) { return kCellInfos[cell].saved; }

STABLE_TORCH_LIBRARY_IMPL(seqkern, CPU, m) {
  m.impl("rnn_layer", SK_BOX(forward));
  m.impl("rnn_layer_backward", SK_BOX(backward));
  m.impl("option_layer", SK_BOX(option_forward));
  m.impl("option_layer_backward", SK_BOX(option_backward));
  m.impl("_bernoulli", SK_BOX(bernoulli));
  m.impl("_cpu_math", SK_BOX(math));
  m.impl("_cpu_mark", SK_BOX(mark));
}
STABLE_TORCH_LIBRARY_IMPL(seqkern, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", SK_BOX(isa));
  m.impl("_cpu_isas", SK_BOX(isas));
  m.impl("_cpu_kept_weights", SK_BOX(kept_weights_held));
  m.impl("_cpu_peak", SK_BOX(peak));
  m.impl("_cpu_plan", SK_BOX(plan));
}
}  // namespace seqkern
