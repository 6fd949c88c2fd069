// k-center selection on the CPU, compiled once per instruction-set level. One item at a time: norms, first centre, then
// k picks by one of the three paths of kcenter_plan.h. The running state of a picked or invalid token is NaN, and so is
// its score: NaN never compares as larger, so such tokens drop out of every scan without a branch.
#include "cpu/kcenter_kernels.h"

#include "core/dispatch.h"
#include "core/order.h"
#include "cpu/kcenter_pairs.h"
#include "cpu/parallel.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {
namespace {

using namespace kcenter;

// Elements read that are worth handing to another thread: about 50 us, what waking one costs under a passive wait
// policy.
constexpr int64_t kTaskElements = 1 << 20;

// Key of the largest score, lowest index first; kNobody if all are NaN.
OrderKey argmax(const float* score, int n) {
  Vec best = broadcast(-INFINITY);
  int i = 0;
  for (; i + kWidth <= n; i += kWidth) best = max(load(score + i), best);
  float top = maximum(best);
  for (; i < n; ++i) top = score[i] > top ? score[i] : top;
  const Vec wanted = broadcast(top);
  for (i = 0; i + kWidth <= n; i += kWidth) {
    if (const uint32_t hits = lanes_ge(load(score + i), wanted)) return order_key(top, i + __builtin_ctz(hits));
  }
  for (; i < n; ++i) {
    if (score[i] >= top) return order_key(top, i);
  }
  return kNobody;
}

// At least about one task's worth of elements per range.
int64_t grain_of(int C) { return kTaskElements / C + 1; }

template <class T>
class Selection {
 public:
  Selection(const Args& args, const CpuPlan& plan, const CpuScratch& scratch, int b)
      : a(args),
        s(scratch),
        path(plan.path),
        rule(rule_of(args)),
        x{static_cast<const T*>(args.x) + b * args.x_stride_b, args.x_stride_n, args.C},
        weight(args.weight ? args.weight + int64_t(b) * args.N : nullptr),
        seed(args.seed ? args.seed + int64_t(b) * args.S : nullptr),
        index(args.index + int64_t(b) * args.k),
        value(args.value + int64_t(b) * args.k),
        n(length_of(args, b)) {}

  template <bool kL2>
  void run() {
    prepare();
    const bool nearest_first = !seed && a.first == First::largest_nn;
    if (path == CpuPath::gram || nearest_first) all_pairs<kL2>(nearest_first);
    for (int pick = 0; pick < a.k; ++pick) {
      const int token = choose<kL2>(pick);
      if (token < 0) {
        pick_leftover(pick);
        continue;
      }
      index[pick] = token;
      value[pick] = rule.value(s.state[token], weight_of(token), centres);
      s.state[token] = s.score[token] = NAN;
      s.centre[centres++] = token;
      if (pick + 1 < a.k && path != CpuPath::lazy) update<kL2>(token);
    }
  }

 private:
  float weight_of(int i) const { return weight ? weight[i] : 1.0f; }

  void rescore(int i) {
    const float state = s.state[i];
    const float score = rule.score(state, weight_of(i), centres);
    s.score[i] = state != state ? NAN : score == score ? score : -INFINITY;
  }

  void prepare() {
    parallel_for(n, grain_of(a.C), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        s.inverse_norm[i] = inverse_norm(product<false>(x[i], x[i], a.C));
        s.state[i] = is_valid(s.inverse_norm[i]) ? rule.start() : NAN;
        s.seen[i] = 0;
        rescore(int(i));
      }
    });
  }

  // Multiplier that turns a product of rows (i, j) into its cost; the same arithmetic as Rule::cost.
  Vec cost_scale(int i, const float* inverse_norm_j) const {
    if (a.metric == Metric::cosine) return mul(broadcast(-s.inverse_norm[i]), load(inverse_norm_j));
    return broadcast(a.metric == Metric::dot ? -1.0f : 1.0f);
  }

  // ---- choosing -----------------------------------------------------------------------------------------------------

  template <bool kL2>
  int choose(int pick) {
    if (pick < a.S) {
      const int token = seed[pick];
      if (token >= 0 && token < n && s.state[token] == s.state[token]) {
        if (path == CpuPath::lazy) refresh<kL2>(token);
        return token;
      }
    }
    if (pick == 0 && !seed && a.first == First::largest_nn) return first_by_neighbour();
    if (pick == 0 && !seed && a.first == First::centroid) return first_by_centroid<kL2>();
    const OrderKey best = path == CpuPath::lazy && centres > 0 ? lazy_argmax<kL2>() : argmax(s.score, n);
    return best == kNobody ? -1 : index_of(best);
  }

  // Valid tokens have run out: the invalid ones follow in index order, then holes.
  void pick_leftover(int pick) {
    while (leftover < n && is_valid(s.inverse_norm[leftover])) ++leftover;
    index[pick] = leftover < n ? leftover++ : -1;
    value[pick] = -INFINITY;
  }

  int first_by_neighbour() {
    const Rule nearest = rule.nearest_neighbour();
    OrderKey best = kNobody;
    for (int i = 0; i < n; ++i) {
      if (!is_valid(s.inverse_norm[i])) continue;
      const OrderKey key = order_key(nearest.score(s.cost[i], weight_of(i), 1), i);
      best = key > best ? key : best;
    }
    return best == kNobody ? -1 : index_of(best);
  }

  template <bool kL2>
  int first_by_centroid() {
    int valid = 0;
    for (int i = 0; i < n; ++i) valid += is_valid(s.inverse_norm[i]);
    parallel_for(a.C, 4 * kBlock, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) s.mean[c] = 0;
      for (int i = 0; i < n; ++i) {
        if (!is_valid(s.inverse_norm[i])) continue;
        const T* row = x[i];
        const float scale = a.metric == Metric::cosine ? s.inverse_norm[i] : 1.0f;
        for (int64_t c = begin; c < end; ++c) s.mean[c] += scale * to_float(row[c]);
      }
      for (int64_t c = begin; c < end; ++c) s.mean[c] /= float(valid);
    });
    const Rows<float> mean{s.mean, 0, a.C};
    OrderKey best = kNobody;
    for (int i = 0; i < n; ++i) {
      if (!is_valid(s.inverse_norm[i])) continue;
      const float cost = rule.cost(product_with_floats<kL2>(x[i], mean[0], a.C), s.inverse_norm[i], 1.0f);
      const OrderKey key = order_key(-cost, i);
      best = key > best ? key : best;
    }
    return best == kNobody ? -1 : index_of(best);
  }

  // ---- streaming and matrix rows
  // --------------------------------------------------------------------------------------

  template <bool kL2>
  void update(int centre) {
    const bool gram = path == CpuPath::gram;
    const float* costs = gram ? s.matrix + int64_t(centre) * a.N : s.cost;
    parallel_for(n, gram ? kTaskElements : grain_of(a.C), [&](int64_t begin, int64_t end) {
      if (!gram) costs_to<kL2>(centre, int(begin), int(end));
      for (int64_t i = begin; i < end; ++i) {
        const float state = s.state[i];
        s.state[i] = state == state ? rule.fold(state, costs[i]) : state;
        rescore(int(i));
      }
    });
  }

  // s.cost of tokens [begin, end) to one centre.
  template <bool kL2>
  void costs_to(int centre, int begin, int end) {
    const T* c = x[centre];
    for (int i = begin; i < end; i += kTileRows) {
      const T* rows[kTileRows];
      float products[kTileRows];
      for (int r = 0; r < kTileRows; ++r) rows[r] = x[i + r < end ? i + r : end - 1];
      tile<kL2, kTileRows, 1>(rows, &c, a.C, products, 1);
      for (int r = 0; r < kTileRows && i + r < end; ++r) {
        s.cost[i + r] = rule.cost(products[r], s.inverse_norm[i + r], s.inverse_norm[centre]);
      }
    }
  }

  // ---- lazy
  // -----------------------------------------------------------------------------------------------------------

  // Folds centres [from, from + cols) into up to kRows tokens, so that a loaded row serves several products. A token
  // may meet a centre twice: a minimum does not mind.
  template <bool kL2, int kRows>
  void meet(const int* tokens, int count, int from, int cols) {
    const T *rows[kRows], *columns[kTileCols];
    for (int r = 0; r < kRows; ++r) rows[r] = x[tokens[r < count ? r : 0]];
    for (int c = 0; c < kTileCols; ++c) columns[c] = x[s.centre[from + (c < cols ? c : 0)]];
    float products[kRows][kTileCols];
    tile<kL2, kRows, kTileCols>(rows, columns, a.C, products[0], kTileCols);
    for (int r = 0; r < count; ++r) {
      const int i = tokens[r];
      for (int c = 0; c < cols; ++c) {
        const float cost = rule.cost(products[r][c], s.inverse_norm[i], s.inverse_norm[s.centre[from + c]]);
        s.state[i] = rule.fold(s.state[i], cost);
      }
      s.seen[i] = from + cols;
      rescore(i);
    }
  }

  OrderKey key_of(int i) const { return order_key(s.score[i], i); }

  // Lets the listed tokens meet the centres they have not seen. A token joins when the sweep reaches its first unseen
  // centre and drops out when its score no longer beats `best`. Returns the largest key of those that met all centres,
  // or `best`. Reorders the list.
  template <bool kL2>
  OrderKey sweep(int* list, int count, OrderKey best, int64_t& products) {
    int from = centres;
    for (int j = 0; j < count; ++j) from = s.seen[list[j]] < from ? s.seen[list[j]] : from;
    from -= from % kTileCols;
    for (; from < centres && count > 0; from += kTileCols) {
      const int cols = centres - from < kTileCols ? centres - from : kTileCols;
      int ready[kTileRows], waiting = 0, kept = 0;
      for (int j = 0; j < count; ++j) {
        const int i = list[j];
        if (key_of(i) <= best) continue;
        list[kept++] = i;
        if (s.seen[i] >= from + cols) continue;
        ready[waiting++] = i;
        if (waiting < kTileRows) continue;
        meet<kL2, kTileRows>(ready, waiting, from, cols);
        products += waiting * cols;
        waiting = 0;
      }
      if (waiting == 1) {
        meet<kL2, 1>(ready, waiting, from, cols);
      } else if (waiting > 1) {
        meet<kL2, kTileRows>(ready, waiting, from, cols);
      }
      products += waiting * cols;
      count = kept;
    }
    for (int j = 0; j < count; ++j) best = key_of(list[j]) > best ? key_of(list[j]) : best;
    return best;
  }

  template <bool kL2>
  void refresh(int token) {
    sweep<kL2>(&token, 1, kNobody, products);
  }

  // Probe: the tokens of largest stale score meet all centres together; the best of them is a bound that few others
  // beat. Those few are then swept, in parallel where it is worth it.
  template <bool kL2>
  OrderKey lazy_argmax() {
    int probe[kTileRows];
    float stale[kTileRows];
    int probes = 0;
    for (OrderKey key; probes < kTileRows && (key = argmax(s.score, n)) != kNobody; ++probes) {
      probe[probes] = index_of(key);
      stale[probes] = s.score[probe[probes]];
      s.score[probe[probes]] = NAN;
    }
    for (int j = 0; j < probes; ++j) s.score[probe[j]] = stale[j];
    int64_t total = 0;
    OrderKey winner = sweep<kL2>(probe, probes, kNobody, total);
    const int hits = collect(winner);
    // Worth sharing out if this pick takes about as many products as the last one; the first centre meets everybody.
    const bool share = (centres == 1 ? n : products) * a.C >= 2 * kTaskElements;
    parallel_for(hits, share ? (hits + thread_count() - 1) / thread_count() : hits, [&](int64_t begin, int64_t end) {
      int64_t mine = 0;
      const OrderKey bound = __atomic_load_n(&winner, __ATOMIC_RELAXED);
      const OrderKey best = sweep<kL2>(s.list + begin, int(end - begin), bound, mine);
      __atomic_fetch_add(&total, mine, __ATOMIC_RELAXED);
      // The largest key wins whatever the order of arrival.
      OrderKey seen = __atomic_load_n(&winner, __ATOMIC_RELAXED);
      while (best > seen &&
             !__atomic_compare_exchange_n(&winner, &seen, best, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
      }
    });
    products = total;
    return winner;
  }

  // Lists the tokens whose stale score beats `best`.
  int collect(OrderKey best) {
    const Vec bound = broadcast(score_of(best));
    int count = 0;
    for (int i = 0; i < n; i += kWidth) {
      const int lanes = n - i < kWidth ? n - i : kWidth;
      uint32_t hits = lanes_ge(lanes == kWidth ? load(s.score + i) : load_some(s.score + i, lanes), bound);
      for (hits &= uint32_t((uint64_t(1) << lanes) - 1); hits; hits &= hits - 1) {
        const int token = i + __builtin_ctz(hits);
        if (key_of(token) > best) s.list[count++] = token;
      }
    }
    return count;
  }

  // ---- all pairs
  // ------------------------------------------------------------------------------------------------------

  // Costs of every pair once: into the matrix (gram), and their row minima into s.cost (largest_nn).
  template <bool kL2>
  void all_pairs(bool nearest_first) {
    const int64_t side = padded(n) / kBlock, blocks = side * (side + 1) / 2;
    int64_t next = 0;  // blocks are taken as threads come: one that wakes late must not keep the others waiting
    parallel_for(s.slots, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot) {
        float* nearest = s.nearest + slot * padded(a.N);
        for (int i = 0; i < n; ++i) nearest[i] = INFINITY;
        int64_t row = 0, first = 0;  // row of blocks, and the number of its first one
        for (int64_t u; (u = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < blocks;) {
          while (u > first + row) first += ++row;
          pair_block<kL2>(int(row) * kBlock, int(u - first) * kBlock, nearest_first ? nearest : nullptr);
        }
      }
    });
    if (!nearest_first) return;
    for (int i = 0; i < n; ++i) {
      s.cost[i] = s.nearest[i];
      for (int slot = 1; slot < s.slots; ++slot) {
        const float other = s.nearest[slot * padded(a.N) + i];
        s.cost[i] = other < s.cost[i] ? other : s.cost[i];
      }
    }
  }

  template <bool kL2>
  void pair_block(int row0, int col0, float* nearest) {
    alignas(64) float costs[kBlock][kBlock];
    const int rows = n - row0 < kBlock ? n - row0 : kBlock, cols = n - col0 < kBlock ? n - col0 : kBlock;
    block<kL2>(x, row0, rows, col0, cols, costs);
    for (int r = 0; r < rows; ++r) {
      const int i = row0 + r;
      if (!is_valid(s.inverse_norm[i])) continue;
      for (int c = 0; c < kBlock; c += kWidth) {
        const float* inverse_norm = s.inverse_norm + col0 + c;
        const Vec cost = mul(load(&costs[r][c]), cost_scale(i, inverse_norm));
        store(&costs[r][c], fma(load(inverse_norm), broadcast(0), cost));  // NaN where the other row is invalid
      }
      if (s.matrix) {
        for (int c = 0; c < cols; ++c) s.matrix[int64_t(i) * a.N + col0 + c] = costs[r][c];
      }
      if (nearest) fold_nearest(i, col0, cols, costs[r], nearest);
    }
    if (!s.matrix) return;
    for (int c = 0; c < cols; ++c) {  // transposed, one contiguous piece of a row at a time
      for (int r = 0; r < rows; ++r) s.matrix[int64_t(col0 + c) * a.N + row0 + r] = costs[r][c];
    }
  }

  static void fold_nearest(int i, int col0, int cols, float* costs, float* nearest) {
    if (i - col0 < cols) costs[i - col0] = INFINITY;  // itself
    Vec lowest = broadcast(INFINITY);
    for (int c = cols; c < kBlock; ++c) costs[c] = INFINITY;
    for (int c = 0; c < kBlock; c += kWidth) {
      const Vec cost = load(costs + c);
      lowest = min(cost, lowest);
      store(nearest + col0 + c, min(cost, load(nearest + col0 + c)));
    }
    const float row = minimum(lowest);
    nearest[i] = row < nearest[i] ? row : nearest[i];
  }

  const Args& a;
  const CpuScratch& s;
  const CpuPath path;
  const Rule rule;
  const Rows<T> x;
  const float* weight;
  const int* seed;
  int* index;
  float* value;
  const int n;
  int centres = 0;       // valid picks
  int leftover = 0;      // where to look for the next invalid token
  int64_t products = 0;  // of the latest lazy pick
};

}  // namespace

void kcenter_select(const Args& args, const CpuPlan& plan, const CpuScratch& scratch, int b) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    Selection<T> selection(args, plan, scratch, b);
    if (args.metric == Metric::l2) {
      selection.template run<true>();
    } else {
      selection.template run<false>();
    }
  });
}

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
