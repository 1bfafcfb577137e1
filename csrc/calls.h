// Plain calls, from Python's objects: seqkern/inference.py, seqkern/training.py.
#pragma once
#include <Python.h>

namespace seqkern {
PyObject* bind_tensors(PyObject*, PyObject* const*, Py_ssize_t);
PyObject* call_inference(PyObject*, PyObject* const*, Py_ssize_t);
PyObject* call_forward(PyObject*, PyObject* const*, Py_ssize_t);
PyObject* call_backward(PyObject*, PyObject* const*, Py_ssize_t);
}  // namespace seqkern
