// Fresh memory in large pages.
#pragma once
#include "../core/operands.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace seqkern {
// Tells the system to back memory that is fresh from it, as malloc's always is from 32 MiB on, with pages of 2 MiB: two
// threads that write it for the first time otherwise spend as long in page faults as in arithmetic.
inline void in_large_pages(const Tensor& t) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20, kAlwaysFresh = 32 << 20;
  const uintptr_t size = uintptr_t(t.numel()) * t.element_size();
  const uintptr_t begin = (uintptr_t(data(t)) + kPage - 1) / kPage * kPage;
  if (size >= kAlwaysFresh) madvise((void*)begin, (uintptr_t(data(t)) + size) / kPage * kPage - begin, MADV_HUGEPAGE);
#endif
}
}  // namespace seqkern
