#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <torch/headeronly/util/Exception.h>
#include <vector>

namespace seqkern {
namespace generic { extern const CpuKernels kKernels; }
#if defined(SK_X86)
namespace avx2 { extern const CpuKernels kKernels; }
namespace avx512 { extern const CpuKernels kKernels; }
namespace avx512_bf16 { extern const CpuKernels kKernels; }
#endif

namespace {
std::vector<const CpuKernels*> runnable() {
  std::vector<const CpuKernels*> found{&generic::kKernels};
#if defined(SK_X86)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return found;
  found.push_back(&avx2::kKernels);
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512bw")) return found;
  found.push_back(&avx512::kKernels);
  if (__builtin_cpu_supports("avx512bf16")) found.push_back(&avx512_bf16::kKernels);
#endif
  return found;
}
}  // namespace

std::string cpu_isas() {
  std::string names;
  for (const CpuKernels* k : runnable()) names += (names.empty() ? "" : " ") + std::string(k->isa);
  return names;
}

const CpuKernels& cpu_kernels() {
  static const CpuKernels* chosen = [] {
    std::vector<const CpuKernels*> found = runnable();
    const char* wanted = std::getenv("SEQKERN_CPU_ISA");
    if (!wanted || !*wanted) {
#if defined(SK_X86)
      // Intel's bf16 dot product runs at half the rate of its float multiply-add (82 against 155 GF/s a core measured
      // on an Emerald Rapids), AMD's at twice: there bf16 is better widened.
      if (found.back() == &avx512_bf16::kKernels && !__builtin_cpu_is("amd")) found.pop_back();
#endif
      return found.back();
    }
    for (const CpuKernels* k : found)
      if (!std::strcmp(k->isa, wanted)) return k;
    STD_TORCH_CHECK(false, "SEQKERN_CPU_ISA must be one of those that this CPU runs (", cpu_isas(), "), got ", wanted);
  }();
  return *chosen;
}
}  // namespace seqkern
