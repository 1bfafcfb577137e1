#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <torch/headeronly/util/Exception.h>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

// X(name) for each instruction set that setup.py built the kernels for, best last.
#ifdef SK_ISA_AVX2
#define SK_AVX2(X) X(avx2)
#else
#define SK_AVX2(X)
#endif
#ifdef SK_ISA_AVX512
#define SK_AVX512(X) X(avx512)
#else
#define SK_AVX512(X)
#endif
#ifdef SK_ISA_AVX512_BF16
#define SK_AVX512_BF16(X) X(avx512_bf16)
#else
#define SK_AVX512_BF16(X)
#endif
#ifdef SK_ISA_AMX
#define SK_AMX_(X) X(amx)
#else
#define SK_AMX_(X)
#endif
#define SK_BUILT(X) X(generic) SK_AVX2(X) SK_AVX512(X) SK_AVX512_BF16(X) SK_AMX_(X)

namespace seqkern {
#define SK_DECLARE(isa)                        \
  namespace isa {                              \
  extern const CpuKernels kKernels;            \
  extern const RecurrenceKernels kRecurrences; \
  extern const DecoderKernels kDecoderKernels; \
  extern const ProjectKernels kProjectKernels; \
  extern const SearchKernels kSearchKernels;   \
  }
SK_BUILT(SK_DECLARE)

namespace {
struct Isa {
  const char* name;
  const CpuKernels* kernels;
  const RecurrenceKernels* recurrences;
  const DecoderKernels* decoder;
  const ProjectKernels* project;
  const SearchKernels* search;
};

#if defined(__x86_64__)
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
bool can_run(const std::string& isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == "avx2") {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
  if (isa == "avx512") {
    return can_run("avx2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  }
  if (isa == "avx512_bf16") return can_run("avx512") && __builtin_cpu_supports("avx512bf16");
  if (isa == "amx") return can_run("avx512_bf16") && has_amx();
#endif
  return isa == "generic";
}

std::vector<Isa> runnable() {
  std::vector<Isa> found;
#define SK_LIST(isa) \
  if (can_run(#isa))                           \
    found.push_back({#isa, &isa::kKernels, &isa::kRecurrences, &isa::kDecoderKernels, &isa::kProjectKernels, \
                     &isa::kSearchKernels});
  SK_BUILT(SK_LIST)
  return found;
}

bool named(const Isa& isa, const char* name) { return !std::strcmp(isa.name, name); }
const char* wanted_isa() {
  const char* name = std::getenv("SEQKERN_CPU_ISA");
  return name && *name ? name : nullptr;
}

const Isa& chosen_isa() {
  static const Isa chosen = [] {
    std::vector<Isa> found = runnable();
    const char* wanted = wanted_isa();
    if (!wanted) {
#if defined(__x86_64__)
      // Intel's bf16 dot product runs at half the rate of its float multiply-add (82 against 155 GF/s a core measured
      // on an Emerald Rapids), AMD's at twice: there bf16 is better widened.
      const size_t n = found.size();
      if (!__builtin_cpu_is("amd") && named(found[n - 1], "avx512_bf16") && named(found[n - 2], "avx512")) found.pop_back();
#endif
      return found.back();
    }
    for (const Isa& isa : found)
      if (named(isa, wanted)) return isa;
    STD_TORCH_CHECK(false, "SEQKERN_CPU_ISA must be one of those that this CPU runs (", cpu_isas(), "), got ", wanted);
  }();
  return chosen;
}
}  // namespace

std::string cpu_isas() {
  std::string names;
  for (const Isa& isa : runnable()) names += (names.empty() ? "" : " ") + std::string(isa.name);
  return names;
}

const CpuKernels& cpu_kernels() { return *chosen_isa().kernels; }
const CpuKernels& vector_kernels() {
  static const CpuKernels& vector = [&]() -> const CpuKernels& {
    const CpuKernels* best = cpu_kernels().tiles ? nullptr : &cpu_kernels();
    for (const Isa& isa : best ? std::vector<Isa>{} : runnable())
      if (!isa.kernels->tiles && !named(isa, "generic")) best = isa.kernels;
    return best ? *best : cpu_kernels();
  }();
  return vector;
}
const CpuKernels& row_kernels() {
  static const CpuKernels& row = [&]() -> const CpuKernels& {
    if (!wanted_isa() && named(chosen_isa(), "avx512"))
      for (const Isa& isa : runnable())
        if (named(isa, "avx512_bf16")) return *isa.kernels;
    return cpu_kernels();
  }();
  return row;
}
const RecurrenceKernels& cpu_recurrences() { return *chosen_isa().recurrences; }
const DecoderKernels& decoder_kernels() { return *chosen_isa().decoder; }
const ProjectKernels& project_kernels() { return *chosen_isa().project; }
const SearchKernels& search_kernels() { return *chosen_isa().search; }
}  // namespace seqkern
