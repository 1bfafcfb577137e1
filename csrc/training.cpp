// A plain layer's or cell's forward and backward with gradients, for the autograd functions of seqkern/training.py.
#include <memory>

#include "calls.h"
#include "objects.h"

namespace seqkern {
namespace {
PyObject* or_none(const Ref& r) { return r ? r.get() : Py_None; }
int64_t number(PyObject* o) { return PyLong_AsLongLong(o); }

// A layer in one call, or one step as RNNCell and its like take it: x [B, I] or [I], states [B, H] or [H], y the new h.
struct Layer {
  DLTensor x, h, c;
  PyObject *x_object, *h_object, *c_object, *weights_object;
  int64_t cell, directions, one_step;
  int64_t steps, batch, input, hidden, output, per_direction;
  int dtype;
  std::vector<Ref> held;
  std::vector<DLTensor> shapes;  // of the weights
  std::vector<void*> weights;

  bool lstm() const { return cell == kLstm; }
  bool plain() {
    if (!read(x_object, x)) return false;
    dtype = dtype_of(x);
    if (dtype == kNoDtype || (one_step ? x.ndim != 1 && x.ndim != 2 : x.ndim != 3)) return false;
    steps = one_step ? 1 : x.shape[0];
    batch = x.ndim == 1 ? 1 : x.shape[x.ndim - 2];
    input = x.shape[x.ndim - 1];
    return steps > 0 && batch > 0 && input > 0 && plain_weights() && plain_state(h_object, h, output) &&
           (!lstm() || plain_state(c_object, c, hidden));
  }
  bool plain_weights() {
    if (!PyTuple_Check(weights_object) && !PyList_Check(weights_object)) return false;
    const Py_ssize_t count = PySequence_Size(weights_object);
    per_direction = count / directions;
    if (count % directions || per_direction < 2 || per_direction > 5) return false;
    const bool bias = per_direction >= 4, projected = per_direction % 2;
    held.reserve(count);
    shapes.resize(count);
    for (Py_ssize_t i = 0; i < count; ++i) {
      held.emplace_back(PySequence_GetItem(weights_object, i));
      if (!read(held.back().get(), shapes[i]) || dtype_of(shapes[i]) != dtype) return false;
      weights.push_back(data(shapes[i]));
    }
    if (shapes[0].ndim != 2 || shapes[1].ndim != 2 || shapes[0].shape[0] % gates_of(cell)) return false;
    hidden = shapes[0].shape[0] / gates_of(cell);
    output = shapes[1].shape[1];
    if (hidden == 0 || output == 0 || (projected ? !lstm() : output != hidden)) return false;
    for (Py_ssize_t i = 0; i < count; ++i)
      if (!weight_shape(i % per_direction, bias, gates_of(cell) * hidden, input, output, output, hidden).of(shapes[i]))
        return false;
    return true;
  }
  Shape state(int64_t size) const {
    if (one_step) return x.ndim == 2 ? Shape{{batch, size}, 2} : Shape{{size}, 1};
    return {{directions, batch, size}, 3};
  }
  Shape outputs() const { return one_step ? state(output) : Shape{{steps, batch, directions * output}, 3}; }
  int64_t reserve_size() const { return directions * steps * batch * saved_per_unit(cell) * hidden; }
  bool plain_state(PyObject* o, DLTensor& t, int64_t size) const { return o == Py_None || is(o, t, state(size)); }
  bool is(PyObject* o, DLTensor& t, const Shape& shape) const {
    return read(o, t) && dtype_of(t) == dtype && shape.of(t);
  }
  Ref like_x(const Shape& shape) const { return made(x_object, x, shape); }
  Plain call(void* y, void* h_n, void* c_n, void* reserve) const {
    return {cell, dtype, steps, batch, input, hidden, output, directions, 0, data(x),
            h_object == Py_None ? nullptr : data(h), lstm() && c_object != Py_None ? data(c) : nullptr, y, h_n, c_n, reserve,
            weights.data(), per_direction};
  }
};

bool right_count(const char* name, Py_ssize_t wanted, Py_ssize_t count) {
  if (count != wanted) PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, got %zd", name, wanted, count);
  return count == wanted;
}
}  // namespace

PyObject* call_forward(PyObject*, PyObject* const* a, Py_ssize_t count) {
  if (!right_count("forward", 7, count)) return nullptr;
  Layer s{.x_object = a[0], .h_object = a[1], .c_object = a[2], .weights_object = a[3], .cell = number(a[4]),
          .directions = number(a[5]) ? 2 : 1, .one_step = number(a[6])};
  if (PyErr_Occurred()) return nullptr;
  if (!s.plain()) Py_RETURN_NONE;
  DLTensor y, h_n, c_n, reserve;
  Ref y_object = s.like_x(s.outputs()), h_object, c_object, reserve_object;
  if (!describe(y_object, y)) return nullptr;
  h_n = y;
  if (!s.one_step && !describe(h_object = s.like_x(s.state(s.output)), h_n)) return nullptr;
  if (s.lstm() && !describe(c_object = s.like_x(s.state(s.hidden)), c_n)) return nullptr;
  if (s.reserve_size() && !describe(reserve_object = s.like_x({{s.reserve_size()}, 1}), reserve)) return nullptr;
  const Plain call = s.call(data(y), data(h_n), c_object ? data(c_n) : nullptr, reserve_object ? data(reserve) : nullptr);
  if (!unlocked([&] { plain_forward(call); })) return nullptr;
  if (s.one_step) return Py_BuildValue("OOO", y_object.get(), or_none(c_object), or_none(reserve_object));
  return Py_BuildValue("OOOO", y_object.get(), h_object.get(), or_none(c_object), or_none(reserve_object));
}

PyObject* call_backward(PyObject*, PyObject* const* a, Py_ssize_t count) {
  if (!right_count("backward", 16, count)) return nullptr;
  Layer s{.x_object = a[3], .h_object = a[4], .c_object = a[5], .weights_object = a[6], .cell = number(a[9]),
          .directions = number(a[10]) ? 2 : 1, .one_step = number(a[11])};
  const bool need_dx = number(a[12]), need_dh = number(a[13]), need_dc = number(a[14]), need_dw = number(a[15]);
  if (PyErr_Occurred()) return nullptr;
  DLTensor dy, dh_n, dc_n, y, reserve;
  PyObject *const dy_object = a[0], *const dh_object = a[1], *const dc_object = s.lstm() ? a[2] : Py_None;
  if (!s.plain() || !s.is(a[7], y, s.outputs())) Py_RETURN_NONE;
  if (s.reserve_size() && !s.is(a[8], reserve, {{s.reserve_size()}, 1})) Py_RETURN_NONE;
  if (dy_object != Py_None && (s.one_step || !s.is(dy_object, dy, s.outputs()))) Py_RETURN_NONE;
  if (!s.plain_state(dh_object, dh_n, s.output) || !s.plain_state(dc_object, dc_n, s.hidden)) Py_RETURN_NONE;

  // The kernel always writes the states' gradients.
  std::unique_ptr<char[]> unwanted;
  const int64_t bytes = s.x.dtype.bits / 8, state_bytes = s.directions * s.batch * (s.output + s.hidden) * bytes;
  if (!need_dh || (s.lstm() && !need_dc)) unwanted.reset(new (std::nothrow) char[state_bytes]);
  if ((!need_dh || (s.lstm() && !need_dc)) && !unwanted) return PyErr_NoMemory();
  void *dh_at = unwanted.get(), *dc_at = unwanted.get() + s.directions * s.batch * s.output * bytes, *dx_at = nullptr;
  DLTensor t;
  Ref dx_object, dh0_object, dc0_object, dw_object;
  if (need_dx) {
    if (!describe(dx_object = Ref(PyObject_CallFunctionObjArgs(torch_objects.empty_like, s.x_object, nullptr)), t))
      return nullptr;
    dx_at = data(t);
  }
  if (need_dh) {
    if (!describe(dh0_object = s.like_x(s.state(s.output)), t)) return nullptr;
    dh_at = data(t);
  }
  if (s.lstm() && need_dc) {
    if (!describe(dc0_object = s.like_x(s.state(s.hidden)), t)) return nullptr;
    dc_at = data(t);
  }
  std::vector<void*> dweights;
  if (need_dw) {
    dw_object = Ref(PyTuple_New(s.held.size()));
    for (size_t i = 0; dw_object && i < s.held.size(); ++i) {
      Ref dw(PyObject_CallFunctionObjArgs(torch_objects.empty_like, s.held[i].get(), nullptr));
      if (!describe(dw, t)) return nullptr;
      dweights.push_back(data(t));
      if (PyTuple_SetItem(dw_object.get(), i, dw.release()) != 0) return nullptr;
    }
    if (!dw_object) return nullptr;
  }
  const Plain call = s.call(data(y), nullptr, nullptr, s.reserve_size() ? data(reserve) : nullptr);
  const PlainGradients gradients{dy_object == Py_None ? nullptr : data(dy), dh_object == Py_None ? nullptr : data(dh_n),
                                 dc_object == Py_None ? nullptr : data(dc_n), dx_at, dh_at, s.lstm() ? dc_at : nullptr,
                                 need_dw ? dweights.data() : nullptr};
  if (!unlocked([&] { plain_backward(call, gradients); })) return nullptr;
  return Py_BuildValue("OOOO", or_none(dx_object), or_none(dh0_object), or_none(dc0_object), or_none(dw_object));
}
}  // namespace seqkern
