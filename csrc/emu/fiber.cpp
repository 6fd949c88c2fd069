// Fibers: the stack switch and the stacks. See fiber.h.
#include "emu/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

namespace emu {
namespace {

size_t page() {
  static const size_t bytes = size_t(sysconf(_SC_PAGESIZE));
  return bytes;
}

// Fibers suspend at similar depths; were all stacks aligned alike, their live ends would share a few cache sets.
size_t colour(size_t number) { return number % 61 * 192; }

#ifndef TOKENCOMP_EMU_UCONTEXT
// Saves the callee-saved registers and the stack pointer, loads the other's. It ends in an indirect jump because a
// `ret` would be mispredicted each time. `noipa`: the compiler must not see that some registers happen to survive.
__attribute__((naked, noinline, noipa)) void switch_stack(void** /*save: rdi*/, void* /*load: rsi*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
      "popq %rcx\n"
      "jmp *%rcx\n");
}
#endif

}  // namespace

char* Stacks::get(size_t i) {
  while (stacks_.size() <= i) {
    void* p =
        mmap(nullptr, page() + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    mprotect(p, page(), PROT_NONE);
    stacks_.push_back(static_cast<char*>(p) + page());
  }
  return stacks_[i];
}

Stacks::~Stacks() {
  for (char* p : stacks_) munmap(p - page(), page() + kStackBytes);
}

#ifdef TOKENCOMP_EMU_UCONTEXT

void prepare(Fiber& fiber, char* stack, size_t number, void (*entry)()) {
  fiber.stack = stack;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = kStackBytes - colour(number);
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

void switch_to(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#else

void prepare(Fiber& fiber, char* stack, size_t number, void (*entry)()) {
  fiber.stack = stack;
  void** top = reinterpret_cast<void**>(stack + kStackBytes - 64 - colour(number));
  *--top = nullptr;  // where a return address would be: the alignment a function expects at entry
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; saved++) *--top = nullptr;
  fiber.stack_pointer = top;
}

void switch_to(Fiber& from, Fiber& to) { switch_stack(&from.stack_pointer, to.stack_pointer); }

#endif

}  // namespace emu
