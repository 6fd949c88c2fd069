// Fibers: stackful coroutines that switch in a dozen instructions on x86-64 and through ucontext elsewhere. A fiber is
// started by switching to it for the first time, and abandoned by never switching to it again, so device code must not
// own anything that needs a destructor. Stacks are kept per OS thread and reused.
#pragma once
#include <cstddef>
#include <vector>

#if !defined(__x86_64__) && !defined(TOKENCOMP_EMU_UCONTEXT)
#define TOKENCOMP_EMU_UCONTEXT
#endif
#ifdef TOKENCOMP_EMU_UCONTEXT
#include <ucontext.h>
#endif

#pragma GCC visibility push(hidden)

namespace emu {

struct Fiber {
#ifdef TOKENCOMP_EMU_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
  char* stack = nullptr;
};

constexpr size_t kStackBytes = 256 << 10;  // untouched pages cost nothing

// Stacks of one OS thread: reserved lazily, each with an inaccessible page below it.
class Stacks {
 public:
  char* get(size_t i);
  ~Stacks();

 private:
  std::vector<char*> stacks_;
};

void prepare(Fiber& fiber, char* stack, size_t number, void (*entry)());
void switch_to(Fiber& from, Fiber& to);

}  // namespace emu

#pragma GCC visibility pop
