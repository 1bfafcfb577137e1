// Weights that a layer packed in inference, kept from one call to the next of the same shape on the same addresses.
//
// What was packed is not trusted: each call takes a mark of the weights themselves (marks.h), panel by panel, and packs
// those panels whose mark is another. So every way of changing weights takes effect at once, also those that leave no trace
// in a tensor's version: `.data`, numpy, another process on shared memory.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <list>
#include <mutex>
#include <vector>

#include "execute.h"

namespace seqkern {
using WeightsKey = std::array<int64_t, 16>;

struct KeptWeights {
  WeightsKey key;
  Scratch memory;
  std::vector<uint64_t> marks;  // 0: nothing packed yet
  bool taken;
  int64_t last;  // turn at which it was taken
};

class WeightsKeeper {
 public:
  static WeightsKeeper& one() {
    static WeightsKeeper* keeper = new WeightsKeeper;  // never destroyed: threads may outlast static objects
    return *keeper;
  }
  // For one call at a time: another that comes meanwhile gets one of its own. Null where there is no room, and at a key's
  // first call: weights that are made anew for each call, as by autocast or a parametrization, often have new addresses.
  KeptWeights* take(const WeightsKey& key, int64_t bytes, int64_t marks) {
    std::lock_guard<std::mutex> lock(mutex_);
    ++turn_;
    for (KeptWeights& k : all_)
      if (!k.taken && k.key == key) return taken(k);
    if (bytes > limit_ || !seen_before(key)) return nullptr;
    for (auto k = all_.begin(); k != all_.end() && !fits(bytes);) {  // the longest unused first
      if (turn_ - k->last <= kInUse) return nullptr;
      if (k->taken) {
        ++k;
      } else {
        held_ -= k->memory.size;
        k = all_.erase(k);
      }
    }
    if (!fits(bytes)) return nullptr;
    all_.emplace_back();
    KeptWeights& k = all_.back();
    k.key = key;
    k.memory.take(bytes);
    k.marks.assign(marks, 0);
    held_ += k.memory.size;
    return taken(k);
  }
  void give_back(KeptWeights* k) {
    std::lock_guard<std::mutex> lock(mutex_);
    k->taken = false;
  }
  std::vector<int64_t> held() {
    std::lock_guard<std::mutex> lock(mutex_);
    return {int64_t(all_.size()), held_};
  }

 private:
  // Evicted are only those that so many calls went by without: a model of more layers than there is room for would else
  // pack every one of them at every call.
  static constexpr int64_t kInUse = 256;
  static constexpr size_t kMost = 128;

  WeightsKeeper() {
    const char* mib = std::getenv("SEQKERN_KEPT_WEIGHTS_MIB");
    if (!mib || !*mib) return;
    char* end;
    limit_ = std::strtoll(mib, &end, 10) * (1 << 20);
    STD_TORCH_CHECK(!*end && limit_ >= 0, "SEQKERN_KEPT_WEIGHTS_MIB must be a whole number of MiB, 0 or more, got ", mib);
  }
  bool seen_before(const WeightsKey& key) {
    if (std::find(seen_.begin(), seen_.end(), key) != seen_.end()) return true;
    seen_[turn_ % seen_.size()] = key;
    return false;
  }
  bool fits(int64_t bytes) const { return held_ + bytes <= limit_ && all_.size() < kMost; }
  KeptWeights* taken(KeptWeights& k) {
    k.taken = true;
    k.last = turn_;
    for (auto i = all_.begin(); i != all_.end(); ++i)
      if (&*i == &k) {
        all_.splice(all_.end(), all_, i);
        break;
      }
    return &k;
  }

  std::mutex mutex_;
  std::array<WeightsKey, 64> seen_{};
  std::list<KeptWeights> all_;  // in the order in which they were last taken
  int64_t limit_ = 128 << 20, held_ = 0, turn_ = 0;
};
}  // namespace seqkern
