// `Run` of the CUDA layers (cuda/layer.h) on the host: their kernels on fibers, their products plain; and the arrays
// that a test hands over.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstring>
#include <map>
#include <memory>
#include <string>

#include "host_launch.h"
#include "memory.h"
#include "../cuda/lanes.cuh"
#include "../cuda/launch.h"

namespace py = pybind11;

namespace seqkern { namespace cuda { namespace {

void must_be_written(const void* p, int64_t bytes, const char* what) {
  const int64_t at = host::first_unwritten(p, bytes);
  if (at >= 0) throw host::Fault(std::string(what) + " reads unwritten " + host::describe((const char*)p + at));
}

struct Host {
  uint64_t seed;
  int64_t launches = 0, products = 0;

  template <class... P, class... A> void launch(void (*kernel)(P...), Extent grid, Extent block,
                                                const A&... arguments) {
    launch_with(0, kernel, grid, block, arguments...);
  }
  template <class... P, class... A> void launch_with(int64_t shared, void (*kernel)(P...), Extent grid, Extent block,
                                                     const A&... arguments) {
    host_launch(kernel, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, size_t(shared),
                seed + uint64_t(launches++), arguments...);
  }
  void copy(void* to, const void* from, int64_t bytes) {
    must_be_written(from, bytes, "a copy");
    memcpy(to, from, size_t(bytes));
    host::mark_written(to, bytes);
  }
  void fill(void* to, int byte, int64_t bytes) {
    memset(to, byte, size_t(bytes));
    host::mark_written(to, bytes);
  }
  void gemm(const Gemm& g) {
    ++products;
    with_storage(g.in, [&](auto s) {
      if (g.out == g.in) multiply<decltype(s), decltype(s)>(g);
      else multiply<decltype(s), float>(g);
    });
  }

  template <class S> static Wide<S> operand(S x, bool tf32) {
    if constexpr (sizeof(S) == 4) {
      uint32_t bits = to_tf32(x);
      if (tf32) memcpy(&x, &bits, sizeof x);
    }
    return widen(x);
  }
  template <class S, class O> static void multiply(const Gemm& g) {
    const auto rows = [](const void* p, int64_t rows, int64_t columns, int64_t ld) {
      for (int64_t i = 0; i < rows; ++i)
        must_be_written((const S*)p + i * ld, columns * int64_t(sizeof(S)), "a product");
    };
    for (int64_t q = 0; q < g.batch; ++q) {
      const S *a = (const S*)g.a + q * g.stride_a, *b = (const S*)g.b + q * g.stride_b;
      O* c = (O*)g.c + q * g.stride_c;
      rows(a, g.a_t ? g.k : g.m, g.a_t ? g.m : g.k, g.lda);
      rows(b, g.b_t ? g.n : g.k, g.b_t ? g.k : g.n, g.ldb);
      for (int64_t i = 0; i < g.m; ++i) {
        for (int64_t j = 0; j < g.n; ++j) {
          Wide<S> sum = g.accumulate ? Wide<S>(widen(c[i * g.ldc + j])) : Wide<S>(0);
          for (int64_t k = 0; k < g.k; ++k)
            sum += operand(a[g.a_t ? k * g.lda + i : i * g.lda + k], g.tf32) *
                   operand(b[g.b_t ? j * g.ldb + k : k * g.ldb + j], g.tf32);
          narrow(sum, c[i * g.ldc + j]);
        }
        host::mark_written(c + i * g.ldc, g.n * int64_t(sizeof(O)));
      }
    }
  }
};

// The arrays of a call by name, as Global memory: inputs are copied in; outputs begin unwritten and are copied out.
struct Arrays {
  std::map<std::string, std::unique_ptr<host::Global>> buffers;
  py::dict outputs;
  Arrays(const py::dict& in, const py::dict& out) : outputs(out) {
    for (auto item : in) {
      const auto array = item.second.cast<py::array>();
      add(item.first.cast<std::string>(), array, array.data());
    }
    for (auto item : out) add(item.first.cast<std::string>(), item.second.cast<py::array>(), nullptr);
    if (buffers.count("flow")) buffers["flow"]->fill(0);  // as cuda/ops.cpp allocates it
  }
  void add(const std::string& name, const py::array& array, const void* data) {
    if (!(array.flags() & py::array::c_style)) throw std::invalid_argument(name + ": must be contiguous");
    const auto [place, _] = buffers.try_emplace(name);
    const char* kept = place->first.c_str();
    place->second = data ? std::make_unique<host::Global>(kept, data, array.nbytes())
                         : std::make_unique<host::Global>(kept, array.nbytes());
  }
  char* at(const std::string& name) const {
    const auto found = buffers.find(name);
    return found == buffers.end() ? nullptr : found->second->as<char>();
  }
  void copy_out() const {
    for (auto item : outputs)
      buffers.at(item.first.cast<std::string>())->copy_to(item.second.cast<py::array>().mutable_data());
  }
};

}}}  // namespace seqkern::cuda
