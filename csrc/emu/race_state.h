// The race checker's own state and vocabulary, shared by race.cpp (what is checked), race_order.cpp (who knows of whom)
// and race_report.cpp (how it is said).
#pragma once
#include <string>
#include <unordered_map>
#include <vector>

#include "emu/race.h"
#include "emu/runtime.h"

#pragma GCC visibility push(hidden)

namespace emu::race {

// Where in the program: an offset from this library's start, of an instruction or of a source_location.
using Site = int32_t;

struct Access {
  uint32_t team = 0;  // 0: none
  uint32_t tick = 0;
  Site site = 0;
  uint16_t thread = 0;
  bool atomic : 1 = false, async : 1 = false, from_loc : 1 = false, exit : 1 = false;
};

// An atomic update does not replace an earlier plain write: others must still know of that one.
struct Cell {
  Access write, atomic, read[2];
  bool written = false, copying = false;
};

struct Region {
  uintptr_t begin, end;  // without guards
  size_t guard;
  std::string name;
  bool shared;
  std::vector<Cell> cells;
};

struct State {
  Team* team = nullptr;
  bool busy = false;    // inside the checker, whose own accesses do not count
  bool strict = false;  // accesses outside everything known are findings
  bool launched = true;
  uint32_t team_id = 0, first_team = 1;
  std::vector<uint32_t> first_block;  // of the teams of this launch
  std::vector<Region> shared, watched;
  std::vector<Clock> clocks, fenced;  // what each thread knows, and knew at its last fence
  Ticks fence_tick;                   // of each thread's last fence
  std::vector<Ticks> proxy_fenced;
  std::unordered_map<const void*, Clock> team_objects, launch_objects;
  // The copies that one mbarrier announces count as a thread of their own, numbered after the real ones.
  struct Copier {
    uint16_t number = 0;
    uint32_t tick = 0;
  };
  std::unordered_map<const void*, Copier> copiers;
};
extern thread_local State state;

struct Busy {
  Busy() { state.busy = true; }
  ~Busy() { state.busy = false; }
};

struct Here {
  const Thread& thread;
  Access access;
  size_t bytes;
  bool is_write;
};

Site site_of(const void* p);
const void* address_of(Site site);

// ---- who knows of whom
Clock& clock_of(const Thread& t);
void join(Clock& to, const Clock& from);
bool knows(const Thread& t, const Access& a);
State::Copier announce_copy(const void* mbarrier);

// ---- the region that an address lies in, or null
Region* find(std::vector<Region>& regions, uintptr_t address);

// ---- how it is said; each report ends the launch
std::string where(const Access& a);
std::string who(const Access& a);
std::string target(const Here& here, const Region& r, uintptr_t address);
[[noreturn]] void report(const Here& here, const std::string& finding);
[[noreturn]] void report_race(const Here& here, const Region& r, uintptr_t address, const Access& other, bool wrote);

}  // namespace emu::race

#pragma GCC visibility pop
