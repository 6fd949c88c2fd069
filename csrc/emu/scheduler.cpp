// Launching: checks the configuration as the driver would, forms teams of blocks and runs their fibers until all have
// exited. A warp runs as far as it can before the next one gets its turn, which keeps few stacks hot; the random
// schedule shuffles warps and lanes and now and then takes the turn away. Errors are thrown here, on the launching
// thread's stack.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <thread>

#include "emu/record.h"
#include "emu/runtime.h"
#include "emu/watchdog.h"

constinit thread_local uint3 threadIdx{}, blockIdx{};
constinit thread_local dim3 blockDim{}, gridDim{};

namespace emu {

constinit thread_local Thread* self = nullptr;

namespace {

thread_local Fiber scheduler;
thread_local std::string failure;

uint64_t volume(dim3 d) { return uint64_t(d.x) * d.y * d.z; }

uint3 unflatten(unsigned i, dim3 d) { return {i % d.x, i / d.x % d.y, i / d.x / d.y}; }

// What a thread does after its last instruction.
void exit_thread(Thread& t) {
  Block& block = *t.block;
  for (const auto& group : t.copies) {
    if (!group.empty()) fail("thread exits with cp.async copies it never waited for", group.front().loc);
  }
  Warp& warp = block.warps[t.rank / kWarp];
  for (const Rendezvous& r : warp.open) {
    if (r.mask >> t.rank % kWarp & 1) fail(std::string("thread exits while its warp waits for it in ") + r.op, r.loc);
  }
  warp.exited |= 1u << t.rank % kWarp;
  race::release(t, block.exits);
  leave_barriers(t);
  if (block.alive == 0) {
    if (race::enabled) race::on_block_exit(t, block);
    // Shared memory dies with the block: a peer of the cluster that reads it later reads poison.
    if (block.arena) std::memset(block.arena, kPoison, block.cluster->team->launch.shape.smem);
  }
}

void entry() {
  const Launch& launch = self->block->cluster->team->launch;
  std::string thrown;
  try {
    launch.body(launch.context);
  } catch (const std::exception& e) {
    thrown = std::string("exception in device code: ") + e.what();
  }
  if (!thrown.empty()) abandon(kernel_at(launch.kernel) + ": " + describe(*self) + ": " + thrown);
  exit_thread(*self);
  self->state = State::done;
  switch_to(self->fiber, scheduler);
}

void resume(Thread& t, Worker& worker) {
  const Block& block = *t.block;
  self = &t;
  threadIdx = t.index;
  blockIdx = block.index;
  const uint64_t block_number =
      block.index.x + uint64_t(gridDim.x) * (block.index.y + uint64_t(gridDim.y) * block.index.z);
  worker.running.store((block_number << 16 | uint64_t(t.rank)) + 1, std::memory_order_relaxed);
  worker.switches.fetch_add(1, std::memory_order_relaxed);
  switch_to(scheduler, t.fiber);
  worker.running.store(0, std::memory_order_relaxed);
  self = nullptr;
  if (!failure.empty()) {
    std::string message;
    message.swap(failure);
    throw std::runtime_error(message);
  }
}

class Runner {
 public:
  Runner(Team& team, Worker& worker) : team_(team), worker_(worker), schedule_(team.launch.options.schedule) {
    for (Block& block : team.blocks) {
      for (unsigned first = 0; first < block.count; first += kWarp) {
        auto& lanes = warps_.emplace_back();
        for (unsigned i = first; i < std::min<unsigned>(block.count, first + kWarp); i++) {
          lanes.push_back(&block.threads[i]);
        }
      }
    }
    if (schedule_ == Options::Schedule::reverse) {
      std::reverse(warps_.begin(), warps_.end());
      for (auto& lanes : warps_) std::reverse(lanes.begin(), lanes.end());
    }
  }

  void run() {
    while (team_.alive) {
      if (random()) shuffle();
      bool progress = false;
      for (auto& lanes : warps_) progress |= run_warp(lanes);
      if (!team_.bulk.empty() && (!progress || (random() && team_.random() % 4 == 0))) {
        finish_bulk_copy(team_, random() ? team_.random() % team_.bulk.size() : 0);
        progress = true;
      }
      if (!progress && team_.alive) throw std::runtime_error(deadlock());
    }
  }

 private:
  bool random() const { return schedule_ == Options::Schedule::random; }

  void shuffle() {
    std::shuffle(warps_.begin(), warps_.end(), team_.random);
    for (auto& lanes : warps_) std::shuffle(lanes.begin(), lanes.end(), team_.random);
  }

  // One warp, as far as it gets. A schedule that shuffled single threads would be nearly lock-step and find little.
  bool run_warp(std::vector<Thread*>& lanes) {
    bool progress = false;
    for (bool again = true; again;) {
      again = false;
      for (Thread* t : lanes) {
        if (t->state == State::mbarrier && mbarrier_open(t->mbarrier, t->mbarrier_parity)) t->state = State::ready;
        if (t->state != State::ready) continue;
        again = progress = true;
        resume(*t, worker_);
      }
      if (random() && team_.random() % 64 == 0) break;
    }
    return progress;
  }

  std::string deadlock() const {
    std::string text = kernel_at(team_.launch.kernel) + ": deadlock: no thread can run";
    int shown = 0;
    for (const Thread& t : team_.threads) {
      if (t.state == State::done) continue;
      if (++shown > 8) return text + "\n  ...";
      text += "\n  " + describe(t) + " waits in " + t.waits_in + " at " + place(t.waits_at);
    }
    return text;
  }

  Team& team_;
  Worker& worker_;
  Options::Schedule schedule_;
  std::vector<std::vector<Thread*>> warps_;
};

// Bytes up to the outermost one that is no longer poison, going away from shared memory in steps of `step`.
size_t damage(const char* guard, ptrdiff_t step) {
  size_t bytes = 0;
  for (size_t i = 0; i < kGuardBytes; i++) {
    if (static_cast<unsigned char>(guard[ptrdiff_t(i) * step]) != kPoison) bytes = i + 1;
  }
  return bytes;
}

void check_guards(const Block& block, size_t smem, const void* kernel) {
  if (!block.arena) return;
  const size_t before = damage(block.arena - 1, -1), after = damage(block.arena + smem, 1);
  if (!before && !after) return;
  throw std::runtime_error(
      kernel_at(kernel) + ": out of bounds: " + describe(block) + " wrote " + std::to_string(before ? before : after) +
      " bytes " + (before ? "before" : "past the end of") + " its " + std::to_string(smem) + " bytes of shared memory");
}

void check_pending(const Team& team) {
  for (const Block& block : team.blocks) {
    for (int id = 1; id < kNamedBarriers; id++) {
      const Barrier& b = block.barriers[id];
      if (b.arrived) {
        throw std::runtime_error(place(b.loc) + ": block ends with " + std::to_string(b.arrived) + " of " +
                                 std::to_string(b.expected) + " arrivals at named barrier " + std::to_string(id));
      }
    }
    check_guards(block, team.launch.shape.smem, team.launch.kernel);
  }
  if (!team.bulk.empty()) {
    throw std::runtime_error(kernel_at(team.launch.kernel) + ": block ends with bulk copies under way");
  }
}

void check_configuration(const LaunchShape& s, const Device& device, const void* kernel, bool dry) {
  auto refuse = [&](const std::string& why) {
    throw std::runtime_error(kernel_at(kernel) + ": invalid launch: " + why);
  };
  const uint64_t threads = volume(s.block), blocks = volume(s.grid);
  if (self) refuse("from device code");
  if (threads == 0 || blocks == 0) refuse("empty grid or block");
  if (threads > 1024 || s.block.z > 64) refuse(std::to_string(threads) + " threads in a block, at most 1024");
  if (blocks > 0x7fffffff || s.grid.y > 65535 || s.grid.z > 65535) refuse("grid too large");
  if (s.smem > device.max_smem) {
    refuse(std::to_string(s.smem) + " bytes of shared memory, at most " + std::to_string(device.max_smem));
  }
  if (s.cluster == 0) refuse("cluster of no blocks");
  if (s.cluster > 1 && device.max_cluster == 1) refuse("this device has no clusters");
  if (s.cluster > 16) refuse("cluster of " + std::to_string(s.cluster) + " blocks, at most 16");
  if (s.grid.x % s.cluster) refuse("grid.x is not a multiple of the cluster size");
  if (s.cooperative && !dry && threads * blocks > kMaxTeam) {
    refuse("a cooperative grid of " + std::to_string(threads * blocks) +
           " threads: all would have to be alive together, " + "the emulator takes at most " +
           std::to_string(kMaxTeam));
  }
}

// Blocks are independent unless they share a cluster or the grid is cooperative, so teams may go to several OS threads.
void run_teams(const Launch& launch, const std::vector<unsigned>& order, unsigned team_blocks, Watchdog& watchdog) {
  std::atomic<size_t> next{0};
  std::atomic<bool> stop{false};
  std::exception_ptr error;
  auto work = [&](Worker& worker) {
    try {
      for (size_t i; !stop && (i = next++) < order.size();)
        run_team(launch, order[i] * team_blocks, team_blocks, worker);
    } catch (...) {
      if (!stop.exchange(true)) error = std::current_exception();
    }
  };
  std::vector<std::thread> helpers;
  for (size_t i = 1; i < watchdog.workers(); i++) helpers.emplace_back([&, i] { work(watchdog.worker(i)); });
  work(watchdog.worker(0));
  for (auto& t : helpers) t.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace

void require_sm90(const char* op, Loc loc) {
  if (self->block->cluster->team->launch.device.major < 9) fail(std::string(op) + ": needs sm_90", loc);
}

std::string place(Loc loc) { return std::string(loc.file_name()) + ":" + std::to_string(loc.line()); }

std::string describe(const Block& b) {
  char text[64];
  std::snprintf(text, sizeof text, "block (%u,%u,%u)", b.index.x, b.index.y, b.index.z);
  return text;
}

std::string describe(const Thread& t) {
  char text[64];
  std::snprintf(text, sizeof text, " thread (%u,%u,%u)", t.index.x, t.index.y, t.index.z);
  return describe(*t.block) + text;
}

void fail(const std::string& message, Loc loc) {
  if (!self) throw std::runtime_error(place(loc) + ": " + message);
  abandon(place(loc) + ": " + describe(*self) + ": " + message);
}

void abandon(const std::string& message) {
  failure = message;
  switch_to(self->fiber, scheduler);
  __builtin_unreachable();
}

void give_way(State state, const char* op, Loc loc) {
  self->state = state;
  self->waits_in = op;
  self->waits_at = loc;
  switch_to(self->fiber, scheduler);
}

Team::Team(const Launch& launch, unsigned first_block, unsigned count)
    : launch(launch),
      threads(size_t(count) * launch.threads),
      blocks(count),
      clusters(count / launch.shape.cluster),
      alive(count * launch.threads),
      random(launch.options.seed * 1000003 + first_block) {
  static thread_local Stacks stacks;
  const LaunchShape& shape = launch.shape;
  for (unsigned c = 0; c < clusters.size(); c++) {
    clusters[c].team = this;
    clusters[c].blocks = &blocks[c * shape.cluster];
    clusters[c].size = shape.cluster;
    clusters[c].alive = shape.cluster * launch.threads;
  }
  for (unsigned i = 0; i < count; i++) {
    Block& b = blocks[i];
    b.cluster = &clusters[i / shape.cluster];
    b.rank = i % shape.cluster;
    b.index = unflatten(first_block + i, shape.grid);
    b.alive = b.count = launch.threads;
    b.threads = &threads[size_t(i) * launch.threads];
    b.warps.resize((launch.threads + kWarp - 1) / kWarp);
    b.warpgroups.resize(launch.threads / kWarpgroup);
    if (shape.smem) {
      const size_t bytes = 1024 + (shape.smem + kGuardBytes + 1023) / 1024 * 1024;
      b.memory.reset(static_cast<char*>(std::aligned_alloc(1024, bytes)));
      if (!b.memory) throw std::bad_alloc();
      std::memset(b.memory.get(), kPoison, bytes);
      b.arena = b.memory.get() + 1024;
    }
    for (unsigned r = 0; r < launch.threads; r++) {
      Thread& t = b.threads[r];
      t.block = &b;
      t.rank = int(r);
      t.number = int(i * launch.threads + r);
      t.index = unflatten(r, shape.block);
      prepare(t.fiber, stacks.get(size_t(t.number)), size_t(t.number), entry);
    }
  }
}

void run_team(const Launch& launch, unsigned first_block, unsigned blocks, Worker& worker) {
  gridDim = launch.shape.grid;
  blockDim = launch.shape.block;
  Team team(launch, first_block, blocks);
  struct RaceScope {
    explicit RaceScope(Team& team) {
      if (race::enabled) race::begin_team(team, team.launch.shape.smem);
    }
    ~RaceScope() {
      if (race::enabled) race::end_team();
    }
  } scope(team);
  Runner(team, worker).run();
  check_pending(team);
}

void run(const LaunchShape& shape, const void* kernel, void (*body)(void*), void* context) {
  const Launch launch{shape,
                      kernel,
                      body,
                      context,
                      Options::from_environment(),
                      device(),
                      unsigned(volume(shape.block)),
                      unsigned(volume(shape.grid))};
  check_configuration(shape, launch.device, kernel, launch.options.dry);
  const record::LaunchScope recorded(launch);
  if (launch.options.dry) return;
  const unsigned blocks = unsigned(volume(shape.grid)), team_blocks = shape.cooperative ? blocks : shape.cluster;
  std::vector<unsigned> order(blocks / team_blocks);
  for (unsigned i = 0; i < order.size(); i++) order[i] = i;
  if (launch.options.schedule == Options::Schedule::reverse) std::reverse(order.begin(), order.end());
  if (launch.options.schedule == Options::Schedule::random) {
    std::shuffle(order.begin(), order.end(), std::mt19937_64(launch.options.seed));
  }
  // The race checker compares blocks by the order in which they ran, so they must run one after another.
  const size_t os_threads = race::enabled ? 1 : std::min<size_t>(launch.options.os_threads, order.size());
  Watchdog watchdog(os_threads, launch.options.watchdog_seconds, shape.grid, kernel);
  struct RaceScope {
    RaceScope() {
      if (race::enabled) race::begin_launch();
    }
    ~RaceScope() {
      if (race::enabled) race::end_launch();
    }
  } scope;
  run_teams(launch, order, team_blocks, watchdog);
}

}  // namespace emu
