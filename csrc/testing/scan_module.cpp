// Python's view of the scan of MinGRU and MinLSTM, run on the host.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "host_launch.h"
#include "../cuda/launch.h"
#include "../cuda/scan.cuh"

namespace py = pybind11;

namespace seqkern { namespace cuda { namespace {

struct Host {
  uint64_t seed;
  int64_t launches = 0;
  template <class... P, class... A> void launch(void (*kernel)(P...), Extent grid, Extent block,
                                                const A&... arguments) {
    host_launch(kernel, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, 0, seed + uint64_t(launches++),
                arguments...);
  }
};

struct Array {
  std::unique_ptr<host::Global> memory;
  Array(const char* name, const py::object& given, bool output) {
    if (given.is_none()) return;
    const auto array = given.cast<py::array>();
    if (!(array.flags() & py::array::c_style)) throw std::invalid_argument(std::string(name) + ": must be contiguous");
    memory = output ? std::make_unique<host::Global>(name, array.nbytes())
                    : std::make_unique<host::Global>(name, array.data(), array.nbytes());
  }
  void* at() const { return memory ? memory->as<void>() : nullptr; }
  void copy_out(const py::object& to) const { memory->copy_to(to.cast<py::array>().mutable_data()); }
};

// Arrays of 16-bit numbers are of integers. Backward where dp is given; returns how many launches it took.
int64_t scan_on_host(int cell, int dtype, std::array<int64_t, 3> sizes, int64_t pieces, uint64_t seed, const py::dict& in,
             const py::dict& out) {
  const auto of = [](const py::dict& d, const char* name) {
    return d.contains(name) ? py::object(d[name]) : py::object(py::none());
  };
  const Array p("p", of(in, "p"), false), h0("h0", of(in, "h0"), false), keep("keep", of(in, "keep"), false),
      dh("dh", of(in, "dh"), false), h_in("h", of(in, "h"), false), h_out("h", of(out, "h"), true),
      dp("dp", of(out, "dp"), true), dh0("dh0", of(out, "dh0"), true);
  ScanArgs a{};
  a.steps = sizes[0];
  a.batch = sizes[1];
  a.hidden = sizes[2];
  a.p = p.at();
  a.h0 = h0.at();
  a.keep = keep.at();
  a.h = dp.at() ? h_in.at() : h_out.at();
  a.dh = dh.at();
  a.dp = dp.at();
  const host::Global workspace("workspace", scan_workspace_of(a, Dtype(dtype), pieces));
  Host run{seed};
  run_scan(run, a, dh0.at(), cell, Dtype(dtype), pieces, workspace.as<char>());
  if (h_out.at()) h_out.copy_out(of(out, "h"));
  if (dp.at()) {
    dp.copy_out(of(out, "dp"));
    dh0.copy_out(of(out, "dh0"));
  }
  return run.launches;
}

int64_t pieces_of(std::array<int64_t, 3> sizes, int sms) {
  ScanArgs a{};
  a.steps = sizes[0];
  a.batch = sizes[1];
  a.hidden = sizes[2];
  return scan_pieces(a, sms);
}

}  // namespace
}}  // namespace seqkern::cuda

namespace seqkern { namespace testing {

void bind_scan(py::module_& m) {
  m.def("scan", cuda::scan_on_host, "Runs the scan, forward or backward, in so many pieces of time; writes the arrays of `out`.",
        py::arg("cell"), py::arg("dtype"), py::arg("sizes"), py::arg("pieces"), py::arg("seed"), py::arg("inputs"),
        py::arg("out"));
  m.def("pieces", cuda::pieces_of, "How many pieces of time a GPU of so many SMs takes.", py::arg("sizes"),
        py::arg("sms"));
}

}}  // namespace seqkern::testing
