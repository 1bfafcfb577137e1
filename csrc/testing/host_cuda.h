// What a kernel sees in host execution: cuda/simt.cuh's functions for a C++ compiler, and CUDA's words.
// host_launch.h runs the kernel.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <source_location>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// There is no __shared__: shared memory is declared by the macros below, in which every access is checked.
// Inlined, as on the device, and because GCC's instrumentation (memory.h) leaves out where a call stores its result.
#define SK_DEVICE inline __attribute__((always_inline))
#define SK_SHARED(type, name) type* const name = static_cast<type*>(::seqkern::host::dynamic_shared())
#define SK_SHARED_STATIC(type, name, count) \
  static const char name##_key = 0;         \
  type(&name)[count] =                      \
      *static_cast<type(*)[count]>(::seqkern::host::static_shared(&name##_key, #name, sizeof(type[count])))

#define threadIdx (::seqkern::host::self->thread)
#define blockIdx (::seqkern::host::self->block)
#define blockDim (::seqkern::host::self->block_dim)
#define gridDim (::seqkern::host::self->grid_dim)

namespace seqkern {

namespace host {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};
struct Self {
  Index thread, block, block_dim, grid_dim;
};
extern const Self* self;  // of the running thread

using Site = std::source_location;

void* dynamic_shared();
void* static_shared(const void* key, const char* name, int64_t bytes);

// Ends the launch with an error that names this thread.
[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));

// A function that a whole warp, or the lanes of a mask, call together. Each lane hands over its arguments, which `all`
// gets for every lane that takes part (null for the others); it runs once, when the last has come.
enum class WarpOp { kSync, kShfl, kShflXor, kShflDown, kBallot, kMma, kLdmatrix };
void warp_meet(WarpOp op, uint32_t mask, void* lane, void (*all)(void* const* lanes), const Site& at);

template <class T> struct Shuffled {
  T value, result;
  int by;
};
// The result of lane i is the value of lane from(i, by).
template <class T, int (*from)(int, int)> void shuffle_all(void* const* lanes) {
  for (int i = 0; i < 32; ++i) {
    if (!lanes[i]) continue;
    auto* to = static_cast<Shuffled<T>*>(lanes[i]);
    const int source = from(i, to->by);
    if (!lanes[source]) fault("lane %d shuffles from lane %d, which takes no part", i, source);
    to->result = static_cast<Shuffled<T>*>(lanes[source])->value;
  }
}
inline int from_lane(int, int by) { return by & 31; }
inline int from_xor(int i, int by) { return (i ^ by) & 31; }
inline int from_down(int i, int by) { return i + by < 32 ? i + by : i; }
template <class T, int (*from)(int, int)> T shuffle(WarpOp op, T value, int by, uint32_t mask, const Site& at) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles 4 or 8 bytes");
  Shuffled<T> lane{value, T(), by};
  warp_meet(op, mask, &lane, shuffle_all<T, from>, at);
  return lane.result;
}

struct Fragments {
  float* d;
  const uint32_t *a, *b;
};
void mma(const Fragments& lane, void (*all)(void* const* lanes), const Site& at);
void mma_bf16(void* const* lanes);
void mma_f16(void* const* lanes);
void mma_tf32(void* const* lanes);
void ldmatrix(uint32_t (&r)[4], const void* row, bool trans, const Site& at);

void cp_async_wait(int pending);
void* map_shared(void* p, int rank);
void store_async(void* to, const void* value, int bytes, uint64_t* barrier);

}  // namespace host

// ---- numbers

namespace host {
float of_bf16(uint16_t bits);
float of_f16(uint16_t bits);
uint16_t to_bf16(float x);
uint16_t to_f16(float x);
}  // namespace host
SK_DEVICE float to_float(float x) { return x; }
SK_DEVICE float to_float(bf16 x) { return host::of_bf16(x.bits); }
SK_DEVICE float to_float(half_t x) { return host::of_f16(x.bits); }
template <class S> S from_float(float x);
template <> SK_DEVICE float from_float<float>(float x) { return x; }
template <> SK_DEVICE bf16 from_float<bf16>(float x) { return {host::to_bf16(x)}; }
template <> SK_DEVICE half_t from_float<half_t>(float x) { return {host::to_f16(x)}; }
template <class S> SK_DEVICE uint32_t pack(float low, float high) {
  return from_float<S>(low).bits | uint32_t(from_float<S>(high).bits) << 16;
}
uint32_t to_tf32(float x);

// ---- block and warp

void block_sync(const host::Site& at = host::Site::current());
void warp_sync(uint32_t mask = kWarpMask, const host::Site& at = host::Site::current());
uint32_t ballot(bool x, uint32_t mask = kWarpMask, const host::Site& at = host::Site::current());
template <class T>
SK_DEVICE T shfl(T value, int from, uint32_t mask = kWarpMask, const host::Site& at = host::Site::current()) {
  return host::shuffle<T, host::from_lane>(host::WarpOp::kShfl, value, from, mask, at);
}
template <class T>
SK_DEVICE T shfl_xor(T value, int x, uint32_t mask = kWarpMask, const host::Site& at = host::Site::current()) {
  return host::shuffle<T, host::from_xor>(host::WarpOp::kShflXor, value, x, mask, at);
}
template <class T>
SK_DEVICE T shfl_down(T value, int delta, uint32_t mask = kWarpMask, const host::Site& at = host::Site::current()) {
  return host::shuffle<T, host::from_down>(host::WarpOp::kShflDown, value, delta, mask, at);
}

// ---- global memory, between blocks

template <class T> SK_DEVICE T ld_cg(const T* p) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  asm volatile("" ::: "memory");  // loads anew every time, as on the device
  return *p;
}
template <class T> SK_DEVICE void st_cg(T* p, const T& x) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  *p = x;
}
void signal_release(int* flag, int value);
void add_release(int* flag, int value);
void wait_acquire(const int* flag, int value, const host::Site& at = host::Site::current());
constexpr uint32_t kEmptyWord = 0xffffffffu;
SK_DEVICE uint32_t full(uint32_t x) { return x == kEmptyWord ? 0x7fff7fffu : x; }
void st_word(uint32_t* p, uint32_t x);
void ld_words(uint32_t (&x)[4], const void* p);
void poll_again(const void* p, const host::Site& at = host::Site::current());
void device_fence();
int atomic_add(int* p, int value);
template <class T> void add_to(T* p, T value) { *p += value; }

// ---- tensor cores

template <class S>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  const host::Site& at = host::Site::current());
template <>
inline void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const host::Site& at) {
  host::mma({d, a, b}, host::mma_bf16, at);
}
template <>
inline void mma_m16n8k16<half_t>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const host::Site& at) {
  host::mma({d, a, b}, host::mma_f16, at);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             const host::Site& at = host::Site::current()) {
  host::mma({d, a, b}, host::mma_tf32, at);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, const host::Site& at = host::Site::current()) {
  host::ldmatrix(r, row, false, at);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, const host::Site& at = host::Site::current()) {
  host::ldmatrix(r, row, true, at);
}

// ---- copies from global to shared memory

void cp_async_16(void* to_shared, const void* from);
void cp_async_commit();
template <int kPending> void cp_async_wait() { host::cp_async_wait(kPending); }

// ---- clusters

int cluster_rank();
int cluster_size();
void cluster_sync(const host::Site& at = host::Site::current());
template <class T> T* map_shared(T* p, int rank) { return static_cast<T*>(host::map_shared(p, rank)); }

// ---- mbarriers

void mbarrier_init(uint64_t* barrier, int arrivals);
void mbarrier_arrive(uint64_t* barrier);
void mbarrier_arrive_expect(uint64_t* barrier, int bytes);
void mbarrier_wait(uint64_t* barrier, int parity, const host::Site& at = host::Site::current());
void mbarrier_arrive_remote(uint64_t* barrier);
template <class T> void store_async(T* to, const T& value, uint64_t* barrier) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  host::store_async(to, &value, sizeof(T), barrier);
}

}  // namespace seqkern
