// Measures what a persistent recurrent kernel is made of, one JSON line a figure. Needs nvcc only; primitives.py builds
// and runs it:
//
//   nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a primitives.cu -o primitives && ./primitives
//
// Figures that the GPU or the build lacks (clusters and mbarriers before sm_90, wgmma outside sm_90a) are printed as
// skipped. A figure per operation is the slope between two loop lengths, so that launches and set-up cancel.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "primitives.cuh"

#define CHECK(call) check((call), #call, __LINE__)

void check(cudaError_t status, const char* call, int line) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "primitives.cu:%d: %s: %s\n", line, call, cudaGetErrorString(status));
  std::exit(1);
}

struct Device {
  cudaDeviceProp prop;
  long long* cycles;  // of block 0
  int* flags;         // [kFlags], zero before every launch
  int* stuck;         // set by a wait that gave up
  uint4* buffer;      // [kBuffer] bytes
};

constexpr int kFlags = 4096;
constexpr size_t kBuffer = 16 << 20;  // fits every L2 that is measured here

struct Slope {
  double ns, cycles;  // per iteration
};

using Json = std::vector<std::pair<const char*, double>>;

void print(const char* name, const Json& sizes, const Json& figures) {
  std::printf("{\"name\": \"%s\"", name);
  for (const Json* part : {&sizes, &figures})
    for (const auto& [key, value] : *part)
      if (std::isfinite(value)) std::printf(", \"%s\": %.6g", key, value);
  std::printf("}\n");
  std::fflush(stdout);
}

void skip(const char* name, const Json& sizes, const char* why) {
  std::printf("{\"name\": \"%s\"", name);
  for (const auto& [key, value] : sizes) std::printf(", \"%s\": %.6g", key, value);
  std::printf(", \"skipped\": \"%s\"}\n", why);
  std::fflush(stdout);
}

// Time per iteration of launch(iterations), which returns a launch's status: the slope between few and 5 x few.
template <class Launch>
bool slope(Device& d, const char* name, const Json& sizes, int few, Launch launch, Slope* found) {
  cudaEvent_t start, end;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&end));
  double ns[2], cycles[2];
  const int counts[2] = {few, 5 * few};
  bool good = true;
  for (int i = 0; i < 2 && good; ++i) {
    std::vector<double> times, clocks;
    for (int repeat = 0; repeat < 6 && good; ++repeat) {
      CHECK(cudaMemset(d.flags, 0, kFlags * sizeof(int)));
      CHECK(cudaMemset(d.stuck, 0, sizeof(int)));
      CHECK(cudaMemset(d.cycles, 0xff, sizeof(long long)));
      CHECK(cudaEventRecord(start));
      cudaError_t status = launch(counts[i]);
      CHECK(cudaEventRecord(end));
      if (status != cudaSuccess) {
        cudaGetLastError();  // a launch that was refused leaves the context usable
        skip(name, sizes, cudaGetErrorString(status));
        good = false;
        break;
      }
      CHECK(cudaEventSynchronize(end));
      float milliseconds = 0;
      long long clock = 0;
      int stuck = 0;
      CHECK(cudaEventElapsedTime(&milliseconds, start, end));
      CHECK(cudaMemcpy(&clock, d.cycles, sizeof clock, cudaMemcpyDeviceToHost));
      CHECK(cudaMemcpy(&stuck, d.stuck, sizeof stuck, cudaMemcpyDeviceToHost));
      if (stuck || clock < 0) {
        skip(name, sizes, stuck ? "a wait gave up" : "not in this build: see the header of primitives.cu");
        good = false;
      }
      if (repeat) {  // the first one warms up
        times.push_back(milliseconds * 1e6);
        clocks.push_back(double(clock));
      }
    }
    if (!good) break;
    std::sort(times.begin(), times.end());
    std::sort(clocks.begin(), clocks.end());
    ns[i] = times[times.size() / 2];
    cycles[i] = clocks[clocks.size() / 2];
  }
  CHECK(cudaEventDestroy(start));
  CHECK(cudaEventDestroy(end));
  if (good) *found = {(ns[1] - ns[0]) / (4.0 * few), (cycles[1] - cycles[0]) / (4.0 * few)};
  return good;
}

struct Shape {
  int ctas, threads, shared = 0, cluster = 1;
  bool cooperative = false;
};

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), Shape shape, Args... args) {
  if (shape.shared > 48 << 10) {
    cudaError_t raised = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared);
    if (raised != cudaSuccess) return raised;
  }
  if (shape.cluster > 8) {
    cudaError_t allowed = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (allowed != cudaSuccess) return allowed;
  }
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim = {unsigned(shape.cluster), 1, 1};
    ++count;
  }
  if (shape.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count].val.cooperative = 1;
    ++count;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.ctas;
  config.blockDim = shape.threads;
  config.dynamicSmemBytes = shape.shared;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

// ---- barriers and hand-offs

void clusters(Device& d) {
  const bool there = d.prop.major >= 9;
  for (int size : {2, 4, 8, 16}) {
    Json sizes = {{"ctas", double(size)}};
    if (!there) {
      for (const char* name : {"cluster_barrier", "dsmem_exchange", "resident_clusters"})
        skip(name, sizes, "needs compute capability 9.0");
      continue;
    }
    Slope s;
    Shape shape{size, 256, 0, size};
    for (bool ordered : {true, false}) {
      Json kind = {{"ctas", double(size)}, {"ordered", double(ordered)}};
      auto run = [&](int n) {
        return launch(ordered ? cluster_barrier<true> : cluster_barrier<false>, shape, n, d.cycles);
      };
      if (slope(d, "cluster_barrier", kind, 2000, run, &s))
        print("cluster_barrier", kind, {{"ns", s.ns}, {"cycles", s.cycles}});
    }
    for (bool ordered : {true, false})
      for (int bytes : {512, 2048}) {  // that each CTA sends to each other one in a step
        Json kind = {{"ctas", double(size)}, {"bytes", double(bytes)}, {"ordered", double(ordered)}};
        Shape wide{size, 128, 2 * 16 * bytes, size};
        auto kernel = ordered ? dsmem_exchange<true> : dsmem_exchange<false>;
        auto run = [&](int n) { return launch(kernel, wide, n, bytes, d.cycles, d.stuck); };
        if (slope(d, "dsmem_exchange", kind, 1000, run, &s))
          print("dsmem_exchange", kind, {{"ns", s.ns}, {"cycles", s.cycles}});
      }
    for (int kilobytes : {16, 200}) {  // 200: one CTA an SM, as a kernel that keeps weights in shared memory
      Json held = {{"ctas", double(size)}, {"shared_kib", double(kilobytes)}};
      auto kernel = cluster_barrier<true>;
      cudaLaunchAttribute attribute;
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {unsigned(size), 1, 1};
      cudaLaunchConfig_t config = {};
      config.gridDim = size * d.prop.multiProcessorCount;
      config.blockDim = 256;
      config.dynamicSmemBytes = kilobytes << 10;
      config.attrs = &attribute;
      config.numAttrs = 1;
      int resident = 0;
      cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kilobytes << 10);
      if (status == cudaSuccess)
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
      if (status == cudaSuccess) status = cudaOccupancyMaxActiveClusters(&resident, kernel, &config);
      cudaGetLastError();
      if (status == cudaSuccess) print("resident_clusters", held, {{"clusters", double(resident)}});
      else skip("resident_clusters", held, cudaGetErrorString(status));
    }
  }
  if (!there) return skip("dsmem_handoff", {{"ctas", 2}}, "needs compute capability 9.0");
  for (bool ordered : {true, false}) {
    Json kind = {{"ctas", 2}, {"ordered", double(ordered)}};
    Slope s;
    auto kernel = ordered ? dsmem_handoff<true> : dsmem_handoff<false>;
    auto pong = [&](int n) { return launch(kernel, Shape{2, 32, 0, 2}, n, d.cycles, d.stuck); };
    if (slope(d, "dsmem_handoff", kind, 1000, pong, &s))  // an iteration is there and back
      print("dsmem_handoff", kind, {{"ns", s.ns / 2}, {"cycles", s.cycles / 2}});
  }
}

void grid_barriers(Device& d) {
  Slope s;
  Json two = {{"ctas", 2}};
  auto pong = [&](int n) { return launch(l2_handoff, Shape{2, 32, 0, 1, true}, n, d.flags, d.cycles, d.stuck); };
  if (slope(d, "l2_handoff", two, 1000, pong, &s))
    print("l2_handoff", two, {{"ns", s.ns / 2}, {"cycles", s.cycles / 2}});
  for (int ctas : {64, 128}) {
    Json sizes = {{"ctas", double(ctas)}};
    Shape shape{ctas, 256, 0, 1, true};
    auto sync = [&](int n) { return launch(grid_sync, shape, n, d.cycles); };
    if (slope(d, "grid_sync", sizes, 500, sync, &s)) print("grid_sync", sizes, {{"ns", s.ns}, {"cycles", s.cycles}});
    auto count = [&](int n) { return launch(counter_barrier, shape, n, d.flags, d.cycles, d.stuck); };
    if (slope(d, "counter_barrier", sizes, 500, count, &s))
      print("counter_barrier", sizes, {{"ns", s.ns}, {"cycles", s.cycles}});
    for (int bytes : {0, 32 << 10, 128 << 10}) {  // that every CTA reads after the barrier: h of B=16 or 64, H=1024
      Json read = {{"ctas", double(ctas)}, {"bytes", double(bytes)}};
      auto flag = [&](int n) { return launch(flag_barrier, shape, n, bytes, d.flags, d.buffer, d.cycles, d.stuck); };
      if (slope(d, "flag_barrier", read, 500, flag, &s))
        print("flag_barrier", read, {{"ns", s.ns}, {"cycles", s.cycles}});
    }
  }
}

// ---- rates

template <int N>
void mma_of(Device& d) {
  const int sms = d.prop.multiProcessorCount;
  Slope s;
  for (int warps : {4, 8}) {
    Json sizes = {{"n", N}, {"warps", double(warps)}};
    auto sync = [&](int n) { return launch(mma_sync<N>, Shape{sms, warps * 32}, n, d.cycles, d.buffer); };
    const double macs = double(warps) * kTiles * 16 * N * 16;  // of one SM in one iteration
    if (slope(d, "mma_sync", sizes, 2000, sync, &s))
      print("mma_sync", sizes, {{"macs_per_clock_sm", macs / s.cycles}, {"tflops", 2e-3 * macs * sms / s.ns}});
    Json group = {{"n", N}, {"warpgroups", double(warps / 4)}};
    if (d.prop.major != 9) {
      skip("wgmma_registers", group, "needs compute capability 9.0");
      continue;
    }
    auto async = [&](int n) { return launch(wgmma<N>, Shape{sms, warps * 32}, n, d.cycles, d.buffer); };
    const double work = warps / 4.0 * kDepth * 64 * N * 16;
    if (slope(d, "wgmma_registers", group, 1000, async, &s))
      print("wgmma_registers", group,
            {{"macs_per_clock_sm", work / s.cycles},
             {"cycles_per_k16", s.cycles / kDepth},
             {"tflops", 2e-3 * work * sms / s.ns}});
  }
}

void rates(Device& d) {
  Slope s;
  const int sms = d.prop.multiProcessorCount;
  Json one = {{"n", 8}};
  auto chain = [&](int n) { return launch(mma_chain, Shape{1, 32}, n, d.cycles, d.buffer); };
  if (slope(d, "mma_sync_latency", one, 2000, chain, &s))
    print("mma_sync_latency", one, {{"ns", s.ns}, {"cycles", s.cycles}});
  mma_of<8>(d);
  mma_of<16>(d);
  mma_of<32>(d);
  mma_of<64>(d);
  for (int threads : {256, 512, 1024}) {
    Json sizes = {{"threads", double(threads)}};
    auto run = [&](int n) { return launch(shared_read, Shape{sms, threads, 32 << 10}, n, d.cycles, d.buffer); };
    const double bytes = 16.0 * threads * kReads;
    if (slope(d, "shared_read", sizes, 1000, run, &s))
      print("shared_read", sizes, {{"bytes_per_clock_sm", bytes / s.cycles}});
  }
  for (int threads : {256, 512, 1024})
    for (int kilobytes : {32, 128, 0}) {  // 0: each CTA its own part of the buffer
      const bool own = kilobytes == 0;
      const int64_t vectors = own ? int64_t(kBuffer / 16 / sms) : int64_t(kilobytes) << 6;
      const int64_t passes = vectors / (threads * kReads);
      const double bytes = 16.0 * double(passes) * threads * kReads;
      Json sizes = {{"threads", double(threads)}, {"kib", bytes / 1024}, {"own", double(own)}};
      if (passes == 0) continue;
      auto run = [&](int n) {
        return launch(l2_read, Shape{sms, threads}, n, int(passes), own ? vectors : 0, d.cycles, d.buffer);
      };
      if (slope(d, "l2_read", sizes, own ? 40 : 200, run, &s))
        print("l2_read", sizes, {{"bytes_per_clock_sm", bytes / s.cycles}, {"gb_per_s", bytes * sms / s.ns}});
    }
}

int main() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    std::fprintf(stderr, "primitives: no GPU\n");
    return 2;
  }
  Device d;
  int clock = 0, driver = 0, runtime = 0;
  CHECK(cudaGetDeviceProperties(&d.prop, 0));
  CHECK(cudaDeviceGetAttribute(&clock, cudaDevAttrClockRate, 0));
  CHECK(cudaDriverGetVersion(&driver));
  CHECK(cudaRuntimeGetVersion(&runtime));
  std::printf("{\"name\": \"device\", \"gpu\": \"%s\", \"capability\": \"%d.%d\", \"sms\": %d, ", d.prop.name,
              d.prop.major, d.prop.minor, d.prop.multiProcessorCount);
  std::printf("\"l2_bytes\": %d, \"clock_mhz\": %d, \"cuda_driver\": %d, \"cuda_runtime\": %d}\n", d.prop.l2CacheSize,
              clock / 1000, driver, runtime);
  CHECK(cudaMalloc(&d.cycles, sizeof(long long)));
  CHECK(cudaMalloc(&d.flags, kFlags * sizeof(int)));
  CHECK(cudaMalloc(&d.stuck, sizeof(int)));
  CHECK(cudaMalloc(&d.buffer, kBuffer));
  std::vector<uint32_t> noise(kBuffer / 4);
  for (size_t i = 0; i < noise.size(); ++i) noise[i] = uint32_t(i) * 2654435761u;
  CHECK(cudaMemcpy(d.buffer, noise.data(), kBuffer, cudaMemcpyHostToDevice));
  clusters(d);
  grid_barriers(d);
  rates(d);
  CHECK(cudaDeviceSynchronize());
  return 0;
}
