// One launch: its fibers, what they wait for, and who runs next.
#pragma once
#include <unordered_map>

#include "fiber.h"
#include "host_launch.h"
#include "memory.h"

namespace seqkern { namespace host {

struct Warp;
struct Block;

struct Copy {
  void* to;
  const void* from;
};  // cp.async: 16 bytes

struct Fiber : Actor {
  Self self;
  Context context;
  bool started = false, ended = false;
  const char* waits_for = nullptr;
  Site at;  // where it waits
  Warp* warp;
  Block* block;
  int lane;
  std::vector<Copy> copies;    // under way, oldest first
  std::vector<size_t> groups;  // how many copies each committed group has, oldest first
  size_t open = 0;             // copies since the last commit
};

struct WarpCall {
  WarpOp op;
  uint32_t mask, arrived;
  Site at;
  void* lanes[32];
};

struct Warp {
  uint32_t exists = 0, ready = 0, ended = 0;  // a bit for each lane
  int place = -1;                             // in the list of warps that have a ready lane
  Fiber* lanes[32] = {};
  std::vector<WarpCall> calls;  // not everyone has come yet
};

// A barrier of a block or a cluster.
struct Meeting {
  const char* name;
  size_t size;
  const Fiber* ended = nullptr;  // one that will not come
  std::vector<Fiber*> here;
};

struct Static {
  const void* key;
  void* memory;
  int64_t bytes;
};

struct Block {
  Meeting meeting;
  Meeting* cluster;
  int rank, first;  // in the cluster; its first block
  size_t left;      // threads that have not ended
  void* dynamic;
  std::vector<Static> statics;
};

struct RemoteStore {
  void* to;
  std::string value;
  uint16_t sender;
  uint32_t now;
};

struct Mbarrier {
  int arrivals, pending, phase = 0;
  int64_t bytes = 0;                // expected and not yet on the way
  std::vector<RemoteStore> stores;  // on the way
  ClockPtr gathering, complete;     // what those who arrived in this phase, and in the last, had seen
};

class Run {
 public:
  Run(const Launch& launch, const std::function<void()>& body);
  ~Run();
  void start();

  Fiber& running() { return *current_; }
  void let_others_run();
  // Until wake(key).
  void wait(const void* key, const char* what, const Site& at);
  void wake(const void* key);
  void meet(Meeting& meeting, const Site& at);
  void warp_meet(WarpOp op, uint32_t mask, void* lane, void (*all)(void* const* lanes), const Site& at);
  std::string name(const Fiber& f) const;
  [[noreturn]] void fail(const std::string& message);

  const Launch launch;
  std::vector<Fiber> fibers;
  std::vector<Block> blocks;
  std::unordered_map<const void*, ClockPtr> flags;  // what was released by each
  std::unordered_map<const void*, Mbarrier> mbarriers;

 private:
  static void entry();
  void end(Fiber& f);
  Fiber* next();
  void become(Fiber& f);
  void go_on();
  void park(const char* what, const Site& at);
  void make_ready(Fiber& f);
  [[noreturn]] void finish();
  std::string deadlock() const;

  const std::function<void()>& body_;
  std::vector<Warp> warps_;
  std::vector<Meeting> clusters_;
  std::vector<Warp*> ready_;
  Warp* last_ = nullptr;  // whose lane runs
  std::unordered_map<const void*, std::vector<Fiber*>> waiting_;
  Fiber* current_ = nullptr;
  Context main_;
  size_t ended_ = 0;
  uint64_t random_;
  std::string error_;
};
extern Run* run_now;

// What the thread has seen and done so far, for others; it counts up.
ClockPtr release_clock(Actor& a);
void acquire_clock(Actor& a, const ClockPtr& clock);
// Everyone has seen what everyone did.
void join_clocks(const std::vector<Fiber*>& fibers);
ClockPtr join(const ClockPtr& a, const ClockPtr& b);  // either may be null

}}  // namespace seqkern::host
