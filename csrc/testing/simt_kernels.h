// Small kernels, one for each family of primitives of cuda/simt.cuh, and the ways to break them that host execution
// has to notice.
#pragma once
#include "../cuda/simt.cuh"

namespace seqkern { namespace testing {

enum Break {
  kWhole,
  kNoBarrier,     // the barrier, or warp_sync, between write and read is left out
  kDivergent,     // some threads end before it
  kOtherBarrier,  // some threads are in another one
  kOutOfRange,
  kUnwritten,
  kMisaligned,
  kSwapped,   // two registers of a fragment
  kNoWait,    // for a copy, a flag, an mbarrier
  kNoSignal,  // a flag is never set
  kPoll,      // a flag is polled by plain loads
  kLeave,     // a block ends while others read its shared memory
  kShort,     // an output is left unwritten
};

struct Args {
  const float* x;
  float* y;
  float* exchange;  // twice y
  int* flags;       // 64, zero
  int64_t n;
  int broken;
};

SK_DEVICE int64_t global_thread() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

// y = x with each block's elements in reverse order.
__global__ void reverse(Args a) {
  SK_SHARED(float, s);
  const int t = int(threadIdx.x), threads = int(blockDim.x);
  if (a.broken != kUnwritten || t != 3) s[t] = a.x[global_thread()];
  if (a.broken == kDivergent) {
    if (t < threads / 2) return;
    block_sync();
  } else if (a.broken == kOtherBarrier && t < threads / 2) {
    block_sync();
  } else if (a.broken != kNoBarrier) {
    block_sync();
  }
  const int from = threads - 1 - t + (a.broken == kOutOfRange);
  const float value = *(const float*)((const char*)s + (a.broken == kMisaligned ? 10 : from * 4));
  if (a.broken != kShort || t != 1) a.y[global_thread()] = value;
}

// The same in static shared memory, for blocks of 64.
__global__ void reverse_static(Args a) {
  SK_SHARED_STATIC(double, other, 3);
  SK_SHARED_STATIC(float, s, 64);
  const int t = int(threadIdx.x);
  if (t < 3) other[t] = 1;
  if (a.broken != kUnwritten || t != 3) s[t] = a.x[global_thread()];
  if (a.broken != kNoBarrier) block_sync();
  const float* from = s + 63 - t + (a.broken == kOutOfRange);
  a.y[global_thread()] = *from * float(other[0]);
}

struct alignas(16) Quad {
  float v[4];
};
SK_DEVICE Quad quad_of(const float* x) { return {{x[0], x[1], x[2], x[3]}}; }
template <class S> struct alignas(4) Pair {
  S v[2];
};

// y = x with each block's elements in reverse order, four to a thread; through structs that functions return, and bf16.
__global__ void quads(Args a) {
  SK_SHARED(Quad, s);
  auto* b = (Pair<bf16>*)(s + blockDim.x);
  const int t = int(threadIdx.x), last = int(blockDim.x) - 1;
  const Quad x = ld_cg((const Quad*)a.x + global_thread());
  s[t + (a.broken == kOutOfRange ? 2 * blockDim.x : 0)] = quad_of(x.v);
  if (a.broken != kUnwritten || t != 3) b[t].v[1] = from_float<bf16>(x.v[3]);
  b[t].v[0] = from_float<bf16>(x.v[2]);
  block_sync();
  const Quad from = s[last - t];
  const Pair<bf16> half = b[last - t];
  if (a.broken == kShort && t == 1) return;
  ((Quad*)a.y)[global_thread()] = Quad{{to_float(half.v[1]), to_float(half.v[0]), from.v[1], from.v[0]}};
}

// y [threads, 8]: shuffles of x, the two halves of a ballot, a shuffle within half a warp, an exchange through memory.
__global__ void warp(Args a) {
  SK_SHARED(float, s);
  const int t = int(threadIdx.x), lane = t % 32;
  const float x = a.x[global_thread()];
  float* y = a.y + global_thread() * 8;
  if (a.broken == kDivergent && lane == 5) return;
  if (a.broken == kOtherBarrier && lane == 5) warp_sync();
  y[0] = shfl(x, lane * 7 % 32);
  y[1] = shfl_xor(x, 5);
  y[2] = shfl_down(x, 3);
  const uint32_t votes = ballot(x > 0);
  y[3] = float(votes & 0xffff);
  y[4] = float(votes >> 16);
  if (lane < 16) y[5] = shfl(x, 3, 0x0000ffff);
  else y[5] = shfl(x, a.broken == kOutOfRange ? 3 : 20, 0xffff0000);
  s[t] = x;
  if (a.broken != kNoBarrier) warp_sync();
  y[6] = s[t ^ 1];
  y[7] = float(shfl(double(x) + 0.25, 31));
}

template <class S> SK_DEVICE uint32_t pack(float low, float high) {
  return from_float<S>(low).bits | uint32_t(from_float<S>(high).bits) << 16;
}
SK_DEVICE void store_fragment(float* y, const float (&d)[4]) {
  const int group = int(threadIdx.x) / 4, quarter = int(threadIdx.x) % 4;
  for (int i = 0; i < 4; ++i) y[(group + 8 * (i / 2)) * 8 + 2 * quarter + i % 2] = d[i];
}

// x: A [16, 16], B [16, 8], C [16, 8]; y = A B + C in S.
template <class S> __global__ void mma(Args a) {
  const int group = int(threadIdx.x) / 4, quarter = int(threadIdx.x) % 4;
  const float *A = a.x, *B = a.x + 256, *C = a.x + 384;
  float d[4];
  uint32_t fa[4], fb[2];
  for (int i = 0; i < 4; ++i) {
    d[i] = C[(group + 8 * (i / 2)) * 8 + 2 * quarter + i % 2];
    const int r = a.broken == kSwapped && (i == 1 || i == 2) ? 3 - i : i;
    const float* from = A + (group + 8 * (r % 2)) * 16 + 2 * quarter + 8 * (r / 2);
    fa[i] = pack<S>(from[0], from[1]);
  }
  for (int i = 0; i < 2; ++i) {
    const float* from = B + (2 * quarter + 8 * i) * 8 + group;
    fb[i] = pack<S>(from[0], from[8]);
  }
  if (a.broken == kDivergent && threadIdx.x == 7) return;
  mma_m16n8k16<S>(d, fa, fb);
  store_fragment(a.y, d);
}

// x: A [16, 8], B [8, 8], C [16, 8]; y = A B + C in TF32.
__global__ void mma_tf32(Args a) {
  const int group = int(threadIdx.x) / 4, quarter = int(threadIdx.x) % 4;
  const float *A = a.x, *B = a.x + 128, *C = a.x + 192;
  float d[4];
  uint32_t fa[4], fb[2];
  for (int i = 0; i < 4; ++i) {
    d[i] = C[(group + 8 * (i / 2)) * 8 + 2 * quarter + i % 2];
    const int r = a.broken == kSwapped && (i == 1 || i == 2) ? 3 - i : i;
    fa[i] = to_tf32(A[(group + 8 * (r % 2)) * 8 + quarter + 4 * (r / 2)]);
  }
  for (int i = 0; i < 2; ++i) fb[i] = to_tf32(B[(quarter + 4 * i) * 8 + group]);
  mma_m16n8k8_tf32(d, fa, fb);
  store_fragment(a.y, d);
}

// x: A [16, 16] and B [16, 8] as bf16; y = A B, by way of cp.async and ldmatrix.
__global__ void tile(Args a) {
  SK_SHARED(uint16_t, s);
  const int lane = int(threadIdx.x);
  const auto* x = (const uint16_t*)a.x;
  uint16_t* B = s + 256;
  cp_async_16(s + lane * 8 + (a.broken == kMisaligned), x + lane * 8);
  cp_async_commit();
  if (lane < 16) cp_async_16(B + lane * 8, x + 256 + lane * 8);
  cp_async_commit();
  if (a.broken == kNoWait) cp_async_wait<1>();
  else cp_async_wait<0>();
  if (a.broken != kNoBarrier) warp_sync();
  uint32_t fa[4], fb[4];
  ldmatrix_x4(fa, s + lane % 16 * 16 + lane / 16 * 8);
  ldmatrix_x4_trans(fb, B + lane % 16 * 8);
  float d[4] = {};
  const uint32_t b[2] = {fb[0], fb[1]};
  mma_m16n8k16<bf16>(d, fa, b);
  store_fragment(a.y, d);
}

// n steps of y[i] = (y[i] + y[i + 1]) / 2, from x, all blocks at once. By flags, one a block.
__global__ void ring(Args a) {
  const int64_t total = int64_t(gridDim.x) * blockDim.x, i = global_thread();
  const int block = int(blockIdx.x), t = int(threadIdx.x);
  float own = a.x[i];
  st_cg(a.exchange + i, own);
  for (int step = 1; step <= int(a.n); ++step) {
    if (a.broken != kNoBarrier) block_sync();
    if (t == 0 && !(a.broken == kNoSignal && block == 1)) signal_release(a.flags + block, step);
    if (a.broken == kPoll && t == 0)
      while (ld_cg(a.flags + 40) == 0) continue;
    if (t < int(gridDim.x) && a.broken != kNoWait) wait_acquire(a.flags + t, step);
    block_sync();
    own = 0.5f * (own + ld_cg(a.exchange + (step - 1) % 2 * total + (i + 1) % total));
    st_cg(a.exchange + step % 2 * total + i, own);
  }
  a.y[i] = own;
}

// The same by grid_barrier.
__global__ void ring_barrier(Args a) {
  const int64_t total = int64_t(gridDim.x) * blockDim.x, i = global_thread();
  float own = a.x[i];
  st_cg(a.exchange + i, own);
  for (int step = 1; step <= int(a.n); ++step) {
    if (a.broken != kNoBarrier) grid_barrier(a.flags, step);
    own = 0.5f * (own + ld_cg(a.exchange + (step - 1) % 2 * total + (i + 1) % total));
    st_cg(a.exchange + step % 2 * total + i, own);
  }
  a.y[i] = own;
}

// y = x, each block's elements taken over by the block before it in the cluster.
__global__ void cluster(Args a) {
  SK_SHARED(float, s);
  s[threadIdx.x] = a.x[global_thread()];
  if (a.broken != kNoBarrier) cluster_sync();
  const int from = (cluster_rank() + 1) % cluster_size() + (a.broken == kOutOfRange ? cluster_size() : 0);
  a.y[global_thread()] = map_shared(s, from)[threadIdx.x];
  if (a.broken != kLeave) cluster_sync();
}

// n times round the cluster: what came, plus x, goes on to the next block; y is what came last.
__global__ void mail(Args a) {
  SK_SHARED(uint64_t, barriers);  // [threads], one each
  auto* box = (float*)(barriers + blockDim.x);
  const int t = int(threadIdx.x), next = (cluster_rank() + 1) % cluster_size();
  const float x = a.x[global_thread()];
  mbarrier_init(barriers + t, 1);
  cluster_sync();
  float value = 0;
  for (int round = 0; round < int(a.n); ++round) {
    mbarrier_arrive_expect(barriers + t, 4);
    store_async(map_shared(box + t, next), value + x, map_shared(barriers + t, next));
    if (a.broken != kNoWait) mbarrier_wait(barriers + t, round & 1);
    value = box[t];
    if (a.broken != kNoBarrier) cluster_sync();  // before the box is filled again
  }
  a.y[global_thread()] = value;
}

// reverse(), ordered by an mbarrier that all threads arrive on.
__global__ void arrive(Args a) {
  SK_SHARED(uint64_t, barrier);
  auto* s = (float*)(barrier + 2);
  const int t = int(threadIdx.x), threads = int(blockDim.x);
  if (t == 0) mbarrier_init(barrier, threads - (a.broken == kNoSignal ? -1 : 0));
  if (a.broken != kNoBarrier) block_sync();
  s[t] = a.x[global_thread()];
  mbarrier_arrive(barrier);
  if (a.broken != kNoWait) mbarrier_wait(barrier, 0);
  a.y[global_thread()] = s[threads - 1 - t];
}

// y is a permutation of x: each thread takes the next place.
__global__ void take_places(Args a) { a.y[atomic_add(a.flags, 1)] = a.x[global_thread()]; }

}}  // namespace seqkern::testing
