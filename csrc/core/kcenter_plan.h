// How a k-center selection is carried out on a CUDA device: a pure function of the problem and the device, tested
// without either. Candidates are listed, the impossible ones refused with a reason, the rest timed by a floor model
// (bytes and multiply-adds over the machine's rates, plus the exchanges between blocks), and the fastest is taken.
//
//   gram      All pairs once through matrix tiles, spread over every block; then one block per item picks, reading one
//             matrix row per pick. Few bytes per pick and no exchange between blocks: wins wherever N x N fits.
//   cluster   One thread-block cluster per item, one pass over the tokens per pick, exchange through distributed shared
//             memory. A cluster of one block is the plain block, on any device.
//   grid      The same with a team of co-resident blocks and an exchange through global memory: for items too big for
//             a cluster, and before sm_90.
// "resident" keeps a block's tokens in shared memory; "stream" reads them from L2 or HBM at every pick; "lazy"
// (max_min) reads only those whose stale score, an upper bound, could still win: fewer bytes, but a warp may have to
// catch up on many centres in a row, so it is for tokens that come from HBM.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "core/kcenter.h"

namespace tokencomp::kcenter {

// ---- shapes shared with the kernels

struct CudaTiles {
  static constexpr int threads = 256;  // 8 warps: enough loads in flight, and a barrier of 8 is quick
  static constexpr int warps = threads / 32;
  static constexpr int tokens = 4;       // tokens a warp multiplies at once: four independent sums hide the FMA latency
                                         // and share the loads of the centre's row
  static constexpr int tile = 64;        // rows and columns of a matrix tile: N=576 gives 45 tiles, one wave of 132 SMs
  static constexpr int row_bytes = 128;  // bytes of a row in one slab: eight 16-byte chunks, one swizzle period
  static constexpr int stages = 4;       // slabs in flight: 48 KB cover L2 latency (about 600 cycles at 64 B each)
  static constexpr int max_cluster = 8;  // the portable limit
  static constexpr int batch = 8;        // matrix values a thread loads before it folds the first: N=2048 in one trip
};

// Bytes of shared memory before the part whose size depends on the problem (the exchange's mailboxes).
constexpr size_t kCudaHeaderBytes = 1152, kCudaLeastBody = 128;
constexpr size_t kCudaTileBytes = size_t(CudaTiles::stages) * 2 * CudaTiles::tile * CudaTiles::row_bytes;
constexpr size_t kCudaTokenBytes = 8;  // running state and inverse norm

// Shared memory for the states of a block's tokens and, by group of tokens, a counter of centres met (lazy passes).
TC_HD size_t cuda_state_bytes(int tokens) {
  const size_t groups = size_t(tokens + CudaTiles::tokens - 1) / CudaTiles::tokens;
  return (tokens * kCudaTokenBytes + groups * sizeof(int) + 127) / 128 * 128;
}

// An N x N float matrix per item in flight is never made beyond this, all items of a launch together.
constexpr int64_t kCudaGramLimitBytes = int64_t(64) << 20;

struct CudaDevice {
  int sm_count = 0;
  size_t smem_per_block = 0;
  int max_cluster = 1;  // 1 before sm_90
};

struct CudaProblem {
  int B = 0, N = 0, C = 0, k = 0;
  int element_bytes = 4;
  bool l2 = false;
  bool shrinking = false;       // running states only shrink and are the scores: max_min without weights
  First first = First::index0;  // index0 where seeds are given
};

inline CudaProblem cuda_problem(const Args& a) {
  const bool shrinking = a.objective == Objective::max_min && !a.weight;
  return {a.B,
          a.N,
          a.C,
          a.k,
          a.dtype == DType::f32 ? 4 : 2,
          a.metric == Metric::l2,
          shrinking,
          a.seed ? First::index0 : a.first};
}

enum class CudaTeam { gram, cluster, grid };
enum class CudaTokens { resident, stream, lazy };

struct CudaPlan {
  CudaTeam team = CudaTeam::cluster;
  int size = 1;   // blocks that work on one item; gram: blocks of the launch
  int teams = 1;  // teams of the launch; gram: 1
  CudaTokens tokens = CudaTokens::stream;
  bool state_in_smem = true;      // else in global memory
  int items = 0;                  // gram: items whose matrices are in memory at a time
  size_t smem = 0;                // bytes of shared memory per block
  double microseconds = 0;        // floor of the launch
  const char* refused = nullptr;  // why this plan is impossible

  std::string name() const {
    if (team == CudaTeam::gram) return "gram";
    constexpr const char* kTokens[] = {",resident", ",stream", ",lazy"};
    return (team == CudaTeam::cluster ? "cluster" : "grid") + std::to_string(size) + kTokens[int(tokens)];
  }
};

namespace plan_detail {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline double larger(double a, double b) { return a > b ? a : b; }

// The machine the floors are computed for: H200 (132 SMs, 1.755 GHz under load, 227 KB of shared memory a block).
struct Rates {
  static constexpr double clock = 1755;     // cycles a microsecond
  static constexpr double smem = 110;       // bytes a cycle and SM: 128 less conflicts and address arithmetic
  static constexpr double l2 = 40;          // bytes a cycle and SM while every SM reads (one alone reaches 64)
  static constexpr double l2_bytes = 40e6;  // what stays in a 50 MB L2 between two passes
  static constexpr double hbm = 2450;       // bytes a cycle of the whole device: 4.3 TB/s
  static constexpr double mma = 650;        // multiply-adds a cycle and SM of mma.sync with this tile: ldmatrix bound
  static constexpr double fma = 90;         // the same on CUDA cores (128 lanes)
  static constexpr double fma_l2 = 50;      // a subtraction and a multiply-add
  static constexpr double pass_wide = 90;   // elements a cycle and SM of a pass over fp32: one FMA each
  static constexpr double pass_half = 56;   // 16-bit: a conversion (64 lanes) and an FMA each
  static constexpr double pass_latency = 500;  // first load of a pass, butterfly, fold
  static constexpr double lazy_scan = 400;     // stale maximum of the block and two barriers
  static constexpr double lazy_share = 0.5;    // tokens that could still win: a guess, to be replaced by a measurement
  static constexpr double gram_latency = 350;  // one L2 load and a fold
  static constexpr double block_exchange = 150;    // two warp maxima around a __syncthreads
  static constexpr double cluster_exchange = 680;  // the same around a cluster barrier of about 0.3 us
  static constexpr double grid_exchange = 2300;    // the same around a grid barrier of about 1.2 us
  static constexpr double launch = 7000;           // launch, first touch of HBM, norms: about 4 us
};

inline double pair_rate(const CudaProblem& p) {
  if (p.l2) return Rates::fma_l2;
  return p.element_bytes == 2 ? Rates::mma : Rates::fma;
}

inline CudaPlan gram_plan(const CudaProblem& p, const CudaDevice& d) {
  CudaPlan plan{.team = CudaTeam::gram};
  const int64_t matrix = int64_t(p.N) * p.N * 4;
  if (matrix > kCudaGramLimitBytes) {
    plan.refused = "the N x N matrix of one item exceeds the 64 MiB limit";
    return plan;
  }
  const int64_t fit = kCudaGramLimitBytes / matrix;
  plan.items = int(fit < p.B ? fit : p.B);
  const size_t tokens = size_t(p.N) * kCudaTokenBytes;
  plan.smem = kCudaHeaderBytes + (tokens > kCudaTileBytes ? tokens : kCudaTileBytes);
  if (plan.smem > d.smem_per_block) {
    plan.refused = "the running states of an item do not fit in shared memory";
    return plan;
  }
  const int64_t side = ceil_div(p.N, CudaTiles::tile), tiles = plan.items * (side * (side + 1) / 2);
  // No more blocks than have a tile, or a few rows per warp to prepare: they would only lengthen the barriers.
  const int64_t row_blocks = ceil_div(int64_t(plan.items) * p.N, 4 * CudaTiles::warps);
  const int64_t useful = tiles > row_blocks ? tiles : row_blocks;
  plan.size = int(useful < d.sm_count ? useful : d.sm_count);
  const double waves = double(ceil_div(tiles, plan.size));
  const double tile = larger(double(CudaTiles::tile) * CudaTiles::tile * p.C / pair_rate(p),
                             2.0 * CudaTiles::tile * p.C * p.element_bytes / Rates::l2);
  const double concurrent = double(ceil_div(plan.items, plan.size));
  double first = 0;
  if (p.first == First::largest_nn) {
    first = Rates::grid_exchange + double(plan.items) * matrix / (Rates::l2 * plan.size);
  } else if (p.first == First::centroid) {  // the picking block alone reads the item twice
    first = concurrent * 2.0 * p.N * p.C * p.element_bytes / Rates::l2;
  }
  const double pick = Rates::gram_latency * double(ceil_div(p.N, CudaTiles::threads * CudaTiles::batch)) +
                      p.N * 4.0 / 64 + Rates::block_exchange;
  const double round = waves * tile + 2 * Rates::grid_exchange + first + concurrent * p.k * pick;
  plan.microseconds = (Rates::launch + double(ceil_div(p.B, plan.items)) * round) / Rates::clock;
  return plan;
}

inline void set_smem(CudaPlan& plan, const CudaProblem& p, const CudaDevice& d) {
  const int64_t slice = ceil_div(p.N, plan.size);
  const size_t row = size_t(round_up(int64_t(p.C) * p.element_bytes, 16));
  const size_t rows = plan.tokens == CudaTokens::resident ? (size_t(slice) + 1) * row : 0;  // and the centre's row
  const size_t tiles = p.first == First::largest_nn ? kCudaTileBytes : 0;
  const size_t body = rows + tiles == 0 ? kCudaLeastBody : rows > tiles ? rows : tiles;
  const size_t states = cuda_state_bytes(int(slice));
  plan.state_in_smem = kCudaHeaderBytes + states + body <= d.smem_per_block;
  plan.smem = kCudaHeaderBytes + body + (plan.state_in_smem ? states : 0);
  if (plan.smem > d.smem_per_block) plan.refused = "the tokens of a block do not fit in its shared memory";
  if (plan.tokens != CudaTokens::lazy) return;
  if (!p.shrinking) plan.refused = "stale scores bound the true ones only under max_min without weights";
  if (!plan.state_in_smem) plan.refused = "lazy passes keep their states in shared memory, and they do not fit";
}

inline CudaPlan team_plan(const CudaProblem& p, const CudaDevice& d, CudaTeam team, int size, CudaTokens tokens) {
  CudaPlan plan{.team = team, .size = size, .tokens = tokens};
  const int limit = team == CudaTeam::cluster ? d.max_cluster : d.sm_count;
  if (size < 1 || size > limit) {
    plan.refused = team == CudaTeam::cluster ? "the device has no thread-block clusters of this size"
                                             : "a grid team needs co-resident blocks, at most one per multiprocessor";
    return plan;
  }
  const int alive = d.sm_count > size ? d.sm_count / size : 1;  // teams that run at a time
  plan.teams = team == CudaTeam::cluster || p.B < alive ? p.B : alive;
  set_smem(plan, p, d);
  if (plan.refused) return plan;
  const double busy = double(p.B < alive ? p.B : alive) * size;  // blocks that read at a time
  const double slice = double(ceil_div(p.N, size)), elements = slice * p.C, bytes = elements * p.element_bytes;
  const double shared_rate = busy * bytes > Rates::l2_bytes ? Rates::hbm / busy : Rates::l2;
  const double source = shared_rate < Rates::l2 ? shared_rate : Rates::l2;
  double pass = larger(bytes / (tokens == CudaTokens::resident ? Rates::smem : source),
                       elements / (p.element_bytes == 2 ? Rates::pass_half : Rates::pass_wide));
  if (tokens == CudaTokens::lazy) pass = Rates::lazy_scan + (source < Rates::l2 ? Rates::lazy_share : 1) * pass;
  const double exchange = team == CudaTeam::grid ? Rates::grid_exchange
                          : size > 1             ? Rates::cluster_exchange
                                                 : Rates::block_exchange;
  double first = 2 * bytes / source;  // norms and the copy
  if (p.first == First::largest_nn) {
    first += double(round_up(int64_t(slice), CudaTiles::tile)) * p.N * p.C / pair_rate(p);
  } else if (p.first == First::centroid) {
    first += 2 * bytes / source + exchange;
  }
  const double item = first + exchange + p.k * (Rates::pass_latency + pass + exchange);
  plan.microseconds = (Rates::launch + double(ceil_div(p.B, alive)) * item) / Rates::clock;
  return plan;
}

}  // namespace plan_detail

// Every plan that is worth a look, the impossible ones with the reason.
inline std::vector<CudaPlan> cuda_candidates(const CudaProblem& p, const CudaDevice& d) {
  std::vector<CudaPlan> plans{plan_detail::gram_plan(p, d)};
  for (int size = 1; size <= CudaTiles::max_cluster; size *= 2) {
    for (CudaTokens tokens : {CudaTokens::resident, CudaTokens::stream, CudaTokens::lazy}) {
      plans.push_back(plan_detail::team_plan(p, d, CudaTeam::cluster, size, tokens));
    }
  }
  for (int size = d.sm_count; size > 1 && size * 8 >= d.sm_count; size /= 2) {
    for (CudaTokens tokens : {CudaTokens::resident, CudaTokens::stream, CudaTokens::lazy}) {
      plans.push_back(plan_detail::team_plan(p, d, CudaTeam::grid, size, tokens));
    }
  }
  return plans;
}

// The fastest possible plan. There always is one: a lone block that streams.
inline CudaPlan plan_cuda(const CudaProblem& p, const CudaDevice& d) {
  CudaPlan best;
  best.refused = "no plan fits";
  for (const CudaPlan& plan : cuda_candidates(p, d)) {
    if (!plan.refused && (best.refused || plan.microseconds < best.microseconds)) best = plan;
  }
  return best;
}

// The plan of this name ("gram", "cluster4,resident", "grid3,lazy"), for tests and measurements.
inline CudaPlan plan_cuda_named(const CudaProblem& p, const CudaDevice& d, const std::string& name) {
  if (name == "gram") return plan_detail::gram_plan(p, d);
  for (CudaTeam team : {CudaTeam::cluster, CudaTeam::grid}) {
    const std::string stem = team == CudaTeam::cluster ? "cluster" : "grid";
    if (name.compare(0, stem.size(), stem) != 0) continue;
    const int size = std::atoi(name.c_str() + stem.size());
    for (CudaTokens tokens : {CudaTokens::resident, CudaTokens::stream, CudaTokens::lazy}) {
      const CudaPlan named{.team = team, .size = size, .tokens = tokens};
      if (size > 0 && named.name() == name) return plan_detail::team_plan(p, d, team, size, tokens);
    }
  }
  CudaPlan unknown;
  unknown.refused = "no such plan; expected gram, or cluster<n> or grid<n> and ,resident ,stream or ,lazy";
  return unknown;
}

}  // namespace tokencomp::kcenter
