// The Python modules `seqkern_testing_*`, which show internals to pytest. They are not part of the wheel.
//
// A part of it is one source file NAME_module.cpp that includes host_launch.h and its kernels and defines
// `void bind_NAME(pybind11::module_&)` in seqkern::testing, declared below. tests/host.py builds each part into a
// module of its own (`host.load("NAME")`): one that does not compile leaves the others alone.
#include <pybind11/pybind11.h>

#include "host_launch.h"

namespace py = pybind11;

namespace seqkern { namespace testing {

#define SK_PART __attribute__((weak))  // null where the part is not linked
SK_PART void bind_simt(py::module_& m);
SK_PART void bind_grid(py::module_& m);
SK_PART void bind_step(py::module_& m);
SK_PART void bind_scan(py::module_& m);
SK_PART void bind_recurrence(py::module_& m);

}}  // namespace seqkern::testing

// SK_MODULE: a name of its own for each, because the interpreter keeps extension modules by name.
PYBIND11_MODULE(SK_MODULE, m) {
  using namespace seqkern::testing;
  py::register_local_exception<seqkern::host::Fault>(m, "Fault", PyExc_RuntimeError);
  if (bind_simt) bind_simt(m);
  if (bind_grid) bind_grid(m);
  if (bind_step) bind_step(m);
  if (bind_scan) bind_scan(m);
  if (bind_recurrence) bind_recurrence(m);
}
