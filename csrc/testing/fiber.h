// Stacks, and the switch from one to another. One OS thread.
#pragma once
#include <stdint.h>

namespace seqkern { namespace host {

struct Stack {
  char* bottom;
  int64_t bytes;
};
Stack take_stack();  // below it lies a page that faults
void give_back(Stack stack);

struct Context {
  void* sp = nullptr;
  Stack stack{};         // the stack it runs on; of the thread that started it all: as the sanitizer says
  void* fake = nullptr;  // AddressSanitizer's own
};

// Makes `context` one that starts with entry() on its stack. entry() must not return.
void prepare(Context& context, void (*entry)());
// From the running context to another; returns when something switches back.
void switch_to(Context& from, Context& to);
// First in entry().
void arrived(Context& starter);

}}  // namespace seqkern::host
