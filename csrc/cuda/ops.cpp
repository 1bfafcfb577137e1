// The operators on CUDA tensors: check, plan, allocate, and call the layer on the caller's stream.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <tuple>

#include "../core/box.h"
#include "../core/layer_options.h"
#include "../core/recurrence_problem.h"
#include "../core/scan_problem.h"
#include "launch.h"
#include "planner.h"

namespace seqkern { namespace cuda {
namespace {

// Functions of torch's stable C interface that a torch without CUDA lacks: looked up, so that the extension imports
// there.
struct TorchCuda {
  AOTITorchError (*stream)(int32_t device, void** stream);
  AOTITorchError (*blas)(void** handle);
  TorchCuda() {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    auto find = [&](const char* name) { return library ? dlsym(library, name) : nullptr; };
    stream = (decltype(stream))find("aoti_torch_get_current_cuda_stream");
    blas = (decltype(blas))find("torch_get_current_cuda_blas_handle");
  }
};
const TorchCuda& torch_cuda() {
  static const TorchCuda found;
  return found;
}

// The current stream of cuda:index, which is the current device, and the cuBLAS handle bound to it.
struct Current {
  void *stream = nullptr, *blas = nullptr;
  Current(const std::string& cell, int index) {
    const TorchCuda& functions = torch_cuda();
    STD_TORCH_CHECK(functions.stream && functions.blas && !functions.stream(index, &stream) && !functions.blas(&blas),
                    cell, ": torch gave no stream or no cuBLAS handle for cuda:", index);
  }
};

void check_devices(const std::string& cell, const Tensor& x, std::initializer_list<const Optional*> some,
                   const Tensors& weights) {
  STD_TORCH_CHECK(x.is_cuda(), cell, ": x must be on a GPU as other arguments are, got one elsewhere");
  auto check = [&](const Tensor& t) {
    STD_TORCH_CHECK(
        t.is_cuda() && t.get_device_index() == x.get_device_index(), cell,
        ": states and weights must be on cuda:", x.get_device_index(), " as x is, got one on ",
        t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : std::string("another kind of device"));
  };
  for (const Optional* t : some)
    if (*t) check(**t);
  for (const Tensor& w : weights) check(w);
}

// Of the current device, which has number `index`; asked once.
const Device& properties(int index) {
  static std::mutex lock;
  static std::map<int, Device> known;
  std::lock_guard<std::mutex> held(lock);
  auto found = known.find(index);
  if (found == known.end()) {
    Device d{};
    const Error error = query_device(&d);
    STD_TORCH_CHECK(!error, "cuda:", index, ": ", error);
    found = known.emplace(index, d).first;
  }
  return found->second;
}

// The plan, under SEQKERN_CUDA_ENGINE = step | grid where it is set, and only if its blocks are resident at once.
Plan choose(const Shape& s, const Device& d, bool backward) {
  const char* set = std::getenv("SEQKERN_CUDA_ENGINE");
  const std::string forced = set ? set : "";
  STD_TORCH_CHECK(forced.empty() || forced == "step" || forced == "grid",
                  "SEQKERN_CUDA_ENGINE must be step or grid, got ", forced);
  if (forced == "step") return detail::step_plan("step: SEQKERN_CUDA_ENGINE asks for it");
  Plan plan = backward ? plan_backward(s, d) : plan_forward(s, d);
  if (plan.engine == Engine::kGrid && !grid_fits(s.cell, s.dtype, plan, backward, s.options))
    plan = detail::step_plan("step: the grid engine's blocks are not all resident at once");
  STD_TORCH_CHECK(forced != "grid" || plan.engine == Engine::kGrid, "SEQKERN_CUDA_ENGINE=grid, but ", plan.why);
  return plan;
}

Shape shape_of(const Problem& p, Dtype dtype, bool tf32, const LayerOptions& o) {
  return {p.cell.cell, dtype,    tf32,         p.steps,  p.batch, p.hidden,
          p.output,    p.directions, p.packed, o.any,   o.clip_norm > 0};
}

// x as [N, I]: its rows' distance in memory, the same from each to the next; 0 where there is none.
int64_t row_stride(const Tensor& x, const Problem& p) {
  if (x.stride(-1) != 1 && p.input > 1) return 0;
  int64_t row = p.input;  // strides of dimensions of size 1 say nothing
  if (p.packed && p.rows > 1) row = x.stride(0);
  if (!p.packed && p.batch > 1) row = x.stride(1);
  if (!p.packed && p.batch == 1 && p.steps > 1) row = x.stride(0);
  const bool even = p.packed || p.steps == 1 || p.batch == 1 || x.stride(0) == p.batch * row;
  return even && row >= p.input ? row : 0;
}
// The sequence x for the products over all steps; `x` is replaced by a dense copy where it has to be.
Sequence as_rows(Tensor& x, const Problem& p) {
  int64_t row = row_stride(x, p);
  if (!row) x = dense(x), row = p.input;
  return {data(x), 0, row, p.packed};
}

void run(LayerCall& call, const Problem& p, const std::string& cell, const Tensor& x, bool backward) {
  const int index = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const Plan plan = choose(shape_of(p, call.dtype, call.tf32, call.layer.options), properties(index), backward);
  call.plan = &plan;
  const Tensor workspace = torch::stable::new_empty(x, {layer_workspace(call, backward)}, ScalarType::Byte);
  const Current now(cell, index);
  const Error error = (backward ? layer_backward : layer_forward)(call, (char*)data(workspace), now.stream, now.blas);
  STD_TORCH_CHECK(!error, cell, ": the ", engine_name(plan.engine), " engine on cuda:", index, " failed: ", error);
}

constexpr int64_t kUnitsOfFlow = 1;

void check_devices(const std::string& cell, const Tensor& x, const OptionTensors& o) {
  check_devices(cell, x, {&o.keep, &o.h_mask, &o.zone_h, &o.zone_c, &o.lengths, &o.c_all, &o.dc_all}, {});
}

ForwardOutputs run_forward(Tensor x, Optional h0, Optional c0, Tensors weights, Optional batch_sizes, std::string cell,
                           bool bidirectional, bool save, bool tf32, OptionTensors& o) {
  const Problem p = check_problem(cell, x, h0, c0, weights, batch_sizes, bidirectional);
  const bool lstm = p.cell.cell == Cell::kLstm;
  check_devices(cell, x, {&h0, &c0}, weights);
  check_devices(cell, x, o);
  auto [y, h_n, c_n, reserve] = forward_outputs(p, x, save);
  if (lstm && (o.want_c || (o.zone_c && save))) o.c_all = empty(x, c_all_sizes(p));
  if (p.rows == 0) return {y, h_n, c_n, reserve};
  const Sequence rows = as_rows(x, p);
  h0 = dense(h0);
  c0 = dense(c0);
  for (Tensor& w : weights) w = dense(w);
  LayerCall call{common_args(p, x, h0, c0, weights, y, save && p.cell.saved ? Optional(reserve) : std::nullopt),
                 p.cell.cell, kernel_dtype(cell, x.scalar_type()), tf32, nullptr};
  call.layer.x = rows;
  call.layer.h_n = data(h_n);
  call.layer.c_n = lstm ? data(c_n) : nullptr;
  set_options(call.layer, p, x, o, false, kUnitsOfFlow);
  run(call, p, cell, x, false);
  return {y, h_n, c_n, reserve};
}

ForwardOutputs forward(Tensor x, Optional h0, Optional c0, Tensors weights, Optional batch_sizes, std::string cell,
                       bool bidirectional, bool save, bool tf32) {
  OptionTensors none;
  return run_forward(x, h0, c0, weights, batch_sizes, cell, bidirectional, save, tf32, none);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> option_forward(Tensor x, Optional h0, Optional c0, Tensors weights,
                                                                  Optional batch_sizes, Optional keep, Optional h_mask,
                                                                  Optional zone_h, Optional zone_c, double clip_value,
                                                                  std::string cell, bool bidirectional, bool want_c,
                                                                  bool save, Optional lengths, double clip_norm,
                                                                  bool tf32) {
  OptionTensors o{keep, h_mask, zone_h, zone_c, lengths, clip_value, clip_norm, want_c};
  auto [y, h_n, c_n, reserve] = run_forward(x, h0, c0, weights, batch_sizes, cell, bidirectional, save, tf32, o);
  return {y, h_n, c_n, o.c_all ? *o.c_all : empty(x, {0}), reserve};
}

BackwardOutputs run_backward(Optional dy, Optional dh_n, Optional dc_n, Tensor x, Optional h0, Optional c0,
                             Tensors weights, Optional batch_sizes, Tensor y, Tensor reserve, std::string cell,
                             bool bidirectional, bool need_dx, bool need_dw, bool tf32, OptionTensors& o) {
  const Problem p = check_problem(cell, x, h0, c0, weights, batch_sizes, bidirectional);
  const bool lstm = p.cell.cell == Cell::kLstm;
  const Optional outputs[] = {y, reserve};
  check_devices(cell, x, {&h0, &c0, &dy, &dh_n, &dc_n, &outputs[0], &outputs[1]}, weights);
  check_devices(cell, x, o);
  check_cotangents(p, cell, x.scalar_type(), dy, dh_n, dc_n, y);
  if (p.cell.saved && reserve.numel() == 0)  // forward kept nothing: run it again
    std::tie(y, std::ignore, std::ignore, reserve) =
        run_forward(x, h0, c0, weights, batch_sizes, cell, bidirectional, true, tf32, o);
  check_c_all(p, x, o);
  Wanted{cell, x.scalar_type()}.check(reserve, "reserve", "[D*N*saved*H]", {reserve_size(p)});
  auto [dx, dh0, dc0, dweights] = backward_outputs(p, x, weights, need_dx, need_dw);
  if (p.rows == 0) return {dx, dh0, dc0, dweights};
  const Sequence rows = as_rows(x, p);
  h0 = dense(h0);
  c0 = dense(c0);
  y = dense(y);
  dh_n = dense(dh_n);
  dc_n = lstm ? dense(dc_n) : std::nullopt;
  reserve = dense(reserve);
  for (Tensor& w : weights) w = dense(w);
  if (dy) dy = with_dense_rows(*dy);
  LayerCall call{common_args(p, x, h0, c0, weights, y, reserve), p.cell.cell, kernel_dtype(cell, x.scalar_type()), tf32,
                 nullptr};
  LayerArgs& a = call.layer;
  a.x = rows;
  if (dy) a.dy = sequence(*dy, p.packed);
  a.dh_n = data(dh_n);
  a.dc_n = data(dc_n);
  a.dx = need_dx ? data(dx) : nullptr;
  a.dh0 = data(dh0);
  a.dc0 = lstm ? data(dc0) : nullptr;
  for (int64_t d = 0; d < p.directions && need_dw; ++d) a.dweights[d] = weights_at(p, dweights, d);
  set_options(a, p, x, o, true, kUnitsOfFlow);
  run(call, p, cell, x, true);
  return {dx, dh0, dc0, dweights};
}

BackwardOutputs backward(Optional dy, Optional dh_n, Optional dc_n, Tensor x, Optional h0, Optional c0, Tensors weights,
                         Optional batch_sizes, Tensor y, Tensor reserve, std::string cell, bool bidirectional,
                         bool need_dx, bool need_dw, bool tf32) {
  OptionTensors none;
  return run_backward(dy, dh_n, dc_n, x, h0, c0, weights, batch_sizes, y, reserve, cell, bidirectional, need_dx,
                      need_dw, tf32, none);
}

std::tuple<Tensor, Tensor, Tensor, Tensors, Tensor> option_backward(
    Optional dy, Optional dh_n, Optional dc_n, Optional dc_all, Tensor x, Optional h0, Optional c0, Tensors weights,
    Optional batch_sizes, Optional keep, Optional h_mask, Optional zone_h, Optional zone_c, double clip_value, Tensor y,
    Tensor c_all, Tensor reserve, std::string cell, bool bidirectional, bool need_dx, bool need_dw, bool want_flow,
    Optional lengths, double clip_norm, bool tf32) {
  OptionTensors o{keep, h_mask, zone_h, zone_c, lengths, clip_value, clip_norm};
  if (c_all.numel()) o.c_all = dense(c_all);
  o.dc_all = dc_all;
  o.want_flow = want_flow;
  auto [dx, dh0, dc0, dweights] = run_backward(dy, dh_n, dc_n, x, h0, c0, weights, batch_sizes, y, reserve, cell,
                                               bidirectional, need_dx, need_dw, tf32, o);
  return {dx, dh0, dc0, dweights, o.flow ? *o.flow : empty(x, {0})};
}

// seed: on the GPU; nobody waits for it.
Tensor bernoulli(Tensor like, std::vector<int64_t> size, Tensor seed, int64_t stream, double p, double value) {
  check_bernoulli(seed, p);
  check_devices("mask", like, {}, {seed});
  Tensor to = empty(like, size);
  const int index = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const Random r{(const int64_t*)data(seed), stream, limit_of(p), value, to.numel(), data(to)};
  const Error error = fill_mask(kernel_dtype("mask", like.scalar_type()), r, Current("mask", index).stream);
  STD_TORCH_CHECK(!error, "mask: on cuda:", index, ": ", error);
  return to;
}

void run_scan(const ScanProblem& problem, const std::string& cell, void* dh0) {
  const int index = problem.p.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const Dtype dtype = Dtype(problem.dtype);
  const int sms = properties(index).sms;
  const Tensor workspace =
      torch::stable::new_empty(problem.p, {scan_workspace(problem.args, dtype, sms)}, ScalarType::Byte);
  const Error error =
      scan(problem.args, dh0, problem.cell, dtype, sms, (char*)data(workspace), Current(cell, index).stream);
  STD_TORCH_CHECK(!error, cell, ": on cuda:", index, ": ", error);
}

Tensor scan_forward(Tensor p, Optional h0, Optional keep, std::string cell) {
  check_devices(cell, p, {&h0, &keep}, {});
  ScanProblem problem(cell, p, h0, keep);
  ScanArgs& a = problem.args;
  Tensor h = empty(p, {a.steps, a.batch, a.hidden});
  if (a.batch == 0) return h;
  a.h = data(h);
  run_scan(problem, cell, nullptr);
  return h;
}

std::tuple<Tensor, Tensor> scan_backward(Tensor dh, Tensor p, Optional h0, Optional keep, Tensor h, std::string cell) {
  check_devices(cell, p, {&h0, &keep}, {dh, h});
  ScanProblem problem(cell, p, h0, keep);
  problem.check_backward(cell, dh, h);
  ScanArgs& a = problem.args;
  Tensor dp = empty(p, sizes_of(p)), dh0 = empty(p, {a.batch, a.hidden});
  if (a.batch == 0) return {dp, dh0};
  dh = dense(dh);
  h = dense(h);
  a.dh = data(dh);
  a.h = data(h);
  a.dp = data(dp);
  run_scan(problem, cell, data(dh0));
  return {dp, dh0};
}

void check_devices(const std::string& cell, const RecurrenceInputs& in) {
  check_devices(cell, in.gx, {&in.h0, &in.c0, &in.keep, &in.h_mask, &in.zone_h, &in.zone_c, &in.lengths}, in.params);
}
// sums: backward's.
void run_recurrence(const RecurrenceProblem& problem, bool tf32, const Tensor* sums) {
  const RecurrenceInputs& in = problem.in;
  const int index = in.gx.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const VariantCall call{problem.args,
                         kernel_dtype(in.cell, in.gx.scalar_type()),
                         tf32,
                         problem.p.packed,
                         problem.parameter_size,
                         sums ? data(*sums) : nullptr};
  const bool backward = sums != nullptr;
  const Tensor workspace = torch::stable::new_empty(in.gx, {variant_workspace(call, backward)}, ScalarType::Byte);
  const Current now(in.cell, index);
  const Error error = variant_pass(call, backward, (char*)data(workspace), now.stream, now.blas);
  STD_TORCH_CHECK(!error, in.cell, ": the recurrence on cuda:", index, " failed: ", error);
}

RecurrenceResults recurrence(Tensor gx, Optional h0, Optional c0, Tensors params, Optional batch_sizes, Optional keep,
                             Optional h_mask, Optional zone_h, Optional zone_c, double clip_value, double clip_norm,
                             std::string cell, int64_t flags, bool want_c, bool save, Optional lengths, bool tf32) {
  const RecurrenceInputs in{gx,     h0,     c0,         params,    batch_sizes, keep,  h_mask,
                            zone_h, zone_c, clip_value, clip_norm, cell,        flags, lengths};
  check_devices(cell, in);
  RecurrenceProblem problem(in);
  RecurrenceResults results = problem.results(want_c, save);
  if (problem.p.rows) run_recurrence(problem, tf32, nullptr);
  return results;
}

RecurrenceGradients recurrence_backward(Optional dy, Optional dh_n, Optional dc_n, Optional dc_all, Tensor gx,
                                        Optional h0, Optional c0, Tensors params, Optional batch_sizes, Optional keep,
                                        Optional h_mask, Optional zone_h, Optional zone_c, double clip_value,
                                        double clip_norm, Tensor read, Tensor reserve, std::string cell, int64_t flags,
                                        Optional lengths, bool tf32) {
  const RecurrenceInputs in{gx,     h0,     c0,         params,    batch_sizes, keep,  h_mask,
                            zone_h, zone_c, clip_value, clip_norm, cell,        flags, lengths};
  check_devices(cell, in);
  check_devices(cell, gx, {&dy, &dh_n, &dc_n, &dc_all}, {read, reserve});
  RecurrenceProblem problem(in);
  RecurrenceCotangents given{dy, dh_n, dc_n, dc_all, read, reserve};
  RecurrenceGradients gradients = problem.gradients(given, problem.p.batch);
  if (problem.p.rows) run_recurrence(problem, tf32, &std::get<4>(gradients));
  return gradients;
}

// Rows of all three lie side by side.
void transposed_product(Tensor out, Tensor a, Tensor b) {
  check_devices("product", out, {}, {a, b});
  for (const Tensor* t : {&out, &a, &b})
    STD_TORCH_CHECK(t->dim() == 2 && t->scalar_type() == ScalarType::Float && t->stride(1) == 1,
                    "product: wants float32 matrices with columns side by side");
  STD_TORCH_CHECK(a.size(0) == b.size(0) && a.size(1) == out.size(0) && b.size(1) == out.size(1),
                  "product: the sizes do not fit");
  const int index = out.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const Current now("product", index);
  const Gemm g{data(a), data(b), data(out), a.size(1), b.size(1), a.size(0), a.stride(0), b.stride(0), out.stride(0),
               true, false, 1, 0, 0, 0, Dtype::kF32, Dtype::kF32, true, false};
  const Error error = product(g, now.stream, now.blas);
  STD_TORCH_CHECK(!error, "product on cuda:", index, " failed: ", error);
}

// JSON. `sizes`: T, B, H, P.
std::string plan(std::vector<int64_t> sizes, std::string cell, std::string dtype, bool tf32, bool bidirectional,
                 bool backward, int64_t device, bool options, bool norms) {
  STD_TORCH_CHECK(sizes.size() == 4, "sizes must be T, B, H, P, got ", sizes.size(), " numbers");
  const ScalarType types[kDtypes] = {ScalarType::Double, ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  int t = 0;
  while (t < kDtypes && dtype != dtype_name(types[t])) ++t;
  STD_TORCH_CHECK(t < kDtypes, "dtype must be float64, float32, bfloat16 or float16, got ", dtype);
  const torch::stable::accelerator::DeviceGuard guard{int32_t(device)};
  const Shape s{cell_info(cell).cell,  Dtype(t), tf32,   sizes[0], sizes[1], sizes[2], sizes[3],
                bidirectional ? 2 : 1, false,    options,  norms};
  const Plan p = choose(s, properties(int(device)), backward);
  auto field = [](const char* name, int64_t value) {
    return ", \"" + std::string(name) + "\": " + std::to_string(value);
  };
  return "{\"engine\": \"" + std::string(engine_name(p.engine)) + "\", \"why\": \"" + p.why + "\"" +
         field("directions", p.directions) + field("tiles", p.tiles) + field("batch_tile", p.batch_tile) +
         field("ctas", p.ctas) + field("units_per_cta", p.units_per_cta) + field("rows_per_thread", p.rows_per_thread) +
         field("threads", p.threads) + field("shared_bytes", p.shared_bytes) +
         field("workspace_bytes", p.workspace_bytes) + "}";
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqkern, CUDA, m) {
  m.impl("rnn_layer", SK_BOX(forward));
  m.impl("rnn_layer_backward", SK_BOX(backward));
  m.impl("option_layer", SK_BOX(option_forward));
  m.impl("option_layer_backward", SK_BOX(option_backward));
  m.impl("recurrence", SK_BOX(recurrence));
  m.impl("_recurrence_backward", SK_BOX(recurrence_backward));
  m.impl("_transposed_product", SK_BOX(transposed_product));
  m.impl("_bernoulli", SK_BOX(bernoulli));
  m.impl("scan", SK_BOX(scan_forward));
  m.impl("scan_backward", SK_BOX(scan_backward));
}
STABLE_TORCH_LIBRARY_IMPL(seqkern, CompositeExplicitAutograd, m) { m.impl("_cuda_plan", SK_BOX(plan)); }
}}  // namespace seqkern::cuda
