// What the environment asks of the emulator. Read at each launch, so that a test can change it between two calls.
#include <algorithm>
#include <cstring>

#include "emu/runtime.h"

namespace emu {
namespace {

const char* setting(const char* name) {
  const char* value = std::getenv(name);
  return value && *value ? value : nullptr;
}

}  // namespace

Options Options::from_environment() {
  Options o;
  if (const char* s = setting("TOKENCOMP_EMU_SCHED")) {
    if (!std::strcmp(s, "reverse"))
      o.schedule = Schedule::reverse;
    else if (!std::strcmp(s, "random"))
      o.schedule = Schedule::random;
    else if (std::strcmp(s, "fixed"))
      throw std::runtime_error("TOKENCOMP_EMU_SCHED must be fixed, reverse or random");
  }
  if (const char* s = setting("TOKENCOMP_EMU_SEED")) o.seed = std::strtoull(s, nullptr, 10);
  if (const char* s = setting("TOKENCOMP_EMU_THREADS")) o.os_threads = std::clamp(std::atoi(s), 1, 64);
  if (const char* s = setting("TOKENCOMP_EMU_WATCHDOG")) o.watchdog_seconds = std::max(0.05, std::atof(s));
  if (const char* s = setting("TOKENCOMP_EMU_RECORD")) o.record = s;
  o.dry = setting("TOKENCOMP_EMU_DRY") != nullptr;
  if (const char* s = setting("TOKENCOMP_EMU_ASYNC")) {
    if (!std::strcmp(s, "eager"))
      o.eager_copies = true;
    else if (std::strcmp(s, "lazy"))
      throw std::runtime_error("TOKENCOMP_EMU_ASYNC must be lazy or eager");
  }
  return o;
}

// Few multiprocessors, so that kernels that fill the device stay small.
Device device() {
  const char* s = setting("TOKENCOMP_EMU_DEVICE");
  if (!s || !std::strcmp(s, "sm_90")) return {9, 4, 8, 227 << 10};
  if (!std::strcmp(s, "sm_80")) return {8, 4, 1, 163 << 10};
  if (!std::strcmp(s, "h200")) return {9, 132, 8, 227 << 10};  // for TOKENCOMP_EMU_DRY: launches as on that GPU
  throw std::runtime_error("TOKENCOMP_EMU_DEVICE must be sm_90, sm_80 or h200");
}

}  // namespace emu
