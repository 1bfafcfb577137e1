// How a call is shared among threads: the only place that decides it.
#pragma once
#include <algorithm>
#include <vector>
#include "../core/args.h"

namespace seqkern {

// Multiply-adds below which a second thread costs more than it brings: for the whole call (waking a thread takes a few
// microseconds), and for one thread's share of a step where the threads meet after every step (about 0.1 microseconds).
constexpr int64_t kMinWork = 300'000, kMinStepWork = 16'000;
// Packed recurrent weights up to this stay in a core's L2 beside what else a step needs.
constexpr int64_t kMaxWeightBytes = 3 << 19;

// Whether a layer's products of float go to the tile unit, where there is one. It makes one of six of bf16, and where
// others on the machine use it too it was seen to run at 0.4 of its rate. At its full rate, vector time / tile time on an
// Emerald Rapids: forward 1.2 to 1.6 from these sizes on, 0.6 to 1.1 below; backward 0.9 to 1.05. At the lower one the
// vector unit is faster throughout, by 1.1 to 1.5.
inline bool float_on_tiles(bool backward, int64_t batch, int64_t hidden, int64_t output) {
  return !backward && batch >= 16 && batch * hidden * output >= 1 << 20;
}

// min_rows: a part of the batch with fewer does not fill the kernel's tiles (CpuKernels).
inline Plan make_plan(int64_t steps, int64_t batch, int64_t input, int64_t hidden, int64_t output, int64_t gates,
                      int64_t directions, int64_t bytes, int64_t min_rows, int threads) {
  Plan plan{1, 1, 1};
  const int64_t step = gates * hidden * output * batch;
  const int64_t work = steps * directions * (step + gates * hidden * input * batch);
  threads = int(std::min<int64_t>(threads, std::max<int64_t>(1, work / (kMinWork / 2))));
  if (threads < 2) return plan;
  if (directions == 2) {
    plan.directions = 2;
    threads /= 2;
  }
  // Parts of the batch need not meet, but each reads all weights at every step; parts of the units each read their own.
  // Where the recurrent weights are larger than a core's share of L2, reading them is what takes the time.
  const int64_t parts = std::min<int64_t>(hidden / 64, threads);
  // Below 16 rows tiles are half empty either way; and better half-empty tiles than idle threads.
  if (batch < 16 || parts < threads) min_rows = std::min<int64_t>(min_rows, 4);
  const int64_t by_rows = std::max<int64_t>(1, std::min<int64_t>(threads, batch / min_rows));
  const auto units_for = [&](int64_t rows) {
    return std::max<int64_t>(1, std::min({threads / rows, parts, step / rows / kMinStepWork}));
  };
  plan.rows = int(by_rows);
  if (gates * hidden * output * bytes > kMaxWeightBytes)
    while (plan.rows > 1 && plan.rows * units_for(plan.rows) <= (plan.rows / 2) * units_for(plan.rows / 2)) plan.rows /= 2;
  plan.units = int(units_for(plan.rows));
  return plan;
}

// Cuts the batch so that each part has about as many rows over all steps; longer sequences come first.
inline std::vector<int64_t> cut_rows(const std::vector<int64_t>& sizes, int64_t batch, int64_t rows, int parts) {
  std::vector<int64_t> bounds{0};
  int64_t sum = 0, t = int64_t(sizes.size()) - 1;
  for (int64_t b = 0; b < batch && int(bounds.size()) < parts; ++b) {
    while (t > 0 && sizes[t] <= b) --t;  // sequence b has t + 1 steps
    sum += t + 1;
    if (sum * parts >= rows * int64_t(bounds.size())) bounds.push_back(b + 1);
  }
  bounds.resize(parts + 1, batch);
  bounds[parts] = batch;
  return bounds;
}

}  // namespace seqkern
