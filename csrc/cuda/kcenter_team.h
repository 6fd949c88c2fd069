// k-center on CUDA: the blocks that work on one item and how they agree on the next centre. Every thread brings the
// best order key it has seen and takes home the best of the team. Keys are integers and the maximum does not depend on
// the order, so every kind and size of team gives the same answer.
//   ClusterTeam   each warp writes its key to every block's mailbox (distributed shared memory); one cluster barrier.
//   GridTeam      each block writes its key to global memory; one barrier among the team's blocks.
// Mailboxes are double-buffered: a box is written again two rounds later, that is after a barrier which everybody
// reaches only when done reading it. So one barrier a round is enough. O(log) steps a round.
#pragma once

#include "core/kcenter_plan.h"
#include "core/order.h"
#include "cuda/arch/gpu.h"

namespace tokencomp::kcenter {

// Start of the shared memory of every kernel here; `body` is as long as the plan says.
struct Smem {
  static constexpr int kBox = CudaTiles::max_cluster * CudaTiles::warps;
  OrderKey box[2][kBox];
  OrderKey warp_best[CudaTiles::warps];
  OrderKey bound;
  alignas(128) unsigned char body[kCudaLeastBody];
};
static_assert(offsetof(Smem, body) == kCudaHeaderBytes);

// Maximum over the warp, for all lanes: two 32-bit reductions are quicker than ten shuffles.
__device__ __forceinline__ OrderKey warp_best(OrderKey key) {
  const unsigned high = __reduce_max_sync(~0u, unsigned(key >> 32));
  const unsigned low = __reduce_max_sync(~0u, unsigned(key >> 32) == high ? unsigned(key) : 0u);
  return OrderKey(high) << 32 | low;
}

__device__ __forceinline__ OrderKey later(OrderKey a, OrderKey b) { return a > b ? a : b; }

// Where teams meet in global memory.
struct Meeting {
  OrderKey* box;      // [teams, 2, size]
  uint32_t* counter;  // [teams], zero at the launch
};

class ClusterTeam {
 public:
  // A lone block is a team too; it makes no difference to it whether it was launched as a cluster.
  __device__ ClusterTeam(Smem& smem, const Meeting&, int team_size) : s_(smem), size(team_size) {
    rank = size > 1 ? int(gpu::cluster_rank()) : 0;
    sync();  // no block writes into another that has not started
  }

  __device__ void sync() {
    if (size > 1)
      gpu::cluster_sync();
    else
      __syncthreads();
  }

  __device__ OrderKey best(OrderKey mine) {
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    const OrderKey key = warp_best(mine);
    OrderKey* box = s_.box[round_++ & 1];
    if (lane < size) {
      OrderKey* slot = box + rank * CudaTiles::warps + warp;
      *(size > 1 ? gpu::cluster_map(slot, unsigned(lane)) : slot) = key;
    }
    sync();
    OrderKey all = kNobody;
    for (int i = lane; i < size * CudaTiles::warps; i += 32) all = later(all, box[i]);
    return warp_best(all);
  }

 private:
  Smem& s_;
  unsigned round_ = 0;

 public:
  int size, rank;
};

class GridTeam {
 public:
  __device__ GridTeam(Smem& smem, const Meeting& meeting, int team_size) : s_(smem), size(team_size) {
    const int team = int(blockIdx.x) / size;
    rank = int(blockIdx.x) % size;
    box_ = meeting.box + int64_t(team) * 2 * size;
    counter_ = meeting.counter + team;
  }

  __device__ void sync() { gpu::grid_barrier(counter_, unsigned(size)); }

  __device__ OrderKey best(OrderKey mine) {
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    const OrderKey key = warp_best(mine);
    if (lane == 0) s_.warp_best[warp] = key;
    __syncthreads();
    OrderKey* box = box_ + (round_++ & 1) * size;
    if (threadIdx.x == 0) {
      OrderKey block = kNobody;
      for (int w = 0; w < CudaTiles::warps; ++w) block = later(block, s_.warp_best[w]);
      box[rank] = block;
    }
    sync();
    OrderKey all = kNobody;
    for (int i = lane; i < size; i += 32) all = later(all, gpu::atomic_load_relaxed(box + i));
    return warp_best(all);
  }

 private:
  Smem& s_;
  OrderKey* box_;
  uint32_t* counter_;
  unsigned round_ = 0;

 public:
  int size, rank;
};

}  // namespace tokencomp::kcenter
