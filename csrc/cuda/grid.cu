// The `grid` engine's kernels for every cell and dtype, and their launches.
#include <cuda_runtime.h>

#include "grid_entry.cuh"

namespace seqkern { namespace cuda {
namespace {

Error text(cudaError_t e) { return e == cudaSuccess ? nullptr : cudaGetErrorString(e); }

cudaError_t allow_shared(GridKernel kernel, const Plan& p) {
  return cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(p.shared_bytes));
}

// Directions that do not fit side by side run one after the other, each in its own part of the workspace.
Error launch(const Recurrence& r, const Plan& p, Stream stream, bool backward) {
  const GridKernel kernel = grid_kernel(r.cell, r.dtype, p, backward, r.layer.options.any);
  if (!kernel) return "grid: no kernel for this cell and dtype";
  cudaError_t e = allow_shared(kernel, p);
  for (int d = 0; d < int(r.layer.directions) && e == cudaSuccess; d += p.directions) {
    GridArgs args{r, d, p.tiles, p.batch_tile, p.ctas};
    void* parameters[] = {&args};
    e = cudaLaunchCooperativeKernel((const void*)kernel, dim3(p.grid()), dim3(p.threads), parameters,
                                    size_t(p.shared_bytes), cudaStream_t(stream));
    const cudaError_t last = cudaGetLastError();
    if (e == cudaSuccess) e = last;
  }
  return text(e);
}

}  // namespace

bool grid_fits(Cell cell, Dtype dtype, const Plan& p, bool backward, bool options) {
  const GridKernel kernel = grid_kernel(cell, dtype, p, backward, options);
  int device = 0, sms = 0, blocks = 0;
  const bool known = kernel && cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device) == cudaSuccess &&
                     allow_shared(kernel, p) == cudaSuccess &&
                     cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, (const void*)kernel, p.threads,
                                                                   size_t(p.shared_bytes)) == cudaSuccess;
  if (!known) cudaGetLastError();  // the caller takes another engine: the error must not show up later
  return known && int64_t(blocks) * sms >= p.grid();
}

Error grid_forward(const Recurrence& r, const Plan& p, Stream stream) { return launch(r, p, stream, false); }
Error grid_backward(const Recurrence& r, const Plan& p, Stream stream) { return launch(r, p, stream, true); }

}}  // namespace seqkern::cuda
