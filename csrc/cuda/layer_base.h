// What layer.h is built from: a layer's sizes, its workspace, its products and launches, and where its steps lie.
#pragma once
#include "launch.h"
#include "planner.h"
#include "step.cuh"
#include "step_sums.cuh"

namespace seqkern { namespace cuda { namespace {

struct CellShape {
  int gates, saved, grads;
  bool cell_state, hidden_carry;
  const int* order;
};
template <class C> constexpr CellShape kShapeOf{
    C::kGates, C::kSaved, C::kGrads, C::kCarry == Carry::kCell, C::kCarry == Carry::kHidden, C::kOrder};

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

template <class Run> struct LayerBase {
  Run& run;
  const LayerCall& call;
  const LayerArgs& a = call.layer;
  const Plan& plan = *call.plan;
  const CellShape cell = shape_of(call.cell);
  const Dtype io = call.dtype, wide = wide_of(call.dtype);
  const int64_t io_bytes = bytes_of(io), wide_bytes = bytes_of(wide);
  const int64_t gh = cell.gates * a.hidden, kh = cell.grads * a.hidden, D = a.directions;
  const bool projected = a.weights[0].w_hr != nullptr, packed = a.x.packed, by_grid = plan.engine == Engine::kGrid;
  const LayerOptions& options = a.options;
  // Whether some rows take no part in some steps; whether h goes into a product other than it is.
  const bool ragged = packed || options.lengths, entering = options.keep || options.h_mask;

  LayerBase(Run& r, const LayerCall& c) : run(r), call(c) {}

  // ---- the workspace

  struct Space {
    char *starts, *grid;                   // [T+1] int64 where packed; the grid engine's
    char *gates_x, *dgates;                // forward [D, N, G*H]; backward [D, N, K*H]
    char *w_hh, *w_hr;                     // both directions' weights side by side
    char* carry;                           // [D, B, H] W
    char *gates_h, *full, *out;            // forward: [D, B, G*H] W, with a projection [D, B, H] and [D, B, P] S
    char* enter;                           // forward, with options: [D, B, P] S
    char *past, *scale;                    // backward, with options: [D, B, P] W, [2, D, B] W
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
      if (entering) s.enter = m.take(states * out * io_bytes);
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
      if (options.zone_h && !cell.hidden_carry) s.past = m.take(states * out * wide_bytes);
      if (options.clip_norm > 0) s.scale = m.take(2 * states * wide_bytes);
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
  // Whether the columns of W_ih's gradients are in another order than torch's.
  bool permuted() const { return cell.order[0] != 0; }
  bool sums() const { return a.dweights[0].w_ih != nullptr; }

  // ---- small things

  char* piece(char* of, int64_t d, int64_t elements) const { return of + d * elements * io_bytes; }
  static void* shift(const void* p, int64_t bytes) { return (char*)p + bytes; }

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
    if (!from) return run.fill(to, 0, n * wide_bytes);
    if (io == wide) return run.copy(to, from, n * wide_bytes);
    with_storage(io, [&](auto s) { over_all(widen_all<decltype(s)>, n, from, to, n); });
  }
  void narrow_state(void* to, const void* from, const void* add, int64_t width) {
    const int64_t n = D * a.batch * width;
    with_storage(io, [&](auto s) { over_all(narrow_all<decltype(s)>, n, from, add, to, n); });
  }
  void initial_state(void* to, const void* from, int64_t bytes) {
    if (from) run.copy(to, from, bytes);
    else run.fill(to, 0, bytes);
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
    if (!g.accumulate) run.fill(g.c, 0, g.m * g.n * bytes_of(g.out));  // an input of no columns: all of C, dense
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
  Neighbours near(int64_t i, bool backward) const {
    Neighbours n{};
    for (int64_t d = 0; d < D; ++d) {
      const int64_t t = time(i, d, backward), after = d ? t - 1 : t + 1;
      n.time[d] = t;
      n.time_before[d] = d ? t + 1 : t - 1;
      n.time_after[d] = after;
      if (after < 0 || after >= a.steps) continue;
      n.after[d] = a.starts[after];
      n.both[d] = min(a.sizes[after], a.sizes[t]);
    }
    return n;
  }
  template <class Args> Args at_step(Args s, const Step& step) const {
    s.step = step;
    s.batch = a.batch;
    s.all_rows = a.rows;
    s.output = a.output;
    s.directions = D;
    return s;
  }
  int64_t most_rows(const Step& s) const { return D == 2 ? max(s.rows[0], s.rows[1]) : s.rows[0]; }

  void grid(const Space& s, bool backward) {
    if (options.lengths) {  // of rows without a step
      const int64_t bytes = D * a.batch * a.hidden * io_bytes;
      initial_state(backward ? a.dh0 : a.h_n, backward ? a.dh_n : a.h0, bytes);
      if (cell.cell_state) initial_state(backward ? a.dc0 : a.c_n, backward ? a.dc_n : a.c0, bytes);
    }
    run.fill(s.grid, kEmptyByte, plan.workspace_bytes);
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
};

}}}  // namespace seqkern::cuda
