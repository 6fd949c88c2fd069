// Column scores on the CPU, compiled once per instruction-set level. Keys lie still in lanes and query rows stream by,
// so a key's sum stays in one lane of one register for a whole block of rows. O(T S D), memory O(T + S).
#include "cpu/score_kernels.h"

#include "core/dispatch.h"
#include "cpu/score_tiles.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {
namespace {

// hi + lo += x, exact to twice the precision: long columns are sums of many blocks.
TC_INLINE void add_exact(float* hi, float* lo, Vec x) {
  const Vec a = load(hi), total = add(a, x), part = sub(total, a);
  const Vec error = add(sub(a, sub(total, part)), sub(x, part));
  store(hi, total);
  store(lo, add(load(lo), error));
}

// Up to kRowBlock query rows of one head that count, packed.
struct RowBlock {
  Word* words;
  int count = 0, first = 0, last = 0;  // keys that at least one row sees
  int all_begin = 0, all_end = 0;      // keys that every row sees
  float beta[kRowBlock];
  Range range[kRowBlock];
};

template <class T, bool kMax, bool kCap>
class Columns {
 public:
  Columns(const ColumnArgs& args, const ColumnWork& work, int64_t task, int64_t slot)
      : c(args), w(work), g(args.a.g), operands(args.a), logit(args.a, float(args.power) * kLog2e) {
    const int64_t pairs = int64_t(g.B) * g.Hkv;  // early keys, which most rows see, come first
    first = int(task / pairs) * kKeyBlock;
    b = int(task % pairs / g.Hkv);
    kv = int(task % g.Hkv);
    keys = w.scratch + slot * w.scratch_words;
    rows.words = keys + int64_t(kKeyBlock) * operands.padded;
    bias = reinterpret_cast<float*>(rows.words + int64_t(kRowBlock) * operands.padded);
    hi = bias + kKeyBlock;
    lo = hi + kKeyBlock;
  }

  void run() {
    for (int i = 0; i < g.group(); ++i) head(kv * g.group() + i);
  }

 private:
  void head(int h) {
    for (int j = 0; j < kKeyBlock; ++j) {
      hi[j] = kMax ? -INFINITY : 0.0f;
      lo[j] = 0.0f;
    }
    const int64_t at = int64_t(b) * g.Hq + h, blocks = row_blocks(g.T);
    for (int block = 0; block < blocks; ++block) {
      const Bounds bounds = w.bounds[at * blocks + block];
      if (bounds.first >= first + kKeyBlock || bounds.last <= first) continue;
      const int end = (block + 1) * kRowBlock < g.T ? (block + 1) * kRowBlock : g.T;
      for (int t = block * kRowBlock; t < end; ++t) {
        take(h, t, w.beta[at * g.T + t]);
        if (rows.count == kRowBlock) flush();
      }
    }
    flush();
    float* out = w.per_head + at * g.S + first;
    for (int j = 0; j < kKeyBlock; j += kWidth) {
      const Vec total = kMax ? exp2(load(hi + j)) : add(load(hi + j), load(lo + j));
      if (g.S - first - j > 0) store_some(out + j, total, g.S - first - j < kWidth ? g.S - first - j : kWidth);
    }
  }

  void take(int h, int t, float beta) {
    const Range range = w.range[int64_t(b) * g.T + t];
    if (beta == INFINITY || range.begin >= first + kKeyBlock || range.end <= first) return;
    RowBlock& r = rows;
    r.first = r.count && r.first < range.begin ? r.first : range.begin;
    r.last = r.count && r.last > range.end ? r.last : range.end;
    r.all_begin = r.count && r.all_begin > range.begin ? r.all_begin : range.begin;
    r.all_end = r.count && r.all_end < range.end ? r.all_end : range.end;
    operands.pack_query(b, h, t, r.words + int64_t(r.count) * operands.padded);
    r.beta[r.count] = beta;
    r.range[r.count++] = range;
  }

  void flush() {
    RowBlock& r = rows;
    if (!r.count) return;
    if (!packed) {
      operands.pack_keys(b, kv, first, kKeyBlock, keys);
      load_bias(c.a, b, kv, first, kKeyBlock, float(c.power) * kLog2e, bias);
      packed = true;
    }
    for (int i = r.count; i % kRowTile; ++i) {  // rows that fill the last tile add nothing
      r.beta[i] = INFINITY;
      r.range[i] = {0, 0};
      for (int word = 0; word < operands.padded; ++word) r.words[int64_t(i) * operands.padded + word] = 0;
    }
    for (int j = 0; j < kKeyBlock; j += kLaneTile) {
      const int key = first + j;
      if (r.first >= key + kLaneTile || r.last <= key) continue;
      if (r.all_begin <= key && r.all_end >= key + kLaneTile) {
        fold<false>(j);
      } else {
        fold<true>(j);
      }
    }
    r.count = 0;
  }

  template <bool kMask>
  TC_INLINE_MEMBER void fold(int j) {
    const Word* lanes = keys + int64_t(j) * operands.padded;
    Vec total[kLaneVecs], bias_of[kLaneVecs];
    for (int v = 0; v < kLaneVecs; ++v) {
      total[v] = broadcast(kMax ? -INFINITY : 0.0f);
      bias_of[v] = load(bias + j + v * kWidth);
    }
    for (int i = 0; i < rows.count; i += kRowTile) {
      Vec s[kRowTile][kLaneVecs];
      lane_products<T>(rows.words + int64_t(i) * operands.padded, operands.padded, lanes, operands.words, s);
      for (int r = 0; r < kRowTile; ++r) {
        const Vec beta = broadcast(rows.beta[i + r]);
        const Range range = rows.range[i + r];
        for (int v = 0; v < kLaneVecs; ++v) {
          const int key = first + j + v * kWidth;
          Vec x = sub(logit(s[r][v], bias_of[v]), beta);
          if constexpr (kMask) x = between(x, range.begin - key, range.end - key, -INFINITY);
          total[v] = kMax ? max(x, total[v]) : add(total[v], exp2(x));  // NaN leaves either as it is
        }
      }
    }
    for (int v = 0; v < kLaneVecs; ++v) {
      float* at = hi + j + v * kWidth;
      if constexpr (kMax) {
        store(at, max(total[v], load(at)));
      } else {
        add_exact(at, lo + j + v * kWidth, total[v]);
      }
    }
  }

  const ColumnArgs& c;
  const ColumnWork& w;
  const Geometry& g;
  const Operands<T> operands;
  const Logit<kCap> logit;
  int first, b, kv;
  bool packed = false;
  Word* keys;
  float *bias, *hi, *lo;
  RowBlock rows;
};

template <class T, bool kMax, bool kCap>
void run_columns(const ColumnArgs& c, const ColumnWork& w) {
  const Geometry& g = c.a.g;
  for_each_task(int64_t(g.B) * g.Hkv * key_blocks(g.S), w.slots,
                [&](int64_t task, int64_t slot) { Columns<T, kMax, kCap>(c, w, task, slot).run(); });
}

}  // namespace

// Once per call: exponents and ranges of all rows, and what each block of rows sees.
void score_rows(const ColumnArgs& c, const ColumnWork& w) {
  const Geometry& g = c.a.g;
  parallel_for(g.B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int t = 0; t < g.T; ++t) w.range[b * g.T + t] = visible(g, int(b), 0, t);
    }
  });
  const int64_t blocks = row_blocks(g.T);
  parallel_for(int64_t(g.B) * g.Hq * blocks, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / blocks, b = head / g.Hq, h = head % g.Hq;
      const float* weight = c.row_weight ? c.row_weight + b * c.weight_stride_b + h * c.weight_stride_h : nullptr;
      Bounds bounds{g.S, 0};
      for (int64_t t = i % blocks * kRowBlock; t < (i % blocks + 1) * kRowBlock && t < g.T; ++t) {
        const float beta = beta_of(c.lse[head * g.T + t], weight ? weight[t] : 1.0f, c.power);
        w.beta[head * g.T + t] = beta;
        const Range r = w.range[b * g.T + t];
        if (beta == INFINITY || r.begin >= r.end) continue;
        bounds.first = r.begin < bounds.first ? r.begin : bounds.first;
        bounds.last = r.end > bounds.last ? r.end : bounds.last;
      }
      w.bounds[i] = bounds;
    }
  });
}

void score_columns(const ColumnArgs& c, const ColumnWork& w) {
  dispatch_dtype(c.a.dtype, [&]<class T> {
    dispatch_cap(c.a, [&]<bool kCap> {
      c.rows == Rows::max ? run_columns<T, true, kCap>(c, w) : run_columns<T, false, kCap>(c, w);
    });
  });
}

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
