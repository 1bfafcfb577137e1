// The order of work of seqkern::recurrence, step by step: the products and variant.cuh's kernels. `Run` as in layer.h.
#pragma once
#include "layer_base.h"
#include "variant.cuh"

namespace seqkern { namespace cuda { namespace {

// What LayerBase looks at.
inline LayerCall as_layer(const VariantCall& call, const Plan& plan) {
  const RecurrenceArgs& r = call.args;
  LayerCall to{};
  to.cell = r.cell;
  to.dtype = call.dtype;
  to.tf32 = call.tf32;
  to.plan = &plan;
  LayerArgs& a = to.layer;
  a.steps = r.steps;
  a.batch = r.batch;
  a.rows = r.rows;
  a.hidden = a.output = r.hidden;
  a.directions = r.directions;
  a.sizes = r.sizes;
  a.starts = r.starts;
  a.x.packed = call.packed;
  a.h0 = r.h0;
  a.c0 = r.c0;
  a.options = r.options;
  return to;
}

template <class Run> struct VariantLayer : LayerBase<Run> {
  using Base = LayerBase<Run>;
  using Base::run, Base::a, Base::io, Base::io_bytes, Base::D, Base::packed, Base::options, Base::ragged,
      Base::entering, Base::over_rows, Base::initial_state, Base::upload_starts, Base::gemm, Base::multiply,
      Base::step_at, Base::near, Base::most_rows, Base::shift;

  const VariantCall& given;
  const RecurrenceArgs& r = given.args;
  const int64_t hidden = r.hidden, width = r.gates * hidden;
  const int64_t first = r.variant.reset_before ? width - hidden : width;  // columns of the first product
  const int64_t states = D * a.batch * hidden * io_bytes;                 // bytes of a state

  // layer: made by as_layer from `call`; both have to last.
  VariantLayer(Run& how, const LayerCall& layer, const VariantCall& call) : Base(how, layer), given(call) {}

  struct Space {
    char *starts, *gates, *reset, *enter, *back, *past, *dc;
  };
  Space space(Arena& m, bool backward) const {
    Space s{};
    if (packed) s.starts = m.take((a.steps + 1) * 8);
    s.gates = m.take(D * a.batch * width * io_bytes);
    if (first < width) s.reset = m.take(states);
    if (!backward && entering) s.enter = m.take(states);
    if (!backward) return s;
    s.back = m.take(states);
    s.past = m.take(states);
    if (r.cell == Cell::kLstm) s.dc = m.take(states);
    return s;
  }
  int64_t workspace(bool backward) const {
    Arena m{nullptr};
    space(m, backward);
    return m.used;
  }

  // Of shared memory for a row of gates: where it is gone over several times, and fits.
  const int64_t row_bytes = r.variant.normal && width * io_bytes <= kRowBytes ? width * io_bytes : 0;

  // One block for each of the first `rows` rows.
  template <class... P, class... A> void launch(void (*kernel)(P...), int64_t rows, const A&... args) {
    unsigned threads = 32;
    while (threads < kRowThreads && threads < hidden) threads *= 2;
    run.launch_with(row_bytes, kernel, Extent{unsigned(rows), 1, unsigned(D)}, Extent{threads, 1, 1}, args...);
  }
  template <class F> void with_type(const F& f) {
    if (io == Dtype::kF64) f(double{});
    else f(float{});
  }
  VariantStep step_args(const Space& s, int64_t i, bool backward) const {
    VariantStep v{};
    v.a = r;
    v.step = step_at(i, backward);
    v.near = near(i, backward);
    v.gates = s.gates;
    v.reset = s.reset;
    v.enter = s.enter;
    v.back = s.back;
    v.past = s.past;
    v.dc = s.dc;
    v.sums = given.sums;
    v.sums_size = given.sums_size;
    v.at_peephole = r.bias_n ? hidden : 0;
    v.at_gain_h = v.at_peephole + (r.variant.peephole ? (r.variant.coupled ? 2 : 3) * hidden : 0);
    v.at_gain_c = v.at_gain_h + (r.variant.normal ? width : 0);
    v.close = row_bytes > 0;
    return v;
  }
  // The rows of W_hh from `begin` to `end` times rows [0, n) of a state, to the same columns of `gates`.
  void product(const void* state, int64_t n, int64_t begin, int64_t end, char* gates) {
    Gemm g = gemm(state, shift(r.w_hh, begin * hidden * io_bytes), gates + begin * io_bytes, n, end - begin, hidden);
    g.ldc = width;
    g.batch = D;
    g.stride_a = a.batch * hidden;
    g.stride_b = width * hidden;
    g.stride_c = a.batch * width;
    multiply(g, false, true);
  }
  void product_back(char* gates, int64_t n, int64_t begin, int64_t end, void* state) {
    Gemm g = gemm(gates + begin * io_bytes, shift(r.w_hh, begin * hidden * io_bytes), state, n, hidden, end - begin);
    g.lda = width;
    g.batch = D;
    g.stride_a = a.batch * width;
    g.stride_b = width * hidden;
    g.stride_c = a.batch * hidden;
    multiply(g, false, false);
  }
  Ends ends(const Space& s) const {
    Ends e{};
    e.steps = a.steps;
    e.batch = a.batch;
    e.width = hidden;
    e.directions = D;
    e.starts = (const int64_t*)s.starts;
    e.o = options;
    e.from = r.h0;
    e.to = s.enter;
    return e;
  }

  void forward(char* base) {
    Arena m{base};
    const Space s = space(m, false);
    upload_starts(s.starts);
    initial_state(r.h_n, r.h0, states);
    if (r.cell == Cell::kLstm) initial_state(r.c_n, r.c0, states);
    if (ragged && first < width) run.fill(s.reset, 0, states);  // read, not used, for rows that take no part
    with_type([&](auto t) {
      using T = decltype(t);
      if (entering && r.h0) over_rows(enter_states<T>, ends(s), a.batch, hidden);
      else if (entering) run.fill(s.enter, 0, states);
      for (int64_t i = 0; i < a.steps; ++i) {
        const VariantStep v = step_args(s, i, false);
        const int64_t n = most_rows(v.step);
        product(entering ? s.enter : r.h_n, n, 0, first, s.gates);
        if (first < width) {
          launch(variant_reset<T>, n, v);
          product(s.reset, n, first, width, s.gates);
        }
        launch(variant_step<T>, n, v);
      }
    });
  }

  void backward(char* base) {
    Arena m{base};
    const Space s = space(m, true);
    upload_starts(s.starts);
    if (ragged) {  // read, not used, for rows that have not begun
      run.fill(s.gates, 0, D * a.batch * width * io_bytes);
      if (first < width) run.fill(s.reset, 0, states);
    }
    with_type([&](auto t) {
      using T = decltype(t);
      int64_t before = 0;
      for (int64_t i = 0; i < a.steps; ++i) {
        const VariantStep v = step_args(s, i, true);
        const int64_t n = most_rows(v.step);
        if (i > 0) product_back(s.gates, before, 0, first, s.back);
        launch(variant_step_back<T>, n, v);
        if (first < width) {
          product_back(s.gates, n, first, width, s.reset);
          launch(variant_reset_back<T>, n, v);
        }
        before = n;
      }
      product_back(s.gates, a.batch, 0, first, s.back);  // every row's first step is its latest now
      launch(variant_leave<T>, a.batch, step_args(s, a.steps - 1, true), ends(s));
    });
  }
};

}}}  // namespace seqkern::cuda
