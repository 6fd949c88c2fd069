// What the race checker says: who did what where, and to whom it is a surprise.
#include <bit>
#include <cstdio>

#include "emu/race_state.h"

namespace emu::race {
namespace {

const char anchor = 0;

}  // namespace

Site site_of(const void* p) { return Site(reinterpret_cast<intptr_t>(p) - reinterpret_cast<intptr_t>(&anchor)); }

const void* address_of(Site site) { return reinterpret_cast<const void*>(reinterpret_cast<intptr_t>(&anchor) + site); }

std::string where(const Access& a) {
  const void* p = address_of(a.site);
  return a.from_loc ? place(std::bit_cast<Loc>(p)) : line_of(p);
}

std::string who(const Access& a) {
  const Launch& launch = state.team->launch;
  if (a.team == state.team_id && a.thread >= state.team->threads.size()) return "a bulk copy issued";
  const unsigned block = state.first_block[a.team - state.first_team] + a.thread / launch.threads;
  const unsigned rank = a.thread % launch.threads;
  const dim3 grid = launch.shape.grid, size = launch.shape.block;
  char text[128];
  std::snprintf(text, sizeof text, "block (%u,%u,%u) thread (%u,%u,%u)", block % grid.x, block / grid.x % grid.y,
                block / grid.x / grid.y, rank % size.x, rank / size.x % size.y, rank / size.x / size.y);
  return text;
}

[[noreturn]] void report(const Here& here, const std::string& finding) {
  const std::string text = where(here.access) + ": " + describe(here.thread) + ": " + finding;
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
  if (!other.exit) text += " at " + where(other);
  if (other.team != state.team_id) text += " (nothing orders these blocks)";
  report(here, text);
}

}  // namespace emu::race
