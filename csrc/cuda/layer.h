// A whole layer: the products over all steps at once, and between them the recurrence, step by step here or in one
// launch by the `grid` engine. Says what is computed and in which order; `Run` says how. On the device Run is cuBLAS
// and kernel launches on a stream (step.cu); the tests run the same order on the host (csrc/testing/step_module.cpp).
//
// Run has: gemm(Gemm), copy(to, from, bytes), zero(to, bytes), launch(kernel, grid, block, arguments...),
// grid(Recurrence, Plan, backward). Each does nothing once one of them has failed.
//
// The state of all rows lies in one [D, B, *] buffer a kind, so that both directions share each product and each
// launch. With packed input a product takes as many rows as the direction that has more of them; what it computes for
// rows that have not begun or have ended is not read.
#pragma once
#include "launch.h"
#include "planner.h"
#include "step.cuh"

namespace seqkern { namespace cuda { namespace {

struct CellShape {
  int gates, saved, grads;
  bool cell_state, hidden_carry;
  const int* order;
};
template <class C> constexpr CellShape kShapeOf{
    C::kGates, C::kSaved, C::kGrads, C::kCarry == Carry::kCell, C::kCarry == Carry::kHidden, C::kOrder};

template <class F> void with_storage(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kF64: return f(double{});
    case Dtype::kF32: return f(float{});
    case Dtype::kBf16: return f(bf16{});
    case Dtype::kF16: return f(half_t{});
  }
}
inline CellShape shape_of(Cell cell) {
  CellShape shape{};
  with_cell(cell, [&](auto c) { shape = kShapeOf<decltype(c)>; });
  return shape;
}
inline int64_t bytes_of(Dtype t) { return t == Dtype::kF64 ? 8 : t == Dtype::kF32 ? 4 : 2; }
inline Dtype wide_of(Dtype t) { return t == Dtype::kF64 ? Dtype::kF64 : Dtype::kF32; }

// Hands out pieces of the workspace; with a null base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;
  char* take(int64_t bytes) {
    char* piece = base ? base + used : nullptr;
    used += ceil_div(bytes, 256) * 256;
    return piece;
  }
};

template <class Run> struct Layer {
  Run& run;
  const LayerCall& call;
  const LayerArgs& a = call.layer;
  const Plan& plan = *call.plan;
  const CellShape cell = shape_of(call.cell);
  const Dtype io = call.dtype, wide = wide_of(call.dtype);
  const int64_t io_bytes = bytes_of(io), wide_bytes = bytes_of(wide);
  const int64_t gh = cell.gates * a.hidden, kh = cell.grads * a.hidden, D = a.directions;
  const bool projected = a.weights[0].w_hr != nullptr, packed = a.x.packed, by_grid = plan.engine == Engine::kGrid;

  // ---- the workspace

  struct Space {
    char *starts, *grid;                   // [T+1] int64 where packed; the grid engine's
    char *gates_x, *dgates;                // forward [D, N, G*H]; backward [D, N, K*H]
    char *w_hh, *w_hr;                     // both directions' weights side by side
    char* carry;                           // [D, B, H] W
    char *gates_h, *full, *out;            // forward: [D, B, G*H] W, with a projection [D, B, H] and [D, B, P] S
    char *dh, *now, *dp, *dp_now, *dfull;  // backward: [D, B, P] W, [D, B, K*H], [D, N, P], [D, B, P] S, [D, B, H] W
    char *h_prev, *unprojected, *w_ih, *sums;  // of the weight gradients
  };
  int64_t sum_chunk() const { return max(256, ceil_div(a.rows, 64)); }
  static int64_t max(int64_t x, int64_t y) { return x > y ? x : y; }
  static int64_t min(int64_t x, int64_t y) { return x < y ? x : y; }
  bool narrow_carry() const { return io != wide && (cell.cell_state || cell.hidden_carry); }

  Space space(Arena& m, bool backward) const {
    const int64_t states = D * a.batch, rows = D * a.rows, out = a.output, hid = a.hidden;
    Space s{};
    if (packed) s.starts = m.take((a.steps + 1) * 8);
    if (by_grid) s.grid = m.take(plan.workspace_bytes);
    if (!by_grid && D == 2) s.w_hh = m.take(D * gh * out * io_bytes);
    if (!by_grid && D == 2 && projected) s.w_hr = m.take(D * out * hid * io_bytes);
    if (!backward) {
      s.gates_x = m.take(rows * gh * io_bytes);
      if (by_grid) return s;
      if (narrow_carry()) s.carry = m.take(states * hid * wide_bytes);
      s.gates_h = m.take(states * gh * wide_bytes);
      if (projected) s.full = m.take(states * hid * io_bytes);
      if (projected) s.out = m.take(states * out * io_bytes);
      return s;
    }
    s.dgates = m.take(rows * kh * io_bytes);
    if (!by_grid) {
      s.carry = m.take(states * hid * wide_bytes);
      s.dh = m.take(states * out * wide_bytes);
      s.now = m.take(states * kh * io_bytes);
      if (projected) s.dp = m.take(rows * out * io_bytes);
      if (projected) s.dp_now = m.take(states * out * io_bytes);
      if (projected) s.dfull = m.take(states * hid * wide_bytes);
    }
    if (a.dx && permuted()) s.w_ih = m.take(gh * a.input * io_bytes);
    if (!sums()) return s;
    s.h_prev = m.take(rows * out * io_bytes);
    if (projected) s.unprojected = m.take(rows * hid * io_bytes);
    if (a.weights[0].b_ih) s.sums = m.take(ceil_div(a.rows, sum_chunk()) * kh * wide_bytes);
    return s;
  }
  int64_t workspace(bool backward) const {
    Arena m{nullptr};
    space(m, backward);
    return m.used;
  }
  bool sums() const { return a.dweights[0].w_ih != nullptr; }

  // ---- small things

  char* piece(char* of, int64_t d, int64_t elements) const { return of + d * elements * io_bytes; }
  static void* shift(const void* p, int64_t bytes) { return (char*)p + bytes; }

  // Vectors need whole rows of them and their alignment everywhere; new tensors have it, others may not.
  template <class S, int n> static bool vectors(int64_t width, const void* const (&pointers)[n]) {
    constexpr uint64_t kBytes = kLanes<S> * sizeof(S);
    for (const void* p : pointers)
      if ((uint64_t)p % kBytes) return false;
    return width % kLanes<S> == 0;
  }
  template <class Kernel, class Args>
  void over_rows(Kernel kernel, const Args& args, int64_t rows, int64_t width, int lanes = 1) {
    const int64_t units = width / lanes;
    unsigned x = 1;
    while (x < 32 && x < units) x *= 2;
    const unsigned y = 128 / x;
    run.launch(kernel, Extent{unsigned(ceil_div(units, x)), unsigned(min(ceil_div(rows, y), 65535)), unsigned(D)},
               Extent{x, y, 1}, args);
  }
  template <class Kernel, class... Args> void over_all(Kernel kernel, int64_t n, const Args&... args) {
    if (n) run.launch(kernel, Extent{unsigned(ceil_div(n, 128)), 1, 1}, Extent{128, 1, 1}, args...);
  }
  // [D, B, width] S to W, zeros where there is nothing.
  void widen_state(void* to, const void* from, int64_t width) {
    const int64_t n = D * a.batch * width;
    if (!from) return run.zero(to, n * wide_bytes);
    if (io == wide) return run.copy(to, from, n * wide_bytes);
    with_storage(io, [&](auto s) { over_all(widen_all<decltype(s)>, n, from, to, n); });
  }
  void narrow_state(void* to, const void* from, const void* add, int64_t width) {
    const int64_t n = D * a.batch * width;
    with_storage(io, [&](auto s) { over_all(narrow_all<decltype(s)>, n, from, add, to, n); });
  }
  void initial_state(void* to, const void* from, int64_t bytes) {
    if (from) run.copy(to, from, bytes);
    else run.zero(to, bytes);
  }
  // The directions' weights of one kind as [D, elements].
  const void* side_by_side(char* space, void* Weights::* w, int64_t elements) {
    if (D == 1) return a.weights[0].*w;
    for (int64_t d = 0; d < D; ++d) run.copy(piece(space, d, elements), a.weights[d].*w, elements * io_bytes);
    return space;
  }
  void upload_starts(char* to) {
    for (int64_t i = 0; packed && i <= a.steps; i += kUploaded) {
      Table t{};
      t.count = int(min(kUploaded, a.steps + 1 - i));
      t.to = (int64_t*)to + i;
      for (int k = 0; k < t.count; ++k) t.values[k] = a.starts[i + k];
      run.launch(upload_table, Extent{1, 1, 1}, Extent{128, 1, 1}, t);
    }
  }
  Gemm gemm(const void* x, const void* w, void* to, int64_t m, int64_t n, int64_t k) const {
    Gemm g{};
    g.a = x;
    g.b = w;
    g.c = to;
    g.m = m;
    g.n = n;
    g.k = k;
    g.lda = k;
    g.ldc = n;
    g.batch = 1;
    g.in = g.out = io;
    g.tf32 = call.tf32;
    return g;
  }
  void multiply(Gemm g, bool a_t, bool b_t) {
    g.a_t = a_t;
    g.b_t = b_t;
    if (!g.ldb) g.ldb = b_t ? g.k : g.n;
    if (!g.m || !g.n) return;
    if (g.k) return run.gemm(g);
    if (!g.accumulate) run.zero(g.c, g.m * g.n * bytes_of(g.out));  // an input of no columns: all of C, dense
  }
  // rows [0, n) of a state [D, B, k] by each direction's weights.
  void multiply_states(const void* states, int64_t n, const void* w, bool w_t, void* to, Dtype out, int64_t k,
                       int64_t columns) {
    Gemm g = gemm(states, w, to, n, columns, k);
    g.out = out;
    g.batch = D;
    g.stride_a = a.batch * k;
    g.stride_b = k * columns;
    g.stride_c = a.batch * columns;
    multiply(g, false, w_t);
  }

  // The i-th step in the order of the pass, and how many rows of it lead.
  int64_t time(int64_t i, int64_t d, bool backward) const { return (d == 1) != backward ? a.steps - 1 - i : i; }
  Step step_at(int64_t i, bool backward) const {
    Step s{};
    for (int64_t d = 0; d < D; ++d) {
      s.first[d] = a.starts[time(i, d, backward)];
      s.rows[d] = a.sizes[time(i, d, backward)];
    }
    return s;
  }
  template <class Args> Args at_step(const Step& step) const {
    Args s{};
    s.step = step;
    s.batch = a.batch;
    s.all_rows = a.rows;
    s.output = a.output;
    s.directions = D;
    return s;
  }
  int64_t most_rows(const Step& s) const { return D == 2 ? max(s.rows[0], s.rows[1]) : s.rows[0]; }

  void grid(const Space& s, bool backward) {
    run.zero(s.grid, plan.workspace_bytes);
    run.grid(recurrence(s), plan, backward);
  }
  Recurrence recurrence(const Space& s) const {
    Recurrence r{};
    r.layer = a;
    r.layer.sizes = nullptr;
    r.layer.starts = (const int64_t*)s.starts;
    r.cell = call.cell;
    r.dtype = io;
    r.tf32 = call.tf32;
    for (int64_t d = 0; d < D; ++d) {
      if (s.gates_x) r.gates_x[d] = piece(s.gates_x, d, a.rows * gh);
      if (s.dgates) r.dgates[d] = piece(s.dgates, d, a.rows * kh);
    }
    r.workspace = s.grid;
    return r;
  }

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
    if (packed && projected)
      run.zero(s.full, D * a.batch * a.hidden * io_bytes);  // read, not used, where rows are left
    void* carry = s.carry ? s.carry : cell.cell_state ? a.c_n : a.h_n;
    if (s.carry || cell.cell_state) widen_state(carry, cell.cell_state ? a.c0 : a.h0, a.hidden);
    for (int64_t i = 0; i < a.steps; ++i) {
      const Step step = step_at(i, false);
      const int64_t n = most_rows(step);
      const bool moving = i > 0 || a.h0;  // else h is zero
      if (moving) multiply_states(a.h_n, n, w_hh, true, s.gates_h, wide, a.output, gh);
      auto f = at_step<ForwardStep>(step);
      f.hidden = a.hidden;
      f.gates_x = s.gates_x;
      f.gates_h = moving ? s.gates_h : nullptr;
      for (int64_t d = 0; d < D; ++d) f.b_ih[d] = a.weights[d].b_ih, f.b_hh[d] = a.weights[d].b_hh;
      f.carry = carry;
      f.h = projected ? s.full : a.h_n;
      f.y = projected ? nullptr : a.y;
      f.reserve = a.reserve;
      cell_forward(f, n);
      if (!projected) continue;
      multiply_states(s.full, n, w_hr, true, s.out, io, a.hidden, a.output);
      auto o = at_step<OutputStep>(step);
      o.from = s.out;
      o.h = a.h_n;
      o.y = a.y;
      with_storage(io, [&](auto t) { over_rows(output_step<decltype(t)>, o, n, a.output); });
    }
    if (s.carry && cell.cell_state) narrow_state(a.c_n, carry, nullptr, a.hidden);
  }
  void cell_forward(const ForwardStep& f, int64_t rows) {
    with_cell(call.cell, [&](auto c) {
      with_storage(io, [&](auto t) {
        using C = decltype(c);
        using S = decltype(t);
        const bool vector =
            vectors<S>(a.hidden, {f.b_ih[0], f.b_ih[1], f.b_hh[0], f.b_hh[1], f.y, f.reserve, f.h, f.carry});
        if (vector) over_rows(forward_step<C, S, kLanes<S>>, f, rows, a.hidden, kLanes<S>);
        else over_rows(forward_step<C, S, 1>, f, rows, a.hidden);
      });
    });
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
    if (packed) run.zero(s.now, states * kh * io_bytes);  // read, not used, for rows that have not begun
    if (packed && projected) run.zero(s.dp_now, states * a.output * io_bytes);
    widen_state(s.carry, cell.cell_state ? a.dc_n : nullptr, a.hidden);
    Step before{};
    for (int64_t i = 0; i < a.steps; ++i) {
      const Step step = step_at(i, true);
      if (i > 0) through_gates(s, w_hh, most_rows(before));
      if (projected) through_projection(s, w_hr, step, before);
      auto b = at_step<BackwardStep>(step);
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
      cell_backward(b, most_rows(step));
      before = step;
    }
    through_gates(s, w_hh, a.batch);  // every row's first step is its latest now
    narrow_state(a.dh0, s.dh, cell.hidden_carry ? s.carry : nullptr, a.output);
    if (cell.cell_state) narrow_state(a.dc0, s.carry, nullptr, a.hidden);
  }
  // dh of rows [0, n) = the gradients of W_hh h, times W_hh.
  void through_gates(const Space& s, const void* w_hh, int64_t n) {
    Gemm g = gemm(piece(s.now, 0, kh) + (kh - gh) * io_bytes, w_hh, s.dh, n, a.output, gh);
    g.out = wide;
    g.lda = kh;
    g.batch = D;
    g.stride_a = a.batch * kh;
    g.stride_b = gh * a.output;
    g.stride_c = a.batch * a.output;
    multiply(g, false, false);
  }
  void through_projection(const Space& s, const void* w_hr, const Step& step, const Step& before) {
    auto o = at_step<OutputStep>(step);
    for (int64_t d = 0; d < D; ++d) o.known[d] = min(before.rows[d], step.rows[d]);
    o.dh = s.dh;
    o.dh_n = a.dh_n;
    o.dy = a.dy;
    o.dp = s.dp;
    o.now = s.dp_now;
    const int64_t n = most_rows(step);
    with_storage(io, [&](auto t) { over_rows(output_gradient_step<decltype(t)>, o, n, a.output); });
    multiply_states(s.dp_now, n, w_hr, false, s.dfull, wide, a.output, a.hidden);
  }
  void cell_backward(const BackwardStep& b, int64_t rows) {
    with_cell(call.cell, [&](auto c) {
      with_storage(io, [&](auto t) {
        using C = decltype(c);
        using S = decltype(t);
        const bool vector =
            vectors<S>(a.hidden, {b.dh, b.dh_n, b.dy.data, b.h0, b.c0, b.y, b.reserve, b.carry, b.dgates, b.now}) &&
            b.dy.step % kLanes<S> == 0 && b.dy.row % kLanes<S> == 0;
        if (vector) over_rows(backward_step<C, S, kLanes<S>>, b, rows, a.hidden, kLanes<S>);
        else over_rows(backward_step<C, S, 1>, b, rows, a.hidden);
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
  bool permuted() const { return cell.order[0] != 0; }

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
    with_storage(io, [&](auto t) { over_rows(gather_states<decltype(t)>, from, a.rows, a.output); });
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
