#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <torch/headeronly/util/Exception.h>
#include <vector>

#if defined(SK_X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace seqkern {
namespace generic { extern const CpuKernels kKernels; }
#if defined(SK_X86)
namespace avx2 { extern const CpuKernels kKernels; }
namespace avx512 { extern const CpuKernels kKernels; }
namespace avx512_bf16 { extern const CpuKernels kKernels; }
namespace amx { extern const CpuKernels kKernels; }
#endif

namespace {
#if defined(SK_X86)
// Whether the CPU has the tile unit with bf16, and the system lets this process use it: its registers are so large that
// a process must ask (Linux 5.16 and later).
bool has_amx() {
  unsigned a, b, c, d;
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kTile | kBf16)) != (kTile | kBf16)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif
std::vector<const CpuKernels*> runnable() {
  std::vector<const CpuKernels*> found{&generic::kKernels};
#if defined(SK_X86)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return found;
  found.push_back(&avx2::kKernels);
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512bw")) return found;
  found.push_back(&avx512::kKernels);
  if (!__builtin_cpu_supports("avx512bf16")) return found;
  found.push_back(&avx512_bf16::kKernels);
  if (has_amx()) found.push_back(&amx::kKernels);
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
