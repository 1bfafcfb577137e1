// A plain call of a layer or a cell in inference: what the operator's boxed arguments, or checks of tensors in Python, would
// cost is more than a small layer's arithmetic.
#include "calls.h"

#include <cstring>

#include "objects.h"

namespace seqkern {
Torch torch_objects;

namespace {
struct Settings {
  int64_t cell, input, hidden, proj, layers, bidirectional, bias, batch_first;
  int64_t one_step;  // as RNNCell and its like take it: x [B, I] or [I], states [B, H] or [H], no y
  bool lstm() const { return cell == kLstm; }
  int64_t directions() const { return bidirectional ? 2 : 1; }
  int64_t output() const { return proj ? proj : hidden; }
  int64_t per_direction() const { return 2 + (bias ? 2 : 0) + (proj ? 1 : 0); }  // weights
  Shape weight(int64_t layer, int64_t which) const {
    return weight_shape(which, bias, gates_of(cell) * hidden, layer ? directions() * output() : input, output(), proj, hidden);
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
      if (!describe(ys.back(), t)) return nullptr;
      at.push_back(data(t));
    }
    DLTensor h_out, c_out;
    Ref h_n = h_object ? made(h_object, h, state(s.output())) : made(x_object, x, state(s.output())), c_n;
    if (!describe(h_n, h_out)) return nullptr;
    if (s.lstm()) {
      c_n = made(h_n.get(), h_out, state(s.hidden));
      if (!describe(c_n, c_out)) return nullptr;
    }
    if (s.one_step) at.push_back(data(h_out));
    const int64_t row = s.directions() * batch * (x.dtype.bits / 8);  // a layer's states: this times the size of one
    const auto part = [&](const DLTensor& states, int64_t layer, int64_t size) {
      return static_cast<void*>(static_cast<char*>(data(states)) + layer * row * size);
    };
    const auto all_layers = [&] {
      for (int64_t layer = 0; layer < s.layers; ++layer)
        plain_forward({s.cell, dtype, steps, batch, layer ? width : s.input, s.hidden, s.output(), s.directions(),
                 turned && layer == 0, at[layer], h_object ? part(h, layer, s.output()) : nullptr,
                 c_object ? part(c, layer, s.hidden) : nullptr, at[layer + 1], part(h_out, layer, s.output()),
                 s.lstm() ? part(c_out, layer, s.hidden) : nullptr, nullptr,
                 weights.data() + layer * s.directions() * s.per_direction(), s.per_direction()});
    };
    if (!unlocked(all_layers)) return nullptr;
    if (s.one_step) return s.lstm() ? Py_BuildValue("OO", h_n.get(), c_n.get()) : h_n.release();
    Ref y = std::move(ys.back());
    if (turned) {
      Ref zero(PyLong_FromLong(0)), one(PyLong_FromLong(1));
      y = Ref(PyObject_CallMethodObjArgs(y.get(), torch_objects.transpose, zero.get(), one.get(), nullptr));
      if (!y) return nullptr;
    }
    return s.lstm() ? Py_BuildValue("O(OO)", y.get(), h_n.get(), c_n.get()) : Py_BuildValue("OO", y.get(), h_n.get());
  }
};
}  // namespace

PyObject* bind_tensors(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 3) return PyErr_Format(PyExc_TypeError, "bind_tensors takes 3 arguments, got %zd", count);
  Ref capsule(PyObject_GetAttrString(arguments[0], "__dlpack_c_exchange_api__"));
  if (!capsule) return nullptr;
  const auto* api = static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.get(), "dlpack_exchange_api"));
  if (!api) return nullptr;
  if (api->header.version.major != DLPACK_MAJOR_VERSION || !api->dltensor_from_py_object_no_sync)
    return PyErr_Format(PyExc_ImportError, "torch exchanges tensors by DLPack %u, built for %d",
                        unsigned(api->header.version.major), DLPACK_MAJOR_VERSION);
  torch_objects.new_empty = PyUnicode_InternFromString("new_empty");
  torch_objects.transpose = PyUnicode_InternFromString("transpose");
  if (!torch_objects.new_empty || !torch_objects.transpose) return nullptr;
  torch_objects.tensor = Ref::to(arguments[0]).release();
  torch_objects.parameter = Ref::to(arguments[1]).release();
  torch_objects.empty_like = Ref::to(arguments[2]).release();
  torch_objects.read = api->dltensor_from_py_object_no_sync;
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
