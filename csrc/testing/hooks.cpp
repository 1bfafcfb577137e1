// What code compiled with -fsanitize=thread calls: before each load and store, and in place of each atomic operation.
// The sanitizer's run time is not linked.
#include <stdint.h>

#include "memory.h"

using seqkern::host::Access;
using seqkern::host::check;
using seqkern::host::check_aligned;

#define HOOK(type) extern "C" __attribute__((visibility("hidden"))) type
#define ACCESSES(size)                                                                                            \
  HOOK(void) __tsan_read##size(void* p) { check_aligned(p, size, Access::kRead, __builtin_return_address(0)); }   \
  HOOK(void) __tsan_write##size(void* p) { check_aligned(p, size, Access::kWrite, __builtin_return_address(0)); } \
  HOOK(void) __tsan_unaligned_read##size(void* p) { check(p, size, Access::kRead, __builtin_return_address(0)); } \
  HOOK(void) __tsan_unaligned_write##size(void* p) { check(p, size, Access::kWrite, __builtin_return_address(0)); }

ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
HOOK(void) __tsan_read_range(void* p, long n) { check(p, n, Access::kRead, __builtin_return_address(0)); }
HOOK(void) __tsan_write_range(void* p, long n) { check(p, n, Access::kWrite, __builtin_return_address(0)); }
HOOK(void) __tsan_vptr_update(void*, void*) {}
HOOK(void) __tsan_func_entry(void*) {}
HOOK(void) __tsan_func_exit() {}
HOOK(void) __tsan_init() {}

// Kernels use the functions of simt.cuh; these serve the bindings beside them.
#define ATOMICS(bits, T)                                                                                        \
  HOOK(T) __tsan_atomic##bits##_load(const volatile T* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); } \
  HOOK(void) __tsan_atomic##bits##_store(volatile T* p, T v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); } \
  HOOK(T) __tsan_atomic##bits##_exchange(volatile T* p, T v, int) {                                             \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                                         \
  }                                                                                                             \
  HOOK(T) __tsan_atomic##bits##_fetch_add(volatile T* p, T v, int) {                                            \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                                          \
  }                                                                                                             \
  HOOK(T) __tsan_atomic##bits##_fetch_sub(volatile T* p, T v, int) {                                            \
    return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                                                          \
  }                                                                                                             \
  HOOK(bool) __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* expected, T v, int, int) {         \
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);              \
  }                                                                                                             \
  HOOK(bool) __tsan_atomic##bits##_compare_exchange_weak(volatile T* p, T* expected, T v, int, int) {           \
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);              \
  }

ATOMICS(8, uint8_t)
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)
