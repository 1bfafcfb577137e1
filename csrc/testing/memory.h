// The memory that is checked: shared memory of every block, and Global buffers. It lies in one reserved range, with a
// Cell for every two bytes beside it.
//
// The sources that hold kernels are compiled with -fsanitize=thread, which calls a function before every load and
// store. Those functions are defined in memory.cpp, in place of the sanitizer's own run time, and look the cell up.
// Under AddressSanitizer, which excludes that, what lies between the buffers is poisoned, and nothing else is known.
//
// Order is told by vector clocks. A thread counts up where it hands over to others (barriers, releases), and
// knows for every thread up to which count it has seen that one's work.
#pragma once
#include <stdint.h>

#include <memory>
#include <string>
#include <vector>

namespace seqkern { namespace host {

using Clock = std::vector<uint32_t>;
using ClockPtr = std::shared_ptr<const Clock>;

// Of the running thread; null between launches.
struct Actor {
  uint16_t id;
  uint32_t now;
  uint32_t oldest;  // what any thread did before this count was before the launch
  ClockPtr known;
  int64_t unseen = 0;  // accesses since it last let others run
};
extern Actor* actor;
std::string thread_name(uint16_t id);  // for messages

// An update reads too.
enum class Access { kRead, kWrite, kAtomicRead, kAtomicStore, kAtomicUpdate };

// What faults name: a place in the source for a return address, where addr2line is installed.
std::string source_line(const void* address);

constexpr uint16_t kNoThread = 0xffff;

// Regions are freed in any order; memory is used again once all after it are free.
void* allocate(const std::string& name, int64_t bytes);
void release(void* p);
bool is_tracked(const void* p);
std::string describe(const void* p);  // "byte 12 of `name` (64 bytes)"
// The region that begins at p is not to be touched any more, for this reason.
void close_region(void* p, const std::string& reason);

// `address`: of the code after the access, or null.
void check(const void* p, int64_t bytes, Access access, const void* address = nullptr);
void check_aligned(const void* p, int64_t bytes, Access access, const void* address = nullptr);
void mark_written(void* p, int64_t bytes);              // by the host
int64_t first_unwritten(const void* p, int64_t bytes);  // -1: none
// An asynchronous copy: `begin` is a write by the running thread, after which nobody may touch the bytes until `end`,
// as of count `now` of thread `id`.
void begin_copy(void* p, int64_t bytes, const void* address);
void end_copy(void* p, int64_t bytes, uint16_t id, uint32_t now);

}}  // namespace seqkern::host
