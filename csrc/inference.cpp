// A plain call of a layer in inference, from Python's objects to addresses: what the operator's boxed arguments, or checks
// of tensors in Python, would cost is more than a small layer's arithmetic. Tensors are read through the exchange table of
// DLPack 1.3 (dmlc.github.io/dlpack), C functions that torch.Tensor offers under `__dlpack_c_exchange_api__`.
#include "inference.h"

// Not torch's own interface, whose stable part this would leave, but that of DLPack: plain C, with a layout that it keeps.
#undef TORCH_TARGET_VERSION
#include <ATen/dlpack.h>

#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "cpu/infer.h"

namespace seqkern {
namespace {
struct Torch {  // of the process, held for good
  PyObject *tensor = nullptr, *parameter, *empty_like, *new_empty, *transpose;
  int (*read)(void*, DLTensor*) = nullptr;
} torch;

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
int dtype_of(const DLTensor& t) {  // as enum Dtype
  if (t.dtype.lanes != 1) return kNoDtype;
  if (t.dtype.code == kDLBfloat) return t.dtype.bits == 16 ? 2 : kNoDtype;
  if (t.dtype.code != kDLFloat) return kNoDtype;
  return t.dtype.bits == 64 ? 0 : t.dtype.bits == 32 ? 1 : t.dtype.bits == 16 ? 3 : kNoDtype;
}

// Whether o is a dense tensor or parameter on the CPU, exactly of these classes; t then describes it.
bool read(PyObject* o, DLTensor& t) {
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(o));
  if (type != torch.tensor && type != torch.parameter) return false;
  if (torch.read(o, &t) != 0) {
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
void* data(const DLTensor& t) { return static_cast<char*>(t.data) + t.byte_offset; }

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
Ref made(PyObject* like, const DLTensor& t, const Shape& shape) {
  if (shape.of(t)) return Ref(PyObject_CallFunctionObjArgs(torch.empty_like, like, nullptr));
  Ref sizes(PyTuple_New(shape.dim));
  for (int i = 0; sizes && i < shape.dim; ++i) {
    PyObject* const size = PyLong_FromLongLong(shape.sizes[i]);
    if (!size || PyTuple_SetItem(sizes.get(), i, size) != 0) return Ref();
  }
  return sizes ? Ref(PyObject_CallMethodObjArgs(like, torch.new_empty, sizes.get(), nullptr)) : Ref();
}

struct Settings {
  int64_t cell, input, hidden, proj, layers, bidirectional, bias, batch_first;
  int64_t one_step;  // as RNNCell and its like take it: x [B, I] or [I], states [B, H] or [H], no y
  bool lstm() const { return cell == 2; }
  int64_t directions() const { return bidirectional ? 2 : 1; }
  int64_t output() const { return proj ? proj : hidden; }
  int64_t gates() const { return lstm() ? 4 : cell == 3 ? 3 : 1; }
  int64_t per_direction() const { return 2 + (bias ? 2 : 0) + (proj ? 1 : 0); }  // weights
  Shape weight(int64_t layer, int64_t which) const {
    const int64_t rows = gates() * hidden;
    if (which == 0) return {{rows, layer ? directions() * output() : input}, 2};
    if (which == 1) return {{rows, output()}, 2};
    return bias && which < 4 ? Shape{{rows}, 1} : Shape{{proj, hidden}, 2};
  }
};
enum Argument { kX, kState, kParameters, kNames, kNumbers };
constexpr Py_ssize_t kArguments = kNumbers + sizeof(Settings) / sizeof(int64_t);

// What a call works on, once all of it has turned out to be plain.
struct Call {
  Settings s;
  DLTensor x, h, c;
  PyObject *h_object = nullptr, *c_object = nullptr;
  int dtype;
  int64_t steps, batch;
  bool turned;  // y is made time-major, as everywhere
  std::vector<Ref> held;
  std::vector<void*> weights;

  bool plain(PyObject* const* arguments) {
    if (!read(arguments[kX], x)) return false;
    dtype = dtype_of(x);
    const int dims = s.one_step ? 1 : 2;  // without a batch
    if (dtype == kNoDtype || (x.ndim != dims && x.ndim != dims + 1) || x.shape[x.ndim - 1] != s.input) return false;
    const bool batched = x.ndim > dims, batch_first = s.batch_first && batched;
    steps = s.one_step ? 1 : x.shape[batch_first];
    batch = !batched ? 1 : s.one_step ? x.shape[0] : x.shape[!batch_first];
    turned = batch_first && steps > 1 && batch > 1;
    return steps > 0 && batch > 0 && plain_state(arguments[kState]) &&
           plain_weights(arguments[kParameters], arguments[kNames]);
  }
  Shape state(int64_t size) const {
    if (s.one_step) return x.ndim == 2 ? Shape{{batch, size}, 2} : Shape{{size}, 1};
    const int64_t all = s.layers * s.directions();
    return x.ndim == 3 ? Shape{{all, batch, size}, 3} : Shape{{all, size}, 2};
  }
  bool plain_state(PyObject* hx) {
    if (hx == Py_None) return true;
    h_object = hx;
    if (s.lstm()) {
      if (!PyTuple_CheckExact(hx) || PyTuple_Size(hx) != 2) return false;
      h_object = PyTuple_GetItem(hx, 0);
      c_object = PyTuple_GetItem(hx, 1);
      if (!read(c_object, c) || dtype_of(c) != dtype || !state(s.hidden).of(c)) return false;
    }
    return read(h_object, h) && dtype_of(h) == dtype && state(s.output()).of(h);
  }
  bool plain_weights(PyObject* parameters, PyObject* names) {
    const int64_t per_layer = s.directions() * s.per_direction(), count = s.layers * per_layer;
    if (!PyDict_Check(parameters) || !PyList_Check(names) || PyList_Size(names) != count) return false;
    held.reserve(count);
    weights.reserve(count);
    for (int64_t i = 0; i < count; ++i) {
      PyObject* const w = PyDict_GetItem(parameters, PyList_GetItem(names, i));
      DLTensor t;
      if (!w || !read(w, t) || dtype_of(t) != dtype) return false;
      if (!s.weight(i / per_layer, i % s.per_direction()).of(t)) return false;
      held.push_back(Ref::to(w));
      weights.push_back(data(t));
    }
    return true;
  }

  PyObject* run(PyObject* x_object) {
    const int64_t width = s.directions() * s.output();
    const Shape y_shape = turned        ? Shape{{steps, batch, width}, 3}
                          : x.ndim == 3 ? Shape{{x.shape[0], x.shape[1], width}, 3}
                                        : Shape{{x.shape[0], width}, 2};
    std::vector<Ref> ys;
    std::vector<void*> at{data(x)};
    DLTensor t;
    for (int64_t layer = 0; layer < s.layers && !s.one_step; ++layer) {
      ys.push_back(made(x_object, x, y_shape));
      if (!ys.back() || !readable(ys.back(), t)) return nullptr;
      at.push_back(data(t));
    }
    DLTensor h_out, c_out;
    Ref h_n = h_object ? made(h_object, h, state(s.output())) : made(x_object, x, state(s.output())), c_n;
    if (!h_n || !readable(h_n, h_out)) return nullptr;
    if (s.lstm()) {
      c_n = made(h_n.get(), h_out, state(s.hidden));
      if (!c_n || !readable(c_n, c_out)) return nullptr;
    }
    if (s.one_step) at.push_back(data(h_out));
    const int64_t row = s.directions() * batch * (x.dtype.bits / 8);  // a layer's states: this times the size of one
    const auto part = [&](const DLTensor& states, int64_t layer, int64_t size) {
      return static_cast<void*>(static_cast<char*>(data(states)) + layer * row * size);
    };
    std::string error;
    PyThreadState* const thread = PyEval_SaveThread();
    try {
      for (int64_t layer = 0; layer < s.layers; ++layer)
        infer({s.cell, dtype, steps, batch, layer ? width : s.input, s.hidden, s.output(), s.directions(),
               turned && layer == 0, at[layer], h_object ? part(h, layer, s.output()) : nullptr,
               c_object ? part(c, layer, s.hidden) : nullptr, at[layer + 1], part(h_out, layer, s.output()),
               s.lstm() ? part(c_out, layer, s.hidden) : nullptr,
               weights.data() + layer * s.directions() * s.per_direction(), s.per_direction()});
    } catch (const std::exception& e) {
      error = e.what();
      if (error.empty()) error = "inference failed";
    }
    PyEval_RestoreThread(thread);
    if (!error.empty()) {
      PyErr_SetString(PyExc_RuntimeError, error.c_str());
      return nullptr;
    }
    if (s.one_step) return s.lstm() ? Py_BuildValue("OO", h_n.get(), c_n.get()) : h_n.release();
    Ref y = std::move(ys.back());
    if (turned) {
      Ref zero(PyLong_FromLong(0)), one(PyLong_FromLong(1));
      y = Ref(PyObject_CallMethodObjArgs(y.get(), torch.transpose, zero.get(), one.get(), nullptr));
      if (!y) return nullptr;
    }
    return s.lstm() ? Py_BuildValue("O(OO)", y.get(), h_n.get(), c_n.get()) : Py_BuildValue("OO", y.get(), h_n.get());
  }
  static bool readable(const Ref& made, DLTensor& t) { return torch.read(made.get(), &t) == 0; }
};
}  // namespace

PyObject* bind_inference(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 3) return PyErr_Format(PyExc_TypeError, "bind_inference takes 3 arguments, got %zd", count);
  Ref capsule(PyObject_GetAttrString(arguments[0], "__dlpack_c_exchange_api__"));
  if (!capsule) return nullptr;
  const auto* api = static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.get(), "dlpack_exchange_api"));
  if (!api) return nullptr;
  if (api->header.version.major != DLPACK_MAJOR_VERSION || !api->dltensor_from_py_object_no_sync)
    return PyErr_Format(PyExc_ImportError, "torch exchanges tensors by DLPack %u, built for %d",
                        unsigned(api->header.version.major), DLPACK_MAJOR_VERSION);
  torch.new_empty = PyUnicode_InternFromString("new_empty");
  torch.transpose = PyUnicode_InternFromString("transpose");
  if (!torch.new_empty || !torch.transpose) return nullptr;
  torch.tensor = Ref::to(arguments[0]).release();
  torch.parameter = Ref::to(arguments[1]).release();
  torch.empty_like = Ref::to(arguments[2]).release();
  torch.read = api->dltensor_from_py_object_no_sync;
  Py_RETURN_NONE;
}

PyObject* call_inference(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != kArguments)
    return PyErr_Format(PyExc_TypeError, "infer takes %zd arguments, got %zd", kArguments, count);
  int64_t numbers[kArguments - kNumbers];
  for (Py_ssize_t i = kNumbers; i < count; ++i) numbers[i - kNumbers] = PyLong_AsLongLong(arguments[i]);
  if (PyErr_Occurred()) return nullptr;
  Call call;
  static_assert(sizeof call.s == sizeof numbers);
  std::memcpy(&call.s, numbers, sizeof numbers);
  if (!call.plain(arguments)) Py_RETURN_NONE;
  return call.run(arguments[kX]);
}
}  // namespace seqkern
