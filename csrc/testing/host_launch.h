// Runs a kernel's source on the host: one fiber for each CUDA thread, all blocks of the grid at the same time. Which
// fiber goes on at a barrier, a wait or any other meeting is drawn from a seed.
//
// Every access of a kernel to shared memory and to Global memory is checked (testing/memory.h). These end a launch with
// a Fault that names the block, the thread and the place in the source:
//   - a barrier that some threads of the block do not reach: they ended, or wait at another one
//   - all threads that are left wait (deadlock)
//   - shared or Global memory out of range or misaligned
//   - a read of shared or Global memory that nobody wrote, or that an unfinished cp.async is to write
//   - two threads that touch the same bytes, one of them writing, with nothing between that orders them
#pragma once
#ifndef SK_HOST
#define SK_HOST
#endif
#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "../cuda/simt.cuh"

namespace seqkern {
namespace host {

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Launch {
  Index grid, block;
  int64_t shared_bytes = 0;
  uint64_t seed = 0;
  int cluster = 1;  // blocks along x that form a cluster
};
void run(const Launch& launch, const std::function<void()>& thread);

// Global memory, between zones that no access may touch. Freed in reverse order of allocation at best.
class Global {
 public:
  Global(const char* name, int64_t bytes);                    // unwritten
  Global(const char* name, const void* data, int64_t bytes);  // a copy of `data`
  ~Global();
  Global(const Global&) = delete;
  Global& operator=(const Global&) = delete;

  template <class T> T* as() const { return static_cast<T*>(data_); }
  int64_t bytes() const { return bytes_; }
  void fill(int byte);             // as a memset on the stream would
  void copy_to(void* data) const;  // throws a Fault if a byte was never written

 private:
  void* data_;
  int64_t bytes_;
};

}  // namespace host

template <class... P, class... A>
void host_launch(const host::Launch& launch, void (*kernel)(P...), const A&... args) {
  const std::tuple<P...> parameters(args...);
  host::run(launch, [&] { std::apply(kernel, parameters); });
}
template <class... P, class... A>
void host_launch(void (*kernel)(P...), host::Index grid, host::Index block, int64_t shared_bytes, uint64_t seed,
                 const A&... args) {
  host_launch(host::Launch{grid, block, shared_bytes, seed}, kernel, args...);
}

}  // namespace seqkern
