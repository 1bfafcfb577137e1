// The attention decoder's operators on CPU tensors: check, allocate, share out the batch, call the kernel table.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "../core/box.h"
#include "../core/operands.h"
#include "dispatch.h"
#include "execute.h"
#include "plan.h"

namespace seqkern {
namespace {
struct Inputs {
  Tensor gx;
  Optional feed0;
  Tensor h0;
  Optional c0;
  Tensors weights;
  Tensor keys, values, lengths;
  Optional w_query, v;
  Tensor w_pre, b_pre;
  Optional masks;
  std::string cell;
  Optional tokens;
};

void check_sizes(const std::string& name, const Tensor& t, int64_t dims, const char* what, const char* letters) {
  STD_TORCH_CHECK(t.dim() == dims, name, ": ", what, " must be ", letters, ", got ", text(sizes_of(t)));
}

void check_lengths(const std::string& name, const Tensor& lengths, int64_t batch, int64_t source) {
  STD_TORCH_CHECK(
      sizes_of(lengths) == std::vector<int64_t>{batch} && lengths.scalar_type() == ScalarType::Long && lengths.is_cpu(),
      name, ": lengths must be [B] = [", batch, "] int64 on the CPU, got ", text(sizes_of(lengths)), " ",
      dtype_name(lengths.scalar_type()));
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t n = ((const int64_t*)lengths.data_ptr())[b * lengths.stride(0)];
    STD_TORCH_CHECK(n >= 0 && n <= source, name, ": lengths must be in [0, S] = [0, ", source, "], got ", n);
  }
}

void check_tokens(const std::string& name, const Tensor& tokens, int64_t vocab) {
  STD_TORCH_CHECK(tokens.scalar_type() == ScalarType::Long && tokens.is_cpu(), name,
                  ": tokens must be int64 on the CPU, got ", dtype_name(tokens.scalar_type()));
  const Tensor plain = dense(tokens);
  const int64_t* token = (const int64_t*)data(plain);
  for (int64_t i = 0; i < plain.numel(); ++i)
    STD_TORCH_CHECK(token[i] >= 0 && token[i] < vocab, name, ": tokens must be in [0, V) = [0, ", vocab, "), got ",
                    token[i]);
}

void check_layers(const std::string& name, const Inputs& in, int64_t gates, int64_t layers, int64_t hidden,
                  int64_t vector) {
  STD_TORCH_CHECK(int64_t(in.weights.size()) == 4 * layers - 1, name,
                  ": weights must be w_feed, w_hh, b_hh, then w_ih, w_hh, b_ih, b_hh of each further layer: 4*L - 1 = ",
                  4 * layers - 1, " tensors, got ", in.weights.size());
  const Wanted want{name, in.gx.scalar_type()};
  const int64_t rows = gates * hidden;
  want.check(in.weights[0], "w_feed", "[G*H, A]", {rows, vector});
  want.check(in.weights[1], "w_hh", "[G*H, H]", {rows, hidden});
  want.check(in.weights[2], "b_hh", "[G*H]", {rows});
  for (int64_t l = 1; l < layers; ++l) {
    const Tensor* w = in.weights.data() + 4 * l - 1;
    const std::string of = " of layer " + std::to_string(l);
    want.check(w[0], "w_ih" + of, "[G*H, H]", {rows, hidden});
    want.check(w[1], "w_hh" + of, "[G*H, H]", {rows, hidden});
    want.check(w[2], "b_ih" + of, "[G*H]", {rows});
    want.check(w[3], "b_hh" + of, "[G*H]", {rows});
  }
}

std::vector<DecoderWeights> pointers(const Tensors& w) {
  std::vector<DecoderWeights> to{{data(w[0]), data(w[1]), nullptr, data(w[2])}};
  for (size_t i = 3; i < w.size(); i += 4) to.push_back({data(w[i]), data(w[i + 1]), data(w[i + 2]), data(w[i + 3])});
  return to;
}

// A call, checked; `in` is made dense.
struct Call {
  CellInfo cell;
  Dtype dtype;
  Inputs in;
  DecoderArgs args{};
  std::vector<DecoderWeights> weights;

  explicit Call(Inputs given) : in(std::move(given)) {
    const std::string& name = in.cell;
    cell = cell_info(name);
    dtype = kernel_dtype(name, in.gx.scalar_type());
    DecoderArgs& a = args;
    if (in.tokens) check_sizes(name, in.gx, 2, "gx", "[V, G*H] beside tokens");
    else check_sizes(name, in.gx, 3, "gx", "[T, B, G*H]");
    check_sizes(name, in.h0, 3, "h0", "[L, B, H]");
    check_sizes(name, in.keys, 3, "keys", "[B, S, K]");
    check_sizes(name, in.values, 3, "values", "[B, S, A]");
    if (in.tokens) check_sizes(name, *in.tokens, 2, "tokens", "[T, B]");
    a.vocab = in.tokens ? in.gx.size(0) : 0;
    a.steps = in.tokens ? in.tokens->size(0) : in.gx.size(0);
    a.batch = in.tokens ? in.tokens->size(1) : in.gx.size(1);
    a.layers = in.h0.size(0);
    a.hidden = in.h0.size(2);
    a.source = in.keys.size(1);
    a.key = in.keys.size(2);
    a.vector = in.values.size(2);
    STD_TORCH_CHECK(a.steps > 0 && a.layers > 0 && a.source > 0 && a.hidden > 0 && a.key > 0 && a.vector > 0, name,
                    ": T, L, S, H, K and A must be at least 1, got ",
                    text({a.steps, a.layers, a.source, a.hidden, a.key, a.vector}));
    const Wanted want{name, in.gx.scalar_type()};
    if (in.tokens) want.check(in.gx, "gx", "[V, G*H]", {a.vocab, cell.gates * a.hidden});
    else want.check(in.gx, "gx", "[T, B, G*H]", {a.steps, a.batch, cell.gates * a.hidden});
    if (in.tokens) check_tokens(name, *in.tokens, a.vocab);
    want.check(in.h0, "h0", "[L, B, H]", {a.layers, a.batch, a.hidden});
    want.check(in.feed0, "feed0", "[B, A]", {a.batch, a.vector});
    const bool lstm = cell.cell == Cell::kLstm;
    STD_TORCH_CHECK(lstm == in.c0.has_value(), name, lstm ? ": c0 must be given" : ": only the LSTM has a c0");
    want.check(in.c0, "c0", "[L, B, H]", {a.layers, a.batch, a.hidden});
    check_layers(name, in, cell.gates, a.layers, a.hidden, a.vector);
    want.check(in.keys, "keys", "[B, S, K]", {a.batch, a.source, a.key});
    want.check(in.values, "values", "[B, S, A]", {a.batch, a.source, a.vector});
    check_lengths(name, in.lengths, a.batch, a.source);
    STD_TORCH_CHECK(in.w_query.has_value() == in.v.has_value(), name,
                    ": w_query and v must be given both or not at all");
    STD_TORCH_CHECK(in.v || a.key == a.hidden, name, ": keys must be [B, S, H] without w_query, H = ", a.hidden,
                    ", got ", text(sizes_of(in.keys)));
    want.check(in.w_query, "w_query", "[K, H]", {a.key, a.hidden});
    want.check(in.v, "v", "[K]", {a.key});
    want.check(in.w_pre, "w_pre", "[A, H]", {a.vector, a.hidden});
    want.check(in.b_pre, "b_pre", "[A]", {a.vector});
    want.check(in.masks, "masks", "[T, L-1, B, H]", {a.steps, a.layers - 1, a.batch, a.hidden});
    read();
  }
  void read() {
    for (Tensor* t : {&in.gx, &in.h0, &in.keys, &in.values, &in.lengths, &in.w_pre, &in.b_pre}) *t = dense(*t);
    for (Optional* t : {&in.feed0, &in.c0, &in.w_query, &in.v, &in.masks, &in.tokens}) *t = dense(*t);
    for (Tensor& w : in.weights) w = dense(w);
    DecoderArgs& a = args;
    a.gx = data(in.gx);
    a.tokens = (const int64_t*)data(in.tokens);
    a.feed0 = data(in.feed0);
    a.h0 = data(in.h0);
    a.c0 = data(in.c0);
    weights = pointers(in.weights);
    a.weights = weights.data();
    a.keys = data(in.keys);
    a.values = data(in.values);
    a.lengths = (const int64_t*)data(in.lengths);
    a.w_query = data(in.w_query);
    a.v = data(in.v);
    a.w_pre = data(in.w_pre);
    a.b_pre = data(in.b_pre);
    a.masks = a.layers > 1 ? data(in.masks) : nullptr;
  }
  int64_t reserve_size() const {
    const DecoderArgs& a = args;
    return a.steps * a.batch * (a.layers * (cell.saved + 1) * a.hidden + (in.v ? a.key : 0));
  }
  // Multiply-adds of a row and step.
  int64_t work() const {
    const DecoderArgs& a = args;
    return cell.gates * a.hidden * (a.vector + a.hidden + 2 * (a.layers - 1) * a.hidden) + a.hidden * a.vector +
           a.source * (a.key * (in.v ? 16 : 1) + a.vector);
  }
  void execute(const DecoderKernel& kernel) {
    DecoderArgs& a = args;
    const int64_t all = a.steps * a.batch * work();
    int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), std::max<int64_t>(1, all / (kMinWork / 2)));
    // Each thread reads all weights at every step: fewer than four rows are not worth that.
    threads = std::max<int64_t>(1, std::min<int64_t>(threads, a.batch / 4));
    for (;; threads = 1) {
      Barrier barrier{};
      a.threads = int(threads);
      a.barrier = &barrier;
      static thread_local Scratch kept;
      Scratch own;
      const int64_t bytes = kernel.scratch(a);
      a.scratch = (bytes <= kMostKept ? kept : own).take(bytes);
      if (run_together(a.threads, [&](int tid) { kernel.run(a, tid); })) return;
    }
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> run_forward(const Inputs& inputs, bool save) {
  Call call(inputs);
  DecoderArgs& a = call.args;
  const Tensor& like = call.in.gx;
  const bool lstm = call.cell.cell == Cell::kLstm;
  Tensor out = empty(like, {a.steps, a.batch, a.vector}), h_n = empty(like, {a.layers, a.batch, a.hidden});
  Tensor c_n = empty(like, lstm ? std::vector<int64_t>{a.layers, a.batch, a.hidden} : std::vector<int64_t>{0});
  Tensor alpha = empty(like, {a.steps, a.batch, a.source}), reserve = empty(like, {save ? call.reserve_size() : 0});
  if (a.batch == 0) return {out, h_n, c_n, alpha, reserve};
  a.a = data(out);
  a.h_n = data(h_n);
  a.c_n = data(c_n);
  a.alpha = data(alpha);
  a.reserve = save ? data(reserve) : nullptr;
  in_large_pages(reserve);
  call.execute(decoder_kernels().forward[int(call.cell.cell)][int(call.dtype)]);
  return {out, h_n, c_n, alpha, reserve};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(Tensor gx, Optional feed0, Tensor h0, Optional c0,
                                                           Tensors weights, Tensor keys, Tensor values, Tensor lengths,
                                                           Optional w_query, Optional v, Tensor w_pre, Tensor b_pre,
                                                           Optional masks, std::string cell, bool save,
                                                           Optional tokens) {
  return run_forward({gx, feed0, h0, c0, weights, keys, values, lengths, w_query, v, w_pre, b_pre, masks, cell, tokens},
                     save);
}

// The kernels write every element, but there is no kernel call for a batch of 0.
Tensor like_if(bool wanted, const Tensor& like, const Optional& t, bool none) {
  if (!t || !wanted) return empty(like, {0});
  return none ? zeros(like, sizes_of(*t)) : empty(like, sizes_of(*t));
}

using Gradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensors, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward(Optional da, Optional dh_n, Optional dc_n, Optional dalpha, Tensor gx, Optional feed0, Tensor h0,
                   Optional c0, Tensors weights, Tensor keys, Tensor values, Tensor lengths, Optional w_query,
                   Optional v, Tensor w_pre, Tensor b_pre, Optional masks, Tensor out, Tensor alpha, Tensor reserve,
                   std::string cell, bool need_sources, bool need_weights, bool need_masks, Optional tokens) {
  Call call({gx, feed0, h0, c0, weights, keys, values, lengths, w_query, v, w_pre, b_pre, masks, cell, tokens});
  DecoderArgs& a = call.args;
  const Wanted want{cell, gx.scalar_type()};
  const bool lstm = call.cell.cell == Cell::kLstm;
  want.check(da, "da", "[T, B, A]", {a.steps, a.batch, a.vector});
  want.check(dh_n, "dh_n", "[L, B, H]", {a.layers, a.batch, a.hidden});
  if (lstm) want.check(dc_n, "dc_n", "[L, B, H]", {a.layers, a.batch, a.hidden});
  want.check(dalpha, "dalpha", "[T, B, S]", {a.steps, a.batch, a.source});
  want.check(out, "a", "[T, B, A]", {a.steps, a.batch, a.vector});
  want.check(alpha, "alpha", "[T, B, S]", {a.steps, a.batch, a.source});
  if (reserve.numel() == 0)  // forward kept nothing: run it again
    std::tie(out, std::ignore, std::ignore, alpha, reserve) = run_forward(call.in, true);
  want.check(reserve, "reserve", "[T*B*(L*(saved + 1)*H + K)]", {call.reserve_size()});

  const bool none = a.batch == 0;
  Tensors dweights;
  for (const Tensor& w : weights)
    if (need_weights) dweights.push_back(like_if(true, gx, w, none));
  Tensor dgx = none ? zeros(gx, sizes_of(gx)) : empty(gx, sizes_of(gx)), dfeed0 = like_if(true, gx, feed0, none),
         dh0 = empty(gx, sizes_of(h0));
  Tensor dc0 = lstm ? empty(gx, sizes_of(h0)) : empty(gx, {0});
  Tensor dkeys = like_if(need_sources, gx, keys, none), dvalues = like_if(need_sources, gx, values, none);
  Tensor dw_query = like_if(need_weights, gx, w_query, none), dv = like_if(need_weights, gx, v, none);
  Tensor dw_pre = like_if(need_weights, gx, w_pre, none), db_pre = like_if(need_weights, gx, b_pre, none);
  Tensor dmasks = like_if(need_masks, gx, masks, none);
  Gradients all{dgx, dfeed0, dh0, dc0, dweights, dkeys, dvalues, dw_query, dv, dw_pre, db_pre, dmasks};
  if (a.batch == 0) return all;

  for (Tensor* t : {&out, &alpha, &reserve}) *t = dense(*t);
  for (Optional* t : {&da, &dh_n, &dc_n, &dalpha}) *t = dense(*t);
  a.a = data(out);
  a.alpha = data(alpha);
  a.reserve = data(reserve);
  a.da = data(da);
  a.dh_n = data(dh_n);
  a.dc_n = lstm ? data(dc_n) : nullptr;
  a.dalpha = data(dalpha);
  a.dgx = data(dgx);
  a.dfeed0 = feed0 ? data(dfeed0) : nullptr;
  a.dh0 = data(dh0);
  a.dc0 = data(dc0);
  if (need_sources) {
    a.dkeys = data(dkeys);
    a.dvalues = data(dvalues);
  }
  if (need_masks && a.masks) a.dmasks = data(dmasks);
  std::vector<DecoderWeights> to;
  if (need_weights) {
    to = pointers(dweights);
    a.dweights = to.data();
    a.dw_query = data(dw_query);
    a.dv = data(dv);
    a.dw_pre = data(dw_pre);
    a.db_pre = data(db_pre);
  }
  call.execute(decoder_kernels().backward[int(call.cell.cell)][int(call.dtype)]);
  return all;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqkern, CPU, m) {
  m.impl("attention_decoder", SK_BOX(forward));
  m.impl("attention_decoder_backward", SK_BOX(backward));
}
}  // namespace seqkern
