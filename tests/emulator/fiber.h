// Fibers: stacks that one host thread switches between.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

namespace emulator {

#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
struct Fiber {
  void* stack_pointer = nullptr;
};
extern "C" void emulator_switch(void** save, void* load);
inline void switch_fiber(Fiber& from, const Fiber& to) { emulator_switch(&from.stack_pointer, to.stack_pointer); }
#else
struct Fiber {
  ucontext_t context;
};
inline void switch_fiber(Fiber& from, const Fiber& to) { swapcontext(&from.context, &to.context); }
#endif

// `entry` must never return. Stacks by number, each used again by the next fiber of that number.
void start_fiber(Fiber& fiber, int number, void (*entry)());

}  // namespace emulator
