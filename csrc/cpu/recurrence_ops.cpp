// The recurrence's operators on CPU tensors: check, allocate, share out the rows, call the kernels.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "../core/box.h"
#include "../core/recurrence_problem.h"
#include "dispatch.h"
#include "memory.h"
#include "plan.h"

namespace seqkern {
namespace {
struct Free {
  void operator()(char* p) const { std::free(p); }
};
std::unique_ptr<char, Free> memory(int64_t bytes) {
  constexpr int64_t kLine = 64;
  char* p = (char*)std::aligned_alloc(kLine, (std::max<int64_t>(bytes, 1) + kLine - 1) / kLine * kLine);
  STD_TORCH_CHECK(p, "not enough memory for ", bytes, " bytes of scratch");
  return std::unique_ptr<char, Free>(p);
}

struct RecurrenceCall : RecurrenceProblem {
  const RecurrenceKernel& kernel;

  explicit RecurrenceCall(const RecurrenceInputs& given)
      : RecurrenceProblem(given),
        kernel(given.gx.scalar_type() == ScalarType::Double ? cpu_recurrences().f64 : cpu_recurrences().f32) {
    STD_TORCH_CHECK(!in.lengths, in.cell, ": on the CPU lengths are for packed rows, got lengths");
  }

  int parts() const {
    const int64_t work = p.rows * p.directions * args.gates * p.hidden * p.hidden;
    const int64_t wanted = std::max<int64_t>(1, work / (kMinWork / 2));
    const int64_t threads = std::min<int64_t>(int64_t(torch::stable::get_num_threads()), wanted);
    return int(std::clamp<int64_t>((threads + p.directions - 1) / p.directions, 1, std::max<int64_t>(1, p.batch)));
  }
  // Rows of the batch for each part, its sums of gradients into sums [parts, D, S].
  void run(bool backward, const Optional& sums) {
    const int n = parts();
    const std::vector<int64_t> bounds = cut_rows(p.sizes, p.batch, p.rows, n);
    const auto packed = memory(kernel.packed(args, backward));
    args.packed = packed.get();
    torch::stable::parallel_for(0, kernel.panels(args, backward), 4,
                                [&](int64_t first, int64_t last) { kernel.pack(args, backward, first, last); });
    const int64_t tasks = n * p.directions;
    std::vector<int64_t> at(1, 0);
    for (int i = 0; i < n; ++i) {
      constexpr int64_t kPage = 4096;  // parts share no line
      at.push_back(at.back() + (kernel.scratch(args, backward, bounds[i + 1] - bounds[i]) + kPage - 1) / kPage * kPage);
    }
    const auto scratch = memory(at.back() * p.directions);
    const int64_t bytes = in.gx.scalar_type() == ScalarType::Double ? 8 : 4;
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t d = i / n, part = i % n;
        char* to = sums ? (char*)data(*sums) + (part * p.directions + d) * parameter_size * bytes : nullptr;
        kernel.run(args, backward, {d, bounds[part], bounds[part + 1], scratch.get() + d * at.back() + at[part], to});
      }
    });
  }
};

RecurrenceResults recurrence(Tensor gx, Optional h0, Optional c0, Tensors params, Optional batch_sizes, Optional keep,
                             Optional h_mask, Optional zone_h, Optional zone_c, double clip_value, double clip_norm,
                             std::string cell, int64_t flags, bool want_c, bool save, Optional lengths, bool) {
  RecurrenceCall call(
      {gx, h0, c0, params, batch_sizes, keep, h_mask, zone_h, zone_c, clip_value, clip_norm, cell, flags, lengths});
  RecurrenceResults results = call.results(want_c, save);
  if (call.p.rows == 0) return results;
  in_large_pages(std::get<5>(results));
  call.run(false, std::nullopt);
  return results;
}

RecurrenceGradients recurrence_backward(Optional dy, Optional dh_n, Optional dc_n, Optional dc_all, Tensor gx,
                                        Optional h0, Optional c0, Tensors params, Optional batch_sizes, Optional keep,
                                        Optional h_mask, Optional zone_h, Optional zone_c, double clip_value,
                                        double clip_norm, Tensor read, Tensor reserve, std::string cell, int64_t flags,
                                        Optional lengths, bool) {
  RecurrenceCall call(
      {gx, h0, c0, params, batch_sizes, keep, h_mask, zone_h, zone_c, clip_value, clip_norm, cell, flags, lengths});
  RecurrenceCotangents given{dy, dh_n, dc_n, dc_all, read, reserve};
  RecurrenceGradients gradients = call.gradients(given, call.parts());
  if (call.p.rows == 0) return gradients;
  in_large_pages(std::get<0>(gradients));
  in_large_pages(std::get<1>(gradients));
  call.run(true, std::get<4>(gradients));
  return gradients;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqkern, CPU, m) {
  m.impl("recurrence", SK_BOX(recurrence));
  m.impl("_recurrence_backward", SK_BOX(recurrence_backward));
}
}  // namespace seqkern
