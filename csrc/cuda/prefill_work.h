// Prefill attention on CUDA: what the launcher needs to know of the version with warpgroup products.
#pragma once

#include "core/prefill.h"
#include "cuda/arch/gpu.h"

namespace tokencomp::prefill {

// One item of work: a block of kWgmmaRows queries of one head.
struct WgmmaWork {
  int items, row_blocks;
  int* order;  // [items], the items with the longest lists first; null: late rows, which see most keys, first
};

// Attention with warpgroup products (prefill_sm90.cu), where the build has it; null elsewhere. Takes 16-bit queries,
// keys and values of whole 16-byte chunks, at most kWgmmaDim channels, lists for kWgmmaRows rows, no soft cap.
using WgmmaLauncher = void(const PrefillArgs& p, const WgmmaWork& w, gpu::LaunchConfig config);
extern WgmmaLauncher* wgmma_prefill;
constexpr int kWgmmaDim = 128, kWgmmaRows = 128;

}  // namespace tokencomp::prefill
