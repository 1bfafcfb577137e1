// Cells beyond torch.nn's: peepholes, coupled gates, hard sigmoids, the reset gate before the product. As in cells.h,
// registers in, registers out. Formulas: seqkern/reference.py, `_lstm_variant` and `_gru_variant`.
#pragma once
#include "args.h"
#include "cells.h"

namespace seqkern { namespace SK_NS { namespace {

template <class V> SK_HD V gate(bool hard, V x) { return hard ? hard_sigmoid(x) : sigmoid(x); }
template <class V> SK_HD V dgate(bool hard, V y) {
  return hard ? positive(y) * positive(V(1) - y) * V(1. / 6) : dsigmoid(y);
}

// c' = f c + i g from the sums a of i, f, g and the peepholes' weights p of i, f; saved: i f g.
template <class V>
SK_HD V variant_lstm_state(const Variant& k, const V (&a)[3], const V (&p)[2], V c, V (&saved)[3]) {
  const V i = gate(k.hard, k.peephole ? a[0] + p[0] * c : a[0]);
  const V f = k.coupled ? V(1) - i : gate(k.hard, k.peephole ? a[1] + p[1] * c : a[1]);
  const V g = tanh_(a[2]);
  saved[0] = i; saved[1] = f; saved[2] = g;
  return f * c + i * g;
}
// From dc, d(loss)/dc': the gradients of a, and d(loss)/dc in place of dc.
template <class V>
SK_HD void variant_lstm_backward(const Variant& k, const V (&saved)[3], const V (&p)[2], V c, V& dc, V (&grad)[3]) {
  const V i = saved[0], f = saved[1], g = saved[2];
  grad[0] = dc * (k.coupled ? g - c : g) * dgate(k.hard, i);
  grad[1] = k.coupled ? V(0) : dc * c * dgate(k.hard, f);
  grad[2] = dc * i * dtanh(g);
  dc = dc * f;
  if (k.peephole) dc = dc + grad[0] * p[0] + grad[1] * p[1];
}

// From dh, d(loss)/dh': the gradients of the sums of z and n, and d(loss)/dh past both in place of dh. h: what the step
// read.
template <class V>
SK_HD void variant_gru_backward(const Variant& k, V z, V n, V h, V& dh, V& dz, V& dn) {
  dn = dh * (V(1) - z) * dtanh(n);
  dz = dh * (h - n) * dgate(k.hard, z);
  dh = dh * z;
}

}}}  // namespace seqkern::SK_NS
