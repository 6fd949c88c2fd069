// See record.h.
#include "emu/record.h"

#include <algorithm>
#include <exception>

#include "emu/runtime.h"

namespace emu::record {

constinit std::atomic<bool> counting{false};

namespace {

constexpr int kRows = 8, kBankGroups = 8, kRowBytes = 16;
constinit std::atomic<uint64_t> accesses{0}, wavefronts{0};

// Of an access of eight rows: different rows in one bank group follow each other, equal rows are served together.
unsigned passes(const void* const* rows) {
  unsigned worst = 0;
  for (int group = 0; group < kBankGroups; group++) {
    const void* seen[kRows];
    int count = 0;
    for (int i = 0; i < kRows; i++) {
      if (reinterpret_cast<uintptr_t>(rows[i]) / kRowBytes % kBankGroups != uintptr_t(group)) continue;
      if (std::find(seen, seen + count, rows[i]) == seen + count) seen[count++] = rows[i];
    }
    worst = std::max(worst, unsigned(count));
  }
  return worst;
}

}  // namespace

void matrix_rows(const void* const* rows) {
  for (int first = 0; first < kWarp; first += kRows) {
    accesses.fetch_add(1, std::memory_order_relaxed);
    wavefronts.fetch_add(passes(rows + first), std::memory_order_relaxed);
  }
}

LaunchScope::LaunchScope(const Launch& launch) : launch_(launch), exceptions_(std::uncaught_exceptions()) {
  if (!launch.options.record) return;
  file_ = std::fopen(launch.options.record, "a");
  if (!file_) throw std::runtime_error(std::string("TOKENCOMP_EMU_RECORD: cannot write ") + launch.options.record);
  accesses = wavefronts = 0;
  counting = true;
}

LaunchScope::~LaunchScope() {
  if (!file_) return;
  counting = false;
  if (std::uncaught_exceptions() == exceptions_) write();
  std::fclose(file_);
}

void LaunchScope::write() const {
  const LaunchShape& s = launch_.shape;
  std::fprintf(file_,
               "{\"kernel\": \"%s\", \"grid\": [%u, %u, %u], \"threads\": %u, \"smem\": %zu, \"cluster\": %u, "
               "\"cooperative\": %s, \"matrix_accesses\": %llu, \"wavefronts\": %llu}\n",
               linkage_name(launch_.kernel).c_str(), s.grid.x, s.grid.y, s.grid.z, launch_.threads, s.smem, s.cluster,
               s.cooperative ? "true" : "false", static_cast<unsigned long long>(accesses.load()),
               static_cast<unsigned long long>(wavefronts.load()));
}

}  // namespace emu::record
