// How a layer's order of work (layer.h, variant_layer.h) is run on the device: launches on a stream, products by
// cuBLAS.
#pragma once
#include <cuda_runtime.h>
#include <dlfcn.h>

#include "launch.h"
#include "planner.h"

namespace seqkern { namespace cuda { namespace {

// cuBLAS as torch loaded it. It is looked up when it is first used, so that a build with CUDA imports on machines
// without; the declarations are those of cublas_api.h, which not every toolkit has.
struct Blas {
  using Batched = int (*)(void*, int, int, int, int, int, const void*, const void*, int, int, long long, const void*,
                          int, int, long long, const void*, void*, int, int, long long, int, int, int);
  using Single = int (*)(void*, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int,
                         const void*, void*, int, int, int, int);
  Batched batched;
  Single single;  // cuts K where that pays; the batched one need not
  int (*get_math)(void*, int*);
  int (*set_math)(void*, int);
  const char* (*status)(int);
  Error error;

  Blas() : error(nullptr) {
    static const char* const kNames[] = {CUDART_VERSION >= 13000 ? "libcublas.so.13" : "libcublas.so.12",
                                         "libcublas.so"};
    void* library = nullptr;
    for (const char* name : kNames)
      if (!library) library = dlopen(name, RTLD_LAZY);
    auto find = [&](const char* name) { return library ? dlsym(library, name) : nullptr; };
    batched = (Batched)find("cublasGemmStridedBatchedEx");
    single = (Single)find("cublasGemmEx");
    get_math = (int (*)(void*, int*))find("cublasGetMathMode");
    set_math = (int (*)(void*, int))find("cublasSetMathMode");
    status = (const char* (*)(int))find("cublasGetStatusString");
    if (!batched || !single || !get_math || !set_math || !status) error = "cuBLAS was not found";
  }
};
const Blas& blas() {
  static const Blas found;
  return found;
}

constexpr int kTranspose = 1, kKeep = 0;               // cublasOperation_t
constexpr int kSums64 = 70, kSums32 = 68, kTf32 = 77;  // cublasComputeType_t
constexpr int kFullSums = 16;  // cublasMath_t: default, partial sums of 16-bit products in float too
int blas_type(Dtype t) {
  switch (t) {
    case Dtype::kF64: return CUDA_R_64F;
    case Dtype::kF32: return CUDA_R_32F;
    case Dtype::kBf16: return CUDA_R_16BF;
    case Dtype::kF16: return CUDA_R_16F;
  }
  return -1;
}

struct OnStream {
  cudaStream_t stream;
  void* handle;
  Error error = nullptr;
  int math = 0;

  OnStream(Stream s, void* h) : stream((cudaStream_t)s), handle(h), error(blas().error) {
    if (error) return;
    // The handle is torch's, in the mode that its flags for plain matrix products ask for; those for RNNs differ.
    blas().get_math(handle, &math);
    check(blas().set_math(handle, kFullSums));
  }
  ~OnStream() {
    if (!blas().error) blas().set_math(handle, math);
  }
  OnStream(const OnStream&) = delete;

  void check(cudaError_t e) {
    if (e != cudaSuccess && !error) error = cudaGetErrorString(e);
  }
  void check(int blas_status) {
    if (blas_status && !error) error = blas().status(blas_status);
  }

  // cuBLAS is column-major: there the row-major C is C^T = B^T A^T.
  void gemm(const Gemm& g) {
    if (error) return;
    const int64_t most = (int64_t(1) << 31) - 1;
    if (g.m > most || g.n > most || g.k > most || g.lda > most || g.ldb > most || g.ldc > most) {
      error = "a matrix of 2^31 rows or more";
      return;
    }
    const double one64 = 1, beta64 = g.accumulate;
    const float one32 = 1, beta32 = g.accumulate;
    const bool f64 = g.in == Dtype::kF64;
    const void *one = f64 ? (const void*)&one64 : &one32, *beta = f64 ? (const void*)&beta64 : &beta32;
    const int sums = f64 ? kSums64 : g.in == Dtype::kF32 && g.tf32 ? kTf32 : kSums32;
    const int op_b = g.b_t ? kTranspose : kKeep, op_a = g.a_t ? kTranspose : kKeep;
    const int m = int(g.m), n = int(g.n), k = int(g.k), lda = int(g.lda), ldb = int(g.ldb), ldc = int(g.ldc);
    const int in = blas_type(g.in), out = blas_type(g.out);
    if (g.batch == 1)
      check(blas().single(handle, op_b, op_a, n, m, k, one, g.b, in, ldb, g.a, in, lda, beta, g.c, out, ldc, sums, -1));
    else
      check(blas().batched(handle, op_b, op_a, n, m, k, one, g.b, in, ldb, g.stride_b, g.a, in, lda, g.stride_a, beta,
                           g.c, out, ldc, g.stride_c, int(g.batch), sums, -1));
  }
  void copy(void* to, const void* from, int64_t bytes) {
    if (!error && bytes) check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream));
  }
  void fill(void* to, int byte, int64_t bytes) {
    if (!error && bytes) check(cudaMemsetAsync(to, byte, bytes, stream));
  }
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), Extent grid, Extent block, const Arguments&... arguments) {
    launch_with(0, kernel, grid, block, arguments...);
  }
  // shared: bytes of dynamic shared memory, 48 KiB at most with what the kernel declares.
  template <class... Parameters, class... Arguments>
  void launch_with(int64_t shared, void (*kernel)(Parameters...), Extent grid, Extent block,
                   const Arguments&... arguments) {
    if (error) return;
    kernel<<<dim3(grid.x, grid.y, grid.z), dim3(block.x, block.y, block.z), size_t(shared), stream>>>(arguments...);
    check(cudaGetLastError());
  }
  void grid(const Recurrence& r, const Plan& plan, bool backward) {
    if (error) return;
    error = backward ? grid_backward(r, plan, stream) : grid_forward(r, plan, stream);
  }
};

}}}  // namespace seqkern::cuda
