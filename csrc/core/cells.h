// Cell math: the one definition for every CPU instruction set and for CUDA. Registers in, registers out.
// V is a SIMD pack on the CPU and float or double on CUDA; sigmoid(V), tanh_(V) and relu(V) are found where this is
// included. No includes: this header stays free of torch, CUDA and the standard library.
//
// A cell says what it is in constants, so that a driver needs no knowledge of it:
//   kGates   weight matrices have kGates * H rows, in torch's gate order
//   kSaved   values per unit that forward hands to backward
//   kGrads   values per unit that backward yields. Their columns hold, from 0, the gradient of W_ih x + b_ih, and,
//            up to the end, that of W_hh h + b_hh: where the two are equal (kGrads == kGates) they share all columns.
//   kOrder   gate of column k of the first of these ranges; kOrderH likewise of the second
//   kCarry   what passes from step to step beside the matrix product, in full precision:
//            the LSTM's c, the GRU's h (through its z gate), or nothing
#pragma once
#ifdef __CUDACC__
#define SK_HD __host__ __device__ __forceinline__
#else
#define SK_HD inline __attribute__((always_inline))
#endif

namespace seqkern { namespace SK_NS { namespace {

enum class Carry { kNone, kCell, kHidden };

template <class V> SK_HD V dsigmoid(V s) { return s * (V(1) - s); }
template <class V> SK_HD V dtanh(V t) { return V(1) - t * t; }

struct TanhActivation {
  template <class V> SK_HD static V value(V x) { return tanh_(x); }
  template <class V> SK_HD static V slope(V y) { return dtanh(y); }
};

struct ReluActivation {
  template <class V> SK_HD static V value(V x) { return relu(x); }
  template <class V> SK_HD static V slope(V y) { return positive(y); }
};

// h' = act(x + h)
template <class Activation> struct Rnn {
  static constexpr int kGates = 1, kSaved = 0, kGrads = 1;
  static constexpr int kOrder[1] = {0}, kOrderH[1] = {0};
  static constexpr Carry kCarry = Carry::kNone;
  template <class V>
  SK_HD static void forward(const V (&x)[1], const V (&h)[1], V&, V& out, V*) {
    out = Activation::value(x[0] + h[0]);
  }
  // out: this step's h'. prev: unused. dh: d(loss)/dh'.
  template <class V> SK_HD static void backward(const V*, V out, V, V dh, V&, V (&grad)[1]) {
    grad[0] = dh * Activation::slope(out);
  }
};
using RnnTanh = Rnn<TanhActivation>;
using RnnRelu = Rnn<ReluActivation>;

// Gates i, f, g, o: c' = f c + i g, h' = o tanh(c').
struct Lstm {
  static constexpr int kGates = 4, kSaved = 5, kGrads = 4;  // saved: i f g o c'
  static constexpr int kOrder[4] = {0, 1, 2, 3}, kOrderH[4] = {0, 1, 2, 3};
  static constexpr Carry kCarry = Carry::kCell;
  template <class V>
  SK_HD static void forward(const V (&x)[4], const V (&h)[4], V& c, V& out, V (&saved)[5]) {
    V i = sigmoid(x[0] + h[0]), f = sigmoid(x[1] + h[1]);
    V g = tanh_(x[2] + h[2]), o = sigmoid(x[3] + h[3]);
    c = f * c + i * g;
    out = o * tanh_(c);
    saved[0] = i; saved[1] = f; saved[2] = g; saved[3] = o; saved[4] = c;
  }
  // prev: c. dc: d(loss)/dc' from the step after on entry, d(loss)/dc on exit.
  template <class V>
  SK_HD static void backward(const V (&saved)[5], V, V prev, V dh, V& dc, V (&grad)[4]) {
    V i = saved[0], f = saved[1], g = saved[2], o = saved[3], t = tanh_(saved[4]);
    V d = dc + dh * o * dtanh(t);
    grad[0] = d * g * dsigmoid(i);
    grad[1] = d * prev * dsigmoid(f);
    grad[2] = d * i * dtanh(g);
    grad[3] = dh * t * dsigmoid(o);
    dc = d * f;
  }
  // All of d(loss)/dc', where dc comes from the step after.
  template <class V> SK_HD static V cell_gradient(const V (&saved)[5], V dh, V dc) {
    return dc + dh * saved[3] * dtanh(tanh_(saved[4]));
  }
  // What the projection multiplies, from the saved values.
  template <class V> SK_HD static V unprojected(const V (&saved)[5]) { return saved[3] * tanh_(saved[4]); }
};

// Gates r, z, n as in torch and cuDNN (the reset gate acts after the matrix product):
// n = tanh(x_n + r h_n), h' = n + z (h - n).
struct Gru {
  static constexpr int kGates = 3, kSaved = 4, kGrads = 4;  // saved: r z n h_n
  // The gradients of x_n and h_n differ; with columns x_n, r, z, h_n both ranges are contiguous.
  static constexpr int kOrder[3] = {2, 0, 1}, kOrderH[3] = {0, 1, 2};
  static constexpr Carry kCarry = Carry::kHidden;
  template <class V>
  SK_HD static void forward(const V (&x)[3], const V (&h)[3], V& state, V& out, V (&saved)[4]) {
    V r = sigmoid(x[0] + h[0]), z = sigmoid(x[1] + h[1]), n = tanh_(x[2] + r * h[2]);
    state = n + z * (state - n);
    out = state;
    saved[0] = r; saved[1] = z; saved[2] = n; saved[3] = h[2];
  }
  // prev: h. carry: the part of d(loss)/dh' that came straight through the step after's z gate.
  template <class V>
  SK_HD static void backward(const V (&saved)[4], V, V prev, V dh, V& carry, V (&grad)[4]) {
    V r = saved[0], z = saved[1], n = saved[2], hn = saved[3], d = dh + carry;
    grad[0] = d * (V(1) - z) * dtanh(n);
    grad[1] = grad[0] * hn * dsigmoid(r);
    grad[2] = d * (prev - n) * dsigmoid(z);
    grad[3] = grad[0] * r;
    carry = d * z;
  }
};

}}}  // namespace seqkern::SK_NS
