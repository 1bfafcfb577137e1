// The recurrence's operators, whatever the device: their arguments, checked, as the kernels take them, and their
// results.
#pragma once
#include <tuple>

#include "operands.h"

namespace seqkern {

// Bits of `flags`; the names are seqkern/recurrence.py's.
enum : int64_t { kCoupled = 1, kHard = 2, kResetBefore = 4, kNormal = 8, kPeephole = 16, kBiasN = 32 };

struct RecurrenceInputs {
  Tensor gx;
  Optional h0, c0;
  Tensors params;
  Optional batch_sizes, keep, h_mask, zone_h, zone_c;
  double clip_value, clip_norm;
  std::string cell;
  int64_t flags;
  Optional lengths;
};

using RecurrenceResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using RecurrenceGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
struct RecurrenceCotangents {
  Optional dy, dh_n, dc_n, dc_all;
  Tensor read, reserve;
};

// The arguments common to forward and backward, checked; it holds the dense tensors that `args` points into.
struct RecurrenceProblem {
  Problem p;
  RecurrenceArgs args{};
  RecurrenceInputs in;
  int64_t parameter_size = 0;  // of the gradients in a part's sums

  explicit RecurrenceProblem(const RecurrenceInputs& given) : in(given) {
    const std::string& cell = in.cell;
    const ScalarType type = in.gx.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Double || type == ScalarType::Float, cell,
                    ": gx must be float32 or float64, got ", dtype_name(type));
    p.cell = cell_info(cell);
    args.cell = p.cell.cell;
    in.gx = dense(in.gx);
    for (Optional* t : {&in.h0, &in.c0, &in.keep, &in.h_mask, &in.zone_h, &in.zone_c, &in.lengths}) *t = dense(*t);
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
  RecurrenceProblem(const RecurrenceProblem&) = delete;

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
    if (in.lengths) Wanted{in.cell, ScalarType::Long}.check(in.lengths, "lengths", "[B]", {p.batch});
    STD_TORCH_CHECK(!in.lengths || !p.packed, in.cell, ": lengths are for padded input, got batch_sizes too");
    o.lengths = (const int64_t*)data(in.lengths);
    args.clip_norm = in.clip_norm;
  }

  std::vector<int64_t> states() const { return {p.directions, p.batch, p.hidden}; }
  std::vector<int64_t> all_states() const { return p.y_sizes(); }
  std::vector<int64_t> read_sizes() const { return {p.directions, p.rows, p.hidden}; }
  std::vector<int64_t> reserve_sizes() const {
    return {p.directions, p.rows, args.variant.row(args.cell, args.gates, p.hidden)};
  }

  // y, h_n, c_n, c_all, read, reserve: allocated, and pointed to.
  RecurrenceResults results(bool want_c, bool save) {
    const Tensor& gx = in.gx;
    const bool lstm = args.cell == Cell::kLstm;
    const std::vector<int64_t> none{0};
    RecurrenceResults r{empty(gx, all_states()),
                        empty(gx, states()),
                        empty(gx, lstm ? states() : none),
                        empty(gx, lstm && want_c ? all_states() : none),
                        empty(gx, save ? read_sizes() : none),
                        empty(gx, save ? reserve_sizes() : none)};
    auto& [y, h_n, c_n, c_all, read, reserve] = r;
    args.y = data(y);
    args.h_n = data(h_n);
    args.c_n = lstm ? data(c_n) : nullptr;
    args.options.c_all = lstm && want_c ? data(c_all) : nullptr;
    args.read = save ? data(read) : nullptr;
    args.reserve = save ? data(reserve) : nullptr;
    return r;
  }

  // The same for backward: dgx, dgh [D, N, G*H] (empty where it is dgx), dh0, dc0, and sums [parts, D, S] of the small
  // parameters' gradients. What it is given besides forward's arguments is checked, and made dense in place.
  RecurrenceGradients gradients(RecurrenceCotangents& given, int64_t parts) {
    const bool lstm = args.cell == Cell::kLstm;
    const Wanted want{in.cell, in.gx.scalar_type()};
    const char* every = p.packed ? "[N, D*H]" : "[T, B, D*H]";
    auto& [dy, dh_n, dc_n, dc_all, read, reserve] = given;
    want.check(dy, "dy", every, all_states());
    want.check(dh_n, "dh_n", "[D, B, H]", states());
    if (lstm) want.check(dc_n, "dc_n", "[D, B, H]", states());
    if (lstm) want.check(dc_all, "dc_all", every, all_states());
    want.check(read, "read", "[D, N, H]", read_sizes());
    want.check(reserve, "reserve", "[D, N, saved]", reserve_sizes());
    for (Optional* t : {&dy, &dh_n, &dc_n, &dc_all}) *t = dense(*t);
    read = dense(read);
    reserve = dense(reserve);
    args.dy = data(dy);
    args.dh_n = data(dh_n);
    args.dc_n = lstm ? data(dc_n) : nullptr;
    args.options.dc_all = lstm ? data(dc_all) : nullptr;
    args.read = data(read);
    args.reserve = data(reserve);
    const std::vector<int64_t> none{0};
    const bool other = args.variant.normal || (args.cell == Cell::kGru && !args.variant.reset_before);
    RecurrenceGradients r{
        empty(in.gx, sizes_of(in.gx)),
        empty(in.gx, other ? std::vector<int64_t>{p.directions, p.rows, args.gates * p.hidden} : none),
        empty(in.gx, states()), empty(in.gx, lstm ? states() : none),
        zeros(in.gx, {parts, p.directions, parameter_size})};
    auto& [dgx, dgh, dh0, dc0, sums] = r;
    args.dgx = data(dgx);
    args.dgh = other ? data(dgh) : nullptr;
    args.dh0 = data(dh0);
    args.dc0 = lstm ? data(dc0) : nullptr;
    return r;
  }
};
}  // namespace seqkern
