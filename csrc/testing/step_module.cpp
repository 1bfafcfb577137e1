// Python's view of a whole layer run on the host: cuda/layer.h's order of work, its kernels on fibers, its products
// plain.
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "host_run.h"
#include "../cuda/grid_entry.cuh"
#include "../cuda/layer.h"

namespace seqkern { namespace cuda { namespace {

struct WithGrid : Host {
  void grid(const Recurrence& r, const Plan& plan, bool backward) {
    const GridKernel kernel = grid_kernel(r.cell, r.dtype, plan, backward, r.layer.options.any);
    if (!kernel) throw std::invalid_argument("grid: no kernel for this cell and dtype");
    for (int d = 0; d < int(r.layer.directions); d += plan.directions) {
      const GridArgs args{r, d, plan.tiles, plan.batch_tile, plan.ctas};
      host_launch(kernel, {unsigned(plan.grid())}, {unsigned(plan.threads)}, plan.shared_bytes,
                  seed + uint64_t(launches++), args);
    }
  }
};

Weights weights_of(const Arrays& m, const std::string& prefix, int64_t d) {
  const std::string end = d ? "_reverse" : "";
  return {m.at(prefix + "weight_ih" + end), m.at(prefix + "weight_hh" + end), m.at(prefix + "bias_ih" + end),
          m.at(prefix + "bias_hh" + end), m.at(prefix + "weight_hr" + end)};
}

LayerArgs layer_of(const py::dict& sizes, const Arrays& m) {
  auto get = [&](const char* name) { return sizes[name].cast<int64_t>(); };
  LayerArgs a{};
  a.steps = get("T");
  a.batch = get("B");
  a.rows = get("N");
  a.input = get("I");
  a.hidden = get("H");
  a.output = get("P");
  a.directions = get("D");
  const bool packed = get("packed");
  a.x = {m.at("x"), a.batch * a.input, a.input, packed};
  a.h0 = m.at("h0");
  a.c0 = m.at("c0");
  a.y = m.at("y");
  a.reserve = m.at("reserve");
  a.h_n = m.at("h_n");
  a.c_n = m.at("c_n");
  const int64_t row = a.directions * a.output;
  a.dy = {m.at("dy"), packed ? 0 : a.batch * row, row, packed};
  if (sizes.contains("dy_row")) a.dy.step = get("dy_step"), a.dy.row = get("dy_row");
  a.dh_n = m.at("dh_n");
  a.dc_n = m.at("dc_n");
  a.dx = m.at("dx");
  a.dh0 = m.at("dh0");
  a.dc0 = m.at("dc0");
  LayerOptions& o = a.options;
  o.keep = m.at("keep");
  o.h_mask = m.at("h_mask");
  o.zone_h = m.at("zone_h");
  o.zone_c = m.at("zone_c");
  o.lengths = (const int64_t*)m.at("lengths");
  o.c_all = m.at("c_all");
  o.dc_all = m.at("dc_all");
  o.flow = m.at("flow");
  o.flow_panels = a.hidden > a.output ? a.hidden : a.output;
  if (sizes.contains("clip_value")) {
    o.clip_value = sizes["clip_value"].cast<double>();
    o.clip_norm = sizes["clip_norm"].cast<double>();
    o.zone_h_row = get("zone_h_row");
    o.zone_c_row = get("zone_c_row");
  }
  o.any = o.keep || o.h_mask || o.zone_h || o.zone_c || o.lengths || o.c_all || o.dc_all || o.flow ||
          o.clip_value > 0 || o.clip_norm > 0;
  for (int64_t d = 0; d < a.directions; ++d) a.weights[d] = weights_of(m, "", d), a.dweights[d] = weights_of(m, "d", d);
  return a;
}

Device device_of(const py::dict& d) {
  auto get = [&](const char* name) { return d[name].cast<int>(); };
  return {get("sms"),           get("cc"), get("shared_per_block"), get("shared_per_sm"), get("registers_per_sm"),
          get("threads_per_sm")};
}

// sizes: T, B, N, I, H, P, D, packed, cell, dtype, tf32 and batch_sizes, and dy's strides where it is not dense;
// device: what to plan for, or None for `step`.
py::dict layer(const py::dict& sizes, bool backward, const py::dict& in, const py::dict& out, uint64_t seed,
               const py::object& device) {
  const Arrays arrays(in, out);
  LayerCall call{layer_of(sizes, arrays), Cell(sizes["cell"].cast<int>()), Dtype(sizes["dtype"].cast<int>()),
                 sizes["tf32"].cast<bool>(), nullptr};
  LayerArgs& a = call.layer;
  const auto batch_sizes = sizes["batch_sizes"].cast<std::vector<int64_t>>();
  std::vector<int64_t> starts(1, 0);
  for (int64_t n : batch_sizes) starts.push_back(starts.back() + n);
  a.sizes = batch_sizes.data();
  a.starts = starts.data();
  const Shape shape{call.cell,
                    call.dtype,
                    call.tf32,
                    a.steps,
                    a.batch,
                    a.hidden,
                    a.output,
                    a.directions,
                    a.x.packed,
                    a.options.any,
                    a.options.clip_norm > 0};
  const Plan plan = device.is_none() ? detail::step_plan("step: for a test")
                                     : (backward ? plan_backward : plan_forward)(shape, device_of(device));
  call.plan = &plan;
  WithGrid run{{seed}};
  Layer<WithGrid> whole{run, call};
  const host::Global workspace("workspace", whole.workspace(backward));
  if (backward) whole.backward(workspace.as<char>());
  else whole.forward(workspace.as<char>());
  arrays.copy_out();
  py::dict done;
  done["engine"] = engine_name(plan.engine);
  done["launches"] = run.launches;
  done["products"] = run.products;
  return done;
}

// to: an array of `dtype`, of 16-bit numbers as integers.
void random(int dtype, int64_t seed, int64_t stream, int64_t limit, double value, const py::array& to) {
  const host::Global seed_at("seed", &seed, sizeof seed), mask("mask", to.nbytes());
  const Random r{seed_at.as<int64_t>(), stream, limit, value, to.size(), mask.as<void>()};
  with_storage(Dtype(dtype), [&](auto t) { host_launch(random_mask<decltype(t)>, {3, 1, 1}, {128, 1, 1}, 0, 1, r); });
  mask.copy_to(py::array(to).mutable_data());
}

}  // namespace
}}  // namespace seqkern::cuda

namespace seqkern { namespace testing {

void bind_step(py::module_& m) {
  m.def("layer", cuda::layer,
        "Runs a whole layer, forward or backward, on the step engine or as planned for `device`; writes the arrays of "
        "`outputs`; returns the engine and how many launches and products it took.",
        py::arg("sizes"), py::arg("backward"), py::arg("inputs"), py::arg("outputs"), py::arg("seed"),
        py::arg("device") = py::none());
  m.def("random", cuda::random, "A random mask, by the kernel behind seqkern::_bernoulli.", py::arg("dtype"),
        py::arg("seed"), py::arg("stream"), py::arg("limit"), py::arg("value"), py::arg("to"));
}

}}  // namespace seqkern::testing
