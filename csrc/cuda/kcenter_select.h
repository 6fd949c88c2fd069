// k-center on CUDA: the selection of one item by one team, whatever the team and wherever products come from. A pick
// is one exchange of keys, then one turn of every token: fold the new centre's cost into the running state and offer
// the score for the next pick. Each block owns a contiguous slice of the tokens; states never leave it. O(k N / team)
// turns. Before it, what the first pick needs: norms, and the scores of the centroid rule.
#pragma once

#include "cuda/kcenter_rows.h"
#include "cuda/kcenter_team.h"

namespace tokencomp::kcenter {

// Inverse norms are >= 0, or NaN for an invalid row; this one marks a token that has been picked.
constexpr float kPicked = -1.0f;

struct TokenState {
  float state, inverse_norm;
};
static_assert(sizeof(TokenState) == kCudaTokenBytes);

// Working memory in global memory, by item.
struct Workspace {
  float* inverse_norm;  // [B, N]
  float* first;         // [B, N] scores of the first pick, where a rule gives them
  float* mean;          // [B, mean_stride], padded with zeros to whole chunks
  TokenState* token;    // [B, N], where the states do not fit in shared memory
  float* gram;          // [items, N, N] products
  int* centre;          // [B, k] valid centres in pick order, for lazy passes
  Meeting meeting;
  int mean_stride;
};

// One batch item: its rows, its side arrays and where its picks go.
template <class T>
struct Item {
  Rows<T> x;
  int n;  // valid tokens
  int k, S;
  Rule rule;
  bool has_first;  // the first pick is ranked by `first`
  const int* seed;
  const float* weight;
  float *inverse_norm, *first, *mean;
  int* index;
  float* value;

  __device__ Item(const Args& a, const Workspace& w, bool whole, int b)
      : x{static_cast<const T*>(a.x) + b * a.x_stride_b, a.x_stride_n, a.C, whole},
        n(length_of(a, b)),
        k(a.k),
        S(a.S),
        rule(rule_of(a)),
        has_first(!a.seed && a.first != First::index0),
        seed(a.seed ? a.seed + int64_t(b) * a.S : nullptr),
        weight(a.weight ? a.weight + int64_t(b) * a.N : nullptr),
        inverse_norm(w.inverse_norm + int64_t(b) * a.N),
        first(w.first + int64_t(b) * a.N),
        mean(w.mean + int64_t(b) * w.mean_stride),
        index(a.index + int64_t(b) * a.k),
        value(a.value + int64_t(b) * a.k) {}

  __device__ float weight_of(int i) const { return weight ? weight[i] : 1.0f; }
  __device__ int seed_of(int pick) const { return pick < S ? seed[pick] : -1; }
};

// A block's tokens [begin, end) of an item.
struct Slice {
  int begin, end;
  TokenState* token;
};

// A seed that is valid and still free beats every score.
TC_HD OrderKey seed_key(int i) { return OrderKey(0xffffffffu) << 32 | (0xffffffffu - uint32_t(i)); }

// Invalid rows come after every valid one, whatever its score, in index order; still above kNobody.
TC_HD OrderKey invalid_key(int i) { return 0xffffffffu - uint32_t(i); }

// What a round of turns is about: the pick just made.
struct Round {
  int pick;            // its number
  int centre;          // the token
  float inverse_norm;  // of the centre
  bool folds;          // the centre is valid, so its cost enters the states
  int centres;         // valid centres before this one
  int wanted;          // seed for the next pick, or -1
};

// A thread's share of a round.
struct Turns {
  OrderKey best = kNobody;
  float picked_state = 0.0f;
  bool picked = false;  // one of the thread's tokens is the centre

  // The turn of token i, whose product with the centre is given: fold it, offer the score for the next pick.
  template <class T>
  __device__ __forceinline__ void take(const Item<T>& item, const Round& round, TokenState& token, int i,
                                       float product) {
    if (take_unscored(round, token, i)) return;
    float state = token.state;
    if (round.folds) {
      state = item.rule.fold(state, item.rule.cost(product, token.inverse_norm, round.inverse_norm));
      token.state = state;
    }
    const int centres = round.centres + round.folds;
    const float score = item.rule.score(state, item.weight_of(i), centres);
    best = later(best, i == round.wanted ? seed_key(i) : order_key(score, i));
  }

  // The turn of a token that needs no score: picked before, the centre itself, or invalid.
  __device__ __forceinline__ bool take_unscored(const Round& round, TokenState& token, int i) {
    const TokenState t = token;
    if (t.inverse_norm == kPicked) return true;
    if (i == round.centre) {
      picked = true;
      picked_state = t.state;
      token.inverse_norm = kPicked;
      return true;
    }
    if (is_valid(t.inverse_norm)) return false;
    best = later(best, invalid_key(i));
    return true;
  }

  // After its turns: the thread that met the centre writes the pick down.
  template <class T>
  __device__ __forceinline__ OrderKey finish(const Item<T>& item, const Round& round) const {
    if (picked) {
      const float value = item.rule.value(picked_state, item.weight_of(round.centre), round.centres);
      item.index[round.pick] = round.centre;
      item.value[round.pick] = round.folds && value == value ? value : -INFINITY;
    }
    return best;
  }
};

// A round of turns without products: after an invalid centre, and to write down the last pick.
template <class T>
__device__ __forceinline__ OrderKey plain_turns(const Item<T>& item, const Slice& slice, const Round& round) {
  Turns turns;
#pragma unroll 1
  for (int i = slice.begin + int(threadIdx.x); i < slice.end; i += CudaTiles::threads) {
    turns.take(item, round, slice.token[i - slice.begin], i, 0.0f);
  }
  return turns.finish(item, round);
}

// Every token enters with its starting state; returns the thread's best key for the first pick.
template <class T>
__device__ __forceinline__ OrderKey first_turns(const Item<T>& item, const Slice& slice) {
  const int wanted = item.seed_of(0);
  OrderKey best = kNobody;
#pragma unroll 1
  for (int i = slice.begin + int(threadIdx.x); i < slice.end; i += CudaTiles::threads) {
    const TokenState token{item.rule.start(), item.inverse_norm[i]};
    slice.token[i - slice.begin] = token;
    OrderKey key = invalid_key(i);
    if (is_valid(token.inverse_norm)) {
      const float score = item.has_first ? item.first[i] : item.rule.score(token.state, item.weight_of(i), 0);
      key = i == wanted ? seed_key(i) : order_key(score, i);
    }
    best = later(best, key);
  }
  return best;
}

// Picks k tokens. Called by all threads of the team when inverse norms and first scores are visible to it.
// `source.turns(item, slice, round)` is plain_turns with the products of the round's centre.
template <class T, class Team, class Source>
__device__ __forceinline__ void select(const Item<T>& item, Team& team, const Slice& slice, const Source& source) {
  Round round{};
  OrderKey best = first_turns(item, slice);
#pragma unroll 1
  for (int pick = 0; pick < item.k; ++pick) {
    const OrderKey winner = team.best(best);
    if (winner == kNobody) {  // no token is left, which the whole team sees
      for (int j = pick + int(threadIdx.x); team.rank == 0 && j < item.k; j += CudaTiles::threads) {
        item.index[j] = -1;
        item.value[j] = -INFINITY;
      }
      break;
    }
    round.centres += round.folds;
    round.pick = pick;
    round.centre = index_of(winner);
    round.inverse_norm = item.inverse_norm[round.centre];
    round.folds = is_valid(round.inverse_norm);
    round.wanted = item.seed_of(pick + 1);
    best = source.has_turns(round) && pick + 1 < item.k ? source.turns(item, slice, round)
                                                        : plain_turns(item, slice, round);
  }
}

// ---- the first pick

// Inverse norms of rows [begin, end), by `warps` warps of which this is number `warp`.
template <class T>
__device__ __forceinline__ void norms(const Item<T>& item, int begin, int end, int warp, int warps) {
  const int lane = int(threadIdx.x) % 32;
  for (int i = begin + warp; i < end; i += warps) {
    const float inverse = inverse_norm(square_sum(item.x, i, lane));
    if (lane == 0) item.inverse_norm[i] = inverse;
  }
}

// Mean of the valid rows (cosine: of the normalised rows): a warp takes a chunk of channels, its lanes every 32nd row.
template <class T>
__device__ __forceinline__ void mean(const Item<T>& item, int warp, int warps) {
  const int lane = int(threadIdx.x) % 32;
  const bool cosine = item.rule.metric == Metric::cosine;
  for (int chunk = warp; chunk < chunks_of(item.x.C, kVec<T>); chunk += warps) {
    float sum[kVec<T>] = {};
    int rows = 0;
    for (int i = lane; i < item.n; i += 32) {
      const float inverse = item.inverse_norm[i];
      float a[kVec<T>];
      unpack<T>(load_chunk(item.x, item.x[i], chunk), a);
      if (is_valid(inverse)) {
        ++rows;
#pragma unroll
        for (int e = 0; e < kVec<T>; ++e) sum[e] += cosine ? a[e] * inverse : a[e];
      }
    }
    rows = gpu::warp_sum(rows);
#pragma unroll
    for (int e = 0; e < kVec<T>; ++e) {
      const float total = gpu::warp_sum(sum[e]);
      if (lane == 0) item.mean[chunk * kVec<T> + e] = total / float(rows > 0 ? rows : 1);
    }
  }
}

// First scores of a block's tokens under the centroid rule: closeness to the mean. The team has met since the norms.
template <class T, class Team>
__device__ __forceinline__ void centroid_scores(const Item<T>& item, Team& team, const Slice& slice) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  mean(item, team.rank * CudaTiles::warps + warp, team.size * CudaTiles::warps);
  team.sync();
  for (int i = slice.begin + warp; i < slice.end; i += CudaTiles::warps) {
    const float product = product_with_floats(item.x, i, item.mean, item.rule.metric == Metric::l2, lane);
    if (lane == 0) item.first[i] = -item.rule.cost(product, item.inverse_norm[i], 1.0f);
  }
  __syncthreads();
}

}  // namespace tokencomp::kcenter
