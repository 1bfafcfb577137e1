// Fresh memory in large pages.
#pragma once
#include "../core/operands.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace seqkern {
// Tells the system to back memory that is fresh from it, as malloc's always is from 32 MiB on, with pages of 2 MiB: two
// threads that write it for the first time otherwise spend as long in page faults as in arithmetic.
inline void large_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kPage = 2 << 20, kAlwaysFresh = 32 << 20;
  const int64_t first = int64_t(data), begin = (first + kPage - 1) / kPage * kPage;
  if (bytes >= kAlwaysFresh) madvise((void*)begin, (first + bytes) / kPage * kPage - begin, MADV_HUGEPAGE);
#endif
}
inline void in_large_pages(const Tensor& t) { large_pages(data(t), t.numel() * int64_t(t.element_size())); }
}  // namespace seqkern
