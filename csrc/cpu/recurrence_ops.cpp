// The recurrence's operators on CPU tensors: check, allocate, share out the rows, call the kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <tuple>

#include "dispatch.h"
#include "memory.h"
#include "plan.h"

namespace seqkern {
namespace {
// Bits of `flags`; the names are seqkern/recurrence.py's.
enum : int64_t { kCoupled = 1, kHard = 2, kResetBefore = 4, kNormal = 8, kPeephole = 16, kBiasN = 32 };

struct Free { void operator()(char* p) const { std::free(p); } };
std::unique_ptr<char, Free> memory(int64_t bytes) {
  constexpr int64_t kLine = 64;
  char* p = (char*)std::aligned_alloc(kLine, (std::max<int64_t>(bytes, 1) + kLine - 1) / kLine * kLine);
  STD_TORCH_CHECK(p, "not enough memory for ", bytes, " bytes of scratch");
  return std::unique_ptr<char, Free>(p);
}

struct Inputs {
  Tensor gx;
  Optional h0, c0;
  Tensors params;
  Optional batch_sizes, keep, h_mask, zone_h, zone_c;
  double clip_value, clip_norm;
  std::string cell;
  int64_t flags;
};

// The arguments common to forward and backward, checked; it holds the dense tensors that `args` points into.
struct RecurrenceCall {
  Problem p;
  RecurrenceArgs args{};
  Inputs in;
  const RecurrenceKernel& kernel;
  int64_t parameter_size = 0;  // of the gradients in a part's sums

  explicit RecurrenceCall(const Inputs& given)
      : in(given), kernel(given.gx.scalar_type() == ScalarType::Double ? cpu_recurrences().f64 : cpu_recurrences().f32) {
    const std::string& cell = in.cell;
    const ScalarType type = in.gx.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Double || type == ScalarType::Float, cell, ": gx must be float32 or float64, got ",
                    dtype_name(type));
    p.cell = cell_info(cell);
    args.cell = p.cell.cell;
    in.gx = dense(in.gx);
    for (Optional* t : {&in.h0, &in.c0, &in.keep, &in.h_mask, &in.zone_h, &in.zone_c}) *t = dense(*t);
    read_steps(p, cell, in.gx, in.batch_sizes);
    set_variant();
    set_params();
    set_masks();
    const Wanted want{cell, type};
    want.check(in.h0, "h0", "[D, B, H]", states());
    want.check(in.c0, "c0", "[D, B, H]", states());
    STD_TORCH_CHECK(args.cell == Cell::kLstm || !in.c0, cell, ": only the LSTM has a cell state");
    args.steps = p.steps;
    args.batch = p.batch;
    args.rows = p.rows;
    args.hidden = p.hidden;
    args.directions = p.directions;
    args.sizes = p.sizes.data();
    args.starts = p.starts.data();
    args.gx = data(in.gx);
    args.h0 = data(in.h0);
    args.c0 = data(in.c0);
  }
  RecurrenceCall(const RecurrenceCall&) = delete;

  bool has(int64_t flag) const { return (in.flags & flag) != 0; }

  void set_variant() {
    const bool lstm = args.cell == Cell::kLstm, gru = args.cell == Cell::kGru;
    constexpr int64_t kBoth = kHard | kNormal;
    const int64_t allowed = lstm ? kCoupled | kPeephole | kBoth : gru ? kResetBefore | kBiasN | kBoth : 0;
    STD_TORCH_CHECK((in.flags & ~allowed) == 0 && !(has(kResetBefore) && has(kNormal | kBiasN)), in.cell,
                    ": no kernel for flags ", in.flags);
    args.variant = {has(kCoupled), has(kHard), has(kResetBefore), has(kNormal), has(kPeephole)};
    args.gates = has(kCoupled) ? 3 : p.cell.gates;
  }

  void set_params() {
    Tensors& params = in.params;
    STD_TORCH_CHECK(!params.empty() && params[0].dim() == 3, in.cell, ": w_hh must be [D, G*H, H]");
    const int64_t d = p.directions = params[0].size(0), n = p.hidden = p.output = params[0].size(2);
    STD_TORCH_CHECK((d == 1 || d == 2) && n > 0, in.cell, ": w_hh must be [D, G*H, H] with D = 1 or 2, got ",
                    text(sizes_of(params[0])));
    const int64_t width = args.gates * n;
    STD_TORCH_CHECK(p.input == d * width, in.cell, ": gx must have D*G*H = ", d * width, " columns, got ", p.input);
    for (Tensor& t : params) t = dense(t);
    const Wanted want{in.cell, in.gx.scalar_type()};
    want.check(params[0], "w_hh", "[D, G*H, H]", {d, width, n});
    args.w_hh = data(params[0]);
    size_t next = 1;
    auto take = [&](bool there, const char* name, int64_t size) -> const void* {
      if (!there) return nullptr;
      STD_TORCH_CHECK(next < params.size(), in.cell, ": params lack ", name);
      want.check(params[next], name, "[D, *]", {d, size});
      parameter_size += size;
      return data(params[next++]);
    };
    const bool normal_c = has(kNormal) && args.cell == Cell::kLstm;
    args.bias_n = take(has(kBiasN), "bias_n", n);
    args.peephole = take(has(kPeephole), "peephole", (has(kCoupled) ? 2 : 3) * n);
    args.gain_h = take(has(kNormal), "gain_h", width);
    args.gain_c = take(normal_c, "gain_c", n);
    args.bias_c = take(normal_c, "bias_c", n);
    STD_TORCH_CHECK(next == params.size(), in.cell, ": params must hold ", next, " tensors, got ", params.size());
  }

  void set_masks() {
    const Wanted want{in.cell, in.gx.scalar_type()};
    want.check(in.keep, "keep", "[N]", {p.rows});
    want.check(in.h_mask, "h_mask", "[D, B, H]", states());
    const int64_t width = p.directions * p.hidden;
    auto zone = [&](const Optional& z, const char* name) -> int64_t {
      if (!z) return 0;
      want.check(z, name, "[N or 1, D*H]", {z->dim() && z->size(0) == 1 ? 1 : p.rows, width});
      return z->size(0) == 1 ? 0 : width;
    };
    LayerOptions& o = args.options;
    o.any = true;
    o.zone_h_row = zone(in.zone_h, "zone_h");
    o.zone_c_row = zone(in.zone_c, "zone_c");
    o.keep = data(in.keep);
    o.h_mask = data(in.h_mask);
    o.zone_h = data(in.zone_h);
    o.zone_c = args.cell == Cell::kLstm ? data(in.zone_c) : nullptr;
    o.clip_value = in.clip_value;
    args.clip_norm = in.clip_norm;
  }

  std::vector<int64_t> states() const { return {p.directions, p.batch, p.hidden}; }
  std::vector<int64_t> all_states() const { return p.y_sizes(); }
  std::vector<int64_t> read_sizes() const { return {p.directions, p.rows, p.hidden}; }
  std::vector<int64_t> reserve_sizes() const {
    return {p.directions, p.rows, args.variant.row(args.cell, args.gates, p.hidden)};
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
    torch::stable::parallel_for(0, kernel.panels(args, backward), 4, [&](int64_t first, int64_t last) {
      kernel.pack(args, backward, first, last);
    });
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

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results recurrence(Tensor gx, Optional h0, Optional c0, Tensors params, Optional batch_sizes, Optional keep,
                   Optional h_mask, Optional zone_h, Optional zone_c, double clip_value, double clip_norm,
                   std::string cell, int64_t flags, bool want_c, bool save) {
  RecurrenceCall call({gx, h0, c0, params, batch_sizes, keep, h_mask, zone_h, zone_c, clip_value, clip_norm, cell, flags});
  RecurrenceArgs& a = call.args;
  const bool lstm = a.cell == Cell::kLstm;
  const std::vector<int64_t> none{0};
  Tensor y = empty(gx, call.all_states()), h_n = empty(gx, call.states()), c_n = empty(gx, lstm ? call.states() : none);
  Tensor c_all = empty(gx, lstm && want_c ? call.all_states() : none);
  Tensor read = empty(gx, save ? call.read_sizes() : none), reserve = empty(gx, save ? call.reserve_sizes() : none);
  if (call.p.rows == 0) return {y, h_n, c_n, c_all, read, reserve};
  in_large_pages(reserve);
  a.y = data(y);
  a.h_n = data(h_n);
  a.c_n = lstm ? data(c_n) : nullptr;
  a.options.c_all = lstm && want_c ? data(c_all) : nullptr;
  a.read = save ? data(read) : nullptr;
  a.reserve = save ? data(reserve) : nullptr;
  call.run(false, std::nullopt);
  return {y, h_n, c_n, c_all, read, reserve};
}

// dgx, dgh [D, N, G*H] (empty where it is dgx), dh0, dc0, and sums [parts, D, S] of the small parameters' gradients.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> recurrence_backward(
    Optional dy, Optional dh_n, Optional dc_n, Optional dc_all, Tensor gx, Optional h0, Optional c0, Tensors params,
    Optional batch_sizes, Optional keep, Optional h_mask, Optional zone_h, Optional zone_c, double clip_value,
    double clip_norm, Tensor read, Tensor reserve, std::string cell, int64_t flags) {
  RecurrenceCall call({gx, h0, c0, params, batch_sizes, keep, h_mask, zone_h, zone_c, clip_value, clip_norm, cell, flags});
  RecurrenceArgs& a = call.args;
  const bool lstm = a.cell == Cell::kLstm;
  Wanted want{cell, gx.scalar_type()};
  const char* every = call.p.packed ? "[N, D*H]" : "[T, B, D*H]";
  want.check(dy, "dy", every, call.all_states());
  want.check(dh_n, "dh_n", "[D, B, H]", call.states());
  if (lstm) want.check(dc_n, "dc_n", "[D, B, H]", call.states());
  if (lstm) want.check(dc_all, "dc_all", every, call.all_states());
  want.check(read, "read", "[D, N, H]", call.read_sizes());
  want.check(reserve, "reserve", "[D, N, saved]", call.reserve_sizes());
  const std::vector<int64_t> none{0};
  const bool other = a.variant.normal || (a.cell == Cell::kGru && !a.variant.reset_before);
  Tensor dgx = empty(gx, sizes_of(gx)), dh0 = empty(gx, call.states()), dc0 = empty(gx, lstm ? call.states() : none);
  Tensor dgh = empty(gx, other ? std::vector<int64_t>{call.p.directions, call.p.rows, a.gates * a.hidden} : none);
  Tensor sums = zeros(gx, {call.parts(), call.p.directions, call.parameter_size});
  if (call.p.rows == 0) return {dgx, dgh, dh0, dc0, sums};
  in_large_pages(dgx);
  in_large_pages(dgh);
  for (Optional* t : {&dy, &dh_n, &dc_n, &dc_all}) *t = dense(*t);
  read = dense(read);
  reserve = dense(reserve);
  a.dy = data(dy);
  a.dh_n = data(dh_n);
  a.dc_n = lstm ? data(dc_n) : nullptr;
  a.options.dc_all = lstm ? data(dc_all) : nullptr;
  a.read = data(read);
  a.reserve = data(reserve);
  a.dgx = data(dgx);
  a.dgh = other ? data(dgh) : nullptr;
  a.dh0 = data(dh0);
  a.dc0 = lstm ? data(dc0) : nullptr;
  call.run(true, sums);
  return {dgx, dgh, dh0, dc0, sums};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqkern, CPU, m) {
  m.impl("recurrence", TORCH_BOX(&recurrence));
  m.impl("_recurrence_backward", TORCH_BOX(&recurrence_backward));
}
}  // namespace seqkern
