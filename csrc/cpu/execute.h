// How an operator's work gets its memory and its threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <thread>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "memory.h"
#include "placement.h"

namespace seqkern {
// Memory for one call's packed weights and buffers. Each calling thread keeps its last, up to a limit: memory fresh
// from the system is cleared page by page, which took a third of the time of training at B=4 H=512. Pages of 2 MiB,
// because translating addresses of 4 KiB pages halves the rate at which large weights are read.
constexpr int64_t kMostKept = 64 << 20;
struct Scratch {
  char* bytes = nullptr;
  int64_t size = 0;
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() { std::free(bytes); }
  char* take(int64_t wanted) {
    if (wanted <= size) return bytes;
    constexpr int64_t kPage = 2 << 20;
    const int64_t page = wanted < kPage ? 4096 : kPage;
    std::free(bytes);
    size = 0;
    bytes = (char*)std::aligned_alloc(page, (wanted + page - 1) / page * page);
    STD_TORCH_CHECK(bytes, "not enough memory for ", wanted, " bytes of scratch");
    size = (wanted + page - 1) / page * page;
#if defined(__linux__)
    if (page == kPage) madvise(bytes, size, MADV_HUGEPAGE);
#endif
    return bytes;
  }
};

// Calls work(tid) once for each of `count` threads, all at the same time, as threads that meet need it. False, with
// nothing done, where the pool would have run several on one thread (inside another parallel region, after a fork).
template <class Work> bool run_together(int count, const Work& work) {
  if (count == 1) {
    work(0);
    return true;
  }
  std::atomic<int> arrived{0};
  std::atomic<bool> one_each{true};
  Team& team = Team::of_this_thread();
  const Team::Region region(team, count);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    if (end - begin != 1) one_each = false;
    team.joined(int(begin));
    arrived += int(end - begin);
    for (int spins = 0; arrived.load() < count; ++spins)
      if (spins > 4000) std::this_thread::yield();
    if (one_each) work(int(begin));
  });
  return one_each;
}
}  // namespace seqkern
