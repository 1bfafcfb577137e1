// The recurrences of scan_cells.h, h_t = a_t keep_t h_{t-1} + b_t with a_t and b_t from p_t alone, on the device.
//
// A thread takes V units of a row for a piece of time. One piece is enough where the units of the batch alone fill the
// GPU. Else each piece first finds what it does to a state, a factor and a summand; a thread for each unit chains the
// pieces; then each piece runs again from its true first state. p is read twice then; memory is what bounds all of it.
// Loads of several steps are under way at once. Nothing is added atomically: results repeat bit for bit.
#pragma once
#include "lanes.cuh"

namespace seqkern { namespace cuda { namespace {

SK_MATH float exp_(float x) { return expf(x); }
SK_MATH double exp_(double x) { return exp(x); }
SK_MATH float reciprocal(float x) { return 1.f / x; }
SK_MATH double reciprocal(double x) { return 1. / x; }
template <class V> SK_MATH V minimum(V a, V b) { return a < b ? a : b; }
template <class V> SK_MATH V positive_or_zero(V x) { return x >= V(0) ? V(1) : V(0); }

}}}  // namespace seqkern::cuda

#include "../core/scan_cells.h"

namespace seqkern { namespace cuda { namespace {

constexpr int kScanThreads = 128;  // of a block
// Steps whose loads are under way at once: as many as do not spill.
template <class C, class S> constexpr int kAheadOf = sizeof(S) == 8 || C::kGates == 3 ? 4 : 8;
constexpr int kPiecesAhead = 8;

struct ScanPass {
  ScanArgs a;
  void* dh0;                // [B, H] in the storage type
  int64_t pieces, length;   // pieces of time, and their steps, the last may have fewer
  void *factor, *state;     // [pieces][B*H] in the type of sums; state: a piece's summand, then its first state
};

template <class W> SK_MATH W kept(W keep, W x) { return keep == W(0) ? W(0) : x * keep; }  // 0 clears a NaN, too

// A piece's factor after a step: `after`, but 0 where, and only where, the state was cleared, so that a state that is not
// a number outlives a factor too small to tell from 0, and no reset.
template <class W> SK_MATH W factor_after(W before, W after) {
  const W least = sizeof(W) == 8 ? W(2.2250738585072014e-308) : W(1.17549435e-38f);
  return before > W(0) ? (after > least ? after : least) : W(0);
}

// A thread's units and steps.
template <class S, int V> struct ScanPlace {
  int64_t b, unit, begin, end, stored;  // stored: of the first unit in a row of factor and state
  bool inside;
  SK_MATH explicit ScanPlace(const ScanPass& s) {
    const int64_t q = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, per_row = s.a.hidden / V;
    inside = q < per_row * s.a.batch;
    b = q / per_row;
    unit = q % per_row * V;
    begin = int64_t(blockIdx.y) * s.length;
    end = begin + s.length < s.a.steps ? begin + s.length : s.a.steps;
    stored = int64_t(blockIdx.y) * s.a.batch * s.a.hidden + b * s.a.hidden + unit;
  }
};

template <class C, class S, int V> struct ScanStep {
  using W = Wide<S>;
  S p[C::kGates][V];
  W keep;
  SK_MATH void load(const ScanArgs& a, int64_t t, int64_t b, int64_t unit) {
    const int64_t at = (t * a.batch + b) * C::kGates * a.hidden + unit;
#pragma unroll
    for (int g = 0; g < C::kGates; ++g) cuda::load<V>(a.p, at + g * a.hidden, p[g]);
    keep = a.keep ? ((const W*)a.keep)[t * a.batch + b] : W(1);
  }
  SK_MATH void gates(int v, W (&x)[C::kGates]) const {
#pragma unroll
    for (int g = 0; g < C::kGates; ++g) x[g] = widen(p[g][v]);
  }
};

// kSummary: only factor and summand of each piece.
template <class C, class S, int V, bool kSummary>
__global__ void __launch_bounds__(kScanThreads) scan_forward(ScanPass s) {
  using W = Wide<S>;
  constexpr int kAhead = kAheadOf<C, S>;
  const ScanPlace<S, V> at(s);
  if (!at.inside) return;
  W state[V], factor[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int64_t first = at.b * s.a.hidden + at.unit + v;
    factor[v] = W(1);
    state[v] = kSummary ? W(0) : s.pieces > 1 ? ((const W*)s.state)[at.stored + v]
               : s.a.h0 ? W(widen(((const S*)s.a.h0)[first])) : W(0);
  }
  for (int64_t t = at.begin; t < at.end; t += kAhead) {
    ScanStep<C, S, V> step[kAhead] = {};
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      if (t + u < at.end) step[u].load(s.a, t + u, at.b, at.unit);
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (t + u >= at.end) break;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        W x[C::kGates], f, add;
        step[u].gates(v, x);
        C::forward(x, f, add);
        state[v] = f * kept(step[u].keep, state[v]) + add;
        if (kSummary) {
          const W before = kept(step[u].keep, factor[v]);
          factor[v] = factor_after(before, f * before);
        }
      }
      if (!kSummary) store<S, V>(s.a.h, ((t + u) * s.a.batch + at.b) * s.a.hidden + at.unit, state);
    }
  }
  if (kSummary) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      ((W*)s.state)[at.stored + v] = state[v];
      ((W*)s.factor)[at.stored + v] = factor[v];
    }
  }
}

// Against time: the state is the gradient of the state after a step, from what follows.
template <class C, class S, int V, bool kSummary>
__global__ void __launch_bounds__(kScanThreads) scan_backward(ScanPass s) {
  using W = Wide<S>;
  constexpr int kAhead = kAheadOf<C, S>;
  const ScanPlace<S, V> at(s);
  if (!at.inside) return;
  W state[V], factor[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    factor[v] = W(1);
    state[v] = kSummary || s.pieces == 1 ? W(0) : ((const W*)s.state)[at.stored + v];
  }
  const int64_t row = s.a.batch * s.a.hidden, mine = at.b * s.a.hidden + at.unit;
  for (int64_t last = at.end - 1; last >= at.begin; last -= kAhead) {
    ScanStep<C, S, V> step[kAhead] = {};
    S dh[kAhead][V] = {}, before[kAhead][V] = {};
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t t = last - u;
      if (t < at.begin) continue;
      step[u].load(s.a, t, at.b, at.unit);
      load<V>(s.a.dh, t * row + mine, dh[u]);
      if (kSummary) continue;
      if (t > 0) load<V>(s.a.h, (t - 1) * row + mine, before[u]);
      else if (s.a.h0) load<V>(s.a.h0, mine, before[u]);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t t = last - u;
      if (t < at.begin) break;
      W dp[C::kGates][V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        W x[C::kGates], f, add, grad[C::kGates];
        step[u].gates(v, x);
        C::forward(x, f, add);
        const W d = state[v] + widen(dh[u][v]);
        state[v] = kept(step[u].keep, f * d);
        if constexpr (kSummary) {
          factor[v] = kept(step[u].keep, factor_after(factor[v], f * factor[v]));
        } else {
          C::backward(x, d * kept(step[u].keep, W(widen(before[u][v]))), d, grad);
#pragma unroll
          for (int g = 0; g < C::kGates; ++g) dp[g][v] = grad[g];
        }
      }
      if constexpr (!kSummary) {
#pragma unroll
        for (int g = 0; g < C::kGates; ++g)
          store<S, V>(s.a.dp, ((t * s.a.batch + at.b) * C::kGates + g) * s.a.hidden + at.unit, dp[g]);
      }
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (kSummary) {
      ((W*)s.state)[at.stored + v] = state[v];
      ((W*)s.factor)[at.stored + v] = factor[v];
    } else if (blockIdx.y == 0) {
      narrow(state[v], ((S*)s.dh0)[mine + v]);
    }
  }
}

// Each piece's summand becomes the state that it starts from, in the order of the pass.
template <class S, bool kBackward> __global__ void __launch_bounds__(kScanThreads) scan_chain(ScanPass s) {
  using W = Wide<S>;
  const int64_t count = s.a.batch * s.a.hidden, q = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (q >= count) return;
  W state = !kBackward && s.a.h0 ? W(widen(((const S*)s.a.h0)[q])) : W(0);
  for (int64_t k = 0; k < s.pieces; k += kPiecesAhead) {
    W add[kPiecesAhead] = {}, factor[kPiecesAhead] = {};
#pragma unroll
    for (int u = 0; u < kPiecesAhead; ++u)
      if (k + u < s.pieces) {
        const int64_t at = (kBackward ? s.pieces - 1 - k - u : k + u) * count + q;
        add[u] = ((const W*)s.state)[at];
        factor[u] = ((const W*)s.factor)[at];
      }
#pragma unroll
    for (int u = 0; u < kPiecesAhead; ++u)
      if (k + u < s.pieces) {
        ((W*)s.state)[(kBackward ? s.pieces - 1 - k - u : k + u) * count + q] = state;
        state = kept(factor[u], state) + add[u];
      }
  }
}

// ---- the order of the launches, on a Run as in layer.h

template <class F> void with_scan(int cell, const F& f) {
  switch (cell) {
    case 0: return f(MinGru<LinearCandidate>{});
    case 1: return f(MinGru<PositiveCandidate>{});
    case 2: return f(MinLstm<LinearCandidate>{});
    case 3: return f(MinLstm<PositiveCandidate>{});
  }
}

// How many pieces of time: enough threads for the GPU, and at least so many steps to each.
inline int64_t scan_pieces(const ScanArgs& a, int sms) {
  constexpr int64_t kThreadsOfSm = 512, kLeast = 32, kMost = 65535;
  const int64_t units = a.batch * a.hidden, wanted = units ? kThreadsOfSm * sms / units : 1, most = a.steps / kLeast;
  const int64_t pieces = wanted < most ? wanted : most;
  return pieces < 2 ? 1 : pieces < kMost ? pieces : kMost;
}
inline int64_t scan_workspace_of(const ScanArgs& a, Dtype dtype, int64_t pieces) {
  return pieces == 1 ? 0 : 2 * pieces * a.batch * a.hidden * (dtype == Dtype::kF64 ? 8 : 4);
}

template <class C, class S, int V, class Run>
void scan_launches(Run& run, const ScanPass& s, bool backward) {
  const auto blocks = [](int64_t threads) { return unsigned((threads + kScanThreads - 1) / kScanThreads); };
  const int64_t units = s.a.batch * s.a.hidden;
  const Extent grid{blocks(units / V), unsigned(s.pieces), 1}, block{kScanThreads, 1, 1};
  if (s.pieces > 1) {
    run.launch(backward ? scan_backward<C, S, V, true> : scan_forward<C, S, V, true>, grid, block, s);
    run.launch(backward ? scan_chain<S, true> : scan_chain<S, false>, Extent{blocks(units), 1, 1}, block, s);
  }
  run.launch(backward ? scan_backward<C, S, V, false> : scan_forward<C, S, V, false>, grid, block, s);
}

template <class Run>
void run_scan(Run& run, const ScanArgs& a, void* dh0, int cell, Dtype dtype, int64_t pieces, char* workspace) {
  ScanPass s{a, dh0, pieces, (a.steps + pieces - 1) / pieces, workspace,
             workspace + scan_workspace_of(a, dtype, pieces) / 2};
  s.pieces = (a.steps + s.length - 1) / s.length;  // none is empty
  const bool backward = a.dp != nullptr;
  with_scan(cell, [&](auto c) {
    with_storage(dtype, [&](auto t) {
      using C = decltype(c);
      using S = decltype(t);
      constexpr int kPair = sizeof(S) == 2 ? 2 : 1;
      bool pairs = a.hidden % kPair == 0;
      for (const void* p : {a.p, a.h0, (const void*)a.h, a.dh, (const void*)a.dp})
        pairs = pairs && (uintptr_t)p % (kPair * sizeof(S)) == 0;
      if (pairs) scan_launches<C, S, kPair>(run, s, backward);
      else scan_launches<C, S, 1>(run, s, backward);
    });
  });
}

}}}  // namespace seqkern::cuda
