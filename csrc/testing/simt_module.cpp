// simt_kernels.h for pytest.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "host_launch.h"
#include "simt_kernels.h"

namespace py = pybind11;

namespace seqkern { namespace testing {
namespace {

template <class T> using Array = py::array_t<T, py::array::c_style>;

struct Entry {
  const char* name;
  void (*kernel)(Args);
};
constexpr Entry kKernels[] = {
    {"reverse", reverse},    {"reverse_static", reverse_static}, {"quads", quads},       {"warp", warp},
    {"mma_bf16", mma<bf16>}, {"mma_f16", mma<half_t>},           {"mma_tf32", mma_tf32}, {"tile", tile},
    {"ring", ring},          {"ring_barrier", ring_barrier},     {"cluster", cluster},   {"mail", mail},
    {"arrive", arrive},      {"take_places", take_places},
};
constexpr const char* kBreaks[] = {"whole",     "no_barrier", "divergent", "other_barrier", "out_of_range",
                                   "unwritten", "misaligned", "swapped",   "no_wait",       "no_signal",
                                   "poll",      "leave",      "short"};

int index_of(const std::string& name) {
  for (int i = 0; i < int(std::size(kBreaks)); ++i)
    if (name == kBreaks[i]) return i;
  throw std::invalid_argument("no break " + name);
}

// x float32 -> y float32 [outputs].
Array<float> run(const std::string& kernel, const Array<float>& x, int64_t outputs, int64_t n, const host::Launch& l,
                 const std::string& broken) {
  for (const Entry& e : kKernels) {
    if (kernel != e.name) continue;
    const int32_t zeros[64] = {};
    host::Global gx("x", x.data(), x.nbytes()), gy("y", outputs * 4), exchange("exchange", outputs * 8),
        flags("flags", zeros, sizeof zeros);
    const Args args{gx.as<float>(), gy.as<float>(), exchange.as<float>(), flags.as<int>(), n, index_of(broken)};
    host_launch(l, e.kernel, args);
    Array<float> y(outputs);
    gy.copy_to(y.mutable_data());
    return y;
  }
  throw std::invalid_argument("no kernel " + kernel);
}

}  // namespace

void bind_simt(py::module_& m) {
  m.def("simt", [](const std::string& kernel, const Array<float>& x, int64_t outputs, int64_t n, unsigned blocks,
                   unsigned threads, const py::dict& options) {
    const auto get = [&](const char* key, int64_t otherwise) {
      return options.contains(key) ? options[key].cast<int64_t>() : otherwise;
    };
    const host::Launch launch{
        {blocks}, {threads}, get("shared_bytes", 0), uint64_t(get("seed", 0)), int(get("cluster", 1))};
    const std::string broken = options.contains("broken") ? options["broken"].cast<std::string>() : "whole";
    return run(kernel, x, outputs, n, launch, broken);
  });
  m.def("to_bf16", py::vectorize([](float x) { return from_float<bf16>(x).bits; }));
  m.def("to_f16", py::vectorize([](float x) { return from_float<half_t>(x).bits; }));
  m.def("of_f16", py::vectorize([](uint16_t x) { return to_float(half_t{x}); }));
  m.def("to_tf32", py::vectorize([](float x) { return to_tf32(x); }));
}

}}  // namespace seqkern::testing
