// The recurrence's operators on CPU tensors: check, allocate, share out the rows, call the kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <tuple>

#include "../core/operands.h"
#include "dispatch.h"
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

struct Masks { Optional keep, h_mask, zone_h, zone_c; };

// The arguments common to forward and backward, checked; it holds the dense tensors that `args` points into.
struct RecurrenceCall {
  Problem p;
  RecurrenceArgs args{};
  Tensor gx;
  Optional h0, c0;
  Tensors params;
  Masks masks;
  const RecurrenceKernel& kernel;
  int64_t parameter_size = 0;  // of the gradients in a part's sums

  RecurrenceCall(const Tensor& x, const Optional& h, const Optional& c, const Tensors& given, const Optional& batch_sizes,
                 const Masks& m, double clip_value, double clip_norm, const std::string& cell, int64_t flags)
      : gx(dense(x)), h0(dense(h)), c0(dense(c)), masks(m),
        kernel(x.scalar_type() == ScalarType::Double ? cpu_recurrences().f64 : cpu_recurrences().f32) {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Double || x.scalar_type() == ScalarType::Float, cell,
                    ": gx must be float32 or float64, got ", dtype_name(x.scalar_type()));
    p.cell = cell_info(cell);
    read_steps(p, cell, gx, batch_sizes);
    const bool lstm = p.cell.cell == Cell::kLstm, gru = p.cell.cell == Cell::kGru;
    constexpr int64_t kOfLstm = kCoupled | kPeephole, kOfGru = kResetBefore | kBiasN;
    const int64_t allowed = lstm ? kOfLstm | kHard | kNormal : gru ? kOfGru | kHard | kNormal : 0;
    STD_TORCH_CHECK((flags & ~allowed) == 0 && !((flags & kResetBefore) && (flags & (kNormal | kBiasN))), cell,
                    ": no kernel for flags ", flags);
    args.variant = {(flags & kCoupled) != 0, (flags & kHard) != 0, (flags & kResetBefore) != 0, (flags & kNormal) != 0,
                    (flags & kPeephole) != 0};
    args.gates = args.variant.coupled ? 3 : p.cell.gates;
    STD_TORCH_CHECK(!given.empty() && given[0].dim() == 3, cell, ": w_hh must be [D, G*H, H]");
    p.directions = given[0].size(0);
    p.hidden = p.output = given[0].size(2);
    STD_TORCH_CHECK((p.directions == 1 || p.directions == 2) && p.hidden > 0, cell, ": w_hh must be [D, G*H, H] with D = 1 or 2, got ",
                    text(sizes_of(given[0])));
    Wanted want{cell, gx.scalar_type()};
    const int64_t d = p.directions, n = p.hidden, width = args.gates * n;
    STD_TORCH_CHECK(p.input == d * width, cell, ": gx must have D*G*H = ", d * width, " columns, got ", p.input);
    want.check(h0, "h0", "[D, B, H]", {d, p.batch, n});
    want.check(c0, "c0", "[D, B, H]", {d, p.batch, n});
    STD_TORCH_CHECK(lstm || !c0, cell, ": only the LSTM has a cell state");
    for (const Tensor& t : given) params.push_back(dense(t));
    size_t next = 0;
    auto take = [&](bool there, const char* name, int64_t size) -> const void* {
      if (!there) return nullptr;
      STD_TORCH_CHECK(next < params.size(), cell, ": params lack ", name);
      if (next) want.check(params[next], name, "[D, *]", {d, size});
      if (next) parameter_size += size;
      return data(params[next++]);
    };
    want.check(params[0], "w_hh", "[D, G*H, H]", {d, width, n});
    args.w_hh = take(true, "w_hh", 0);
    args.bias_n = take(flags & kBiasN, "bias_n", n);
    args.peephole = take(flags & kPeephole, "peephole", (args.variant.coupled ? 2 : 3) * n);
    args.gain_h = take(flags & kNormal, "gain_h", width);
    args.gain_c = take((flags & kNormal) && lstm, "gain_c", n);
    args.bias_c = take((flags & kNormal) && lstm, "bias_c", n);
    STD_TORCH_CHECK(next == params.size(), cell, ": params must hold ", next, " tensors, got ", params.size());
    set_masks(want);
    args.options.clip_value = clip_value;
    args.clip_norm = clip_norm;
    args.options.any = true;
    args.steps = p.steps;
    args.batch = p.batch;
    args.rows = p.rows;
    args.hidden = n;
    args.directions = d;
    args.sizes = p.sizes.data();
    args.starts = p.starts.data();
    args.cell = p.cell.cell;
    args.gx = data(gx);
    args.h0 = data(h0);
    args.c0 = data(c0);
  }
  RecurrenceCall(const RecurrenceCall&) = delete;

  void set_masks(const Wanted& want) {
    for (Optional* t : {&masks.keep, &masks.h_mask, &masks.zone_h, &masks.zone_c}) *t = dense(*t);
    want.check(masks.keep, "keep", "[N]", {p.rows});
    want.check(masks.h_mask, "h_mask", "[D, B, H]", {p.directions, p.batch, p.hidden});
    const int64_t width = p.directions * p.hidden;
    auto zone = [&](const Optional& z, const char* name) -> int64_t {
      if (!z) return 0;
      STD_TORCH_CHECK(z->dim() == 2, want.cell, ": ", name, " must be [N or 1, D*H], got ", text(sizes_of(*z)));
      want.check(z, name, "[N or 1, D*H]", {z->size(0) == 1 ? 1 : p.rows, width});
      return z->size(0) == 1 ? 0 : width;
    };
    LayerOptions& o = args.options;
    o.zone_h_row = zone(masks.zone_h, "zone_h");
    o.zone_c_row = zone(masks.zone_c, "zone_c");
    o.keep = data(masks.keep);
    o.h_mask = data(masks.h_mask);
    o.zone_h = data(masks.zone_h);
    o.zone_c = p.cell.cell == Cell::kLstm ? data(masks.zone_c) : nullptr;
  }

  std::vector<int64_t> states() const { return {p.directions, p.batch, p.hidden}; }
  std::vector<int64_t> all_states() const { return p.y_sizes(); }
  std::vector<int64_t> read_sizes() const { return {p.directions, p.rows, p.hidden}; }
  std::vector<int64_t> reserve_sizes() const {
    return {p.directions, p.rows, args.variant.row(args.cell, args.gates, p.hidden)};
  }

  int parts() const {
    const int64_t work = p.rows * p.directions * args.gates * p.hidden * p.hidden;
    const int64_t threads = std::min<int64_t>(int64_t(torch::stable::get_num_threads()), std::max<int64_t>(1, work / (kMinWork / 2)));
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
    for (int i = 0; i < n; ++i) at.push_back(at.back() + (kernel.scratch(args, backward, bounds[i + 1] - bounds[i]) + 4095) / 4096 * 4096);
    const auto scratch = memory(at.back() * p.directions);
    const int64_t bytes = gx.scalar_type() == ScalarType::Double ? 8 : 4;
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

Results recurrence(Tensor gx, Optional h0, Optional c0, Tensors params, Optional batch_sizes, Optional keep, Optional h_mask,
                   Optional zone_h, Optional zone_c, double clip_value, double clip_norm, std::string cell, int64_t flags,
                   bool want_c, bool save) {
  RecurrenceCall call(gx, h0, c0, params, batch_sizes, {keep, h_mask, zone_h, zone_c}, clip_value, clip_norm, cell, flags);
  RecurrenceArgs& a = call.args;
  const bool lstm = a.cell == Cell::kLstm;
  const std::vector<int64_t> none{0};
  Tensor y = empty(gx, call.all_states()), h_n = empty(gx, call.states()), c_n = empty(gx, lstm ? call.states() : none);
  Tensor c_all = empty(gx, lstm && want_c ? call.all_states() : none);
  Tensor read = empty(gx, save ? call.read_sizes() : none), reserve = empty(gx, save ? call.reserve_sizes() : none);
  if (call.p.rows == 0) return {y, h_n, c_n, c_all, read, reserve};
  a.y = data(y);
  a.h_n = data(h_n);
  a.c_n = lstm ? data(c_n) : nullptr;
  a.options.c_all = lstm && want_c ? data(c_all) : nullptr;
  a.read = save ? data(read) : nullptr;
  a.reserve = save ? data(reserve) : nullptr;
  call.run(false, std::nullopt);
  return {y, h_n, c_n, c_all, read, reserve};
}

// dgx, dgh [D, N, G*H] (empty where it is dgx), dh0, dc0, and the sums [parts, D, S] of the small parameters' gradients.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> recurrence_backward(
    Optional dy, Optional dh_n, Optional dc_n, Optional dc_all, Tensor gx, Optional h0, Optional c0, Tensors params,
    Optional batch_sizes, Optional keep, Optional h_mask, Optional zone_h, Optional zone_c, double clip_value,
    double clip_norm, Tensor read, Tensor reserve, std::string cell, int64_t flags) {
  RecurrenceCall call(gx, h0, c0, params, batch_sizes, {keep, h_mask, zone_h, zone_c}, clip_value, clip_norm, cell, flags);
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
