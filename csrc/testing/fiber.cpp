#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
constexpr int64_t kStackBytes = 256 << 10;
#else
constexpr int64_t kStackBytes = 64 << 10;
#endif

namespace seqkern { namespace host {

namespace {
std::vector<Stack> free_stacks;
}

Stack take_stack() {
  if (!free_stacks.empty()) {
    const Stack stack = free_stacks.back();
    free_stacks.pop_back();
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(stack.bottom, size_t(stack.bytes));  // a fiber may have been left in mid-call
#endif
    return stack;
  }
  const int64_t guard = sysconf(_SC_PAGESIZE);
  void* p = mmap(nullptr, size_t(kStackBytes + guard), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (p == MAP_FAILED || mprotect(p, size_t(guard), PROT_NONE) != 0) throw std::bad_alloc();
  return {static_cast<char*>(p) + guard, kStackBytes};
}
void give_back(Stack stack) { free_stacks.push_back(stack); }

#if defined(__x86_64__)
// The registers that a called function keeps, then the other's stack.
extern "C" void seqkern_switch(void** from, void* to) __attribute__((visibility("hidden")));
asm(R"(
.text
.hidden seqkern_switch
.globl seqkern_switch
.type seqkern_switch, @function
seqkern_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size seqkern_switch, .-seqkern_switch
)");

void prepare(Context& context, void (*entry)()) {
  // At entry() the stack is as after a call: 8 bytes off a multiple of 16, a return address (none) on top.
  void** top = reinterpret_cast<void**>(context.stack.bottom + context.stack.bytes) - 2;
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.sp = top;
}
static void jump(Context& from, Context& to) { seqkern_switch(&from.sp, to.sp); }
#else
void prepare(Context& context, void (*entry)()) {
  auto* c = new (context.stack.bottom) ucontext_t;
  getcontext(c);
  c->uc_stack.ss_sp = context.stack.bottom + sizeof(ucontext_t);
  c->uc_stack.ss_size = size_t(context.stack.bytes) - sizeof(ucontext_t);
  makecontext(c, entry, 0);
  context.sp = c;
}
static void jump(Context& from, Context& to) {
  ucontext_t here;
  void* target = to.sp;
  from.sp = &here;
  swapcontext(&here, static_cast<ucontext_t*>(target));
}
#endif

void switch_to(Context& from, Context& to) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.fake, to.stack.bottom, size_t(to.stack.bytes));
  jump(from, to);
  __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#else
  jump(from, to);
#endif
}

void arrived([[maybe_unused]] Context& starter) {
#ifdef __SANITIZE_ADDRESS__
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  // The first fiber is started from the thread's own stack, which has no other way to be known.
  if (!starter.stack.bottom) starter.stack = {static_cast<char*>(const_cast<void*>(bottom)), int64_t(bytes)};
#endif
}

}}  // namespace seqkern::host
