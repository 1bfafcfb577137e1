// The table of contents of the C++ side: the module and every operator's schema.
// Python adds fake kernels, autograd and autocast in seqkern/ops.py (and seqkern/seq2seq/ops.py), in this order.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "calls.h"

PyMODINIT_FUNC PyInit__C(void) {
  const auto fast = [](PyObject* (*f)(PyObject*, PyObject* const*, Py_ssize_t)) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
  };
  static PyMethodDef methods[] = {
      // (x, hx, parameters, names, cell, I, H, P or 0, L, bidirectional, bias, batch_first, one_step) -> (y, hx), or of one
      // step hx; like the next two None where the tensors are not plain, and to be called after bind_tensors
      {"infer", fast(&seqkern::call_inference), METH_FASTCALL, nullptr},
      // (x, h0, c0, weights, cell, bidirectional, one_step) -> (y, h_n, c_n, reserve), or of one step (h_n, c_n, reserve)
      {"forward", fast(&seqkern::call_forward), METH_FASTCALL, nullptr},
      // (dy, dh_n, dc_n, x, h0, c0, weights, y, reserve, cell, bidirectional, one_step, need_dx, need_dh0, need_dc0, need_dw)
      // -> (dx, dh0, dc0, dweights), None for what is not needed
      {"backward", fast(&seqkern::call_backward), METH_FASTCALL, nullptr},
      // (Tensor, Parameter, empty_like)
      {"bind_tensors", fast(&seqkern::bind_tensors), METH_FASTCALL, nullptr},
      {nullptr, nullptr, 0, nullptr}};
  static struct PyModuleDef def = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&def);
}

STABLE_TORCH_LIBRARY(seqkern, m) {
  // One layer, one or two directions. Shapes: seqkern/reference.py, `layer`. `save`: keep what backward needs.
  // `tf32`: float32 operands of matrix products on a GPU may be rounded to TF32.
  m.def("rnn_layer(Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, str cell,"
        " bool bidirectional, bool save, bool tf32=False) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor reserve)");
  m.def("rnn_layer_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor? h0, Tensor? c0,"
        " Tensor[] weights, Tensor? batch_sizes, Tensor y, Tensor reserve, str cell, bool bidirectional,"
        " bool need_dx, bool need_dw, bool tf32=False) -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights)");
  // The same with what torch.nn's layers lack: seqkern/reference.py, `Options`. want_c: c of every step (LSTM), into
  // c_all, which backward needs too where it is not empty. want_flow: squares of d(loss)/dh and d(loss)/dc, [2, D, N, K]
  // in K parts to be summed. On the CPU neither lengths nor clip_norm: there packed rows and `recurrence` do these.
  m.def("option_layer(Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, Tensor? keep,"
        " Tensor? h_mask, Tensor? zone_h, Tensor? zone_c, float clip_value, str cell, bool bidirectional, bool want_c,"
        " bool save, Tensor? lengths=None, float clip_norm=0., bool tf32=False)"
        " -> (Tensor y, Tensor h_n, Tensor c_n, Tensor c_all, Tensor reserve)");
  m.def("option_layer_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc_all, Tensor x, Tensor? h0,"
        " Tensor? c0, Tensor[] weights, Tensor? batch_sizes, Tensor? keep, Tensor? h_mask, Tensor? zone_h,"
        " Tensor? zone_c, float clip_value, Tensor y, Tensor c_all, Tensor reserve, str cell, bool bidirectional,"
        " bool need_dx, bool need_dw, bool want_flow, Tensor? lengths=None, float clip_norm=0., bool tf32=False)"
        " -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights, Tensor flow)");
  // The recurrence alone, from projected inputs gx, with other cells than torch.nn's: seqkern/recurrence.py. read and
  // reserve are what backward needs; its impl in Python takes dw_hh from what _recurrence_backward gives. lengths: CUDA's
  // alone.
  m.def("recurrence(Tensor gx, Tensor? h0, Tensor? c0, Tensor[] params, Tensor? batch_sizes, Tensor? keep,"
        " Tensor? h_mask, Tensor? zone_h, Tensor? zone_c, float clip_value, float clip_norm, str cell, int flags,"
        " bool want_c, bool save, Tensor? lengths=None, bool tf32=False)"
        " -> (Tensor y, Tensor h_n, Tensor c_n, Tensor c_all, Tensor read, Tensor reserve)");
  m.def("recurrence_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc_all, Tensor gx, Tensor? h0, Tensor? c0,"
        " Tensor[] params, Tensor? batch_sizes, Tensor? keep, Tensor? h_mask, Tensor? zone_h, Tensor? zone_c,"
        " float clip_value, float clip_norm, Tensor read, Tensor reserve, str cell, int flags,"
        " Tensor? lengths=None, bool tf32=False)"
        " -> (Tensor dgx, Tensor dh0, Tensor dc0, Tensor[] dparams)");
  m.def("_recurrence_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc_all, Tensor gx, Tensor? h0,"
        " Tensor? c0, Tensor[] params, Tensor? batch_sizes, Tensor? keep, Tensor? h_mask, Tensor? zone_h,"
        " Tensor? zone_c, float clip_value, float clip_norm, Tensor read, Tensor reserve, str cell, int flags,"
        " Tensor? lengths=None, bool tf32=False)"
        " -> (Tensor dgx, Tensor dgh, Tensor dh0, Tensor dc0, Tensor sums)");
  // out = a^T b in float32 with operands rounded to TF32, whatever torch's flag for its own products: CUDA.
  m.def("_transposed_product(Tensor(a!) out, Tensor a, Tensor b) -> ()");
  // h_t = keep_t a_t h_{t-1} + b_t for cells whose gates see the input alone: seqkern/scan.py.
  m.def("scan(Tensor p, Tensor? h0, Tensor? keep, str cell) -> Tensor h");
  m.def("scan_backward(Tensor dh, Tensor p, Tensor? h0, Tensor? keep, Tensor h, str cell) -> (Tensor dp, Tensor dh0)");
  // Recurrent layers with attention and input feeding over a whole target: seqkern/seq2seq/reference.py.
  m.def("attention_decoder(Tensor gx, Tensor? feed0, Tensor h0, Tensor? c0, Tensor[] weights, Tensor keys,"
        " Tensor values, Tensor lengths, Tensor? w_query, Tensor? v, Tensor w_pre, Tensor b_pre, Tensor? masks,"
        " str cell, bool save, Tensor? tokens=None)"
        " -> (Tensor a, Tensor h_n, Tensor c_n, Tensor alpha, Tensor reserve)");
  // What is not needed or not there comes back empty.
  m.def("attention_decoder_backward(Tensor? da, Tensor? dh_n, Tensor? dc_n, Tensor? dalpha, Tensor gx, Tensor? feed0,"
        " Tensor h0, Tensor? c0, Tensor[] weights, Tensor keys, Tensor values, Tensor lengths, Tensor? w_query,"
        " Tensor? v, Tensor w_pre, Tensor b_pre, Tensor? masks, Tensor a, Tensor alpha, Tensor reserve, str cell,"
        " bool need_sources, bool need_weights, bool need_masks, Tensor? tokens=None)"
        " -> (Tensor dgx, Tensor dfeed0, Tensor dh0, Tensor dc0, Tensor[] dweights, Tensor dkeys, Tensor dvalues,"
        " Tensor dw_query, Tensor dv, Tensor dw_pre, Tensor db_pre, Tensor dmasks)");
  // Keys and values of the places before each length, batch-major; zeros elsewhere: seqkern/seq2seq/reference.py.
  m.def("project_sources(Tensor memory, Tensor lengths, Tensor w_key, Tensor? b_key, Tensor w_value)"
        " -> (Tensor keys, Tensor values)");
  m.def("project_sources_backward(Tensor dkeys, Tensor dvalues, Tensor memory, Tensor lengths, Tensor w_key,"
        " Tensor? b_key, Tensor w_value, bool need_memory, bool need_weights)"
        " -> (Tensor dmemory, Tensor dw_key, Tensor db_key, Tensor dw_value)");
  // Searches, the whole loop: seqkern/seq2seq/compiled.py. `packed` holds a decoder's weights, opaque.
  m.def("search_pack(Tensor table, Tensor w_ih, Tensor b_ih, Tensor[] layers, Tensor[] sources, Tensor[] query,"
        " Tensor[] pre, Tensor[] out, str cell, str attention, int embedding) -> Tensor packed");
  m.def("search_greedy(Tensor packed, Tensor? embedding, Tensor? memory, Tensor lengths, Tensor h0,"
        " Tensor? c0, Tensor? forced, int[] ids, int max_len, bool attention)"
        " -> (Tensor tokens, Tensor lengths, Tensor scores, Tensor attention)");
  m.def("search_sample(Tensor packed, Tensor? embedding, Tensor? memory, Tensor lengths, Tensor h0,"
        " Tensor? c0, Tensor seed, int[] ids, int max_len, float temperature, int top_k, float top_p)"
        " -> (Tensor tokens, Tensor lengths, Tensor scores, Tensor attention)");
  m.def("search_beam(Tensor packed, Tensor? embedding, Tensor? memory, Tensor lengths, Tensor h0,"
        " Tensor? c0, int[] ids, int[] options, float length_penalty, float coverage_penalty, bool early_stop,"
        " bool attention) -> (Tensor tokens, Tensor lengths, Tensor scores, Tensor attention)");
  m.def("_search_scratch(Tensor packed, int sources, int places, int beam) -> int");
  // A mask like `like` of the given size: `value` with probability p, else 0. Definition: seqkern/masks.py.
  m.def("_bernoulli(Tensor like, SymInt[] size, Tensor seed, int stream, float p, float value) -> Tensor");
  m.def("_build_info() -> str");                       // JSON: version, hash of csrc/, torch and CUDA archs of the build
  m.def("_cpu_isa() -> str");                          // the instruction set in use
  m.def("_cpu_isas() -> str");                         // those that this CPU can run
  m.def("_cpu_math(Tensor x, str name) -> Tensor");    // exp, tanh or sigmoid as the kernels compute it
  m.def("_cpu_mark(Tensor x) -> int");                  // of its bits: csrc/cpu/marks.h
  m.def("_cpu_kept_weights() -> int[]");                // layers whose packed weights are kept, and their bytes
  m.def("_cpu_peak(str dtype, int threads) -> float");  // GF/s of multiply-adds on registers
  // The work split of a call: directions at once, parts of the batch, parts of the hidden units.
  m.def("_cpu_plan(int steps, int batch, int input, int hidden, int output, str cell, bool bidirectional) -> int[]");
  // The engine that a call on CUDA device `device` would take, and its tiles: JSON. sizes: T, B, H, P. options: any set.
  m.def("_cuda_plan(int[] sizes, str cell, str dtype, bool tf32, bool bidirectional, bool backward, int device,"
        " bool options=False, bool norms=False) -> str");
}

namespace {
std::string build_info() { return SK_BUILD_INFO; }
}  // namespace
STABLE_TORCH_LIBRARY_IMPL(seqkern, CompositeExplicitAutograd, m) { m.impl("_build_info", TORCH_BOX(&build_info)); }
