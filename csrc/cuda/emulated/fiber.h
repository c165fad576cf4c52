// A stack of its own for each emulated thread, and the switch between two of them.
//
// ucontext works everywhere; on x86-64 a switch without its system calls is five times faster.
// CLAE_EMULATED_UCONTEXT chooses the former.
#pragma once
#include <cstdint>

#include "sanitizers.h"

#if !defined(__x86_64__) && !defined(CLAE_EMULATED_UCONTEXT)
#define CLAE_EMULATED_UCONTEXT
#endif
#if defined(CLAE_EMULATED_UCONTEXT)
#include <ucontext.h>
#endif

namespace clae_fast {
namespace gpu {
namespace emulated {

struct Fiber {
  char* stack = nullptr;
  std::size_t bytes = 0;
#if defined(CLAE_EMULATED_UCONTEXT)
  ucontext_t context;
#else
  void* top = nullptr;  // where its registers lie while it does not run
#endif
#if CLAE_ASAN
  void* fake_stack = nullptr;
#endif
#if CLAE_TSAN
  void* tsan = nullptr;
#endif
};

#if !defined(CLAE_EMULATED_UCONTEXT)
#if defined(__clang__)
#define CLAE_OPAQUE naked, noinline
#else
#define CLAE_OPAQUE naked, noipa  // its callers must not learn which registers it leaves alone
#endif
// Saves what a function must preserve, in the order that prepare() below lays out.
__attribute__((CLAE_OPAQUE, no_sanitize("address"), no_sanitize("thread"))) inline void
switch_stack([[maybe_unused]] void** from, [[maybe_unused]] void* to) {
  asm("pushq %rbp\n\t"
      "pushq %rbx\n\t"
      "pushq %r12\n\t"
      "pushq %r13\n\t"
      "pushq %r14\n\t"
      "pushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq %rsi, %rsp\n\t"
      "popq %r15\n\t"
      "popq %r14\n\t"
      "popq %r13\n\t"
      "popq %r12\n\t"
      "popq %rbx\n\t"
      "popq %rbp\n\t"
      "ret");
}
#endif

// The fiber starts `entry`, which never returns, at the first switch to it.
inline void prepare(Fiber& fiber, char* stack, std::size_t bytes, void (*entry)()) {
  unpoison(stack, bytes);  // what an earlier fiber left half-way
  fiber.stack = stack;
  fiber.bytes = bytes;
#if defined(CLAE_EMULATED_UCONTEXT)
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#else
  // Six registers, the address to return to, and the place of a return address of the entry: the
  // entry finds its stack as after a call.
  auto top = reinterpret_cast<std::uintptr_t>(stack + bytes) & ~std::uintptr_t(15);
  void** words = reinterpret_cast<void**>(top) - 8;
  for (int i = 0; i < 8; ++i) words[i] = nullptr;
  words[6] = reinterpret_cast<void*>(entry);
  fiber.top = words;
#endif
}

// AddressSanitizer's half of arriving; `from` is told its stack, which for the OS thread's own
// nobody else knows.
inline void arrived([[maybe_unused]] Fiber& self, [[maybe_unused]] Fiber& from) {
#if CLAE_ASAN
  const void* stack;
  std::size_t bytes;
  __sanitizer_finish_switch_fiber(self.fake_stack, &stack, &bytes);
  from.stack = const_cast<char*>(static_cast<const char*>(stack));
  from.bytes = bytes;
#endif
}

// Runs `to` until something switches back. Does not return if this is the fiber's `last` switch.
CLAE_UNSEEN inline void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool last) {
#if CLAE_ASAN
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack, to.bytes);
#endif
#if CLAE_TSAN
  __tsan_switch_to_fiber(to.tsan, 1);  // 1: a switch orders nothing
#endif
#if defined(CLAE_EMULATED_UCONTEXT)
  swapcontext(&from.context, &to.context);
#else
  switch_stack(&from.top, to.top);
#endif
}

}  // namespace emulated
}  // namespace gpu
}  // namespace clae_fast
