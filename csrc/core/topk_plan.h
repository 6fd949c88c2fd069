// How rows are selected from on a CUDA device: a pure function of the problem and the device, tested without either.
//
//   cluster   One thread-block cluster per row; blocks read each other's histograms through distributed shared memory.
//             A cluster of one block is the plain block, on any device.
//   grid      A team of co-resident blocks per row and histograms in global memory: for few long rows, and before
//   sm_90.
// "resident" keeps a block's slots in shared memory, so that the scores are read once; "stream" makes them again from
// the scores, which then come from L2, in each of the five passes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "core/topk.h"

namespace tokencomp::topk {

struct CudaTiles {
  static constexpr int threads = 512;  // 16 warps: few enough that a barrier is quick, enough to hide L2 latency
  static constexpr int warps = threads / 32;
  static constexpr int bins = kBins / threads;  // a thread's share of a histogram
  static constexpr int max_cluster = 8;         // the portable limit
  static constexpr int batch = 8;               // scores a thread loads before it uses the first
};

// Bytes of shared memory before the slots: two histograms, with sums two more words a bin, and the exchange.
constexpr size_t kCudaTable = sizeof(uint32_t) * kBins, kCudaExchange = 768;
constexpr size_t cuda_header_bytes(bool by_mass) { return (by_mass ? 6 : 2) * kCudaTable + kCudaExchange; }

struct CudaDevice {
  int sm_count = 0;
  size_t smem_per_block = 0;
  int max_cluster = 1;  // 1 before sm_90
};

struct CudaProblem {
  int R = 0, S = 0;
  int element_bytes = 4;
  bool by_mass = false;
};

enum class CudaTeam { cluster, grid };

struct CudaPlan {
  CudaTeam team = CudaTeam::cluster;
  int size = 1;  // blocks that work on one row
  bool resident = false;
  size_t smem = 0;                // bytes of shared memory per block
  double microseconds = 0;        // floor of the launch
  const char* refused = nullptr;  // why this plan is impossible

  std::string name() const {
    return (team == CudaTeam::cluster ? "cluster" : "grid") + std::to_string(size) +
           (resident ? ",resident" : ",stream");
  }
};

namespace plan_detail {

// Of an H200, by estimate: none of these has been measured.
struct Rates {
  static constexpr double launch = 3.0;          // microseconds until the first block runs and after the last one
  static constexpr double sm_bytes = 60e3;       // bytes a microsecond that one SM draws from L2
  static constexpr double device_bytes = 4.3e6;  // bytes a microsecond from HBM, all SMs together
  static constexpr double slot = 7e-5;           // microseconds a slot takes in a histogram pass of one block
  static constexpr double plain_slot = 4e-5;     // in a pass without histogram
  static constexpr double walk = 0.4, block_exchange = 0.1, cluster_exchange = 0.8, grid_exchange = 1.5;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Waves of the launch times the chain of passes and exchanges of one block.
inline double floor_of(const CudaProblem& p, const CudaDevice& device, const CudaPlan& plan) {
  const double slots = double(ceil_div(p.S, plan.size)), bytes = slots * p.element_bytes;
  const int64_t blocks = int64_t(p.R) * plan.size;
  const double waves = double(ceil_div(blocks, device.sm_count));
  const double busy = double(least(blocks, device.sm_count));
  const double share = Rates::device_bytes / busy;
  const double read = bytes / (share < Rates::sm_bytes ? share : Rates::sm_bytes);
  const double exchange = plan.size == 1                   ? Rates::block_exchange
                          : plan.team == CudaTeam::cluster ? Rates::cluster_exchange
                                                           : Rates::grid_exchange;
  const int reads = plan.resident ? 1 : kLevels + 2;
  const double levels = kLevels * (slots * Rates::slot * (p.by_mass ? 3 : 1) + exchange + Rates::walk);
  return Rates::launch + waves * (read * reads + levels + 2 * slots * Rates::plain_slot + exchange);
}

inline const char* refusal(const CudaProblem& p, const CudaDevice& device, const CudaPlan& plan) {
  if (plan.size < 1) return "a team has at least one block";
  if (plan.smem > device.smem_per_block) return "the slots do not fit in shared memory";
  if (plan.team == CudaTeam::grid) {
    return int64_t(p.R) * plan.size > device.sm_count ? "not all blocks would be resident together" : nullptr;
  }
  if (plan.size > 1 && device.max_cluster < 2) return "the device has no thread-block clusters";
  if (plan.size > device.max_cluster || (plan.size & (plan.size - 1))) return "not a size of a cluster";
  return nullptr;
}

inline CudaPlan make_plan(const CudaProblem& p, const CudaDevice& device, CudaTeam team, int size, bool resident) {
  CudaPlan plan{team, size, resident, cuda_header_bytes(p.by_mass), 0, nullptr};
  if (resident && size > 0) plan.smem += size_t(ceil_div(p.S, size)) * sizeof(uint32_t);
  plan.refused = refusal(p, device, plan);
  if (!plan.refused) plan.microseconds = floor_of(p, device, plan);
  return plan;
}

}  // namespace plan_detail

// Every plan worth considering, the impossible ones with a reason.
inline std::vector<CudaPlan> cuda_candidates(const CudaProblem& p, const CudaDevice& device) {
  std::vector<CudaPlan> plans;
  for (const bool resident : {true, false}) {
    for (int size = 1; size <= CudaTiles::max_cluster; size *= 2) {
      plans.push_back(plan_detail::make_plan(p, device, CudaTeam::cluster, size, resident));
    }
    const int most_blocks = device.sm_count / (p.R > 0 ? p.R : 1);
    for (int size = 2; size <= most_blocks; size *= 2) {
      plans.push_back(plan_detail::make_plan(p, device, CudaTeam::grid, size, resident));
    }
  }
  return plans;
}

inline CudaPlan plan_cuda(const CudaProblem& p, const CudaDevice& device) {
  CudaPlan best;
  best.refused = "no plan fits";
  for (const CudaPlan& plan : cuda_candidates(p, device)) {
    if (!plan.refused && (best.refused || plan.microseconds < best.microseconds)) best = plan;
  }
  return best;
}

// The plan of a name such as "cluster4,resident" or "grid3,stream"; refused, with the reason, where it is impossible.
inline CudaPlan plan_cuda_named(const CudaProblem& p, const CudaDevice& device, const std::string& name) {
  for (const CudaTeam team : {CudaTeam::cluster, CudaTeam::grid}) {
    const std::string stem = team == CudaTeam::cluster ? "cluster" : "grid";
    if (name.rfind(stem, 0) != 0) continue;
    const int size = std::atoi(name.c_str() + stem.size());
    for (const bool resident : {true, false}) {
      const CudaPlan plan = plan_detail::make_plan(p, device, team, size, resident);
      if (plan.name() == name) return plan;
    }
  }
  CudaPlan unknown;
  unknown.refused = "no plan has this name";
  return unknown;
}

}  // namespace tokencomp::topk
