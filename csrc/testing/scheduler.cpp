#include "scheduler.h"

#include <stdarg.h>
#include <stdio.h>

#include <algorithm>

namespace seqkern { namespace host {

const Self* self = nullptr;
Run* run_now = nullptr;

namespace {

uint32_t oldest_count = 1;  // clocks go on from launch to launch, so that no cell has to be reset

constexpr int64_t kMaxShared = 227 << 10;
const char* const kWarpOps[] = {"warp_sync", "shfl", "shfl_xor", "shfl_down", "ballot", "mma", "ldmatrix"};

std::string text(const Index& i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}
std::string text(const Site& at) {
  const std::string file = at.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(at.line());
}
size_t count(const Index& i) { return size_t(i.x) * i.y * i.z; }
Index unravel(size_t n, const Index& size) {
  return {unsigned(n % size.x), unsigned(n / size.x % size.y), unsigned(n / size.x / size.y)};
}
uint32_t bit(int lane) { return uint32_t(1) << lane; }

}  // namespace

// ---- clocks

ClockPtr release_clock(Actor& a) {
  auto clock = std::make_shared<Clock>(*a.known);
  (*clock)[a.id] = a.now++;
  return clock;
}

ClockPtr join(const ClockPtr& a, const ClockPtr& b) {
  if (!a || !b || a == b) return a ? a : b;
  auto clock = std::make_shared<Clock>(*a);
  uint32_t* to = clock->data();
  const uint32_t* from = b->data();
  for (size_t i = 0, n = clock->size(); i < n; ++i) to[i] = to[i] > from[i] ? to[i] : from[i];
  return clock;
}

void acquire_clock(Actor& a, const ClockPtr& clock) { a.known = join(a.known, clock); }

void join_clocks(const std::vector<Fiber*>& fibers) {
  std::vector<const Clock*> seen;
  auto clock = std::make_shared<Clock>(*fibers[0]->known);
  seen.push_back(fibers[0]->known.get());
  for (const Fiber* f : fibers) {
    const Clock* known = f->known.get();
    if (std::find(seen.begin(), seen.end(), known) != seen.end()) continue;
    seen.push_back(known);
    uint32_t* to = clock->data();
    const uint32_t* from = known->data();
    for (size_t i = 0, n = clock->size(); i < n; ++i) to[i] = to[i] > from[i] ? to[i] : from[i];
  }
  for (Fiber* f : fibers) (*clock)[f->id] = f->now++;
  for (Fiber* f : fibers) f->known = clock;
}

// ---- set up and take down

Run::Run(const Launch& l, const std::function<void()>& body)
    : launch(l), body_(body), random_(l.seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du) {
  const size_t block_count = count(l.grid), threads = count(l.block), warps = (threads + 31) / 32;
  if (block_count == 0 || threads == 0 || threads > 1024)
    throw Fault("launch: a grid of " + text(l.grid) + " blocks of " + text(l.block) + " threads");
  if (block_count * threads >= kNoThread)
    throw Fault("launch: at most 65534 threads in all run on the host, not " + std::to_string(block_count * threads));
  if (l.shared_bytes < 0 || l.shared_bytes > kMaxShared)
    throw Fault("launch: " + std::to_string(l.shared_bytes) + " bytes of shared memory, of at most 232448");
  if (l.cluster < 1 || l.grid.x % unsigned(l.cluster))
    throw Fault("launch: clusters of " + std::to_string(l.cluster) + " in a grid of " + text(l.grid) + " blocks");
  const size_t cluster = size_t(l.cluster);
  const auto nothing = std::make_shared<Clock>(block_count * threads, 0u);
  fibers.resize(block_count * threads);
  warps_.resize(block_count * warps);
  for (size_t c = 0; c < block_count / cluster; ++c) clusters_.push_back({"cluster_sync", cluster * threads, {}, {}});
  for (size_t b = 0; b < block_count; ++b) {
    const size_t rank = b % cluster;
    void* shared = allocate("shared memory of block " + text(unravel(b, l.grid)), l.shared_bytes);
    blocks.push_back(
        {{"block_sync", threads, {}, {}}, &clusters_[b / cluster], int(rank), int(b - rank), threads, shared, {}});
  }
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber& f = fibers[i];
    const size_t b = i / threads, t = i % threads;
    f.id = uint16_t(i);
    f.now = f.oldest = oldest_count;
    f.known = nothing;
    f.self = {unravel(t, l.block), unravel(b, l.grid), l.block, l.grid};
    f.block = &blocks[b];
    f.warp = &warps_[b * warps + t / 32];
    f.lane = int(t % 32);
    f.warp->lanes[f.lane] = &f;
    f.warp->exists |= bit(f.lane);
    make_ready(f);
  }
}

Run::~Run() {
  for (const Fiber& f : fibers) {
    oldest_count = std::max(oldest_count, f.now + 1);
    if (f.context.stack.bottom) give_back(f.context.stack);
  }
  for (auto b = blocks.rbegin(); b != blocks.rend(); ++b)
    for (auto s = b->statics.rbegin(); s != b->statics.rend(); ++s) release(s->memory);
  for (auto b = blocks.rbegin(); b != blocks.rend(); ++b) release(b->dynamic);
  actor = nullptr;
  self = nullptr;
  run_now = nullptr;
}

void run(const Launch& launch, const std::function<void()>& thread) {
  if (run_now) throw Fault("launch: a launch is under way");
  Run r(launch, thread);
  run_now = &r;
  r.start();
}

void Run::start() {
  Fiber& first = *next();
  become(first);
  first.started = true;
  first.context.stack = take_stack();
  prepare(first.context, entry);
  switch_to(main_, first.context);
  if (!error_.empty()) throw Fault(error_);
}

// ---- switching

void Run::entry() {
  Run& run = *run_now;
  arrived(run.main_);
  for (;;) {
    Fiber& f = *run.current_;
    try {
      run.body_();
    } catch (const std::exception& e) {
      run.fail(e.what());
    }
    run.end(f);
    Fiber* n = run.next();
    if (!n) run.finish();
    run.become(*n);
    std::swap(n->context.stack, f.context.stack);
    if (!n->started) {  // on this stack, which nobody needs any more
      n->started = true;
      continue;
    }
    std::swap(n->context.stack, f.context.stack);
    give_back(f.context.stack);
    Context over;
    std::swap(over, f.context);
    switch_to(over, n->context);
  }
}

void Run::end(Fiber& f) {
  Warp& w = *f.warp;
  for (const WarpCall& c : w.calls)
    if (c.mask & bit(f.lane))
      fail("ends, while other lanes of its warp wait for it in " + std::string(kWarpOps[int(c.op)]) + " at " +
           text(c.at));
  for (Meeting* m : {&f.block->meeting, f.block->cluster}) {
    if (!m->here.empty())
      fail("divergent barrier: ends, while " + name(*m->here[0]) + " waits for it in " + m->name + " at " +
           text(m->here[0]->at));
    m->ended = &f;
  }
  f.ended = true;
  w.ended |= bit(f.lane);
  ++ended_;
  if (--f.block->left > 0 || launch.cluster == 1) return;
  // Other blocks of the cluster must be done with this one's shared memory: for them, it is as if the block wrote it.
  Actor block = f;
  for (const Fiber& g : fibers)
    if (g.block == f.block) {
      Actor thread = g;
      acquire_clock(block, release_clock(thread));
    }
  actor = &block;
  const auto close = [&](void* p, int64_t bytes) {
    check(p, bytes, Access::kWrite);
    close_region(p, "its block has ended");
  };
  close(f.block->dynamic, launch.shared_bytes);
  for (const Static& s : f.block->statics) close(s.memory, s.bytes);
}

void Run::make_ready(Fiber& f) {
  Warp& w = *f.warp;
  f.waits_for = nullptr;
  w.ready |= bit(f.lane);
  if (w.place >= 0) return;
  w.place = int(ready_.size());
  ready_.push_back(&w);
}

// Mostly another lane of the same warp: thousands of stacks do not fit the cache.
Fiber* Run::next() {
  if (ready_.empty()) return nullptr;
  random_ ^= random_ << 13;
  random_ ^= random_ >> 7;
  random_ ^= random_ << 17;
  const uint32_t draw = uint32_t(random_ >> 32);
  if (!last_ || !last_->ready || draw % 8 == 0) last_ = ready_[(draw >> 8) % ready_.size()];
  Warp& w = *last_;
  const int turn = int(draw >> 3 & 31);
  const int lane = (__builtin_ctz(w.ready >> turn | (turn ? w.ready << (32 - turn) : 0)) + turn) & 31;
  w.ready &= ~bit(lane);
  if (!w.ready) {
    ready_.back()->place = w.place;
    ready_[size_t(w.place)] = ready_.back();
    ready_.pop_back();
    w.place = -1;
  }
  return w.lanes[lane];
}

void Run::become(Fiber& f) {
  current_ = &f;
  self = &f.self;
  actor = &f;
  f.unseen = 0;
}

// To the next fiber; returns when it is the running one's turn again.
void Run::go_on() {
  Fiber& f = *current_;
  Fiber* n = next();
  if (!n) finish();
  become(*n);
  if (n == &f) return;
  if (!n->started) {
    n->started = true;
    n->context.stack = take_stack();
    prepare(n->context, entry);
  }
  switch_to(f.context, n->context);
}

void Run::let_others_run() {
  make_ready(*current_);
  go_on();
}

void Run::park(const char* what, const Site& at) {
  current_->waits_for = what;
  current_->at = at;
  go_on();
}

void Run::fail(const std::string& message) {
  error_ = name(*current_) + ": " + message;
  Context over = current_->context;
  switch_to(over, main_);
  __builtin_unreachable();
}

void Run::finish() {
  if (ended_ < fibers.size()) error_ = deadlock();
  Context over = current_->context;
  switch_to(over, main_);
  __builtin_unreachable();
}

// ---- waiting

void Run::wait(const void* key, const char* what, const Site& at) {
  waiting_[key].push_back(current_);
  park(what, at);
}

void Run::wake(const void* key) {
  const auto found = waiting_.find(key);
  if (found == waiting_.end()) return;
  for (Fiber* f : found->second) make_ready(*f);
  waiting_.erase(found);
}

void Run::meet(Meeting& m, const Site& at) {
  if (m.ended)
    fail("divergent barrier: in " + std::string(m.name) + " at " + text(at) + ", but " + name(*m.ended) + " has ended");
  if (!m.here.empty() && m.here[0]->at.line() != at.line())
    fail("divergent barrier: in " + std::string(m.name) + " at " + text(at) + ", while " + name(*m.here[0]) +
         " is in the one at " + text(m.here[0]->at));
  m.here.push_back(current_);
  current_->at = at;
  if (m.here.size() < m.size) return park(m.name, at);
  join_clocks(m.here);
  for (Fiber* f : m.here)
    if (f != current_) make_ready(*f);
  m.here.clear();
  let_others_run();
}

void Run::warp_meet(WarpOp op, uint32_t mask, void* lane, void (*all)(void* const* lanes), const Site& at) {
  Fiber& f = *current_;
  Warp& w = *f.warp;
  const std::string what = kWarpOps[int(op)];
  const bool aligned = op == WarpOp::kMma || op == WarpOp::kLdmatrix;  // the whole warp runs one instruction
  if (!(mask & bit(f.lane))) fail(what + " at " + text(at) + ": the mask leaves out this lane");
  mask &= w.exists;
  if (mask & w.ended)
    fail(what + " at " + text(at) + ": lane " + std::to_string(__builtin_ctz(mask & w.ended)) + " has ended");
  size_t i = w.calls.size();
  for (size_t c = 0; c < w.calls.size(); ++c) {
    const WarpCall& call = w.calls[c];
    const bool same = call.op == op && call.mask == mask && (!aligned || call.at.line() == at.line());
    if (same) i = c;
    else if (call.mask & bit(f.lane) && call.arrived & mask)  // each waits for the other
      fail("divergent warp: in " + what + " at " + text(at) + ", while lane " +
           std::to_string(__builtin_ctz(call.arrived & mask)) + " is in " + kWarpOps[int(call.op)] + " at " +
           text(call.at));
  }
  if (i == w.calls.size()) w.calls.push_back({op, mask, 0, at, {}});
  WarpCall& call = w.calls[i];
  call.lanes[f.lane] = lane;
  call.arrived |= bit(f.lane);
  if (call.arrived != mask) return park(kWarpOps[int(op)], at);
  const WarpCall done = call;
  w.calls.erase(w.calls.begin() + ptrdiff_t(i));
  if (all) all(done.lanes);
  std::vector<Fiber*> together;
  for (int l = 0; l < 32; ++l) {
    if (!(mask & bit(l))) continue;
    if (op == WarpOp::kSync) together.push_back(w.lanes[l]);
    if (l != f.lane) make_ready(*w.lanes[l]);
  }
  if (op == WarpOp::kSync) join_clocks(together);
}

// ---- messages

std::string Run::name(const Fiber& f) const { return "block " + text(f.self.block) + " thread " + text(f.self.thread); }

std::string Run::deadlock() const {
  std::string message = "deadlock: ";
  std::vector<std::string> kinds;
  for (const Fiber& f : fibers) {
    if (!f.waits_for) continue;
    const std::string kind = std::string(f.waits_for) + " at " + text(f.at);
    if (std::find(kinds.begin(), kinds.end(), kind) != kinds.end()) continue;
    kinds.push_back(kind);
    message += (kinds.size() > 1 ? "; " : "") + name(f) + " and perhaps others wait in " + kind;
  }
  return message;
}

std::string thread_name(uint16_t id) { return run_now ? run_now->name(run_now->fibers[id]) : ""; }

void fault(const char* format, ...) {
  char message[1024];
  va_list args;
  va_start(args, format);
  vsnprintf(message, sizeof message, format, args);
  va_end(args);
  if (!run_now) throw Fault(message);
  run_now->fail(message);
}

}}  // namespace seqkern::host
