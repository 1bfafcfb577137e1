// MinGRU and MinLSTM on the device: scan.cuh's launches on a stream.
#include <cuda_runtime.h>

#include "launch.h"
#include "scan.cuh"

namespace seqkern { namespace cuda {
namespace {
struct OnStream {
  cudaStream_t stream;
  Error error = nullptr;
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), Extent grid, Extent block, const Arguments&... arguments) {
    if (error) return;
    kernel<<<dim3(grid.x, grid.y, grid.z), dim3(block.x, block.y, block.z), 0, stream>>>(arguments...);
    const cudaError_t e = cudaGetLastError();
    if (e != cudaSuccess) error = cudaGetErrorString(e);
  }
};
}  // namespace

int64_t scan_workspace(const ScanArgs& a, Dtype dtype, int sms) {
  return scan_workspace_of(a, dtype, scan_pieces(a, sms));
}
Error scan(const ScanArgs& a, void* dh0, int cell, Dtype dtype, int sms, char* workspace, Stream stream) {
  OnStream run{(cudaStream_t)stream};
  run_scan(run, a, dh0, cell, dtype, scan_pieces(a, sms), workspace);
  return run.error;
}

}}  // namespace seqkern::cuda
