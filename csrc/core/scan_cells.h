// Cells whose gates see the input alone, so that h' = a h + b is linear in h and time can be cut into pieces (Feng et
// al. 2024, "Were RNNs all we needed?"). Registers in, registers out, as in cells.h.
//   kGates     rows of the weight matrix are kGates * H; p holds W x + b, gate by gate, the candidate last
//   forward    a and b from p; b = (1 - a) c for both cells, where c is the candidate
//   backward   the gradient of p from those of a and b
#pragma once
#include "cells.h"

namespace seqkern { namespace SK_NS { namespace {

struct LinearCandidate {
  template <class V> SK_HD static V value(V p) { return p; }
  template <class V> SK_HD static V slope(V) { return V(1); }
};
// p + 1/2 for p >= 0, else sigmoid(p): always positive, as the paper's scan over logarithms needs it.
struct PositiveCandidate {
  template <class V> SK_HD static V value(V p) {
    V up = positive_or_zero(p);
    return up * (p + V(0.5)) + (V(1) - up) * sigmoid(p);
  }
  template <class V> SK_HD static V slope(V p) {
    V up = positive_or_zero(p), s = sigmoid(p);
    return up + (V(1) - up) * dsigmoid(s);
  }
};

// Gates z, c: h' = (1 - z) h + z c.
template <class Candidate> struct MinGru {
  static constexpr int kGates = 2;
  template <class V> SK_HD static void forward(const V (&p)[2], V& a, V& b) {
    V z = sigmoid(p[0]);
    a = sigmoid(V(0) - p[0]);
    b = z * Candidate::value(p[1]);
  }
  template <class V> SK_HD static void backward(const V (&p)[2], V da, V db, V (&dp)[2]) {
    V z = sigmoid(p[0]), c = Candidate::value(p[1]);
    dp[0] = (db * c - da) * z * sigmoid(V(0) - p[0]);
    dp[1] = db * z * Candidate::slope(p[1]);
  }
};

// Gates f, i, c: h' = f / (f + i) h + i / (f + i) c. With sigmoids written out, f / (f + i) is
// (1 + e^-i) / (2 + e^-f + e^-i); a common factor e^m, m = min(f, i, 0), keeps every power at most 1.
template <class Candidate> struct MinLstm {
  static constexpr int kGates = 3;
  template <class V> SK_HD static void shares(const V (&p)[3], V& forget, V& input) {
    V m = minimum(minimum(p[0], p[1]), V(0));
    V one = exp_(m), f = exp_(m - p[0]), i = exp_(m - p[1]);
    V r = reciprocal(one + one + f + i);
    forget = (one + i) * r;
    input = (one + f) * r;
  }
  template <class V> SK_HD static void forward(const V (&p)[3], V& a, V& b) {
    V input;
    shares(p, a, input);
    b = input * Candidate::value(p[2]);
  }
  template <class V> SK_HD static void backward(const V (&p)[3], V da, V db, V (&dp)[3]) {
    V a, input;
    shares(p, a, input);
    V d = (da - db * Candidate::value(p[2])) * a * input;
    dp[0] = d * sigmoid(V(0) - p[0]);
    dp[1] = V(0) - d * sigmoid(V(0) - p[1]);
    dp[2] = db * input * Candidate::slope(p[2]);
  }
};

}}}  // namespace seqkern::SK_NS
