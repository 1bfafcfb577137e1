// A layer on the device: layer.h's order of work on a stream, its products by cuBLAS.
#include "layer.h"
#include "on_stream.h"

namespace seqkern { namespace cuda {

int64_t layer_workspace(const LayerCall& call, bool backward) {
  struct Nothing {
  } nothing;
  return Layer<Nothing>{nothing, call}.workspace(backward);
}
Error layer_forward(const LayerCall& call, char* workspace, Stream stream, void* handle) {
  OnStream run(stream, handle);
  Layer<OnStream>{run, call}.forward(workspace);
  return run.error;
}
Error layer_backward(const LayerCall& call, char* workspace, Stream stream, void* handle) {
  OnStream run(stream, handle);
  Layer<OnStream>{run, call}.backward(workspace);
  return run.error;
}

Error fill_mask(Dtype dtype, const Random& r, Stream stream) {
  if (r.n == 0) return nullptr;
  const unsigned blocks = unsigned(ceil_div(r.n, 128) < 65535 ? ceil_div(r.n, 128) : 65535);
  with_storage(dtype, [&](auto t) { random_mask<decltype(t)><<<blocks, 128, 0, (cudaStream_t)stream>>>(r); });
  const cudaError_t e = cudaGetLastError();
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

Error product(const Gemm& g, Stream stream, void* handle) {
  OnStream run(stream, handle);
  run.gemm(g);
  return run.error;
}

Error query_device(Device* d) {
  int device = 0, major = 0, minor = 0;
  const struct {
    cudaDeviceAttr attribute;
    int* to;
  } wanted[] = {{cudaDevAttrMultiProcessorCount, &d->sms},
                {cudaDevAttrComputeCapabilityMajor, &major},
                {cudaDevAttrComputeCapabilityMinor, &minor},
                {cudaDevAttrMaxSharedMemoryPerBlockOptin, &d->shared_per_block},
                {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &d->shared_per_sm},
                {cudaDevAttrMaxRegistersPerMultiprocessor, &d->registers_per_sm},
                {cudaDevAttrMaxThreadsPerMultiProcessor, &d->threads_per_sm}};
  cudaError_t e = cudaGetDevice(&device);
  for (const auto& w : wanted)
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(w.to, w.attribute, device);
  d->cc = 10 * major + minor;
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

}}  // namespace seqkern::cuda
