#include "memory.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "host_launch.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
constexpr bool kTracked = false;
#else
#define ASAN_POISON_MEMORY_REGION(p, n)
#define ASAN_UNPOISON_MEMORY_REGION(p, n)
constexpr bool kTracked = true;
#endif

namespace seqkern { namespace host {

Actor* actor = nullptr;

namespace {

// Of two bytes. All zero: no access is allowed.
struct Cell {
  uint32_t write_clock, read_clock;
  uint16_t writer, reader;
  uint8_t inside, written, pending;  // a bit for each byte; pending: an asynchronous copy will write it
  bool atomic;                       // the last write was
};
static_assert(sizeof(Cell) == 16);

struct Region {
  uintptr_t begin;
  int64_t bytes;
  std::string name, closed;
  bool live;
};

constexpr int64_t kReserved = int64_t(2) << 30, kZone = 1 << 16, kPoison = 4096;
constexpr int64_t kPatience = 20'000'000;  // accesses of one thread without letting others run

void* reserve(int64_t bytes) {
  void* p = mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return p;
}

uintptr_t base = 0;
Cell* cells = nullptr;
std::vector<Region> regions;  // by address

Cell& cell_of(uintptr_t at) { return cells[(at - base) / 2]; }
uint8_t bits(uintptr_t cell, uintptr_t begin, uintptr_t end) {
  return uint8_t((cell >= begin && cell < end ? 1 : 0) | (cell + 1 >= begin && cell + 1 < end ? 2 : 0));
}
template <class F> void each_cell(const void* p, int64_t bytes, F f) {
  const uintptr_t begin = uintptr_t(p), end = begin + uintptr_t(bytes);
  for (uintptr_t at = begin & ~uintptr_t(1); at < end; at += 2) f(cell_of(at), bits(at, begin, end), at);
}

// The live region nearest to an address.
Region* nearest(uintptr_t at) {
  Region* found = nullptr;
  int64_t least = 0;
  for (Region& r : regions) {
    if (!r.live) continue;
    const int64_t before = int64_t(r.begin - at), after = int64_t(at - r.begin) - r.bytes;
    const int64_t distance = before > 0 ? before : after > 0 ? after : 0;
    if (!found || distance < least) found = &r, least = distance;
  }
  return found;
}

bool ordered(const Actor& a, uint16_t id, uint32_t clock) {
  return clock < a.oldest || id == a.id || (*a.known)[id] >= clock;
}

const char* verb(Access access) {
  switch (access) {
    case Access::kRead: return "reads";
    case Access::kWrite: return "writes";
    case Access::kAtomicRead: return "polls";
    case Access::kAtomicStore: return "signals";
    default: return "updates";
  }
}

[[noreturn]] void report(const void* p, int64_t bytes, Access access, const void* address, const std::string& what) {
  const std::string where = source_line(address);
  fault("%s %lld bytes, %s: %s%s%s", verb(access), (long long)bytes, describe(p).c_str(), what.c_str(),
        where.empty() ? "" : ", at ", where.c_str());
}

}  // namespace

std::string source_line(const void* address) {
  Dl_info info;
  if (!address || !dladdr(address, &info) || !info.dli_fname) return "";
  char command[4096];
  const auto offset = (unsigned long long)(uintptr_t(address) - uintptr_t(info.dli_fbase) - 1);
  snprintf(command, sizeof command, "addr2line -s -e '%s' %#llx 2> /dev/null", info.dli_fname, offset);
  FILE* out = popen(command, "r");
  if (!out) return "";
  char line[256] = "";
  if (!fgets(line, sizeof line, out)) line[0] = 0;
  pclose(out);
  line[strcspn(line, " \n")] = 0;
  return line[0] == '?' ? "" : line;
}

void* allocate(const std::string& name, int64_t bytes) {
  if (!base) {
    base = uintptr_t(reserve(kReserved));
    cells = static_cast<Cell*>(reserve(kReserved / 2 * int64_t(sizeof(Cell))));
  }
  const uintptr_t free = regions.empty() ? base : regions.back().begin + uintptr_t(regions.back().bytes);
  const uintptr_t begin = (free + kZone + 127) / 128 * 128;
  if (begin + uintptr_t(bytes) + kZone > base + kReserved) throw std::bad_alloc();
  regions.push_back({begin, bytes, name, "", true});
  void* p = reinterpret_cast<void*>(begin);
  ASAN_POISON_MEMORY_REGION(reinterpret_cast<void*>(begin - kPoison), kPoison);
  ASAN_UNPOISON_MEMORY_REGION(p, size_t(bytes));
  ASAN_POISON_MEMORY_REGION(reinterpret_cast<void*>(begin + uintptr_t(bytes)), kPoison);
  memset(p, 0xff, size_t(bytes));  // NaN in every floating-point type
  each_cell(p, bytes,
            [](Cell& c, uint8_t inside, uintptr_t) { c = {0, 0, kNoThread, kNoThread, inside, 0, 0, false}; });
  return p;
}

void release(void* p) {
  for (Region& r : regions)
    if (r.live && r.begin == uintptr_t(p)) {
      r.live = false;
      ASAN_POISON_MEMORY_REGION(p, size_t(r.bytes));
      each_cell(p, r.bytes, [](Cell& c, uint8_t, uintptr_t) { c = {}; });
    }
  while (!regions.empty() && !regions.back().live) regions.pop_back();
}

bool is_tracked(const void* p) { return base && uintptr_t(p) - base < uintptr_t(kReserved); }

std::string describe(const void* p) {
  const Region* r = is_tracked(p) ? nearest(uintptr_t(p)) : nullptr;
  if (!r) return "in no buffer";
  return "byte " + std::to_string(int64_t(uintptr_t(p) - r->begin)) + " of " + r->name + " (" +
         std::to_string(r->bytes) + " bytes)";
}

void close_region(void* p, const std::string& reason) {
  for (Region& r : regions)
    if (r.live && r.begin == uintptr_t(p)) {
      r.closed = reason;
      ASAN_POISON_MEMORY_REGION(p, size_t(r.bytes));
      each_cell(p, r.bytes, [](Cell& c, uint8_t, uintptr_t) { c.inside = 0; });
    }
}

void check_aligned(const void* p, int64_t bytes, Access access, const void* address) {
  if (!actor || !is_tracked(p)) return;
  if (uintptr_t(p) % uintptr_t(bytes)) report(p, bytes, access, address, "misaligned");
  check(p, bytes, access, address);
}

void check(const void* p, int64_t bytes, Access access, const void* address) {
  if (!kTracked || !actor || !is_tracked(p)) return;
  Actor& a = *actor;
  if (++a.unseen > kPatience)
    report(p, bytes, access, address, "and goes on without letting others run: does it poll without wait_acquire?");
  const bool write = access != Access::kRead && access != Access::kAtomicRead;
  const bool atomic = access != Access::kRead && access != Access::kWrite;
  const bool needs_value = access != Access::kWrite && access != Access::kAtomicStore;
  each_cell(p, bytes, [&](Cell& c, uint8_t mask, uintptr_t at) {
    if ((c.inside & mask) != mask) {
      const Region* r = nearest(at);
      report(p, bytes, access, address, r && !r->closed.empty() ? r->closed : "out of range");
    }
    if (c.pending & mask) report(p, bytes, access, address, "an asynchronous copy to them is not finished");
    if (needs_value && (c.written & mask) != mask) report(p, bytes, access, address, "nothing was written there");
    if (!(atomic && c.atomic) && !ordered(a, c.writer, c.write_clock))
      report(p, bytes, access, address, "race with a write by " + thread_name(c.writer));
    if (write) {
      if (!ordered(a, c.reader, c.read_clock))
        report(p, bytes, access, address, "race with a read by " + thread_name(c.reader));
      c.writer = a.id;
      c.write_clock = a.now;
      c.atomic = atomic;
      c.written |= mask;
    } else if (!atomic && (ordered(a, c.reader, c.read_clock) || (a.unseen & 1))) {
      // One reader is kept: of several that nothing orders, any.
      c.reader = a.id;
      c.read_clock = a.now;
    }
  });
}

void mark_written(void* p, int64_t bytes) {
  each_cell(p, bytes, [](Cell& c, uint8_t mask, uintptr_t) { c.written |= mask; });
}

int64_t first_unwritten(const void* p, int64_t bytes) {
  int64_t found = -1;
  if (!kTracked) return found;
  each_cell(p, bytes, [&](Cell& c, uint8_t mask, uintptr_t at) {
    if (found < 0 && (c.written & mask) != mask) found = int64_t(at - uintptr_t(p)) + (c.written & mask & 1);
  });
  return found;
}

void begin_copy(void* p, int64_t bytes, const void* address) {
  check_aligned(p, bytes, Access::kWrite, address);
  if (!is_tracked(p)) return;
  memset(p, 0xff, size_t(bytes));
  each_cell(p, bytes, [](Cell& c, uint8_t mask, uintptr_t) {
    c.written &= uint8_t(~mask);
    c.pending |= mask;
  });
}

void end_copy(void* p, int64_t bytes, uint16_t id, uint32_t now) {
  if (!is_tracked(p)) return;
  each_cell(p, bytes, [&](Cell& c, uint8_t mask, uintptr_t) {
    c.pending &= uint8_t(~mask);
    c.written |= mask;
    c.writer = id;
    c.write_clock = now;
  });
}

// ---- Global

Global::Global(const char* name, int64_t bytes) : data_(allocate(name, bytes)), bytes_(bytes) {}
Global::Global(const char* name, const void* data, int64_t bytes) : Global(name, bytes) {
  if (bytes) memcpy(data_, data, size_t(bytes));
  mark_written(data_, bytes);
}
Global::~Global() { release(data_); }
void Global::fill(int byte) {
  memset(data_, byte, size_t(bytes_));
  mark_written(data_, bytes_);
}
void Global::copy_to(void* data) const {
  const int64_t hole = first_unwritten(data_, bytes_);
  if (hole >= 0) {
    throw Fault("the launch is over, and nothing was written to " + describe(static_cast<char*>(data_) + hole));
  }
  if (bytes_) memcpy(data, data_, size_t(bytes_));
}

}}  // namespace seqkern::host
