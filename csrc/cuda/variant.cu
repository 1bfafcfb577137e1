// seqkern::recurrence on the device: variant_layer.h's order of work on a stream.
#include "on_stream.h"
#include "variant_layer.h"

namespace seqkern { namespace cuda {

int64_t variant_workspace(const VariantCall& call, bool backward) {
  struct Nothing {
  } nothing;
  const Plan plan = detail::step_plan("step: seqkern::recurrence");
  const LayerCall layer = as_layer(call, plan);
  return VariantLayer<Nothing>{nothing, layer, call}.workspace(backward);
}
Error variant_pass(const VariantCall& call, bool backward, char* workspace, Stream stream, void* handle) {
  OnStream run(stream, handle);
  const Plan plan = detail::step_plan("step: seqkern::recurrence");
  const LayerCall layer = as_layer(call, plan);
  VariantLayer<OnStream> whole{run, layer, call};
  if (backward) whole.backward(workspace);
  else whole.forward(workspace);
  return run.error;
}

}}  // namespace seqkern::cuda
