// Python's view of seqkern::recurrence run on the host: cuda/variant_layer.h's order of work.
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "host_run.h"
#include "../cuda/variant_layer.h"

namespace seqkern { namespace cuda { namespace {

// seqkern::recurrence. sizes: T, B, N, H, gates, D, packed, batch_sizes, cell, dtype, S, the zones' rows, the bounds
// and the five flags of Variant.
int64_t run(const py::dict& sizes, bool backward, const py::dict& in, const py::dict& out, uint64_t seed) {
  const Arrays m(in, out);
  auto get = [&](const char* name) { return sizes[name].cast<int64_t>(); };
  VariantCall call{};
  RecurrenceArgs& a = call.args;
  a.steps = get("T");
  a.batch = get("B");
  a.rows = get("N");
  a.hidden = get("H");
  a.gates = get("gates");
  a.directions = get("D");
  a.cell = Cell(get("cell"));
  a.variant = {get("coupled") != 0, get("hard") != 0, get("reset_before") != 0, get("normal") != 0,
               get("peephole") != 0};
  const std::pair<const void**, const char*> inputs[] = {{&a.gx, "gx"},
                                                         {&a.h0, "h0"},
                                                         {&a.c0, "c0"},
                                                         {&a.w_hh, "w_hh"},
                                                         {&a.bias_n, "bias_n"},
                                                         {&a.peephole, "peephole"},
                                                         {&a.gain_h, "gain_h"},
                                                         {&a.gain_c, "gain_c"},
                                                         {&a.bias_c, "bias_c"},
                                                         {&a.dy, "dy"},
                                                         {&a.dh_n, "dh_n"},
                                                         {&a.dc_n, "dc_n"},
                                                         {&a.options.keep, "keep"},
                                                         {&a.options.h_mask, "h_mask"},
                                                         {&a.options.zone_h, "zone_h"},
                                                         {&a.options.zone_c, "zone_c"},
                                                         {&a.options.dc_all, "dc_all"}};
  for (const auto& [to, name] : inputs) *to = m.at(name);
  const std::pair<void**, const char*> results[] = {
      {&a.y, "y"},         {&a.h_n, "h_n"}, {&a.c_n, "c_n"}, {&a.read, "read"}, {&a.reserve, "reserve"},
      {&a.dgx, "dgx"},     {&a.dgh, "dgh"}, {&a.dh0, "dh0"}, {&a.dc0, "dc0"},   {&a.options.c_all, "c_all"},
      {&call.sums, "sums"}};
  for (const auto& [to, name] : results) *to = m.at(name);
  if (call.sums && get("S")) m.buffers.at("sums")->fill(0);  // as cuda/ops.cpp allocates them
  a.options.any = true;
  a.options.lengths = (const int64_t*)m.at("lengths");
  a.options.zone_h_row = get("zone_h_row");
  a.options.zone_c_row = get("zone_c_row");
  a.options.clip_value = sizes["clip_value"].cast<double>();
  a.clip_norm = sizes["clip_norm"].cast<double>();
  const auto batch_sizes = sizes["batch_sizes"].cast<std::vector<int64_t>>();
  std::vector<int64_t> starts(1, 0);
  for (int64_t n : batch_sizes) starts.push_back(starts.back() + n);
  a.sizes = batch_sizes.data();
  a.starts = starts.data();
  call.dtype = Dtype(get("dtype"));
  call.packed = get("packed");
  call.sums_size = get("S");
  const Plan plan = detail::step_plan("step: seqkern::recurrence");
  const LayerCall layer = as_layer(call, plan);
  Host how{seed};
  VariantLayer<Host> whole{how, layer, call};
  const host::Global workspace("workspace", whole.workspace(backward));
  if (backward) whole.backward(workspace.as<char>());
  else whole.forward(workspace.as<char>());
  m.copy_out();
  return how.launches;
}

}  // namespace
}}  // namespace seqkern::cuda

namespace seqkern { namespace testing {

void bind_recurrence(py::module_& m) {
  m.def("run", cuda::run,
        "seqkern::recurrence or its backward; writes the arrays of `outputs`, returns "
        "how many launches it took.",
        py::arg("sizes"), py::arg("backward"), py::arg("inputs"), py::arg("outputs"), py::arg("seed"));
}

}}  // namespace seqkern::testing
