// Who knows of whom: the vector clocks behind the race checker. A thread's tick grows when it passes its knowledge on,
// so an access is known to a thread that has heard of its tick. Knowledge of other teams travels through atomics alone.
#include <algorithm>

#include "emu/race_state.h"

namespace emu::race {
namespace {

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

void next_tick(const Thread& t) { clock_of(t).own[size_t(t.number)]++; }

Clock& object(const void* p) {
  const bool shared = find(state.shared, reinterpret_cast<uintptr_t>(p)) != nullptr;
  return (shared ? state.team_objects : state.launch_objects)[p];
}

// What a relaxed atomic passes on: all that its thread knew at its last fence, and of what it learnt since (at a
// barrier, say) that which the writers had fenced off themselves.
Clock fenced_knowledge(const Thread& t) {
  Clock known = state.fenced[size_t(t.number)];
  const Ticks& now = clock_of(t).own;
  known.own.resize(now.size());
  for (size_t i = 0; i < state.fence_tick.size(); i++) {
    known.own[i] = std::max(known.own[i], std::min(now[i], state.fence_tick[i]));
  }
  return known;
}

}  // namespace

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

bool knows(const Thread& t, const Access& a) {
  if (a.team < state.first_team) return true;  // of an earlier launch, or none
  const Clock& clock = clock_of(t);
  const auto reaches = [&](const Ticks& ticks) { return a.thread < ticks.size() && ticks[a.thread] >= a.tick; };
  if (a.team == state.team_id) return a.thread == t.number || reaches(clock.own);
  const auto it = clock.foreign.find(a.team);
  return it != clock.foreign.end() && reaches(*it->second);
}

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

// What goes into a word that other teams may read is filed under this team's number.
void on_publish(const Thread& t, const void* p, bool fenced_only) {
  Busy busy;
  const Clock known = fenced_only ? fenced_knowledge(t) : clock_of(t);
  Clock& to = object(p);
  for (const auto& [team, ticks] : known.foreign) raise(to.foreign[team], ticks);
  raise(to.foreign[state.team_id], std::make_shared<const Ticks>(known.own));
  if (!fenced_only) next_tick(t);
}

State::Copier announce_copy(const void* mbarrier) {
  const auto [it, is_new] = state.copiers.try_emplace(mbarrier);
  State::Copier& copier = it->second;
  if (is_new) copier.number = uint16_t(state.team->threads.size() + state.copiers.size() - 1);
  Ticks ticks(copier.number + size_t(1), 0);
  ticks.back() = ++copier.tick;
  raise(object(mbarrier).foreign[state.team_id], std::make_shared<const Ticks>(std::move(ticks)));
  return copier;
}

void on_observe(const Thread& t, const void* p) {
  Busy busy;
  join(clock_of(t), object(p));
}

}  // namespace emu::race
