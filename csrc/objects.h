// A plain call's tensors from Python's objects: dense, on the CPU, of torch's own classes. They are read through the exchange
// table of DLPack 1.3 (dmlc.github.io/dlpack), C functions that torch.Tensor offers under `__dlpack_c_exchange_api__`.
#pragma once
#include <Python.h>

// Not torch's own interface, whose stable part this would leave, but that of DLPack: plain C, with a layout that it keeps.
#undef TORCH_TARGET_VERSION
#include <ATen/dlpack.h>

#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "cpu/plain.h"

namespace seqkern {
struct Torch {  // of the process, held for good
  PyObject *tensor = nullptr, *parameter, *empty_like, *new_empty, *transpose;
  int (*read)(void*, DLTensor*) = nullptr;
};
extern Torch torch_objects;  // bind_tensors

class Ref {
 public:
  explicit Ref(PyObject* owned = nullptr) : object_(owned) {}
  Ref(const Ref&) = delete;
  Ref(Ref&& other) noexcept : object_(other.release()) {}
  Ref& operator=(Ref&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Ref() { Py_XDECREF(object_); }
  static Ref to(PyObject* borrowed) {
    Py_INCREF(borrowed);
    return Ref(borrowed);
  }
  PyObject* get() const { return object_; }
  PyObject* release() {
    PyObject* const object = object_;
    object_ = nullptr;
    return object;
  }
  explicit operator bool() const { return object_; }

 private:
  PyObject* object_;
};

constexpr int kNoDtype = -1;
inline int dtype_of(const DLTensor& t) {  // as enum Dtype
  if (t.dtype.lanes != 1) return kNoDtype;
  if (t.dtype.code == kDLBfloat) return t.dtype.bits == 16 ? 2 : kNoDtype;
  if (t.dtype.code != kDLFloat) return kNoDtype;
  return t.dtype.bits == 64 ? 0 : t.dtype.bits == 32 ? 1 : t.dtype.bits == 16 ? 3 : kNoDtype;
}

// Whether o is a dense tensor or parameter on the CPU, exactly of these classes; t then describes it.
inline bool read(PyObject* o, DLTensor& t) {
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(o));
  if (type != torch_objects.tensor && type != torch_objects.parameter) return false;
  if (torch_objects.read(o, &t) != 0) {
    PyErr_Clear();
    return false;
  }
  if (t.device.device_type != kDLCPU || !t.data) return false;  // no data: a tensor known to be zeros
  // A last dimension of 1 must lie dense, too: the imaginary part of a conjugate, whose sign waits to be changed, does not.
  if (t.ndim && t.strides && t.strides[t.ndim - 1] != 1) return false;
  int64_t dense = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] != 1 && t.strides && t.strides[i] != dense) return false;
    dense *= t.shape[i];
  }
  return true;
}
inline void* data(const DLTensor& t) { return static_cast<char*>(t.data) + t.byte_offset; }

struct Shape {
  int64_t sizes[3];
  int dim;
  bool of(const DLTensor& t) const {
    if (t.ndim != dim) return false;
    for (int i = 0; i < dim; ++i)
      if (t.shape[i] != sizes[i]) return false;
    return true;
  }
};

// Dense, like `like` in all but its shape; null with an exception set where there is no memory for it.
inline Ref made(PyObject* like, const DLTensor& t, const Shape& shape) {
  if (shape.of(t)) return Ref(PyObject_CallFunctionObjArgs(torch_objects.empty_like, like, nullptr));
  Ref sizes(PyTuple_New(shape.dim));
  for (int i = 0; sizes && i < shape.dim; ++i) {
    PyObject* const size = PyLong_FromLongLong(shape.sizes[i]);
    if (!size || PyTuple_SetItem(sizes.get(), i, size) != 0) return Ref();
  }
  return sizes ? Ref(PyObject_CallMethodObjArgs(like, torch_objects.new_empty, sizes.get(), nullptr)) : Ref();
}

// For a tensor that was just made.
inline bool describe(const Ref& made, DLTensor& t) { return made && torch_objects.read(made.get(), &t) == 0; }

constexpr int64_t kLstm = 2, kGru = 3;  // as enum Cell
inline int64_t gates_of(int64_t cell) { return cell == kLstm ? 4 : cell == kGru ? 3 : 1; }
inline Shape weight_shape(int64_t which, bool bias, int64_t rows, int64_t input, int64_t output, int64_t proj, int64_t hidden) {
  if (which == 0) return {{rows, input}, 2};
  if (which == 1) return {{rows, output}, 2};
  return bias && which < 4 ? Shape{{rows}, 1} : Shape{{proj, hidden}, 2};
}

// Runs `work` without Python's lock; false with an exception set where it throws.
template <class Work> bool unlocked(const Work& work) {
  std::string error;
  PyThreadState* const thread = PyEval_SaveThread();
  try {
    work();
  } catch (const std::exception& e) {
    error = e.what();
    if (error.empty()) error = "a kernel failed";
  }
  PyEval_RestoreThread(thread);
  if (!error.empty()) PyErr_SetString(PyExc_RuntimeError, error.c_str());
  return error.empty();
}
}  // namespace seqkern
