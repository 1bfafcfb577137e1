// The device primitives that the engines use: everything in a kernel that is not plain C++ goes through here.
//
// Compiled by nvcc this is inline PTX. With SK_HOST defined, testing/host_cuda.h declares the same functions for a C++
// compiler, and testing/ runs the kernels on fibers. What a device is too old for traps: the planner never launches it.
// sm_75 has barriers, warp functions, flags, L2 loads and 16-bit numbers; mma, ldmatrix, cp.async and mbarrier
// need sm_80; clusters and store_async need sm_90.
#pragma once
#include <stdint.h>

namespace seqkern {

constexpr uint32_t kWarpMask = 0xffffffffu;

// 16-bit storage. Arithmetic is done in float.
struct bf16 {
  uint16_t bits;
};
struct half_t {
  uint16_t bits;
};

}  // namespace seqkern

#ifdef SK_HOST
#include "../testing/host_cuda.h"
#else

#define SK_DEVICE __device__ __forceinline__

// Dynamic shared memory as `type* name`, 128-byte aligned. One declaration a kernel: every one names the same bytes.
#define SK_SHARED(type, name)                                  \
  extern __shared__ __align__(128) unsigned char sk_dynamic[]; \
  type* const name = reinterpret_cast<type*>(sk_dynamic)
// `count` elements that a block has beside its dynamic shared memory. Not initialised.
#define SK_SHARED_STATIC(type, name, count) __shared__ __align__(16) type name[count]

namespace seqkern {

// ---- numbers

SK_DEVICE float to_float(float x) { return x; }
SK_DEVICE float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
SK_DEVICE float to_float(half_t x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// Rounded to nearest, ties to even; NaN stays NaN.
template <class S> SK_DEVICE S from_float(float x);
template <> SK_DEVICE float from_float<float>(float x) { return x; }
template <> SK_DEVICE bf16 from_float<bf16>(float x) {
#if __CUDA_ARCH__ >= 800
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const uint32_t u = __float_as_uint(x);
  if (x != x) return {uint16_t(u >> 16 | 0x40)};
  return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
#endif
}
template <> SK_DEVICE half_t from_float<half_t>(float x) {
  half_t y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

// Two of them in a word, the first in its lower half.
template <class S> SK_DEVICE uint32_t pack(float low, float high);
template <> SK_DEVICE uint32_t pack<bf16>(float low, float high) {
  uint32_t y = 0;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#else
  __trap();
#endif
  return y;
}
template <> SK_DEVICE uint32_t pack<half_t>(float low, float high) {
  uint32_t y = 0;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#else
  __trap();
#endif
  return y;
}

// A TF32 operand of mma: 10 bits of mantissa, rounded to nearest, ties away from zero.
SK_DEVICE uint32_t to_tf32(float x) {
  uint32_t y = 0;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
#else
  __trap();
#endif
  return y;
}

// ---- block and warp

// All threads of the block, from the same place in the source.
SK_DEVICE void block_sync() { __syncthreads(); }
// The lanes in `mask`, which each of them names; what one wrote before it the others see after it.
SK_DEVICE void warp_sync(uint32_t mask = kWarpMask) { __syncwarp(mask); }
// The value of lane `from`, of lane ^ `x`, of lane + `delta`. They order no memory.
template <class T> SK_DEVICE T shfl(T value, int from, uint32_t mask = kWarpMask) {
  return __shfl_sync(mask, value, from);
}
template <class T> SK_DEVICE T shfl_xor(T value, int x, uint32_t mask = kWarpMask) {
  return __shfl_xor_sync(mask, value, x);
}
template <class T> SK_DEVICE T shfl_down(T value, int delta, uint32_t mask = kWarpMask) {
  return __shfl_down_sync(mask, value, delta);
}
// One bit for each lane in `mask`.
SK_DEVICE uint32_t ballot(bool x, uint32_t mask = kWarpMask) { return __ballot_sync(mask, x); }

// ---- global memory, between blocks

// Through L2, never from a stale line of L1. T: 2, 4, 8 or 16 bytes, aligned to its size.
template <class T> SK_DEVICE T ld_cg(const T* p) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  T x;
  if constexpr (sizeof(T) == 2) {
    const unsigned short v = __ldcg(reinterpret_cast<const unsigned short*>(p));
    memcpy(&x, &v, sizeof x);
  } else if constexpr (sizeof(T) == 4) {
    const unsigned v = __ldcg(reinterpret_cast<const unsigned*>(p));
    memcpy(&x, &v, sizeof x);
  } else if constexpr (sizeof(T) == 8) {
    const uint2 v = __ldcg(reinterpret_cast<const uint2*>(p));
    memcpy(&x, &v, sizeof x);
  } else {
    const uint4 v = __ldcg(reinterpret_cast<const uint4*>(p));
    memcpy(&x, &v, sizeof x);
  }
  return x;
}
template <class T> SK_DEVICE void st_cg(T* p, const T& x) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  if constexpr (sizeof(T) == 2) {
    unsigned short v;
    memcpy(&v, &x, sizeof x);
    __stcg(reinterpret_cast<unsigned short*>(p), v);
  } else if constexpr (sizeof(T) == 4) {
    unsigned v;
    memcpy(&v, &x, sizeof x);
    __stcg(reinterpret_cast<unsigned*>(p), v);
  } else if constexpr (sizeof(T) == 8) {
    uint2 v;
    memcpy(&v, &x, sizeof x);
    __stcg(reinterpret_cast<uint2*>(p), v);
  } else {
    uint4 v;
    memcpy(&v, &x, sizeof x);
    __stcg(reinterpret_cast<uint4*>(p), v);
  }
}

// Stores `value`. Who sees it by wait_acquire sees all that this thread did before, and, after a block_sync, the block.
SK_DEVICE void signal_release(int* flag, int value) {
  asm volatile("st.release.gpu.s32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
// Likewise, adding to the flag.
SK_DEVICE void add_release(int* flag, int value) {
  asm volatile("red.release.gpu.add.s32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
// Polls until *flag >= value. Each lane may wait for its own flag.
SK_DEVICE void wait_acquire(const int* flag, int value) {
  int seen;
  do asm volatile("ld.acquire.gpu.s32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
  while (seen < value);
}
// Words that tell by themselves that they are there: memory begins as kEmptyWord, which is no number (full() sees to
// that), and who waits for words polls them. They order no other memory.
constexpr uint32_t kEmptyWord = 0xffffffffu;
SK_DEVICE uint32_t full(uint32_t x) { return x == kEmptyWord ? 0x7fff7fffu : x; }  // one NaN for another
SK_DEVICE void st_word(uint32_t* p, uint32_t x) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
// Four words, each read whole; from an address that is a multiple of 16.
SK_DEVICE void ld_words(uint32_t (&x)[4], const void* p) {
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "l"(p));
}
// Between two looks at the words at p, one of which was empty.
SK_DEVICE void poll_again(const void*) {}
// What this thread stored before it, no thread sees after what it stores later.
SK_DEVICE void device_fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
// The old value. It orders no other memory.
SK_DEVICE int atomic_add(int* p, int value) { return atomicAdd(p, value); }
// Where no other thread adds: a sum that the thread does not wait for.
template <class T> SK_DEVICE void add_to(T* p, T value) { atomicAdd(p, value); }

// ---- tensor cores. Fragments as in PTX's tables; with group = lane / 4 and quarter = lane % 4,
//   16-bit: a[0..3] hold rows group, group + 8, group, group + 8 and columns 2 quarter, + 1 (a[2], a[3]: + 8, + 9);
//           b[0..1] hold column group, rows 2 quarter, + 1 (b[1]: + 8, + 9). The lower half is the lower index.
//   tf32:   a[0..3] hold rows likewise and column quarter (a[2], a[3]: + 4); b[0..1] column group, row quarter (+ 4).
//   d[0..3] hold rows group (0, 1) and group + 8 (2, 3) and columns 2 quarter, + 1.

// d [16, 8] += a [16, 16] b [16, 8]; S: bf16 or half_t.
template <class S> SK_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <> SK_DEVICE void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}
template <> SK_DEVICE void mma_m16n8k16<half_t>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}
// d [16, 8] += a [16, 8] b [8, 8]. The lower 13 bits of a and b are not looked at.
SK_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

SK_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Four 8x8 matrices of 16 bits: lane i names row i % 8 of matrix i / 8 (16 bytes, aligned); r[m] gets elements
// 2 quarter, + 1 of row `group` of matrix m; with _trans of column `group`.
SK_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
SK_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// ---- copies from global to shared memory behind the program's back

// 16 bytes, both aligned to 16. They are there for this thread after cp_async_wait, for others after a barrier too.
SK_DEVICE void cp_async_16(void* to_shared, const void* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to_shared)), "l"(from) : "memory");
#else
  __trap();
#endif
}
// The copies since the last commit become a group.
SK_DEVICE void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  __trap();
#endif
}
// Until at most kPending of this thread's groups, the latest, are under way.
template <int kPending> SK_DEVICE void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  __trap();
#endif
}

// ---- clusters

SK_DEVICE int cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return int(rank);
}
SK_DEVICE int cluster_size() {
  uint32_t size = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return int(size);
}
// All threads of the cluster. A block must not end while another may still reach into its shared memory.
SK_DEVICE void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __trap();
#endif
}
// The same place in the shared memory of block `rank` of the cluster.
template <class T> SK_DEVICE T* map_shared(T* p, int rank) {
  uint64_t found = 0;
#if __CUDA_ARCH__ >= 900
  asm("mapa.u64 %0, %1, %2;" : "=l"(found) : "l"(p), "r"(rank));
#else
  __trap();
#endif
  return reinterpret_cast<T*>(found);
}

// ---- mbarriers: 8 bytes of shared memory that count arrivals, and bytes of store_async, phase after phase

// By one thread, before a barrier of all who will use it (block_sync, or cluster_sync where other blocks do).
SK_DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
#else
  __trap();
#endif
}
SK_DEVICE void mbarrier_arrive(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 800
  asm volatile("{\n\t.reg .b64 s;\n\tmbarrier.arrive.shared.b64 s, [%0];\n\t}" ::"r"(shared_address(barrier))
               : "memory");
#else
  __trap();
#endif
}
// Arrives, and has this phase wait for `bytes` more.
SK_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t.reg .b64 s;\n\tmbarrier.arrive.expect_tx.shared::cta.b64 s, [%0], %1;\n\t}" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#else
  __trap();
#endif
}
// Until the phase of this parity is over: 0 for the first.
SK_DEVICE void mbarrier_wait(uint64_t* barrier, int parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t.reg .pred p;\nSK_WAIT_%=:\n\t"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n\t@!p bra SK_WAIT_%=;\n\t}" ::"r"(
          shared_address(barrier)),
      "r"(parity)
      : "memory");
#elif __CUDA_ARCH__ >= 800
  uint32_t over;
  do
    asm volatile("{\n\t.reg .pred p;\n\tmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
                 : "=r"(over)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  while (!over);
#else
  __trap();
#endif
}

#if __CUDA_ARCH__ >= 900
// What map_shared gave, as an address in the cluster's shared memory.
SK_DEVICE uint32_t cluster_address(const void* p) {
  uint64_t address;
  asm("cvta.to.shared::cluster.u64 %0, %1;" : "=l"(address) : "l"(p));
  return uint32_t(address);
}
#endif
// On another block's barrier, from map_shared.
SK_DEVICE void mbarrier_arrive_remote(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(cluster_address(barrier))
               : "memory");
#else
  __trap();
#endif
}
// 4, 8 or 16 bytes to another block's shared memory, counted by that block's barrier when they are there. Both pointers
// are from map_shared.
template <class T> SK_DEVICE void store_async(T* to, const T& value, uint64_t* barrier) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
#if __CUDA_ARCH__ >= 900
  const uint32_t at = cluster_address(to), bar = cluster_address(barrier);
  uint32_t v[sizeof(T) / 4];
  memcpy(v, &value, sizeof(T));
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(at), "r"(v[0]),
                 "r"(bar)
                 : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1,%2}, [%3];" ::"r"(at),
                 "r"(v[0]), "r"(v[1]), "r"(bar)
                 : "memory");
  } else {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(at),
                 "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(bar)
                 : "memory");
  }
#else
  __trap();
#endif
}

}  // namespace seqkern
#endif  // SK_HOST

namespace seqkern {

// All blocks of a grid that is resident at once, for the `round`-th time (from 1). `counter` starts at zero.
SK_DEVICE void grid_barrier(int* counter, int round) {
  block_sync();
  if (threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) {
    add_release(counter, 1);
    wait_acquire(counter, round * int(gridDim.x * gridDim.y * gridDim.z));
  }
  block_sync();
}

}  // namespace seqkern
