// The race, bounds and initialisation checker. Each byte of shared memory and of watched tensors remembers its last
// write and two reads: by which thread of which team, at which tick of that thread, and where in the program. Vector
// clocks say what a thread may rely on: barriers join them, mbarriers and fenced atomics pass them on, shuffles and
// votes do not (as on hardware). Two accesses of which one is a plain write race if neither thread could know of the
// other's. Ticks only grow when a thread passes its knowledge on, so one comparison decides. The first finding ends the
// launch, before the access itself is performed.
#include "emu/race.h"

#include <dlfcn.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unordered_map>

#include "emu/runtime.h"

namespace emu::race {

constinit bool enabled = false;

namespace {

constexpr size_t kTensorGuard = 256;  // bytes beside a watched tensor that count as outside it

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
};
thread_local State state;

struct Busy {
  Busy() { state.busy = true; }
  ~Busy() { state.busy = false; }
};

const char anchor = 0;

Site site_of(const void* p) { return Site(reinterpret_cast<intptr_t>(p) - reinterpret_cast<intptr_t>(&anchor)); }

// ---- clocks
void raise(Ticks& to, const Ticks& from) {
  if (to.size() < from.size()) to.resize(from.size());
  for (size_t i = 0; i < from.size(); i++) to[i] = std::max(to[i], from[i]);
}

void raise(std::shared_ptr<const Ticks>& to, const std::shared_ptr<const Ticks>& from) {
  if (to == from || !from) return;
  if (!to) {
    to = from;
    return;
  }
  auto sum = std::make_shared<Ticks>(*to);
  raise(*sum, *from);
  to = sum;
}

void join(Clock& to, const Clock& from) {
  raise(to.own, from.own);
  for (const auto& [team, ticks] : from.foreign) {
    if (team == state.team_id)
      raise(to.own, *ticks);
    else
      raise(to.foreign[team], ticks);
  }
}

Clock& clock_of(const Thread& t) { return state.clocks[size_t(t.number)]; }

void next_tick(const Thread& t) { clock_of(t).own[size_t(t.number)]++; }

bool knows(const Thread& t, const Access& a) {
  if (a.team < state.first_team) return true;  // of an earlier launch, or none
  const Clock& clock = clock_of(t);
  if (a.team == state.team_id) return a.thread == t.number || clock.own[a.thread] >= a.tick;
  const auto it = clock.foreign.find(a.team);
  return it != clock.foreign.end() && (*it->second)[a.thread] >= a.tick;
}

// ---- reports
std::string where(Site site, bool from_loc) {
  const char* p = &anchor + site;
  if (from_loc) return place(std::bit_cast<Loc>(p));
  return line_of(p);
}

std::string who(const Access& a) {
  const Launch& launch = state.team->launch;
  const unsigned block = state.first_block[a.team - state.first_team] + a.thread / launch.threads;
  const unsigned rank = a.thread % launch.threads;
  const dim3 grid = launch.shape.grid, size = launch.shape.block;
  char text[128];
  std::snprintf(text, sizeof text, "block (%u,%u,%u) thread (%u,%u,%u)", block % grid.x, block / grid.x % grid.y,
                block / grid.x / grid.y, rank % size.x, rank / size.x % size.y, rank / size.x / size.y);
  return text;
}

struct Here {
  const Thread& thread;
  Access access;
  size_t bytes;
  bool is_write;
};

[[noreturn]] void report(const Here& here, const std::string& finding) {
  const std::string text =
      where(here.access.site, here.access.from_loc) + ": " + describe(here.thread) + ": " + finding;
  state.busy = false;
  abandon(text);
}

std::string target(const Here& here, const Region& r, uintptr_t address) {
  const char* what = here.access.atomic ? "atomic " : "";
  return what + std::string(here.is_write ? "write" : "read") + " of " + std::to_string(here.bytes) + " bytes at " +
         r.name + (address >= r.begin ? "+" : "-") +
         std::to_string(address >= r.begin ? address - r.begin : r.begin - address);
}

[[noreturn]] void report_race(const Here& here, const Region& r, uintptr_t address, const Access& other, bool wrote) {
  std::string text = "race: " + target(here, r, address) + " conflicts with ";
  if (other.exit)
    text += "the exit of the block that owns it: ";
  else
    text += std::string("an earlier ") + (wrote ? "write" : "read") + " by ";
  text += who(other);
  if (!other.exit) text += " at " + where(other.site, other.from_loc);
  if (other.team != state.team_id) text += " (nothing orders these blocks)";
  report(here, text);
}

// ---- regions
Region make_region(const void* p, size_t bytes, size_t guard, std::string name, bool shared) {
  const auto begin = reinterpret_cast<uintptr_t>(p);
  return {begin, begin + bytes, guard, std::move(name), shared, std::vector<Cell>(bytes)};
}

Region* find(std::vector<Region>& regions, uintptr_t a, size_t guard_used) {
  for (Region& r : regions) {
    const size_t guard = guard_used ? r.guard : 0;
    if (a + guard >= r.begin && a < r.end + guard) return &r;
  }
  return nullptr;
}

Region* find(uintptr_t a) {
  if (Region* r = find(state.shared, a, false)) return r;
  if (Region* r = find(state.watched, a, false)) return r;
  if (Region* r = find(state.shared, a, true)) return r;
  return find(state.watched, a, true);
}

// Built-in variables, stacks (operands of collectives are read across fibers), the launch's arguments, constants.
bool is_private(uintptr_t a) {
  for (const void* builtin : {static_cast<const void*>(&threadIdx), static_cast<const void*>(&blockIdx),
                              static_cast<const void*>(&blockDim), static_cast<const void*>(&gridDim)}) {
    const auto begin = reinterpret_cast<uintptr_t>(builtin);
    if (a >= begin && a < begin + sizeof(uint3)) return true;
  }
  for (const Thread& t : state.team->threads) {
    const auto stack = reinterpret_cast<uintptr_t>(t.fiber.stack);
    if (a >= stack && a < stack + kStackBytes) return true;
  }
  constexpr uintptr_t kArguments = 1 << 16;
  const auto context = reinterpret_cast<uintptr_t>(state.team->launch.context);
  if (a + kArguments >= context && a < context + kArguments) return true;
  Dl_info info;
  return dladdr(reinterpret_cast<void*>(a), &info) != 0;
}

// ---- the checks of one byte
void check_proxy(const Here& here, const Region& r, uintptr_t address, const Cell& cell) {
  const Access& w = cell.write;
  if (!r.shared || w.async || w.team != state.team_id) return;
  const auto fenced_at = [&](const Thread& t) {
    const Ticks& ticks = state.proxy_fenced[size_t(t.number)];
    return ticks.empty() ? 0 : ticks[w.thread];
  };
  if (fenced_at(state.team->threads[w.thread]) >= w.tick || fenced_at(here.thread) >= w.tick) return;
  report(here, "missing fence_proxy_async: " + target(here, r, address) + " by the asynchronous proxy, written by " +
                   who(w) + " at " + where(w.site, w.from_loc));
}

void remember_read(Cell& cell, const Thread& thread, const Access& access) {
  for (Access& r : cell.read) {
    if (r.team == access.team && r.thread == access.thread) {
      r = access;
      return;
    }
  }
  for (Access& r : cell.read) {
    if (knows(thread, r)) {
      r = access;
      return;
    }
  }
  cell.read[1] = access;  // of more than two unordered readers the first and the last are kept
}

void check_byte(const Here& here, const Region& r, uintptr_t address, Cell& cell, bool reads) {
  if (reads && !cell.written) {
    report(here, "uninitialised: " + target(here, r, address) + ", which nothing has written");
  }
  const bool atomic = here.access.atomic;
  if (cell.copying) {
    report(here, "race: " + target(here, r, address) + " conflicts with an earlier asynchronous copy by " +
                     who(cell.write) + " at " + where(cell.write.site, cell.write.from_loc) +
                     ", which has not been waited for");
  }
  if (!knows(here.thread, cell.write)) report_race(here, r, address, cell.write, true);
  if (!atomic && !knows(here.thread, cell.atomic)) report_race(here, r, address, cell.atomic, true);
  if (here.access.async && reads) check_proxy(here, r, address, cell);
  if (!here.is_write) return remember_read(cell, here.thread, here.access);
  for (const Access& read : cell.read) {
    if (!knows(here.thread, read) && !(read.atomic && atomic)) report_race(here, r, address, read, false);
  }
  cell.written = true;
  if (atomic) {
    cell.atomic = here.access;
    return;
  }
  cell.write = here.access;
  cell.atomic = cell.read[0] = cell.read[1] = {};
}

void check(const Thread& as, const void* p, size_t bytes, Kind kind, Site site, bool from_loc) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  const bool atomic = kind == Kind::atomic_read || kind == Kind::atomic_write;
  const bool async = kind == Kind::async_read || kind == Kind::async_write;
  const bool is_write = kind == Kind::write || kind == Kind::atomic_write || kind == Kind::async_write;
  const bool reads = !is_write || kind == Kind::atomic_write;
  const uint32_t tick = clock_of(as).own[size_t(as.number)];
  const Here here{
      as, {state.team_id, tick, site, uint16_t(as.number), atomic, async, from_loc, false}, bytes, is_write};
  const auto of_run_time = [&] { return !from_loc && in_standard_library(&anchor + site); };
  Region* r = find(address);
  if (!r) {
    if (state.strict && !is_private(address) && !of_run_time()) {
      report(here, std::string("out of bounds: ") + (is_write ? "write" : "read") + " of " + std::to_string(bytes) +
                       " bytes outside every known buffer");
    }
    return;
  }
  if (address < r->begin || address + bytes > r->end) {
    if (of_run_time()) return;
    report(here, "out of bounds: " + target(here, *r, address) + ", which has " + std::to_string(r->end - r->begin) +
                     " bytes");
  }
  for (size_t i = 0; i < bytes; i++) check_byte(here, *r, address + i, r->cells[address - r->begin + i], reads);
}

bool listening() { return self && state.team && !state.busy; }

Clock& object(const void* p) {
  const bool shared = find(state.shared, reinterpret_cast<uintptr_t>(p), false) != nullptr;
  return (shared ? state.team_objects : state.launch_objects)[p];
}

}  // namespace

// ---- launches and teams
void begin_launch() {
  Busy busy;
  state.first_team = state.team_id + 1;
  state.first_block.clear();
  state.launch_objects.clear();
  state.launched = true;
  const char* strict = std::getenv("TOKENCOMP_EMU_STRICT");
  state.strict = strict && std::strcmp(strict, "0") != 0;
}

void end_launch() { state.team = nullptr; }

void begin_team(Team& team, size_t smem) {
  Busy busy;
  const size_t threads = team.threads.size();
  state.team = &team;
  state.team_id++;
  const dim3 grid = team.launch.shape.grid;
  const uint3 first = team.blocks[0].index;
  state.first_block.push_back(first.x + grid.x * (first.y + grid.y * first.z));
  state.team_objects.clear();
  state.clocks.assign(threads, {});
  for (size_t t = 0; t < threads; t++) {
    state.clocks[t].own.assign(threads, 0);
    state.clocks[t].own[t] = 1;
  }
  state.fenced.assign(threads, {});
  state.fence_tick.assign(threads, 0);
  state.proxy_fenced.assign(threads, {});
  state.shared.clear();
  for (const Block& b : team.blocks) {
    if (!b.arena) continue;
    const uint3 i = b.index;
    const std::string name =
        "shared memory of block (" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
    state.shared.push_back(make_region(b.arena, smem, kGuardBytes, name, true));
  }
}

void end_team() {
  state.team = nullptr;
  state.shared.clear();
}

// The last thread's exit counts as a write to all of the block's shared memory: a peer must have finished with it.
void on_block_exit(const Thread& last, const Block& block) {
  Busy busy;
  join(clock_of(last), block.exits);
  Region* r = block.arena ? find(state.shared, reinterpret_cast<uintptr_t>(block.arena), false) : nullptr;
  if (!r) return;
  const uint32_t tick = clock_of(last).own[size_t(last.number)];
  const Site kernel = site_of(static_cast<const char*>(state.team->launch.kernel) + 1);
  const Access exit{state.team_id, tick, kernel, uint16_t(last.number), false, false, false, true};
  for (size_t i = 0; i < r->cells.size(); i++) {
    Cell& cell = r->cells[i];
    for (const Access* a : {&cell.write, &cell.atomic, &cell.read[0], &cell.read[1]}) {
      if (knows(last, *a)) continue;
      report({last, exit, 1, true}, "race: the block exits while its shared memory at +" + std::to_string(i) +
                                        " is still used by " + who(*a) + " at " + where(a->site, a->from_loc));
    }
    cell = Cell{};
    cell.write = exit;
    cell.written = true;
  }
}

// ---- order
void on_release(const Thread& t, Clock& into) {
  Busy busy;
  join(into, clock_of(t));
  next_tick(t);
}

void on_acquire(const Thread& t, const Clock& from) {
  Busy busy;
  join(clock_of(t), from);
}

void on_meet(Thread* const* threads, int count) {
  Busy busy;
  Clock all;
  for (int i = 0; i < count; i++) join(all, clock_of(*threads[i]));
  for (int i = 0; i < count; i++) {
    join(clock_of(*threads[i]), all);
    next_tick(*threads[i]);
  }
}

void on_fence(const Thread& t) {
  Busy busy;
  state.fenced[size_t(t.number)] = clock_of(t);
  state.fence_tick[size_t(t.number)] = clock_of(t).own[size_t(t.number)];
  next_tick(t);
}

void on_proxy_fence(const Thread& t) {
  Busy busy;
  state.proxy_fenced[size_t(t.number)] = clock_of(t).own;
  next_tick(t);
}

// What a relaxed atomic passes on: all that its thread knew at its last fence, and of what it learnt since (at a
// barrier, say) that which the writers had fenced off themselves.
Clock fenced_knowledge(const Thread& t) {
  Clock known = state.fenced[size_t(t.number)];
  const Ticks& now = clock_of(t).own;
  known.own.resize(now.size());
  for (size_t i = 0; i < now.size(); i++) known.own[i] = std::max(known.own[i], std::min(now[i], state.fence_tick[i]));
  return known;
}

// What goes into a word that other teams may read is filed under this team's number.
void on_publish(const Thread& t, const void* p, bool fenced_only) {
  Busy busy;
  const Clock known = fenced_only ? fenced_knowledge(t) : clock_of(t);
  Clock& to = object(p);
  for (const auto& [team, ticks] : known.foreign) raise(to.foreign[team], ticks);
  raise(to.foreign[state.team_id], std::make_shared<const Ticks>(known.own));
  if (!fenced_only) next_tick(t);
}

void on_observe(const Thread& t, const void* p) {
  Busy busy;
  join(clock_of(t), object(p));
}

// ---- accesses
void on_copy(const void* p, size_t bytes, bool finished) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  Region* r = find(state.shared, address, false);
  for (size_t i = 0; r && i < bytes; i++) r->cells[address - r->begin + i].copying = !finished;
}

void on_touch(const Thread& as, const void* p, size_t bytes, Kind kind, Loc loc) {
  if (!listening()) return;
  Busy busy;
  check(as, p, bytes, kind, site_of(std::bit_cast<const void*>(loc)), true);
}

void on_access(const void* p, size_t bytes, Kind kind, const void* pc) {
  if (!listening()) return;
  Busy busy;
  check(*self, p, bytes, kind, site_of(pc), false);
}

// ---- tensors. The first watch() after a launch begins a new set.
void watch(const void* p, size_t bytes, const char* name, bool written) {
  Busy busy;
  if (state.launched) state.watched.clear();
  state.launched = false;
  if (bytes == 0) return;
  state.watched.push_back(make_region(p, bytes, kTensorGuard, name, false));
  if (written) wrote(p, bytes);
}

void unwatch() {
  Busy busy;
  state.watched.clear();
}

void wrote(const void* p, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(p), end = begin + bytes;
  for (Region& r : state.watched) {
    for (uintptr_t a = std::max(begin, r.begin); a < std::min(end, r.end); a++) r.cells[a - r.begin].written = true;
  }
}

}  // namespace emu::race
