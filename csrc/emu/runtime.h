// The emulator's inside: threads, warps, blocks, clusters and teams, and how a fiber gives way. Only the run time's own
// .cpp files include this. A team is the set of blocks that are alive together: one cluster (a lone block is a cluster
// of one), or the whole grid in cooperative mode. A team stays on one OS thread from its first instruction to its last.
#pragma once
#include <atomic>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "emu/emu.h"
#include "emu/fiber.h"
#include "emu/race.h"
#include "emu/symbol.h"

#pragma GCC visibility push(hidden)

namespace emu {

constexpr int kWarp = 32, kWarpgroup = 128, kNamedBarriers = 16;
constexpr size_t kGuardBytes = 512;  // poisoned bytes on either side of a block's shared memory
constexpr unsigned kMaxTeam = 4096;  // threads of a cooperative grid: all are alive together, each with its own stack
constexpr unsigned char kPoison = 0xff;  // NaN in every float type, -1 in every integer

// Read from the environment at each launch, so that a test can change it between two calls.
struct Options {
  enum class Schedule { fixed, reverse, random };
  Schedule schedule = Schedule::fixed;
  uint64_t seed = 0;
  bool eager_copies = false;
  unsigned os_threads = 1;
  double watchdog_seconds = 20;
  const char* record = nullptr;  // a file that gets a line for each launch
  bool dry = false;              // launches are checked and recorded, kernels do not run
  static Options from_environment();
};

struct Block;
struct Cluster;
struct Team;

enum class State : uint8_t { ready, collective, barrier, mbarrier, done };

struct Copy {
  void* dst;
  const void* src;
  unsigned bytes;  // 0: the destination is filled with zeros
  Loc loc;
};

struct BulkCopy {
  void* dst;
  const void* src;
  unsigned bytes;
  uint64_t* barrier;
};

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  uint3 index{};
  int rank = 0;    // in the block
  int number = 0;  // in the team
  State state = State::ready;
  const char* waits_in = "";
  Loc waits_at;
  uint64_t* mbarrier = nullptr;  // what a thread in State::mbarrier waits for
  bool mbarrier_parity = false;
  bool cluster_arrived = false;
  uint32_t cluster_generation = 0;
  std::vector<std::vector<Copy>> copies;  // cp.async groups, oldest first; the last one is open
};

// Lanes that meet in one warp operation. The operand of each lane stays on its own stack.
struct Rendezvous {
  uint32_t mask = 0, arrived = 0;
  const char* op = nullptr;
  Loc loc;
  void* operand[kWarp];
};

struct Warp {
  std::vector<Rendezvous> open;  // several only if their masks are disjoint
  uint32_t exited = 0;
};

struct Barrier {
  unsigned arrived = 0, expected = 0;
  uint32_t generation = 0;
  const char* op = nullptr;
  Loc loc;
  unsigned votes = 0;  // predicates that were true
  std::vector<Thread*> members, waiting;
  race::Clock clock;
  // Of the generation that completed last, for threads that come to look later:
  unsigned last_votes = 0, last_arrived = 0;
  race::Clock last_clock;
};

struct WgmmaOp {
  Half type;
  int columns;
  uint64_t a, b;
  bool accumulate;
  bool fragment = false;  // a lies in registers, and the columns of b side by side
  float* d[kWarpgroup] = {};
  std::vector<float> saved = {};  // the accumulators as they were at issue; empty if an earlier pending op holds them
  const uint32_t* registers[kWarpgroup] = {};  // of a, and what they held at issue
  std::vector<uint32_t> issued = {};
};

struct Warpgroup {
  unsigned arrived = 0;
  const char* op = nullptr;
  Loc loc;
  void* operand[kWarpgroup];
  std::vector<std::vector<WgmmaOp>> groups;  // oldest first; the last one is open
  bool fenced = false;
};

struct Block {
  Cluster* cluster = nullptr;
  uint3 index{};
  unsigned rank = 0;  // in the cluster
  unsigned alive = 0;
  Thread* threads = nullptr;
  unsigned count = 0;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  Barrier barriers[kNamedBarriers];  // 0 is __syncthreads
  std::unique_ptr<char, void (*)(void*)> memory{nullptr, std::free};
  char* arena = nullptr;  // shared memory, 1024-aligned, kGuardBytes of poison before and after it
  race::Clock exits;
};

struct Cluster {
  Team* team = nullptr;
  Block* blocks = nullptr;
  unsigned size = 0, alive = 0;
  Barrier barrier;
};

struct Launch {
  LaunchShape shape;
  const void* kernel;
  void (*body)(void*);
  void* context;
  Options options;
  Device device;
  unsigned threads, blocks;  // of a block, of the grid
};

struct Team {
  const Launch& launch;
  std::vector<Thread> threads;  // block by block
  std::vector<Block> blocks;
  std::vector<Cluster> clusters;
  unsigned alive = 0;
  std::vector<BulkCopy> bulk;                  // copies under way
  std::map<uint32_t*, Barrier> grid_barriers;  // by counter
  std::mt19937_64 random;
  Team(const Launch& launch, unsigned first_block, unsigned blocks);
};

// What one OS thread publishes for the watchdog.
struct Worker {
  std::atomic<uint64_t> switches{0};
  std::atomic<uint64_t> running{0};  // 1 + (block number << 16 | thread), 0 between fibers
};

void run_team(const Launch& launch, unsigned first_block, unsigned blocks, Worker& worker);

extern constinit thread_local Thread* self;  // the running fiber, null on the scheduler's stack

// Gives the fiber up for good; its launch throws the message.
[[noreturn]] void abandon(const std::string& message);

// Parks the running fiber; returns when somebody made it ready and the scheduler came round.
void give_way(State state, const char* op, Loc loc);

// A barrier may also become complete because a thread exits: it is no longer waited for.
bool complete_if_full(Barrier& barrier, unsigned expected);
void leave_barriers(Thread& thread);

bool mbarrier_open(const uint64_t* barrier, bool parity);
void finish_bulk_copy(Team& team, size_t which);

// Meets all lanes of `mask`; the last one calls compute(operands, mask), where absent lanes have a null operand.
using Compute = void (*)(void** operands, uint32_t mask);
void warp_collective(uint32_t mask, const char* op, void* operand, Compute compute, Loc loc);

inline const Options& options() { return self->block->cluster->team->launch.options; }
// Instructions of sm_90 are an error on an emulated sm_80, where a GPU would trap.
void require_sm90(const char* op, Loc loc);
std::string place(Loc loc);
std::string describe(const Thread& thread);
std::string describe(const Block& block);

}  // namespace emu

#pragma GCC visibility pop
