// Python's view of the planner, and of the `grid` engine run on the host.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <map>
#include <memory>
#include <stdexcept>
#include <string>

#include "host_launch.h"
#include "../cuda/grid_entry.cuh"

namespace py = pybind11;

namespace seqkern { namespace cuda { namespace {

template <class T> T get(const py::dict& d, const char* name) { return d[name].template cast<T>(); }

Shape shape_of(const py::dict& d) {
  return {Cell(get<int>(d, "cell")), Dtype(get<int>(d, "dtype")),
          get<bool>(d, "tf32"),      get<int64_t>(d, "steps"),
          get<int64_t>(d, "batch"),  get<int64_t>(d, "hidden"),
          get<int64_t>(d, "output"), get<int64_t>(d, "directions"),
          get<bool>(d, "packed"),    d.contains("options") && get<bool>(d, "options"),
          d.contains("norms") && get<bool>(d, "norms")};
}
Device device_of(const py::dict& d) {
  return {get<int>(d, "sms"),
          get<int>(d, "cc"),
          get<int>(d, "shared_per_block"),
          get<int>(d, "shared_per_sm"),
          get<int>(d, "registers_per_sm"),
          get<int>(d, "threads_per_sm")};
}
py::dict plan_of(const py::dict& shape, const py::dict& device, bool backward) {
  const Plan p = (backward ? plan_backward : plan_forward)(shape_of(shape), device_of(device));
  py::dict d;
  d["engine"] = engine_name(p.engine);
  d["why"] = p.why;
  d["directions"] = p.directions;
  d["tiles"] = p.tiles;
  d["batch_tile"] = p.batch_tile;
  d["ctas"] = p.ctas;
  d["units_per_cta"] = p.units_per_cta;
  d["rows_per_thread"] = p.rows_per_thread;
  d["threads"] = p.threads;
  d["shared_bytes"] = p.shared_bytes;
  d["workspace_bytes"] = p.workspace_bytes;
  d["grid"] = p.grid();
  return d;
}

// The arrays of a call by name, as Global memory: inputs are copied in; outputs begin unwritten and are copied out.
struct Memory {
  std::map<std::string, std::unique_ptr<host::Global>> buffers;
  py::dict outputs;
  Memory(const py::dict& in, const py::dict& out) : outputs(out) {
    for (auto item : in) {
      const auto array = item.second.cast<py::array>();
      add(item.first.cast<std::string>(), array, array.data());
    }
    for (auto item : out) add(item.first.cast<std::string>(), item.second.cast<py::array>(), nullptr);
  }
  void add(const std::string& name, const py::array& array, const void* data) {
    if (!(array.flags() & py::array::c_style)) throw std::invalid_argument(name + ": must be contiguous");
    auto& buffer = buffers[name];
    const int64_t bytes = array.nbytes();
    buffer = data ? std::make_unique<host::Global>(names(name), data, bytes)
                  : std::make_unique<host::Global>(names(name), bytes);
  }
  const char* names(const std::string& name) const { return buffers.find(name)->first.c_str(); }
  char* at(const std::string& name) const {
    const auto found = buffers.find(name);
    return found == buffers.end() ? nullptr : found->second->as<char>();
  }
  void copy_out() const {
    for (auto item : outputs)
      buffers.at(item.first.cast<std::string>())->copy_to(item.second.cast<py::array>().mutable_data());
  }
};

Recurrence recurrence_of(const Shape& s, int64_t rows, const Memory& m) {
  Recurrence r{};
  LayerArgs& l = r.layer;
  l.steps = s.steps;
  l.batch = s.batch;
  l.rows = rows;
  l.hidden = l.output = s.hidden;
  l.directions = s.directions;
  l.starts = (const int64_t*)m.at("starts");
  l.h0 = m.at("h0");
  l.c0 = m.at("c0");
  for (int d = 0; d < int(s.directions); ++d) {
    const std::string suffix = std::to_string(d);
    l.weights[d].w_hh = m.at("w_hh" + suffix);
    l.weights[d].b_ih = m.at("b_ih" + suffix);
    l.weights[d].b_hh = m.at("b_hh" + suffix);
    r.gates_x[d] = m.at("gates_x" + suffix);
    r.dgates[d] = m.at("dgates" + suffix);
  }
  l.y = m.at("y");
  l.reserve = m.at("reserve");
  l.h_n = m.at("h_n");
  l.c_n = m.at("c_n");
  const int64_t row = s.directions * s.hidden;
  l.dy = {m.at("dy"), s.batch * row, row, s.packed};
  l.dh_n = m.at("dh_n");
  l.dc_n = m.at("dc_n");
  l.dh0 = m.at("dh0");
  l.dc0 = m.at("dc0");
  r.cell = s.cell;
  r.dtype = s.dtype;
  r.tf32 = s.tf32;
  return r;
}

// As grid_forward and grid_backward of cuda/grid.cu.
void launch(const Recurrence& r, const Plan& p, bool backward, uint64_t seed) {
  const GridKernel kernel = grid_kernel<false>(r.cell, r.dtype, p, backward, false);
  if (!kernel) throw std::invalid_argument("grid: no kernel for this cell and dtype");
  for (int d = 0; d < int(r.layer.directions); d += p.directions) {
    const GridArgs args{r, d, p.tiles, p.batch_tile, p.ctas};
    host_launch(kernel, {unsigned(p.grid())}, {unsigned(p.threads)}, p.shared_bytes, seed + d, args);
  }
}

py::dict run(const py::dict& shape, const py::dict& device, int64_t rows, bool backward, const py::dict& in,
             const py::dict& out, uint64_t seed) {
  const Shape s = shape_of(shape);
  const Plan p = (backward ? plan_backward : plan_forward)(s, device_of(device));
  if (p.engine != Engine::kGrid) throw std::invalid_argument(std::string("grid: the plan is ") + p.why);
  const Memory memory(in, out);
  host::Global workspace("workspace", p.workspace_bytes);
  workspace.fill(kEmptyByte);
  Recurrence r = recurrence_of(s, rows, memory);
  r.workspace = workspace.as<char>();
  launch(r, p, backward, seed);
  memory.copy_out();
  return plan_of(shape, device, backward);
}

}  // namespace

}}  // namespace seqkern::cuda

namespace seqkern { namespace testing {

void bind_grid(py::module_& m) {
  using namespace seqkern::cuda;
  m.def("plan", plan_of, "The planner's choice for a shape on a device.", py::arg("shape"), py::arg("device"),
        py::arg("backward"));
  m.def("grid", run, "Runs the grid engine as planned for `device`; writes the arrays of `outputs`; returns the plan.",
        py::arg("shape"), py::arg("device"), py::arg("rows"), py::arg("backward"), py::arg("inputs"),
        py::arg("outputs"), py::arg("seed"));
}

}}  // namespace seqkern::testing
