// A plain call of a layer in inference, from Python's objects: seqkern/inference.py.
#pragma once
#include <Python.h>

namespace seqkern {
PyObject* bind_inference(PyObject*, PyObject* const*, Py_ssize_t);
PyObject* call_inference(PyObject*, PyObject* const*, Py_ssize_t);
}  // namespace seqkern
