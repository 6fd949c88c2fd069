// Asynchronous copies. A copy is performed at the last legal moment (a cp.async when its group is waited for, a bulk
// copy when no thread can run or at random) and its destination is poisoned until then, so that a missing wait shows
// itself as NaN. TOKENCOMP_EMU_ASYNC=eager performs copies at once, the other extreme that hardware may choose.
#include <cstring>

#include "emu/runtime.h"

namespace emu {
namespace {

using race::Kind;

// A Mbarrier as the emulator keeps it in its 64-bit word. `valid` tells an initialised word from poison and from zeros.
struct Word {
  uint64_t phase : 1, valid : 2;
  uint64_t pending : 20, count : 20;
  int64_t bytes : 21;
};
static_assert(sizeof(Word) == sizeof(uint64_t));
constexpr uint64_t kValid = 1;
constexpr unsigned kMaxCount = (1u << 20) - 1;

Word load(const uint64_t* barrier) {
  Word w;
  std::memcpy(&w, barrier, sizeof w);
  return w;
}

// A phase ends when all arrivals and all expected bytes have come.
void store(uint64_t* barrier, Word w) {
  if (w.pending == 0 && w.bytes == 0) {
    w.phase = w.phase ^ 1;
    w.pending = w.count;
  }
  std::memcpy(barrier, &w, sizeof w);
}

bool in_shared_memory(const void* p, size_t bytes) {
  const Block& block = *self->block;
  const auto* c = static_cast<const char*>(p);
  return block.arena && c >= block.arena && c + bytes <= block.arena + block.cluster->team->launch.shape.smem;
}

void check_barrier(const uint64_t* barrier, const char* op, Loc loc) {
  if (!in_shared_memory(barrier, sizeof *barrier) || reinterpret_cast<uintptr_t>(barrier) % 8) {
    fail(std::string(op) + ": an mbarrier must be an aligned 8-byte word of the block's shared memory", loc);
  }
}

Word load_valid(const uint64_t* barrier, const char* op, Loc loc) {
  require_sm90(op, loc);
  check_barrier(barrier, op, loc);
  race::touch(*self, barrier, sizeof *barrier, Kind::atomic_write, loc);
  const Word w = load(barrier);
  if (w.valid != kValid) fail(std::string(op) + ": the mbarrier was never initialised", loc);
  return w;
}

void perform(const Copy& c) {
  if (c.bytes)
    std::memcpy(c.dst, c.src, c.bytes);
  else
    std::memset(c.dst, 0, 16);
}

void complete_bytes(uint64_t* barrier, unsigned bytes) {
  Word w = load(barrier);
  w.bytes -= int64_t(bytes);
  store(barrier, w);
}

}  // namespace

void cp_async16(void* dst, const void* src, bool valid, Loc loc) {
  if ((reinterpret_cast<uintptr_t>(dst) | reinterpret_cast<uintptr_t>(src)) % 16) {
    fail("cp_async16: misaligned: both addresses must be multiples of 16", loc);
  }
  if (!in_shared_memory(dst, 16))
    fail("cp_async16: out of bounds: the destination is not in the block's shared memory", loc);
  race::touch(*self, dst, 16, Kind::write, loc);
  if (valid) race::touch(*self, src, 16, Kind::read, loc);
  const Copy copy{dst, src, valid ? 16u : 0u, loc};
  if (options().eager_copies) return perform(copy);
  race::begin_copy(dst, 16);
  std::memset(dst, kPoison, 16);
  if (self->copies.empty()) self->copies.emplace_back();
  self->copies.back().push_back(copy);
}

void cp_async_commit() {
  if (self->copies.empty()) self->copies.emplace_back();
  self->copies.emplace_back();
}

// Performs all but the newest `pending` committed groups; the open group is not touched, as on hardware.
void cp_async_wait(int pending, Loc loc) {
  auto& groups = self->copies;
  while (groups.size() > size_t(pending) + 1) {
    for (const Copy& c : groups.front()) {
      race::finish_copy(c.dst, 16);
      race::touch(*self, c.dst, 16, Kind::write, loc);
      perform(c);
    }
    groups.erase(groups.begin());
  }
}

void mbar_init(uint64_t* barrier, unsigned count, Loc loc) {
  check_barrier(barrier, "mbar_init", loc);
  if (count == 0 || count > kMaxCount) fail("mbar_init: the count must be in [1, 2^20)", loc);
  race::touch(*self, barrier, sizeof *barrier, Kind::write, loc);
  Word w{};
  w.valid = kValid;
  w.pending = w.count = count;
  std::memcpy(barrier, &w, sizeof w);
}

void mbar_arrive(uint64_t* barrier, unsigned expect_bytes, Loc loc) {
  Word w = load_valid(barrier, "mbar_arrive", loc);
  if (w.pending == 0) fail("mbar_arrive: more arrivals than the mbarrier expects in this phase", loc);
  if (expect_bytes > kMaxCount) fail("mbar_arrive_expect_tx: more than 2^20 - 1 bytes", loc);
  race::publish(*self, barrier, false);
  w.bytes += int64_t(expect_bytes);
  w.pending = w.pending - 1;
  store(barrier, w);
}

bool mbarrier_open(const uint64_t* barrier, bool parity) { return load(barrier).phase != parity; }

void mbar_wait(uint64_t* barrier, unsigned parity, Loc loc) {
  load_valid(barrier, "mbar_wait", loc);
  if (parity > 1) fail("mbar_wait: the parity must be 0 or 1", loc);
  if (!mbarrier_open(barrier, parity)) {
    self->mbarrier = barrier;
    self->mbarrier_parity = parity;
    give_way(State::mbarrier, "mbar_wait", loc);
  }
  race::observe(*self, barrier);
}

void bulk_load(void* dst, const void* src, unsigned bytes, uint64_t* barrier, Loc loc) {
  if ((reinterpret_cast<uintptr_t>(dst) | reinterpret_cast<uintptr_t>(src) | bytes) % 16) {
    fail("bulk_load: misaligned: addresses and size must be multiples of 16", loc);
  }
  if (!in_shared_memory(dst, bytes)) fail("bulk_load: out of bounds: the destination is not in shared memory", loc);
  load_valid(barrier, "bulk_load", loc);
  race::touch(*self, dst, bytes, Kind::async_write, loc);
  race::touch(*self, src, bytes, Kind::read, loc);
  race::publish(*self, barrier, false);
  race::begin_copy(dst, bytes);
  if (options().eager_copies) {
    race::finish_copy(dst, bytes, barrier);
    std::memcpy(dst, src, bytes);
    complete_bytes(barrier, bytes);
    return;
  }
  std::memset(dst, kPoison, bytes);
  self->block->cluster->team->bulk.push_back({dst, src, bytes, barrier});
}

void finish_bulk_copy(Team& team, size_t which) {
  const BulkCopy copy = team.bulk[which];
  team.bulk.erase(team.bulk.begin() + ptrdiff_t(which));
  race::finish_copy(copy.dst, copy.bytes, copy.barrier);
  std::memcpy(copy.dst, copy.src, copy.bytes);
  complete_bytes(copy.barrier, copy.bytes);
}

// ---- ordinary memory operations behind wrappers
void before_read(const void* p, size_t bytes, Order order, Loc loc) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("misaligned read of " + std::to_string(bytes) + " bytes", loc);
  race::touch(*self, p, bytes, order == Order::plain ? Kind::read : Kind::atomic_read, loc);
  if (order == Order::acquire || order == Order::relaxed) race::observe(*self, p);
}

void before_write(const void* p, size_t bytes, Order order, Loc loc) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("misaligned write of " + std::to_string(bytes) + " bytes", loc);
  race::touch(*self, p, bytes, order == Order::plain ? Kind::write : Kind::atomic_write, loc);
  if (order == Order::release) race::publish(*self, p, false);
}

// An atomic passes on what its thread had fenced off before, and learns what others passed on through the same word.
void before_atomic(const void* p, size_t bytes, Loc loc) {
  if (!self) return;
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("misaligned atomic of " + std::to_string(bytes) + " bytes", loc);
  if (!race::enabled) return;
  race::touch(*self, p, bytes, Kind::atomic_write, loc);
  race::observe(*self, p);
  race::publish(*self, p, true);
}

void thread_fence() {
  if (race::enabled) race::on_fence(*self);
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

void fence_proxy_async(Loc loc) {
  require_sm90("fence_proxy_async", loc);
  if (race::enabled) race::on_proxy_fence(*self);
}

void host_wrote(const void* p, size_t bytes) { race::wrote(p, bytes); }

void watch(const void* p, size_t bytes, const char* name, bool written) {
  if (race::enabled) race::watch(p, bytes, name, written);
}

void unwatch() {
  if (race::enabled) race::unwatch();
}

// ---- shared memory and clusters
void* shared_memory(size_t bytes, size_t alignment, Loc loc) {
  const Launch& launch = self->block->cluster->team->launch;
  if (bytes > launch.shape.smem) {
    fail("dynamic_smem: the type takes " + std::to_string(bytes) + " bytes, the launch gave " +
             std::to_string(launch.shape.smem),
         loc);
  }
  if (alignment > 1024) fail("dynamic_smem: shared memory is aligned to 1024 bytes only", loc);
  return self->block->arena;
}

// Shared-window addresses start above zero, as on hardware, so that a forgotten one is noticed.
uint32_t shared_address(const void* p, Loc loc) {
  if (!in_shared_memory(p, 0)) fail("smem_address: not in the block's shared memory", loc);
  return 1024 + uint32_t(static_cast<const char*>(p) - self->block->arena);
}

unsigned cluster_rank() { return self->block->rank; }

unsigned cluster_size() { return self->block->cluster->size; }

void* cluster_map(void* p, unsigned rank, Loc loc) {
  const Block& block = *self->block;
  if (rank >= block.cluster->size) fail("cluster_map: rank " + std::to_string(rank) + " is not in the cluster", loc);
  if (!in_shared_memory(p, 0)) fail("cluster_map: not an address of the block's own shared memory", loc);
  return block.cluster->blocks[rank].arena + (static_cast<char*>(p) - block.arena);
}

}  // namespace emu
