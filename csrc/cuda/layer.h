// A whole layer: the products over all steps at once, and between them the recurrence, step by step here or in one
// launch by the `grid` engine. Says what is computed and in which order; `Run` says how. On the device Run is cuBLAS
// and kernel launches on a stream (step.cu); the tests run the same order on the host (csrc/testing/step_module.cpp).
//
// Run has: gemm(Gemm), copy(to, from, bytes), fill(to, byte, bytes), launch(kernel, grid, block, arguments...),
// grid(Recurrence, Plan, backward). Each does nothing once one of them has failed.
//
// The state of all rows lies in one [D, B, *] buffer a kind, so that both directions share each product and each
// launch. With packed input a product takes as many rows as the direction that has more of them; what it computes for
// rows that have not begun or have ended is not read.
#pragma once
#include "layer_base.h"

namespace seqkern { namespace cuda { namespace {

template <class Run> struct Layer : LayerBase<Run> {
  using Base = LayerBase<Run>;
  using Base::Base;
  using Base::run, Base::call, Base::a, Base::cell, Base::io, Base::wide, Base::io_bytes, Base::wide_bytes, Base::gh,
      Base::kh, Base::D, Base::projected, Base::packed, Base::by_grid, Base::options, Base::ragged, Base::entering,
      Base::space, Base::sums, Base::sum_chunk, Base::piece, Base::shift, Base::over_rows, Base::over_all,
      Base::widen_state, Base::narrow_state, Base::initial_state, Base::side_by_side, Base::upload_starts, Base::gemm,
      Base::multiply, Base::multiply_states, Base::time, Base::step_at, Base::at_step, Base::permuted, Base::near,
      Base::most_rows, Base::grid, Base::min;
  using typename Base::Space;

  // ---- forward

  void forward(char* base) {
    Arena m{base};
    const Space s = space(m, false);
    upload_starts(s.starts);
    for (int64_t d = 0; d < D; ++d) {
      Gemm g = gemm(a.x.data, a.weights[d].w_ih, piece(s.gates_x, d, a.rows * gh), a.rows, gh, a.input);
      g.lda = a.x.row;
      multiply(g, false, true);
    }
    if (by_grid) grid(s, false);
    else forward_steps(s);
  }

  void forward_steps(const Space& s) {
    const int64_t state = D * a.batch * a.output * io_bytes;
    const void* w_hh = side_by_side(s.w_hh, &Weights::w_hh, gh * a.output);
    const void* w_hr = projected ? side_by_side(s.w_hr, &Weights::w_hr, a.output * a.hidden) : nullptr;
    initial_state(a.h_n, a.h0, state);
    if (entering && a.h0)
      with_storage(io, [&](auto t) {
        over_rows(enter_states<decltype(t)>, ends(s, a.output, a.h0, s.enter), a.batch, a.output);
      });
    else if (entering) run.fill(s.enter, 0, state);
    if (ragged && projected)
      run.fill(s.full, 0, D * a.batch * a.hidden * io_bytes);  // read, not used, where rows are left
    void* carry = s.carry ? s.carry : cell.cell_state ? a.c_n : a.h_n;
    if (s.carry || cell.cell_state) widen_state(carry, cell.cell_state ? a.c0 : a.h0, a.hidden);
    for (int64_t i = 0; i < a.steps; ++i) {
      const Step step = step_at(i, false);
      const int64_t n = most_rows(step);
      const bool moving = i > 0 || a.h0;  // else h is zero
      if (moving) multiply_states(entering ? s.enter : a.h_n, n, w_hh, true, s.gates_h, wide, a.output, gh);
      auto f = at_step(ForwardStep{}, step);
      f.hidden = a.hidden;
      f.gates_x = s.gates_x;
      f.gates_h = moving ? s.gates_h : nullptr;
      for (int64_t d = 0; d < D; ++d) f.b_ih[d] = a.weights[d].b_ih, f.b_hh[d] = a.weights[d].b_hh;
      f.carry = carry;
      f.h = projected ? s.full : a.h_n;
      f.y = projected ? nullptr : a.y;
      f.reserve = a.reserve;
      cell_forward(f, n, i, s);
      if (!projected) continue;
      multiply_states(s.full, n, w_hr, true, s.out, io, a.hidden, a.output);
      auto o = at_step(OutputStep{}, step);
      o.from = s.out;
      o.h = a.h_n;
      o.y = a.y;
      with_storage(io, [&](auto t) {
        using S = decltype(t);
        if (!options.any) return over_rows(output_step<S>, o, n, a.output);
        auto with = with_options<OptionOutputStep>(o, i, false);
        with.entering = s.enter;
        over_rows(option_output_step<S>, with, n, a.output);
      });
    }
    if (s.carry && cell.cell_state) narrow_state(a.c_n, carry, nullptr, a.hidden);
  }
  // A step's arguments with the options added. i, backward: as in time().
  template <class Args, class Plain> Args with_options(const Plain& plain, int64_t i, bool backward) const {
    Args s{};
    (Plain&)s = plain;
    s.o = options;
    s.near = near(i, backward);
    return s;
  }
  void cell_forward(const ForwardStep& f, int64_t rows, int64_t i, const Space& s) {
    with_cell(call.cell, [&](auto c) {
      with_storage(io, [&](auto t) {
        using C = decltype(c);
        using S = decltype(t);
        constexpr int kV = kLanes<S>;
        const bool vector = vectors<S>({f.b_ih[0], f.b_ih[1], f.b_hh[0], f.b_hh[1], f.y, f.reserve, f.h, f.carry}) &&
                            vector_options<S>();
        if (!options.any) {
          if (vector) return over_rows(forward_step<C, S, kV>, f, rows, a.hidden, kV);
          return over_rows(forward_step<C, S, 1>, f, rows, a.hidden);
        }
        auto o = with_options<OptionForwardStep>(f, i, false);
        o.entering = projected ? nullptr : s.enter;
        if (vector) over_rows(option_forward_step<C, S, kV>, o, rows, a.hidden, kV);
        else over_rows(option_forward_step<C, S, 1>, o, rows, a.hidden);
      });
    });
  }
  // Vectors need whole rows of them and their alignment everywhere; new tensors have it, others may not.
  template <class S, int n> bool vectors(const void* const (&pointers)[n]) const {
    constexpr uint64_t kBytes = kLanes<S> * sizeof(S);
    for (const void* p : pointers)
      if ((uint64_t)p % kBytes) return false;
    return a.hidden % kLanes<S> == 0;
  }
  template <class S> bool vector_options() const {
    return vectors<S>({options.h_mask, options.zone_h, options.zone_c, options.c_all, options.dc_all});
  }

  // ---- backward

  void backward(char* base) {
    Arena m{base};
    const Space s = space(m, true);
    upload_starts(s.starts);
    if (by_grid) grid(s, true);
    else backward_steps(s);
    if (a.dx) input_gradient(s);
    if (sums()) weight_gradients(s);
  }

  void backward_steps(const Space& s) {
    const int64_t states = D * a.batch;
    const void* w_hh = side_by_side(s.w_hh, &Weights::w_hh, gh * a.output);
    const void* w_hr = projected ? side_by_side(s.w_hr, &Weights::w_hr, a.output * a.hidden) : nullptr;
    if (ragged) run.fill(s.now, 0, states * kh * io_bytes);  // read, not used, for rows that have not begun
    if (ragged && projected) run.fill(s.dp_now, 0, states * a.output * io_bytes);
    if (s.past) run.fill(s.past, 0, states * a.output * wide_bytes);
    widen_state(s.carry, cell.cell_state ? a.dc_n : nullptr, a.hidden);
    Step before{};
    for (int64_t i = 0; i < a.steps; ++i) {
      const Step step = step_at(i, true);
      if (i > 0) through_gates(s, w_hh, most_rows(before));
      if (projected) through_projection(s, w_hr, step, before, i);
      auto b = at_step(BackwardStep{}, step);
      b.hidden = a.hidden;
      for (int64_t d = 0; d < D; ++d) {
        const int64_t t = time(i, d, true), from = d ? t + 1 : t - 1;
        b.known[d] = projected ? step.rows[d] : min(before.rows[d], step.rows[d]);
        if (from < 0 || from >= a.steps) continue;
        b.before[d] = a.starts[from];
        b.fed[d] = min(a.sizes[from], step.rows[d]);
      }
      b.dh = projected ? s.dfull : s.dh;
      if (!projected) b.dh_n = a.dh_n, b.dy = a.dy;
      b.h0 = a.h0;
      b.c0 = a.c0;
      b.y = a.y;
      b.reserve = a.reserve;
      b.carry = s.carry;
      b.dgates = s.dgates;
      b.now = s.now;
      cell_backward(b, most_rows(step), i, s);
      before = step;
    }
    through_gates(s, w_hh, a.batch);  // every row's first step is its latest now
    if (options.any) return leave(s);
    narrow_state(a.dh0, s.dh, cell.hidden_carry ? s.carry : nullptr, a.output);
    if (cell.cell_state) narrow_state(a.dc0, s.carry, nullptr, a.hidden);
  }
  void leave(const Space& s) {
    Ends h = ends(s, a.output, s.dh, a.dh0), c = ends(s, a.hidden, s.carry, a.dc0);
    h.past = past(s);
    h.scale = s.scale;
    h.last = a.dh_n;
    c.o.h_mask = nullptr;
    c.scale = s.scale ? shift(s.scale, D * a.batch * wide_bytes) : nullptr;
    c.last = a.dc_n;
    with_storage(io, [&](auto t) { over_rows(leave_states<decltype(t)>, h, a.batch, a.output); });
    if (cell.cell_state) with_storage(io, [&](auto t) { over_rows(leave_states<decltype(t)>, c, a.batch, a.hidden); });
  }
  Ends ends(const Space& s, int64_t width, const void* from, void* to) const {
    Ends e{};
    e.steps = a.steps;
    e.batch = a.batch;
    e.width = width;
    e.directions = D;
    e.starts = (const int64_t*)s.starts;
    e.o = options;
    e.from = from;
    e.to = to;
    return e;
  }
  char* past(const Space& s) const { return cell.hidden_carry ? s.carry : s.past; }
  // dh of rows [0, n) = the gradients of W_hh h, times W_hh; and the norms of these rows, where they are bounded.
  void through_gates(const Space& s, const void* w_hh, int64_t n) {
    Gemm g = gemm(piece(s.now, 0, kh) + (kh - gh) * io_bytes, w_hh, s.dh, n, a.output, gh);
    g.out = wide;
    g.lda = kh;
    g.batch = D;
    g.stride_a = a.batch * kh;
    g.stride_b = gh * a.output;
    g.stride_c = a.batch * a.output;
    multiply(g, false, false);
    if (!s.scale) return;
    const RowNorms r{n, a.batch, a.hidden, a.output, D, options, s.dh, past(s), s.carry, s.scale};
    with_storage(io, [&](auto t) {
      const Extent grid{unsigned(min(n, 65535)), cell.cell_state ? 2u : 1u, unsigned(D)};
      run.launch(row_norms<decltype(t)>, grid, Extent{128, 1, 1}, r);
    });
  }
  void through_projection(const Space& s, const void* w_hr, const Step& step, const Step& before, int64_t i) {
    auto o = at_step(OutputStep{}, step);
    for (int64_t d = 0; d < D; ++d) o.known[d] = min(before.rows[d], step.rows[d]);
    o.dh = s.dh;
    o.dh_n = a.dh_n;
    o.dy = a.dy;
    o.dp = s.dp;
    o.now = s.dp_now;
    const int64_t n = most_rows(step);
    with_storage(io, [&](auto t) {
      using S = decltype(t);
      if (!options.any) return over_rows(output_gradient_step<S>, o, n, a.output);
      auto with = with_options<OptionOutputStep>(o, i, true);
      with.past = s.past;
      with.scale = s.scale;
      with.of_h = true;
      over_rows(option_output_gradient_step<S>, with, n, a.output);
    });
    multiply_states(s.dp_now, n, w_hr, false, s.dfull, wide, a.output, a.hidden);
  }
  void cell_backward(const BackwardStep& b, int64_t rows, int64_t i, const Space& s) {
    with_cell(call.cell, [&](auto c) {
      with_storage(io, [&](auto t) {
        using C = decltype(c);
        using S = decltype(t);
        constexpr int kV = kLanes<S>;
        const bool vector =
            vectors<S>({b.dh, b.dh_n, b.dy.data, b.h0, b.c0, b.y, b.reserve, b.carry, b.dgates, b.now}) &&
            b.dy.step % kV == 0 && b.dy.row % kV == 0 && vector_options<S>();
        if (!options.any) {
          if (vector) return over_rows(backward_step<C, S, kV>, b, rows, a.hidden, kV);
          return over_rows(backward_step<C, S, 1>, b, rows, a.hidden);
        }
        auto o = with_options<OptionBackwardStep>(b, i, true);
        o.past = projected ? nullptr : past(s);
        o.scale = s.scale;
        o.of_h = !projected;
        if (vector) over_rows(option_backward_step<C, S, kV>, o, rows, a.hidden, kV);
        else over_rows(option_backward_step<C, S, 1>, o, rows, a.hidden);
      });
    });
  }

  // ---- products over all steps of the gradients

  // Calls use(column, gate, count) for runs of columns of W_ih's gradients that are neighbours in torch's order too.
  template <class Use> void runs(const Use& use) const {
    for (int k = 0, n; k < cell.gates; k += n) {
      for (n = 1; k + n < cell.gates && cell.order[k + n] == cell.order[k] + n;) ++n;
      use(k, cell.order[k], n);
    }
  }

  void input_gradient(const Space& s) {
    for (int64_t d = 0; d < D; ++d) {
      const void* w = a.weights[d].w_ih;
      if (permuted()) {
        const int64_t gate = a.hidden * a.input * io_bytes;
        runs([&](int k, int from, int n) { run.copy(s.w_ih + k * gate, shift(w, from * gate), n * gate); });
        w = s.w_ih;
      }
      Gemm g = gemm(piece(s.dgates, d, a.rows * kh), w, a.dx, a.rows, a.input, gh);
      g.lda = kh;
      g.accumulate = d > 0;
      multiply(g, false, false);
    }
  }

  // to [m, n] = left^T right, over all rows; `left` has `ld` columns.
  void sum_products(const void* left, int64_t ld, const void* right, int64_t right_ld, void* to, int64_t m, int64_t n) {
    Gemm g = gemm(left, right, to, m, n, a.rows);
    g.lda = ld;
    g.ldb = right_ld;
    multiply(g, true, false);
  }

  void weight_gradients(const Space& s) {
    Gather from{a.steps, a.batch, a.rows,    a.hidden, a.output, D, (const int64_t*)s.starts,
                a.y,     a.h0,    a.reserve, s.h_prev};
    with_storage(io, [&](auto t) {
      using S = decltype(t);
      if (options.any) over_rows(option_gather_states<S>, OptionGather{from, options}, a.rows, a.output);
      else over_rows(gather_states<S>, from, a.rows, a.output);
    });
    from.to = s.unprojected;
    if (projected)
      with_storage(io, [&](auto t) { over_rows(gather_unprojected<decltype(t)>, from, a.rows, a.hidden); });
    for (int64_t d = 0; d < D; ++d) {
      const Weights& to = a.dweights[d];
      const char* grads = piece(s.dgates, d, a.rows * kh);
      runs([&](int k, int gate, int n) {
        sum_products(grads + k * a.hidden * io_bytes, kh, a.x.data, a.x.row,
                     shift(to.w_ih, gate * a.hidden * a.input * io_bytes), n * a.hidden, a.input);
      });
      sum_products(grads + (kh - gh) * io_bytes, kh, piece(s.h_prev, d, a.rows * a.output), a.output, to.w_hh, gh,
                   a.output);
      if (projected)
        sum_products(piece(s.dp, d, a.rows * a.output), a.output, piece(s.unprojected, d, a.rows * a.hidden), a.hidden,
                     to.w_hr, a.output, a.hidden);
      if (to.b_ih) bias_gradients(s, grads, to);
    }
  }
  void bias_gradients(const Space& s, const void* grads, const Weights& to) {
    const int64_t chunk = sum_chunk(), chunks = ceil_div(a.rows, chunk);
    const BiasSums b{a.rows, a.hidden, kh, chunk, grads, s.sums, chunks, to.b_ih, to.b_hh};
    with_cell(call.cell, [&](auto c) {
      with_storage(io, [&](auto t) {
        run.launch(sum_rows<decltype(t)>, Extent{unsigned(ceil_div(kh, 32)), unsigned(chunks), 1},
                   Extent{32, kSumWarps, 1}, b);
        over_all(sum_chunks<decltype(c), decltype(t)>, kh, b);
      });
    });
  }
};

}}}  // namespace seqkern::cuda
