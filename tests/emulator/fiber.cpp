#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

namespace emulator {
namespace {

constexpr size_t kStack = 256 << 10;
constexpr size_t kGuard = 4096;

char* stack_of(size_t number) {
  static std::vector<char*> stacks;
  while (stacks.size() <= number) {
    void* p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED || mprotect(p, kGuard, PROT_NONE)) throw std::runtime_error("no memory for stacks");
    stacks.push_back(static_cast<char*>(p));
  }
  return stacks[number];
}

// Bytes left free at the top: equal offsets in all stacks would fight for the same sets of the cache.
size_t colour(int number) { return size_t(number) % 64 * 17 * 64; }

}  // namespace

#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)

// Keeps what the System V ABI asks a function to keep.
asm(R"(
  .text
  .globl emulator_switch
  .hidden emulator_switch
  .type emulator_switch, @function
emulator_switch:
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
  popq %rcx
  jmp *%rcx
  .size emulator_switch, . - emulator_switch
)");

void start_fiber(Fiber& fiber, int number, void (*entry)()) {
  auto top = reinterpret_cast<uintptr_t>(stack_of(size_t(number)) + kStack - colour(number)) & ~uintptr_t(63);
  auto* p = reinterpret_cast<void**>(top);
  *--p = nullptr;  // where a caller would go on
  *--p = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--p = nullptr;
  fiber.stack_pointer = p;
}

#else

void start_fiber(Fiber& fiber, int number, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack_of(size_t(number));
  fiber.context.uc_stack.ss_size = kStack - colour(number);
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

#endif

}  // namespace emulator
