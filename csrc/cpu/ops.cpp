// The operators on CPU tensors: check, allocate, share out the work, call the kernel table.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <thread>
#include <tuple>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../core/operands.h"
#include "dispatch.h"
#include "plan.h"

namespace seqkern {
namespace {
// Tells the system to back memory that is fresh from it, as malloc's always is from 32 MiB on, with pages of 2 MiB: two
// threads that write it for the first time otherwise spend as long in page faults as in arithmetic.
void in_large_pages(const Tensor& t) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20, kAlwaysFresh = 32 << 20;
  const uintptr_t size = uintptr_t(t.numel()) * t.element_size(), begin = (uintptr_t(data(t)) + kPage - 1) / kPage * kPage;
  if (size >= kAlwaysFresh) madvise((void*)begin, (uintptr_t(data(t)) + size) / kPage * kPage - begin, MADV_HUGEPAGE);
#endif
}

// Memory for one call's packed weights and buffers. Each calling thread keeps its last, up to a limit: memory fresh from
// the system is cleared page by page, which took a third of the time of training at B=4 H=512. Pages of 2 MiB, because
// translating addresses of 4 KiB pages halves the rate at which large weights are read.
constexpr int64_t kMostKept = 64 << 20;
struct Scratch {
  char* bytes = nullptr;
  int64_t size = 0;
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() { std::free(bytes); }
  char* take(int64_t wanted) {
    if (wanted <= size) return bytes;
    constexpr int64_t kPage = 2 << 20;
    const int64_t page = wanted < kPage ? 4096 : kPage;
    std::free(bytes);
    size = 0;
    bytes = (char*)std::aligned_alloc(page, (wanted + page - 1) / page * page);
    STD_TORCH_CHECK(bytes, "not enough memory for ", wanted, " bytes of scratch");
    size = (wanted + page - 1) / page * page;
#if defined(__linux__)
    if (page == kPage) madvise(bytes, size, MADV_HUGEPAGE);
#endif
    return bytes;
  }
};

// Calls work(tid) once for each of `count` threads, all at the same time, as threads that meet need it. False, with
// nothing done, where the pool would have run several on one thread (inside another parallel region, after a fork).
template <class Work> bool run_together(int count, const Work& work) {
  if (count == 1) {
    work(0);
    return true;
  }
  std::atomic<int> arrived{0};
  std::atomic<bool> one_each{true};
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    if (end - begin != 1) one_each = false;
    arrived += int(end - begin);
    for (int spins = 0; arrived.load() < count; ++spins)
      if (spins > 4000) std::this_thread::yield();
    if (one_each) work(int(begin));
  });
  return one_each;
}

void execute(LayerArgs& a, const Kernel& kernel, const Problem& p, const Tensor& like) {
  const int64_t min_rows = cpu_kernels().min_rows[int(kernel_dtype(p.cell.name, like.scalar_type()))];
  for (int threads = int(torch::stable::get_num_threads());; threads = 1) {
    a.plan = make_plan(p.steps, p.batch, p.input, p.hidden, p.output, p.cell.gates, p.directions,
                       int64_t(like.element_size() < 4 ? 4 : like.element_size()), min_rows, threads);
    std::vector<int64_t> bounds = cut_rows(p.sizes, p.batch, p.rows, a.plan.rows);
    std::vector<Barrier> barriers(1 + kMaxDirections * (1 + a.plan.rows));
    a.row_bounds = bounds.data();
    a.barriers = barriers.data();
    static thread_local Scratch kept;
    Scratch own;
    const int64_t bytes = kernel.scratch(a);
    a.scratch = (bytes <= kMostKept ? kept : own).take(bytes);
    if (run_together(a.plan.threads(), [&](int tid) { kernel.run(a, tid); })) return;
  }
}

ForwardOutputs forward(Tensor x, Optional h0, Optional c0, Tensors weights, Optional batch_sizes, std::string cell,
                       bool bidirectional, bool save, bool /* tf32: CUDA's */) {
  const Problem p = check_problem(cell, x, h0, c0, weights, batch_sizes, bidirectional);
  const bool lstm = p.cell.cell == Cell::kLstm;
  auto [y, h_n, c_n, reserve] = forward_outputs(p, x, save);
  in_large_pages(reserve);
  if (p.rows == 0) return {y, h_n, c_n, reserve};
  x = with_dense_rows(x);
  h0 = dense(h0);
  c0 = dense(c0);
  for (Tensor& w : weights) w = dense(w);
  LayerArgs a = common_args(p, x, h0, c0, weights, y, save && p.cell.saved ? Optional(reserve) : std::nullopt);
  a.h_n = data(h_n);
  a.c_n = lstm ? data(c_n) : nullptr;
  execute(a, cpu_kernels().forward[int(p.cell.cell)][int(kernel_dtype(cell, x.scalar_type()))], p, x);
  return {y, h_n, c_n, reserve};
}

BackwardOutputs backward(Optional dy, Optional dh_n, Optional dc_n, Tensor x, Optional h0, Optional c0, Tensors weights,
                         Optional batch_sizes, Tensor y, Tensor reserve, std::string cell, bool bidirectional,
                         bool need_dx, bool need_dw, bool tf32) {
  const Problem p = check_problem(cell, x, h0, c0, weights, batch_sizes, bidirectional);
  const bool lstm = p.cell.cell == Cell::kLstm;
  check_cotangents(p, cell, x.scalar_type(), dy, dh_n, dc_n, y);
  if (p.cell.saved && reserve.numel() == 0)  // forward kept nothing: run it again
    std::tie(y, std::ignore, std::ignore, reserve) =
        forward(x, h0, c0, weights, batch_sizes, cell, bidirectional, true, tf32);
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
  a.dh0 = data(dh0);
  a.dc0 = lstm ? data(dc0) : nullptr;
  for (int64_t d = 0; d < p.directions && need_dw; ++d) a.dweights[d] = weights_at(p, dweights, d);
  execute(a, cpu_kernels().backward[int(p.cell.cell)][int(kernel_dtype(cell, x.scalar_type()))], p, x);
  return {dx, dh0, dc0, dweights};
}

std::string isa() { return cpu_kernels().isa; }
std::string isas() { return cpu_isas(); }

Tensor math(Tensor x, std::string name) {
  STD_TORCH_CHECK(name == "exp" || name == "tanh" || name == "sigmoid", "name must be exp, tanh or sigmoid, got ",
                  name);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
                  "x must be float32 or float64, got ", dtype_name(x.scalar_type()));
  x = dense(x);
  Tensor y = empty(x, sizes_of(x));
  const CpuKernels& k = cpu_kernels();
  if (x.scalar_type() == ScalarType::Float) k.math_f32(name.c_str(), (float*)data(x), (float*)data(y), x.numel());
  else k.math_f64(name.c_str(), (double*)data(x), (double*)data(y), x.numel());
  return y;
}

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
  const Plan p = make_plan(steps, batch, input, hidden, output, cell_info(cell).gates, bidirectional ? 2 : 1, 4,
                           cpu_kernels().min_rows[int(Dtype::kF32)],
                           int(torch::stable::get_num_threads()));
  return {p.directions, p.rows, p.units};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqkern, CPU, m) {
  m.impl("rnn_layer", TORCH_BOX(&forward));
  m.impl("rnn_layer_backward", TORCH_BOX(&backward));
  m.impl("_cpu_math", TORCH_BOX(&math));
}
STABLE_TORCH_LIBRARY_IMPL(seqkern, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&isa));
  m.impl("_cpu_isas", TORCH_BOX(&isas));
  m.impl("_cpu_peak", TORCH_BOX(&peak));
  m.impl("_cpu_plan", TORCH_BOX(&plan));
}
}  // namespace seqkern
