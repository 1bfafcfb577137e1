// The functions of cuda/simt.cuh beside barriers and shuffles, as fibers see them.
#include <string.h>

#include <algorithm>

#include "scheduler.h"

namespace seqkern {

using host::Access;
using host::fault;
using host::run_now;
using host::Site;

namespace {

uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}
float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

}  // namespace

// ---- numbers

namespace host {

float of_bf16(uint16_t bits) { return float_of(uint32_t(bits) << 16); }

uint16_t to_bf16(float x) {
  const uint32_t u = bits_of(x);
  if (x != x) return 0x7fff;
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

float of_f16(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = bits & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest < 0x400) return (sign ? -1.f : 1.f) * float(rest) * 0x1p-24f;
  return float_of(sign | ((rest << 13) + ((127 - 15) << 23)));
}

uint16_t to_f16(float x) {
  const uint32_t u = bits_of(x), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
  if (x != x) return 0x7fff;
  if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and above
  if (rest < 0x38800000) {  // below 2^-14: adding 1/2 leaves the multiple of 2^-24 in the last bits, rounded
    return uint16_t(sign | (bits_of(float_of(rest) + 0.5f) - 0x3f000000));
  }
  return uint16_t(sign | ((rest - ((127 - 15) << 23) + 0xfff + (rest >> 13 & 1)) >> 13));
}

}  // namespace host

uint32_t to_tf32(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7f800000) == 0x7f800000) return x != x ? 0x7fffffff : u;
  return (u + 0x1000) & 0xffffe000;
}

// ---- block, warp and grid

void block_sync(const Site& at) { run_now->meet(run_now->running().block->meeting, at); }

void warp_sync(uint32_t mask, const Site& at) { host::warp_meet(host::WarpOp::kSync, mask, nullptr, nullptr, at); }

namespace {
struct Vote {
  bool x;
  uint32_t result;
};
void vote(void* const* lanes) {
  uint32_t result = 0;
  for (int i = 0; i < 32; ++i)
    if (lanes[i] && static_cast<Vote*>(lanes[i])->x) result |= uint32_t(1) << i;
  for (int i = 0; i < 32; ++i)
    if (lanes[i]) static_cast<Vote*>(lanes[i])->result = result;
}
}  // namespace
uint32_t ballot(bool x, uint32_t mask, const Site& at) {
  Vote lane{x, 0};
  host::warp_meet(host::WarpOp::kBallot, mask, &lane, vote, at);
  return lane.result;
}

void signal_release(int* flag, int value) {
  host::check_aligned(flag, sizeof *flag, Access::kAtomicStore, __builtin_return_address(0));
  run_now->flags[flag] = host::release_clock(run_now->running());
  *flag = value;
  run_now->wake(flag);
  run_now->let_others_run();
}

void add_release(int* flag, int value) {
  host::check_aligned(flag, sizeof *flag, Access::kAtomicUpdate, __builtin_return_address(0));
  host::ClockPtr& released = run_now->flags[flag];
  released = host::join(host::release_clock(run_now->running()), released);
  *flag += value;
  run_now->wake(flag);
  run_now->let_others_run();
}

void wait_acquire(const int* flag, int value, const Site& at) {
  run_now->let_others_run();
  for (;;) {
    host::check_aligned(flag, sizeof *flag, Access::kAtomicRead, __builtin_return_address(0));
    if (*flag >= value) break;
    run_now->wait(flag, "wait_acquire", at);
  }
  host::acquire_clock(run_now->running(), run_now->flags[flag]);
}

// Words are emptied before they are filled again: else who polls may take the old ones for the new.
void st_word(uint32_t* p, uint32_t x) {
  run_now->let_others_run();
  host::check_aligned(p, sizeof *p, Access::kAtomicStore, __builtin_return_address(0));
  if (x != kEmptyWord && *p != kEmptyWord) fault("st_word: %s is filled already", host::describe(p).c_str());
  *p = x;
  run_now->wake(reinterpret_cast<const void*>(uintptr_t(p) & ~uintptr_t(15)));
}
void ld_words(uint32_t (&x)[4], const void* p) {
  host::check_aligned(p, 16, Access::kAtomicRead, __builtin_return_address(0));
  memcpy(x, p, sizeof x);
}
void poll_again(const void* p, const Site& at) {
  uint32_t x[4];
  memcpy(x, p, sizeof x);
  if (std::count(x, x + 4, kEmptyWord)) run_now->wait(p, "poll_again", at);
}
void device_fence() { run_now->let_others_run(); }

int atomic_add(int* p, int value) {
  run_now->let_others_run();
  host::check_aligned(p, sizeof *p, Access::kAtomicUpdate, __builtin_return_address(0));
  const int before = *p;
  *p += value;
  run_now->wake(p);
  return before;
}

// ---- cp.async

void cp_async_16(void* to_shared, const void* from) {
  host::check_aligned(from, 16, Access::kRead, __builtin_return_address(0));
  host::begin_copy(to_shared, 16, __builtin_return_address(0));
  host::Fiber& f = run_now->running();
  f.copies.push_back({to_shared, from});
  ++f.open;
}

void cp_async_commit() {
  host::Fiber& f = run_now->running();
  f.groups.push_back(f.open);
  f.open = 0;
}

namespace host {

void warp_meet(WarpOp op, uint32_t mask, void* lane, void (*all)(void* const* lanes), const Site& at) {
  run_now->warp_meet(op, mask, lane, all, at);
}

// Nothing lands before it must: that is the latest that a device may take.
void cp_async_wait(int pending) {
  Fiber& f = run_now->running();
  while (f.groups.size() > size_t(pending)) {
    for (size_t i = 0; i < f.groups[0]; ++i) {
      check(f.copies[i].from, 16, Access::kRead);  // the copy may have read it as late as this
      memcpy(f.copies[i].to, f.copies[i].from, 16);
      end_copy(f.copies[i].to, 16, f.id, f.now);
    }
    f.copies.erase(f.copies.begin(), f.copies.begin() + ptrdiff_t(f.groups[0]));
    f.groups.erase(f.groups.begin());
  }
}

// ---- shared memory

void* dynamic_shared() { return run_now->running().block->dynamic; }

namespace {
void* static_of(Block& block, const void* key, const char* name, int64_t bytes) {
  for (const Static& s : block.statics)
    if (s.key == key) return s.memory;
  const Index& i = run_now->running().self.block;
  block.statics.push_back({key,
                           allocate(std::string(name) + " of block (" + std::to_string(i.x) + ", " +
                                        std::to_string(i.y) + ", " + std::to_string(i.z) + ")",
                                    bytes),
                           bytes});
  return block.statics.back().memory;
}
}  // namespace
void* static_shared(const void* key, const char* name, int64_t bytes) {
  return static_of(*run_now->running().block, key, name, bytes);
}

// ---- tensor cores

namespace {

float half_word(uint32_t pair, int i, float (*decode)(uint16_t)) { return decode(uint16_t(pair >> 16 * i)); }
const Fragments& fragments(void* const* lanes, int i) {
  if (!lanes[i]) fault("mma: lane %d takes no part", i);
  return *static_cast<const Fragments*>(lanes[i]);
}

// d [16, 8] += a [16, K] b [K, 8]; the sum is rounded once.
template <int K> void multiply_add(void* const* lanes, const float (&a)[16][K], const float (&b)[K][8]) {
  for (int i = 0; i < 16; ++i) {
    double sum[8] = {};
    for (int k = 0; k < K; ++k)
      for (int j = 0; j < 8; ++j) sum[j] += double(a[i][k]) * double(b[k][j]);
    for (int j = 0; j < 8; ++j) {
      float& d = fragments(lanes, i % 8 * 4 + j / 2).d[i / 8 * 2 + j % 2];
      d = float(double(d) + sum[j]);
    }
  }
}

// Register and half of element (row, k) of a: rows in steps of 8, then columns in steps of 8; of (k, column) of b.
void mma_16(void* const* lanes, float (*decode)(uint16_t)) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Fragments& f = fragments(lanes, lane);
    const int group = lane / 4, quarter = lane % 4;
    for (int r = 0; r < 4; ++r)
      for (int i = 0; i < 2; ++i) a[group + 8 * (r % 2)][2 * quarter + i + 8 * (r / 2)] = half_word(f.a[r], i, decode);
    for (int r = 0; r < 2; ++r)
      for (int i = 0; i < 2; ++i) b[2 * quarter + i + 8 * r][group] = half_word(f.b[r], i, decode);
  }
  multiply_add(lanes, a, b);
}

}  // namespace

void mma(const Fragments& lane, void (*all)(void* const* lanes), const Site& at) {
  Fragments mine = lane;
  warp_meet(WarpOp::kMma, kWarpMask, &mine, all, at);
}
void mma_bf16(void* const* lanes) { mma_16(lanes, of_bf16); }
void mma_f16(void* const* lanes) { mma_16(lanes, of_f16); }
void mma_tf32(void* const* lanes) {
  constexpr uint32_t kKept = 0xffffe000;
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Fragments& f = fragments(lanes, lane);
    const int group = lane / 4, quarter = lane % 4;
    for (int r = 0; r < 4; ++r) a[group + 8 * (r % 2)][quarter + 4 * (r / 2)] = float_of(f.a[r] & kKept);
    for (int r = 0; r < 2; ++r) b[quarter + 4 * r][group] = float_of(f.b[r] & kKept);
  }
  multiply_add(lanes, a, b);
}

namespace {
struct Rows {
  const void* row;
  uint32_t* r;
};
template <bool kTrans> void load_matrices(void* const* lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int m = 0; m < 4; ++m) {
      const int group = lane / 4, quarter = lane % 4;
      uint16_t pair[2];
      for (int i = 0; i < 2; ++i) {
        const int row = kTrans ? 2 * quarter + i : group, column = kTrans ? group : 2 * quarter + i;
        const auto* from = static_cast<const Rows*>(lanes[8 * m + row]);
        if (!from) fault("ldmatrix: lane %d takes no part", 8 * m + row);
        memcpy(&pair[i], static_cast<const uint16_t*>(from->row) + column, 2);
      }
      static_cast<Rows*>(lanes[lane])->r[m] = pair[0] | uint32_t(pair[1]) << 16;
    }
  }
}
}  // namespace
void ldmatrix(uint32_t (&r)[4], const void* row, bool trans, const Site& at) {
  check_aligned(row, 16, Access::kRead, __builtin_return_address(0));
  Rows mine{row, r};
  warp_meet(WarpOp::kLdmatrix, kWarpMask, &mine, trans ? load_matrices<true> : load_matrices<false>, at);
}

// ---- clusters

void* map_shared(void* p, int rank) {
  Block& own = *run_now->running().block;
  if (rank < 0 || rank >= run_now->launch.cluster)
    fault("map_shared: block %d of a cluster of %d", rank, run_now->launch.cluster);
  Block& other = run_now->blocks[size_t(own.first + rank)];
  const auto offset = [p](const void* from) { return static_cast<char*>(p) - static_cast<const char*>(from); };
  if (offset(own.dynamic) >= 0 && offset(own.dynamic) < run_now->launch.shared_bytes)
    return static_cast<char*>(other.dynamic) + offset(own.dynamic);
  for (const Static& s : own.statics)
    if (offset(s.memory) >= 0 && offset(s.memory) < s.bytes)
      return static_cast<char*>(static_of(other, s.key, "static shared memory", s.bytes)) + offset(s.memory);
  fault("map_shared: the pointer is not to shared memory of this block: %s", describe(p).c_str());
}

}  // namespace host

int cluster_rank() { return run_now->running().block->rank; }
int cluster_size() { return run_now->launch.cluster; }
void cluster_sync(const Site& at) { run_now->meet(*run_now->running().block->cluster, at); }

// ---- mbarriers. Their state lies beside the 8 bytes, which hold a mark.

namespace host {
namespace {

constexpr uint64_t kMark = 0x6d62617272696572;

Mbarrier& mbarrier_at(const uint64_t* p) {
  check_aligned(p, sizeof *p, Access::kAtomicUpdate);
  const auto found = run_now->mbarriers.find(p);
  if (found == run_now->mbarriers.end() || *p != kMark)
    fault("mbarrier: not initialised, or overwritten: %s", describe(p).c_str());
  return found->second;
}

// Stores land when the phase could not end without them, which is the latest.
void advance(uint64_t* p, Mbarrier& m) {
  if (m.pending > 0 || m.bytes != 0) return;
  for (const RemoteStore& s : m.stores) {
    memcpy(s.to, s.value.data(), s.value.size());
    end_copy(s.to, int64_t(s.value.size()), s.sender, s.now);
  }
  m.stores.clear();
  m.pending = m.arrivals;
  m.phase ^= 1;
  m.complete = m.gathering;
  m.gathering = nullptr;
  run_now->wake(p);
}

void arrive(uint64_t* p, int64_t bytes) {
  Mbarrier& m = mbarrier_at(p);
  m.gathering = join(release_clock(run_now->running()), m.gathering);
  m.bytes += bytes;
  --m.pending;
  advance(p, m);
  run_now->let_others_run();
}

}  // namespace

void store_async(void* to, const void* value, int bytes, uint64_t* barrier) {
  begin_copy(to, bytes, __builtin_return_address(0));
  Mbarrier& m = mbarrier_at(barrier);
  Fiber& f = run_now->running();
  m.stores.push_back({to, std::string(static_cast<const char*>(value), size_t(bytes)), f.id, f.now});
  m.gathering = join(release_clock(f), m.gathering);
  m.bytes -= bytes;
  advance(barrier, m);
  run_now->let_others_run();
}

}  // namespace host

void mbarrier_init(uint64_t* barrier, int arrivals) {
  host::check_aligned(barrier, sizeof *barrier, Access::kWrite);
  if (arrivals < 1) fault("mbarrier_init: %d arrivals", arrivals);
  *barrier = host::kMark;
  host::Mbarrier m;
  m.arrivals = m.pending = arrivals;
  run_now->mbarriers[barrier] = m;
}
void mbarrier_arrive(uint64_t* barrier) { host::arrive(barrier, 0); }
void mbarrier_arrive_expect(uint64_t* barrier, int bytes) { host::arrive(barrier, bytes); }
void mbarrier_arrive_remote(uint64_t* barrier) { host::arrive(barrier, 0); }

void mbarrier_wait(uint64_t* barrier, int parity, const Site& at) {
  while (host::mbarrier_at(barrier).phase == (parity & 1)) run_now->wait(barrier, "mbarrier_wait", at);
  host::acquire_clock(run_now->running(), host::mbarrier_at(barrier).complete);
}

}  // namespace seqkern
