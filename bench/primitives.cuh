// The kernels that primitives.cu times. Each runs `iterations` rounds and writes the cycles that block 0 took.
#pragma once
#include <cooperative_groups.h>

#include <cstdint>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define HAS_CLUSTERS 1
#endif
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HAS_WGMMA 1
#endif

constexpr long long kPatience = 4000000000;  // cycles after which a wait gives up: seconds
constexpr int kTiles = 4;                    // of 16 rows that a warp has in mma_sync: its four gates
constexpr int kDepth = 16;                   // of K/16 in one round of wgmma: K = 256
constexpr int kReads = 8;                    // loads in flight in shared_read and l2_read

__device__ inline void report(long long start, long long* cycles) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *cycles = clock64() - start;
}

// Whether to poll on. `since` is 0 at the first poll, which reads no clock.
__device__ inline bool patient(long long& since) {
  if (since == 0) {
    since = -1;
    return true;
  }
  const long long now = clock64();
  if (since < 0) since = now;
  return now - since < kPatience;
}

// ---- clusters

// kOrdered: what was written before it is seen after it by the whole cluster, global memory included. That costs a
// fence of the whole GPU; a kernel that hands its data over by mbarriers does not need it.
template <bool kOrdered = true>
__device__ inline void cluster_sync() {
#ifdef HAS_CLUSTERS
  if (kOrdered) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  else asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

template <bool kOrdered>
__global__ void cluster_barrier(int iterations, long long* cycles) {
#ifdef HAS_CLUSTERS
  cluster_sync();
  const long long start = clock64();
#pragma unroll 1
  for (int i = 0; i < iterations; ++i) cluster_sync<kOrdered>();
  report(start, cycles);
#endif
}

#ifdef HAS_CLUSTERS
__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// The same place in the shared memory of CTA `rank` of the cluster.
__device__ inline uint32_t remote(uint32_t address, uint32_t rank) {
  uint32_t found;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(found) : "r"(address), "r"(rank));
  return found;
}

__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ inline uint32_t cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

__device__ inline void barrier_init(uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// kOrdered: acquires from the whole cluster, as the memory model asks, which also empties L1. Without, from this CTA
// only: enough in practice for what st.async brings, and what CUTLASS's pipelines do.
template <bool kOrdered>
__device__ inline bool barrier_wait(uint32_t barrier, uint32_t parity) {
  for (long long since = 0; patient(since);) {
    uint32_t done;
    if (kOrdered)
      asm volatile(
          "{\n\t.reg .pred p;\n\t"
          "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n\t"
          "selp.u32 %0, 1, 0, p;\n\t}"
          : "=r"(done)
          : "r"(barrier), "r"(parity)
          : "memory");
    else
      asm volatile(
          "{\n\t.reg .pred p;\n\t"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
          "selp.u32 %0, 1, 0, p;\n\t}"
          : "=r"(done)
          : "r"(barrier), "r"(parity)
          : "memory");
    if (done) return true;
  }
  return false;
}

// 16 bytes to another CTA's shared memory, counted by that CTA's barrier when they are there.
__device__ inline void store_async(uint32_t to, uint32_t barrier, uint4 v) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(barrier)
               : "memory");
}
#endif

// Two CTAs send 16 bytes to and fro.
template <bool kOrdered>
__global__ void dsmem_handoff(int iterations, long long* cycles, int* stuck) {
#ifdef HAS_CLUSTERS
  __shared__ alignas(16) uint4 mail;
  __shared__ alignas(8) uint64_t barrier;
  const uint32_t own = shared_address(&barrier), rank = cluster_rank(), other = rank ^ 1;
  if (threadIdx.x == 0) barrier_init(own);
  cluster_sync();
  const long long start = clock64();
  if (threadIdx.x == 0) {
    const uint32_t to = remote(shared_address(&mail), other), signal = remote(own, other);
    uint4 value = {rank, 0, 0, 0};
    for (int i = 0; i < iterations; ++i) {
      barrier_expect(own, 16);
      if (rank == 0) store_async(to, signal, value);
      if (!barrier_wait<kOrdered>(own, i & 1)) {
        *stuck = 1;
        break;
      }
      value.x = *reinterpret_cast<volatile uint32_t*>(&mail) + 1;  // what is sent depends on what came
      if (rank == 1) store_async(to, signal, value);
    }
  }
  report(start, cycles);
  cluster_sync();  // no CTA leaves while another may still store into it
#endif
}

// Every CTA sends `bytes` to every other one and waits for theirs: a step of a recurrence inside one cluster. Two sets
// of buffers and barriers, by turns: a CTA is at most one step ahead of the others.
template <bool kOrdered>
__global__ void dsmem_exchange(int iterations, int bytes, long long* cycles, int* stuck) {
#ifdef HAS_CLUSTERS
  extern __shared__ __align__(16) unsigned char inbox[];  // [2, 16, bytes]
  __shared__ alignas(8) uint64_t barriers[2];
  const uint32_t rank = cluster_rank(), size = cluster_size();
  const uint32_t base = shared_address(inbox);
  if (threadIdx.x < 2) barrier_init(shared_address(&barriers[threadIdx.x]));
  cluster_sync();
  const int pieces = bytes / 16 * (static_cast<int>(size) - 1);
  uint4 value = {rank, threadIdx.x, 0, 0};
  const long long start = clock64();
  for (int i = 0; i < iterations; ++i) {
    const uint32_t own = shared_address(&barriers[i & 1]), box = base + (i & 1) * 16 * bytes;
    if (threadIdx.x == 0) barrier_expect(own, bytes * (size - 1));
    for (int piece = threadIdx.x; piece < pieces; piece += blockDim.x) {
      const uint32_t target = piece / (bytes / 16), to = target + (target >= rank);
      const uint32_t offset = rank * bytes + piece % (bytes / 16) * 16;
      store_async(remote(box + offset, to), remote(own, to), value);
    }
    const bool came = barrier_wait<kOrdered>(own, i >> 1 & 1);
    if (!came) *stuck = 1;
    if (__syncthreads_or(!came)) break;
    value.z += *reinterpret_cast<volatile uint32_t*>(inbox + (box - base) + (rank ^ 1) * bytes);
  }
  report(start, cycles);
  cluster_sync();
#endif
}

// ---- the whole grid, through L2

__device__ inline int load_acquire(const int* p) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

__device__ inline void store_release(int* p, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}

__device__ inline bool wait_for(const int* p, int value) {
  for (long long since = 0; patient(since);)
    if (load_acquire(p) >= value) return true;
  return false;
}

__device__ inline uint4 load_l2(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

__global__ void l2_handoff(int iterations, int* flags, long long* cycles, int* stuck) {
  const long long start = clock64();
  if (threadIdx.x == 0) {
    int *own = flags + 64 * blockIdx.x, *other = flags + 64 * (blockIdx.x ^ 1);
    for (int i = 1; i <= iterations; ++i) {
      if (blockIdx.x == 0) store_release(other, i);
      if (!wait_for(own, i)) {
        *stuck = 1;
        break;
      }
      if (blockIdx.x == 1) store_release(other, i);
    }
  }
  report(start, cycles);
}

__global__ void grid_sync(int iterations, long long* cycles) {
  auto grid = cooperative_groups::this_grid();
  const long long start = clock64();
  for (int i = 0; i < iterations; ++i) grid.sync();
  report(start, cycles);
}

// One counter that every block raises and watches.
__global__ void counter_barrier(int iterations, int* counter, long long* cycles, int* stuck) {
  const long long start = clock64();
  for (int i = 1; i <= iterations; ++i) {
    __syncthreads();
    bool late = false;
    if (threadIdx.x == 0) {
      asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
      late = !wait_for(counter, i * static_cast<int>(gridDim.x));
      if (late) *stuck = 1;
    }
    if (__syncthreads_or(late)) break;
  }
  report(start, cycles);
}

// A flag for each block; thread t watches block t's. Then every block reads the same `bytes`, as it would the state.
__global__ void flag_barrier(int iterations, int bytes, int* flags, const uint4* state, long long* cycles, int* stuck) {
  uint32_t sum = 0;
  const long long start = clock64();
  for (int i = 1; i <= iterations; ++i) {
    __syncthreads();
    if (threadIdx.x == 0) store_release(flags + 16 * blockIdx.x, i);
    bool late = false;
    if (threadIdx.x < gridDim.x) late = !wait_for(flags + 16 * threadIdx.x, i);
    if (late) *stuck = 1;
    if (__syncthreads_or(late)) break;
#pragma unroll 8
    for (int at = threadIdx.x; at < bytes / 16; at += blockDim.x) {
      const uint4 v = load_l2(state + at);
      sum ^= v.x ^ v.y ^ v.z ^ v.w;
    }
  }
  report(start, cycles);
  if (sum == 0x12345678) *stuck = 2;  // keeps the loads; the state's bits are as good as random
}

// ---- rates

__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// bf16 pairs around 1, different in each register; random mantissas, as the rate may depend on the data.
__device__ inline uint32_t operand(int index) {
  const uint32_t bits = (threadIdx.x * 64 + index + 1) * 2654435761u;
  return (bits & 0x807f807f) | 0x3f003f00;
}

// Keeps a value in its register: the compiler can neither compute it again nor see what it is.
__device__ inline void pin(uint32_t& value) { asm volatile("" : "+r"(value)); }

// A chain of dependent products in one warp.
__global__ void mma_chain(int iterations, long long* cycles, uint4* out) {
  float d[4] = {};
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = operand(i);
  for (int i = 0; i < 2; ++i) b[i] = operand(4 + i);
  const long long start = clock64();
  for (int i = 0; i < iterations; ++i) mma_m16n8k16(d, a, b);
  if (d[0] + d[1] + d[2] + d[3] == 1.2345e30f) out->x = 1;  // waits for the last product
  report(start, cycles);
}

// kTiles x 16 rows and N columns for each warp, the weights (A) in registers. One round is K = 16.
template <int N>
__global__ void __launch_bounds__(256, 1) mma_sync(int iterations, long long* cycles, uint4* out) {
  float d[kTiles][N / 8][4] = {};
  uint32_t a[kTiles][4], b[N / 8][2];
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
    for (int i = 0; i < 4; ++i) pin(a[m][i] = operand(4 * m + i));
#pragma unroll
  for (int n = 0; n < N / 8; ++n)
    for (int i = 0; i < 2; ++i) pin(b[n][i] = operand(32 + 2 * n + i));
  __syncthreads();
  const long long start = clock64();
#pragma unroll 1
  for (int i = 0; i < iterations; ++i)
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int n = 0; n < N / 8; ++n) mma_m16n8k16(d[m][n], a[m], b[n]);
  float sum = 0;
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
    for (int n = 0; n < N / 8; ++n)
      for (int i = 0; i < 4; ++i) sum += d[m][n][i];
  if (sum == 1.2345e30f) out->x = 1;
  __syncthreads();
  report(start, cycles);
}

#ifdef HAS_WGMMA
#define SK_D(i) "+f"(d[i])
#define SK_D4(i) SK_D(i), SK_D(i + 1), SK_D(i + 2), SK_D(i + 3)
#define SK_D8(i) SK_D4(i), SK_D4(i + 4)
#define SK_D16(i) SK_D8(i), SK_D8(i + 8)
// The operands after the accumulators: four registers of A, the descriptor of B.
#define SK_WGMMA(N, D, A0, A1, A2, A3, B, ...)                                                                  \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" D "}, {" A0 ", " A1 ", " A2 ", " A3 \
               "}, " B ", 1, 1, 1, 0;"                                                                          \
               : __VA_ARGS__                                                                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

template <int N>
__device__ inline void wgmma_k16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (N == 8) {
    SK_WGMMA(8, "%0, %1, %2, %3", "%4", "%5", "%6", "%7", "%8", SK_D4(0));
  } else if constexpr (N == 16) {
    SK_WGMMA(16, "%0, %1, %2, %3, %4, %5, %6, %7", "%8", "%9", "%10", "%11", "%12", SK_D8(0));
  } else if constexpr (N == 32) {
    SK_WGMMA(32, "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15", "%16", "%17", "%18", "%19",
             "%20", SK_D16(0));
  } else {
    static_assert(N == 64);
    SK_WGMMA(64,
             "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
             "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31",
             "%32", "%33", "%34", "%35", "%36", SK_D16(0), SK_D16(16));
  }
}
#endif

// 64 rows for each warpgroup, N columns, K = 16 kDepth in a round: A in registers, B in shared memory without swizzle,
// in core matrices of 8 x 16 bytes. A round ends with a wait, as a step of a recurrence does.
template <int N>
__global__ void __launch_bounds__(256, 1) wgmma(int iterations, long long* cycles, uint4* out) {
#ifdef HAS_WGMMA
  __shared__ alignas(128) uint32_t tile[kDepth * N * 8];  // [kDepth, N/8, 2 core matrices of 128 bytes]
  for (int i = threadIdx.x; i < kDepth * N * 8; i += blockDim.x) tile[i] = operand(i);
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  uint32_t a[kDepth][4];
#pragma unroll
  for (int k = 0; k < kDepth; ++k)
    for (int i = 0; i < 4; ++i) pin(a[k][i] = operand(4 * k + i));
  float d[N / 2] = {};
  const uint64_t address = __cvta_generic_to_shared(tile);
  // Start, and the distances along K (128 bytes) and along N (256 bytes), all in units of 16 bytes.
  const uint64_t descriptor = (address >> 4 & 0x3fff) | uint64_t(8) << 16 | uint64_t(16) << 32;
  const long long start = clock64();
#pragma unroll 1
  for (int i = 0; i < iterations; ++i) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < kDepth; ++k) wgmma_k16<N>(d, a[k], descriptor + k * (N * 32 >> 4));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  }
  float sum = 0;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) sum += d[i];
  if (sum == 1.2345e30f) out->x = 1;
  __syncthreads();
  report(start, cycles);
#endif
}

// kReads reads of 16 bytes a thread and round, without bank conflicts.
__global__ void shared_read(int iterations, long long* cycles, uint4* out) {
  extern __shared__ __align__(16) unsigned char bytes[];  // 32 KiB
  for (int i = threadIdx.x; i < 8192; i += blockDim.x) reinterpret_cast<uint32_t*>(bytes)[i] = i;
  __syncthreads();
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(bytes));
  uint32_t sum = 0;
  const long long start = clock64();
#pragma unroll 1
  for (int i = 0; i < iterations; ++i)
#pragma unroll
    for (int r = 0; r < kReads; ++r) {
      uint4 v;
      const uint32_t at = base + ((threadIdx.x + 256 * r) % 2048) * 16;
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
      sum ^= v.x ^ v.y ^ v.z ^ v.w;
    }
  if (sum == 0x12345678) out->x = sum;
  __syncthreads();
  report(start, cycles);
}

// Every CTA reads `passes` x blockDim x kReads vectors past L1: its own part of the buffer, or all the same (stride 0).
__global__ void l2_read(int iterations, int passes, int64_t stride, long long* cycles, uint4* buffer) {
  const uint4* own = buffer + stride * blockIdx.x + threadIdx.x;
  uint32_t sum = 0;
  const long long start = clock64();
#pragma unroll 1
  for (int i = 0; i < iterations; ++i)
#pragma unroll 1
    for (int pass = 0; pass < passes; ++pass) {
      uint4 v[kReads];
#pragma unroll
      for (int r = 0; r < kReads; ++r) v[r] = load_l2(own + (pass * kReads + r) * static_cast<int>(blockDim.x));
#pragma unroll
      for (int r = 0; r < kReads; ++r) sum ^= v[r].x ^ v[r].y ^ v[r].z ^ v[r].w;
    }
  if (sum == 0x12345678) buffer->x = sum;
  __syncthreads();
  report(start, cycles);
}
