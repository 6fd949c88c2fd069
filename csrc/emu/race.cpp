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
#include <cstdlib>
#include <cstring>

#include "emu/race_state.h"

namespace emu::race {

constinit bool enabled = false;
thread_local State state;

Region* find(std::vector<Region>& regions, uintptr_t a) {
  for (Region& r : regions) {
    if (a >= r.begin && a < r.end) return &r;
  }
  return nullptr;
}

namespace {

constexpr size_t kTensorGuard = 256;  // bytes beside a watched tensor that count as outside it

// ---- regions
Region make_region(const void* p, size_t bytes, size_t guard, std::string name, bool shared) {
  const auto begin = reinterpret_cast<uintptr_t>(p);
  return {begin, begin + bytes, guard, std::move(name), shared, std::vector<Cell>(bytes)};
}

// The region that an address lies in, or else the nearest one whose guard it lies in.
Region* find_or_guard(uintptr_t a) {
  if (Region* r = find(state.shared, a)) return r;
  if (Region* r = find(state.watched, a)) return r;
  Region* nearest = nullptr;
  size_t best = SIZE_MAX;
  for (auto* regions : {&state.shared, &state.watched}) {
    for (Region& r : *regions) {
      const size_t distance = a < r.begin ? r.begin - a : a - r.end + 1;
      if (distance > r.guard || distance >= best) continue;
      best = distance;
      nearest = &r;
    }
  }
  return nearest;
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
    return w.thread < ticks.size() ? ticks[w.thread] : 0;
  };
  if (fenced_at(state.team->threads[w.thread]) >= w.tick || fenced_at(here.thread) >= w.tick) return;
  report(here, "missing fence_proxy_async: " + target(here, r, address) + " by the asynchronous proxy, written by " +
                   who(w) + " at " + where(w));
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
                     who(cell.write) + " at " + where(cell.write) + ", which has not been waited for");
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
  const auto of_run_time = [&] { return !from_loc && in_standard_library(address_of(site)); };
  Region* r = find_or_guard(address);
  if (!r) {
    if (state.strict && !is_private(address) && !of_run_time()) {
      report(here, std::string("out of bounds: ") + (is_write ? "write" : "read") + " of " + std::to_string(bytes) +
                       " bytes outside every known buffer");
    }
    return;
  }
  if (address < r->begin || address + bytes > r->end) {
    // Thread-local storage of a loaded library comes from malloc: threadIdx may lie in a tensor's guard.
    if (of_run_time() || is_private(address)) return;
    report(here, "out of bounds: " + target(here, *r, address) + ", which has " + std::to_string(r->end - r->begin) +
                     " bytes");
  }
  for (size_t i = 0; i < bytes; i++) check_byte(here, *r, address + i, r->cells[address - r->begin + i], reads);
}

bool listening() { return self && state.team && !state.busy; }

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
  state.copiers.clear();
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
  Region* r = block.arena ? find(state.shared, reinterpret_cast<uintptr_t>(block.arena)) : nullptr;
  if (!r) return;
  const uint32_t tick = clock_of(last).own[size_t(last.number)];
  const Site kernel = site_of(static_cast<const char*>(state.team->launch.kernel) + 1);
  const Access exit{state.team_id, tick, kernel, uint16_t(last.number), false, false, false, true};
  for (size_t i = 0; i < r->cells.size(); i++) {
    Cell& cell = r->cells[i];
    for (const Access* a : {&cell.write, &cell.atomic, &cell.read[0], &cell.read[1]}) {
      if (knows(last, *a)) continue;
      report({last, exit, 1, true}, "race: the block exits while its shared memory at +" + std::to_string(i) +
                                        " is still used by " + who(*a) + " at " + where(*a));
    }
    cell = Cell{};
    cell.write = exit;
    cell.written = true;
  }
}

// ---- accesses
void on_copy(const void* p, size_t bytes, bool finished, const void* mbarrier) {
  Busy busy;
  const auto address = reinterpret_cast<uintptr_t>(p);
  Region* r = find(state.shared, address);
  if (!r) return;
  State::Copier copier;
  if (mbarrier) copier = announce_copy(mbarrier);
  for (size_t i = 0; i < bytes; i++) {
    Cell& cell = r->cells[address - r->begin + i];
    cell.copying = !finished;
    if (!mbarrier) continue;
    cell.write.thread = copier.number;
    cell.write.tick = copier.tick;
  }
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
