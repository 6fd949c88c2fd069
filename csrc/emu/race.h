// The race, bounds and initialisation checker's interface to the rest of the run time. It wakes up only in a library
// whose kernels were compiled with -fsanitize=thread (their start-up code calls __tsan_init, which race.cpp defines);
// everywhere else each hook is one untaken branch. Order between threads is kept in vector clocks; see race.cpp.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <source_location>
#include <vector>

#pragma GCC visibility push(hidden)

namespace emu {

struct Thread;
struct Block;
struct Team;

namespace race {

using Loc = std::source_location;
using Ticks = std::vector<uint32_t>;

// What has happened before: one count per thread of this team, and for other teams of the launch what was learnt
// through an atomic. The counts of a foreign team are never changed once published, so they are shared.
struct Clock {
  Ticks own;
  std::map<uint32_t, std::shared_ptr<const Ticks>> foreign;
};

enum class Kind : uint8_t { read, write, atomic_read, atomic_write, async_read, async_write };

extern bool enabled;

void begin_launch();
void end_launch();
void begin_team(Team& team, size_t smem);
void end_team();
void on_release(const Thread& thread, Clock& into);
void on_acquire(const Thread& thread, const Clock& from);
void on_meet(Thread* const* threads, int count);
void on_touch(const Thread& as, const void* p, size_t bytes, Kind kind, Loc loc);
void on_fence(const Thread& thread);
void on_proxy_fence(const Thread& thread);
void on_publish(const Thread& thread, const void* p, bool fenced_only);
void on_observe(const Thread& thread, const void* p);
void on_block_exit(const Thread& last, const Block& block);
void on_copy(const void* p, size_t bytes, bool finished, const void* mbarrier);
void watch(const void* p, size_t bytes, const char* name, bool written);
void unwatch();
void wrote(const void* p, size_t bytes);
// An access that the compiler reports; `pc` is its place in the program.
void on_access(const void* p, size_t bytes, Kind kind, const void* pc);

inline void release(const Thread& thread, Clock& into) {
  if (enabled) on_release(thread, into);
}
inline void acquire(const Thread& thread, const Clock& from) {
  if (enabled) on_acquire(thread, from);
}
inline void meet(Thread* const* threads, int count) {
  if (enabled) on_meet(threads, count);
}
inline void touch(const Thread& as, const void* p, size_t bytes, Kind kind, Loc loc) {
  if (enabled) on_touch(as, p, bytes, kind, loc);
}
// Between the two the destination of an asynchronous copy belongs to the copy; a write has been reported just before.
// A copy that an mbarrier announces is known to those alone who waited for that.
inline void begin_copy(const void* p, size_t bytes) {
  if (enabled) on_copy(p, bytes, false, nullptr);
}
inline void finish_copy(const void* p, size_t bytes, const void* mbarrier = nullptr) {
  if (enabled) on_copy(p, bytes, true, mbarrier);
}
// Release and acquire through an object in memory (an atomic word, an mbarrier).
inline void publish(const Thread& thread, const void* p, bool fenced_only) {
  if (enabled) on_publish(thread, p, fenced_only);
}
inline void observe(const Thread& thread, const void* p) {
  if (enabled) on_observe(thread, p);
}

}  // namespace race
}  // namespace emu

#pragma GCC visibility pop
