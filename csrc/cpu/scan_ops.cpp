// The operators of the cells that are linear in their state, on CPU tensors: share out the work, chain the pieces.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <functional>
#include <tuple>

#include "../core/box.h"
#include "../core/scan_problem.h"
#include "dispatch.h"
#include "memory.h"

namespace seqkern {
namespace {
struct ScanCall : ScanProblem {
  using ScanProblem::ScanProblem;

  // Runs `kernel` over all time for all units. With fewer vectors of units than threads, time is cut into pieces: first
  // each finds its factor and summand, then, with these chained, its results. `state` holds the initial state and gets
  // the last one, [B][H padded to vectors].
  void run(void (*kernel)(const ScanArgs&, const ScanPart&), char* state, int64_t vectors, int64_t bytes, bool reverse) {
    const int64_t threads = int64_t(torch::stable::get_num_threads());
    const int64_t pieces = vectors >= threads ? 1 : std::min<int64_t>(threads, args.steps / 256);
    if (pieces <= 1) {
      const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, args.steps));
      torch::stable::parallel_for(0, vectors, grain, [&](int64_t first, int64_t last) {
        kernel(args, {0, args.steps, first, last, state + first * bytes, nullptr, false});
      });
      return;
    }
    const int64_t size = vectors * bytes;
    std::vector<char> sums(size * pieces), factors(size * pieces);
    auto begin = [&](int64_t i) { return args.steps * i / pieces; };
    auto each = [&](const std::function<void(int64_t)>& work) {
      torch::stable::parallel_for(0, pieces, 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) work(i);
      });
    };
    each([&](int64_t i) {
      fill_ones(factors.data() + i * size, size);
      kernel(args, {begin(i), begin(i + 1), 0, vectors, sums.data() + i * size, factors.data() + i * size, true});
    });
    for (int64_t k = 0; k < pieces; ++k) {  // sums[i] becomes the state that piece i starts from
      const int64_t i = reverse ? pieces - 1 - k : k;
      chain(state, sums.data() + i * size, factors.data() + i * size, size);
    }
    each([&](int64_t i) {
      kernel(args, {begin(i), begin(i + 1), 0, vectors, sums.data() + i * size, nullptr, false});
    });
  }
  void fill_ones(char* to, int64_t bytes) const {
    if (sums == ScalarType::Double) std::fill_n((double*)to, bytes / 8, 1.0);
    else std::fill_n((float*)to, bytes / 4, 1.0f);
  }
  template <class T> static void chain_of(T* state, T* sum, const T* factor, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const T first = state[i];
      state[i] = (factor[i] == 0 ? T(0) : factor[i] * first) + sum[i];  // what was cleared may not be a number
      sum[i] = first;
    }
  }
  void chain(char* state, char* sum, const char* factor, int64_t bytes) const {
    if (sums == ScalarType::Double) chain_of((double*)state, (double*)sum, (const double*)factor, bytes / 8);
    else chain_of((float*)state, (float*)sum, (const float*)factor, bytes / 4);
  }

  // Vectors of units in the batch, and bytes of one: as wide as the kernels' registers.
  int64_t lanes() const { return cpu_kernels().scan_bytes / (sums == ScalarType::Double ? 8 : 4); }
  int64_t padded() const { return (args.hidden + lanes() - 1) / lanes() * lanes(); }
  Tensor padded_state() const { return torch::stable::new_zeros(p, {args.batch, padded()}, sums); }
};

Tensor first_units(const Tensor& t, int64_t n) { return torch::stable::narrow(const_cast<Tensor&>(t), 1, 0, n); }

Tensor scan(Tensor p, Optional h0, Optional keep, std::string cell) {
  ScanCall call(cell, p, h0, keep);
  ScanArgs& a = call.args;
  Tensor h = torch::stable::new_empty(p, {a.steps, a.batch, a.hidden});
  in_large_pages(h);
  if (a.batch == 0) return h;
  a.h = data(h);
  Tensor state = call.padded_state();
  if (h0) {
    Tensor to = first_units(state, a.hidden);
    torch::stable::copy_(to, *h0);
  }
  call.run(cpu_kernels().scan[call.cell][call.dtype].forward, (char*)data(state), a.batch * call.padded() / call.lanes(),
           cpu_kernels().scan_bytes, false);
  return h;
}

std::tuple<Tensor, Tensor> scan_backward(Tensor dh, Tensor p, Optional h0, Optional keep, Tensor h, std::string cell) {
  ScanCall call(cell, p, h0, keep);
  ScanArgs& a = call.args;
  call.check_backward(cell, dh, h);
  Tensor dp = torch::stable::new_empty(p, sizes_of(p)), dh0 = torch::stable::new_empty(p, {a.batch, a.hidden});
  in_large_pages(dp);
  if (a.batch == 0) return {dp, dh0};
  dh = dense(dh);
  h = dense(h);
  a.dh = data(dh);
  a.h = data(h);
  a.dp = data(dp);
  Tensor state = call.padded_state();
  call.run(cpu_kernels().scan[call.cell][call.dtype].backward, (char*)data(state),
           a.batch * call.padded() / call.lanes(), cpu_kernels().scan_bytes, true);
  torch::stable::copy_(dh0, first_units(state, a.hidden));
  return {dp, dh0};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqkern, CPU, m) {
  m.impl("scan", SK_BOX(scan));
  m.impl("scan_backward", SK_BOX(scan_backward));
}
}  // namespace seqkern
