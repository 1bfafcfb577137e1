// Where the threads of a team wake up.
//
// Linux wakes a thread on its waker's core where no other core seems free, and to a guest of KVM a halted core does not:
// its host has marked it as not running. After a pause of some milliseconds the whole team then starts on the caller's core
// and meets there, a slice of time each, until the system's tick moves a thread: 4 to 12 ms (measured, bench/NOTES.md). So
// threads that may be asleep are kept off the caller's core while a call lasts.
#pragma once
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <utility>
#include <vector>
#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace seqkern {
// The threads that a calling thread had in its parallel regions, all of one pool.
class Team {
 public:
  static Team& of_this_thread() {
    static thread_local Team team;
    return team;
  }
  // For as long as a region of `count` threads lasts.
  class Region {
   public:
    Region(Team& team, int count) : team_(team) { team.begin(count); }
    ~Region() { team_.end(); }
    Region(const Region&) = delete;

   private:
    Team& team_;
  };
  void joined(int i) {  // by any thread of the region
#if defined(__linux__)
    if (this_thread() != caller_) threads_[i] = this_thread();
#endif
  }

 private:
  using Clock = std::chrono::steady_clock;
  void begin(int count) {
#if defined(__linux__)
    if (int(threads_.size()) < count) threads_.resize(count, 0);
    caller_ = this_thread();
    if (!may_sleep()) return;
    if (process_ != getpid()) std::fill(threads_.begin(), threads_.end(), 0);  // a fork's threads are not its parent's
    process_ = getpid();
    const int core = sched_getcpu();
    for (int i = 0; core >= 0 && i < count; ++i) {
      cpu_set_t cores;
      if (!threads_[i] || sched_getaffinity(threads_[i], sizeof cores, &cores) != 0) continue;
      if (!CPU_ISSET(core, &cores) || CPU_COUNT(&cores) < 2) continue;
      moved_.emplace_back(threads_[i], cores);
      CPU_CLR(core, &cores);
      sched_setaffinity(threads_[i], sizeof cores, &cores);
    }
#endif
  }
  void end() {
#if defined(__linux__)
    for (const auto& [thread, cores] : moved_) sched_setaffinity(thread, sizeof cores, &cores);
    moved_.clear();
#endif
    last_ = Clock::now();
  }
  // OpenMP's threads spin for some milliseconds after a region, unless told to sleep at once.
  bool may_sleep() const {
    static const bool passive = [] {
      const char* policy = std::getenv("OMP_WAIT_POLICY");
      return policy && (*policy == 'p' || *policy == 'P');
    }();
    return passive || Clock::now() - last_ > std::chrono::milliseconds(1);
  }
  Clock::time_point last_;
#if defined(__linux__)
  static pid_t this_thread() {
    static thread_local const pid_t id = pid_t(syscall(SYS_gettid));
    return id;
  }
  pid_t caller_ = 0, process_ = 0;
  std::vector<pid_t> threads_;  // 0: not known
  std::vector<std::pair<pid_t, cpu_set_t>> moved_;
#endif
};
}  // namespace seqkern
