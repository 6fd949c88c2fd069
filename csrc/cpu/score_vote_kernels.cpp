// Pointwise steps of a decode-time selection on the CPU, compiled once per instruction-set level: the heads' vote, the
// update of accumulated scores, and the reduction over heads. Heads are added in order.
#include "cpu/score_tiles.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {
namespace {

constexpr int64_t kGrain = 1 << 15;  // values that are worth handing to another thread

TC_INLINE int lanes_left(int n) { return n < kWidth ? n : kWidth; }
TC_INLINE Vec load_left(const float* p, int n) { return n >= kWidth ? load(p) : load_some(p, n); }

// e^(z - lse), 0 for a head without a finite lse. NaN gives 0.
TC_INLINE Vec probability(Vec z, float lse) {
  if (!is_finite(lse)) return broadcast(0.0f);
  return exp(sub(z, broadcast(lse)));
}

Vec vote_of(const VoteArgs& v, int64_t head, int heads, int j, int n) {
  const Vec lowest = broadcast(-INFINITY);
  Vec total = broadcast(0.0f), top = lowest;
  for (int h = 0; h < heads; ++h) {
    const Vec z = max(load_left(v.scores + (head + h) * v.S + j, n), lowest);  // NaN counts as -inf
    top = max(z, top);
    total = add(total, v.mode == Vote::softmax_sum ? probability(z, v.lse[head + h]) : z);
  }
  if (v.mode == Vote::max) return top;
  if (v.mode == Vote::mean) total = div(total, broadcast(float(heads)));
  return select_ge(lowest, top, lowest, total);  // masked for every head
}

// What one slot receives: every head's probability to a power, reduced; and the strongest probability.
struct Received {
  Vec score, strongest;
};

Received receive(const DecayArgs& d, int64_t head, int heads, int j, int n) {
  Received r{broadcast(0.0f), broadcast(0.0f)};
  const Vec zero = broadcast(0.0f);
  for (int h = 0; h < heads; ++h) {
    const Vec z = load_left(d.logits + (head + h) * d.S + j, n);
    const Vec p = d.lse ? probability(z, d.lse[head + h]) : max(z, zero);
    r.strongest = max(p, r.strongest);
    Vec s = d.power == 2 ? mul(p, p) : p;
    if (d.heads == Heads::rms) s = mul(s, s);
    r.score = d.heads == Heads::kv_max ? max(s, r.score) : add(r.score, s);
  }
  const bool mean = d.heads == Heads::kv_mean || d.heads == Heads::mean || d.heads == Heads::rms;
  if (mean) r.score = div(r.score, broadcast(float(heads)));
  return r;
}

void update(const DecayArgs& d, int64_t row, int j, int n, Received r) {
  const int64_t at = row * d.S + j;
  alignas(64) float score[kWidth], strongest[kWidth];
  store(score, r.score);
  store(strongest, r.strongest);
  for (int i = 0; i < n; ++i) {
    const float received = d.heads == Heads::rms ? sqrtf(score[i]) : score[i];
    d.score[at + i] = d.gamma * d.score[at + i] + received;
    // Unsigned: counters that somebody filled to the brim wrap, as on a GPU.
    if (d.count) d.count[at + i] = int(unsigned(d.count[at + i]) + 1);
    if (d.last && strongest[i] >= d.alpha) {
      const int gap = int(unsigned(d.step) - unsigned(d.last[at + i]));
      if (d.interval && gap > d.interval[at + i]) d.interval[at + i] = gap;
      d.last[at + i] = d.step;
    }
  }
}

// f(row, j, n): pieces of n <= kWidth values of `rows` rows of S, in parallel.
template <class F>
void for_each_piece(int64_t rows, int S, int work, F&& f) {
  const int64_t pieces = (int64_t(S) + kWidth - 1) / kWidth;
  parallel_for(rows * pieces, kGrain / (kWidth * work) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int j = int(i % pieces) * kWidth;
      f(i / pieces, j, lanes_left(S - j));
    }
  });
}

}  // namespace

void score_vote(const VoteArgs& v) {
  const int heads = v.Hq / v.groups;
  for_each_piece(int64_t(v.B) * v.groups, v.S, heads, [&](int64_t row, int j, int n) {
    store_some(v.out + row * v.S + j, vote_of(v, row * heads, heads, j, n), n);
  });
}

void score_decay(const DecayArgs& d) {
  const int heads = d.Hq / d.H;
  for_each_piece(int64_t(d.B) * d.H, d.S, heads, [&](int64_t row, int j, int n) {
    const int length = d.lengths ? d.lengths[row / d.H] : d.S, live = length - j < n ? length - j : n;
    if (live > 0) update(d, row, j, live, receive(d, row * heads, heads, j, n));
  });
}

// per_head [B, Hq, S] to out [B, H*, S].
void score_heads(const ColumnArgs& c, const ColumnWork& w) {
  const Geometry& g = c.a.g;
  const int out = heads_out(c.heads, g.Hq, g.Hkv), heads = g.Hq / out;
  for_each_piece(int64_t(g.B) * out, g.S, heads, [&](int64_t row, int j, int n) {
    for (int i = j; i < j + n; ++i) {
      float total = 0.0f;
      for (int h = 0; h < heads; ++h) {
        total = accumulate_head(c.heads, total, w.per_head[(row * heads + h) * g.S + i]);
      }
      c.out[row * g.S + i] = finish_heads(c.heads, total, heads);
    }
  });
}

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
