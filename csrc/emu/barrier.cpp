// Barriers of a block, of named groups of threads, of a cluster and of a cooperative grid. The block and cluster
// barriers count threads that have not exited, as the hardware does; named barriers count to a given number.
#include <cstring>

#include "emu/runtime.h"

namespace emu {
namespace {

void arrive(Barrier& b, const char* op, Loc loc) {
  if (b.arrived++ == 0) {
    b.op = op;
    b.loc = loc;
  }
  b.members.push_back(self);
  race::release(*self, b.clock);
}

// Parks the running thread unless its own arrival has completed the barrier.
void wait(Barrier& b, unsigned expected, const char* op, Loc loc) {
  b.waiting.push_back(self);
  if (!complete_if_full(b, expected)) give_way(State::barrier, op, loc);
}

bool same_place(Loc a, Loc b) {
  return a.line() == b.line() && a.column() == b.column() && !std::strcmp(a.file_name(), b.file_name());
}

// A named barrier takes warps, not threads: a warp that comes with some lanes only would be counted whole by hardware.
void check_whole_warps(const Barrier& b, const Block& block, int id, Loc loc) {
  std::vector<uint32_t> seen(block.warps.size());
  for (const Thread* t : b.members) seen[t->rank / kWarp] |= 1u << t->rank % kWarp;
  for (size_t w = 0; w < seen.size(); w++) {
    const unsigned lanes = std::min<unsigned>(kWarp, block.count - unsigned(w) * kWarp);
    const uint32_t all = lanes == 32 ? ~0u : (1u << lanes) - 1;
    if (seen[w] && (seen[w] | block.warps[w].exited) != all) {
      fail("named barrier " + std::to_string(id) + ": only some lanes of warp " + std::to_string(w) + " arrived", loc);
    }
  }
}

}  // namespace

bool complete_if_full(Barrier& b, unsigned expected) {
  if (b.arrived == 0 || b.arrived != expected) return false;
  b.last_votes = b.votes;
  b.last_arrived = b.arrived;
  b.last_clock = std::move(b.clock);
  b.clock = {};
  b.arrived = b.votes = 0;
  b.generation++;
  for (Thread* t : b.waiting) {
    race::acquire(*t, b.last_clock);
    t->state = State::ready;
  }
  b.waiting.clear();
  b.members.clear();
  return true;
}

int block_barrier(const char* op, Vote vote, bool predicate, Loc loc) {
  Block& block = *self->block;
  Barrier& b = block.barriers[0];
  if (b.arrived && !same_place(b.loc, loc)) {
    fail(std::string("divergent barrier: this thread is in ") + op + ", others wait in " + b.op + " at " + place(b.loc),
         loc);
  }
  arrive(b, op, loc);
  b.votes += predicate;
  wait(b, block.alive, op, loc);
  switch (vote) {
    case Vote::any:
      return b.last_votes != 0;
    case Vote::all:
      return b.last_votes == b.last_arrived;
    case Vote::count:
      return int(b.last_votes);
    case Vote::none:
      break;
  }
  return 0;
}

void named_barrier(int id, int threads, bool wants_to_wait, Loc loc) {
  const char* op = wants_to_wait ? "named_barrier_sync" : "named_barrier_arrive";
  Block& block = *self->block;
  if (id < 1 || id >= kNamedBarriers)
    fail(std::string(op) + ": id must be in [1, 15]; 0 belongs to __syncthreads", loc);
  if (threads < kWarp || threads % kWarp) fail(std::string(op) + ": the count must be a multiple of 32", loc);
  if (unsigned(threads) > block.count) fail(std::string(op) + ": the count exceeds the block", loc);
  Barrier& b = block.barriers[id];
  if (b.arrived && b.expected != unsigned(threads)) {
    fail(std::string(op) + ": counts to " + std::to_string(threads) + ", others to " + std::to_string(b.expected) +
             " at " + place(b.loc),
         loc);
  }
  b.expected = unsigned(threads);
  arrive(b, op, loc);
  if (b.arrived == b.expected) check_whole_warps(b, block, id, loc);
  if (wants_to_wait)
    wait(b, b.expected, op, loc);
  else
    complete_if_full(b, b.expected);
}

void cluster_arrive(Loc loc) {
  Cluster& cluster = *self->block->cluster;
  if (self->cluster_arrived) fail("cluster_arrive: called twice without cluster_wait", loc);
  self->cluster_arrived = true;
  self->cluster_generation = cluster.barrier.generation;
  arrive(cluster.barrier, "cluster_arrive", loc);
  complete_if_full(cluster.barrier, cluster.alive);
}

void cluster_wait(Loc loc) {
  Barrier& b = self->block->cluster->barrier;
  if (!self->cluster_arrived) fail("cluster_wait: without cluster_arrive", loc);
  self->cluster_arrived = false;
  if (b.generation != self->cluster_generation) {
    race::acquire(*self, b.last_clock);
  } else {
    b.waiting.push_back(self);
    give_way(State::barrier, "cluster_wait", loc);
  }
}

void grid_barrier(uint32_t* counter, unsigned blocks, Loc loc) {
  Team& team = *self->block->cluster->team;
  if (blocks == 0 || blocks > team.launch.blocks) fail("grid_barrier: more blocks than the grid has", loc);
  if (blocks > 1 && !team.launch.shape.cooperative) {
    fail("grid_barrier: the launch is not cooperative, so other blocks are not alive", loc);
  }
  Barrier& b = team.grid_barriers[counter];
  const unsigned expected = blocks * self->block->count;
  if (b.arrived == 0) {
    b.expected = expected;
    if (*counter % blocks) fail("grid_barrier: the counter was not zero at the launch", loc);
  } else if (b.expected != expected) {
    fail("grid_barrier: blocks disagree on their number", loc);
  }
  race::touch(*self, counter, sizeof *counter, race::Kind::atomic_write, loc);
  arrive(b, "grid_barrier", loc);
  if (b.arrived == expected) *counter += blocks;
  wait(b, expected, "grid_barrier", loc);
}

void leave_barriers(Thread& t) {
  Block& block = *t.block;
  Cluster& cluster = *block.cluster;
  Barrier& b = cluster.barrier;
  // An exited thread counts as arrived for ever; one that arrived just now must not be counted twice.
  if (t.cluster_arrived && t.cluster_generation == b.generation) b.arrived--;
  block.alive--;
  cluster.alive--;
  cluster.team->alive--;
  complete_if_full(block.barriers[0], block.alive);
  complete_if_full(b, cluster.alive);
}

}  // namespace emu
