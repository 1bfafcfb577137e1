// A source's projection on CPU tensors: check, allocate, share out the rows, call the kernel table.
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
const std::string kName = "project_sources";

// A call, checked; its tensors are made dense.
struct Call {
  Tensor x, w_key, w_value;
  Optional b_key;
  Dtype dtype;
  int64_t steps, batch;
  ProjectArgs args{};
  std::vector<int64_t> from, to;

  Call(const Tensor& memory, const Tensor& lengths, const Tensor& key, const Optional& bias, const Tensor& value)
      : x(dense(memory)), w_key(dense(key)), w_value(dense(value)), b_key(dense(bias)) {
    dtype = kernel_dtype(kName, x.scalar_type());
    STD_TORCH_CHECK(x.dim() == 3, kName, ": memory must be [S, B, M], got ", text(sizes_of(x)));
    steps = x.size(0);
    batch = x.size(1);
    args.input = x.size(2);
    STD_TORCH_CHECK(w_key.dim() == 2 && w_value.dim() == 2, kName, ": w_key must be [K, M] and w_value [A, M], got ",
                    text(sizes_of(w_key)), " and ", text(sizes_of(w_value)));
    const int64_t keys = w_key.size(0), values = w_value.size(0);
    STD_TORCH_CHECK(steps > 0 && args.input > 0 && keys > 0 && values > 0, kName,
                    ": S, M, K and A must be at least 1, got ", text({steps, args.input, keys, values}));
    const Wanted want{kName, x.scalar_type()};
    want.check(w_key, "w_key", "[K, M]", {keys, args.input});
    want.check(w_value, "w_value", "[A, M]", {values, args.input});
    want.check(b_key, "b_key", "[K]", {keys});
    args.x = data(x);
    args.of[0] = {keys, data(w_key), data(b_key)};
    args.of[1] = {values, data(w_value)};
    read_places(lengths);
  }
  void read_places(const Tensor& lengths) {
    STD_TORCH_CHECK(sizes_of(lengths) == std::vector<int64_t>{batch} && lengths.scalar_type() == ScalarType::Long &&
                        lengths.is_cpu(),
                    kName, ": lengths must be [B] = [", batch, "] int64 on the CPU, got ", text(sizes_of(lengths)), " ",
                    dtype_name(lengths.scalar_type()));
    std::vector<int64_t> length(batch);
    for (int64_t b = 0; b < batch; ++b) {
      length[b] = ((const int64_t*)lengths.data_ptr())[b * lengths.stride(0)];
      STD_TORCH_CHECK(length[b] >= 0 && length[b] <= steps, kName, ": lengths must be in [0, S] = [0, ", steps,
                      "], got ", length[b]);
      args.rows += length[b];
    }
    args.places = steps * batch;
    from.resize(args.places);
    to.resize(args.places);
    int64_t inside = 0, outside = args.rows;
    for (int64_t s = 0; s < steps; ++s)
      for (int64_t b = 0; b < batch; ++b) {
        int64_t& next = s < length[b] ? inside : outside;
        from[next] = s * batch + b;
        to[next++] = b * steps + s;
      }
    args.from = from.data();
    args.to = to.data();
  }
  void execute(const ProjectKernel& kernel) {
    ProjectArgs& a = args;
    const int64_t all = a.rows * a.input * (a.of[0].columns + a.of[1].columns);
    int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), std::max<int64_t>(1, all / (kMinWork / 2)));
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

std::tuple<Tensor, Tensor> forward(Tensor memory, Tensor lengths, Tensor w_key, Optional b_key, Tensor w_value) {
  Call call(memory, lengths, w_key, b_key, w_value);
  ProjectArgs& a = call.args;
  Tensor keys = empty(call.x, {call.batch, call.steps, a.of[0].columns});
  Tensor values = empty(call.x, {call.batch, call.steps, a.of[1].columns});
  a.of[0].y = data(keys);
  a.of[1].y = data(values);
  if (call.batch) call.execute(project_kernels().forward[int(call.dtype)]);
  return {keys, values};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dkeys, Tensor dvalues, Tensor memory, Tensor lengths,
                                                    Tensor w_key, Optional b_key, Tensor w_value, bool need_memory,
                                                    bool need_weights) {
  Call call(memory, lengths, w_key, b_key, w_value);
  ProjectArgs& a = call.args;
  const Wanted want{kName, call.x.scalar_type()};
  want.check(dkeys, "dkeys", "[B, S, K]", {call.batch, call.steps, a.of[0].columns});
  want.check(dvalues, "dvalues", "[B, S, A]", {call.batch, call.steps, a.of[1].columns});
  dkeys = dense(dkeys);
  dvalues = dense(dvalues);
  const auto like = [&](bool wanted, const Tensor& t) {
    if (!wanted) return empty(call.x, {0});
    return call.batch ? empty(call.x, sizes_of(t)) : zeros(call.x, sizes_of(t));
  };
  Tensor dmemory = like(need_memory, call.x), dw_key = like(need_weights, call.w_key);
  Tensor db_key = like(need_weights && b_key, b_key ? *call.b_key : call.x),
         dw_value = like(need_weights, call.w_value);
  if (call.batch) {
    a.dx = need_memory ? data(dmemory) : nullptr;
    a.of[0].dy = data(dkeys);
    a.of[1].dy = data(dvalues);
    if (need_weights) {
      a.of[0].dw = data(dw_key);
      a.of[0].dbias = b_key ? data(db_key) : nullptr;
      a.of[1].dw = data(dw_value);
    }
    call.execute(project_kernels().backward[int(call.dtype)]);
  }
  return {dmemory, dw_key, db_key, dw_value};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqkern, CPU, m) {
  m.impl("project_sources", SK_BOX(forward));
  m.impl("project_sources_backward", SK_BOX(backward));
}
}  // namespace seqkern
