// Log-sum-exp of attention rows on the CPU, with or without the logits, compiled once per instruction-set level. The
// rows of all heads of a group form one list, so that a packed key serves them all. Keys are split where rows are few;
// the parts are merged in order.
#include "core/dispatch.h"
#include "cpu/score_tiles.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {
namespace {

struct LseRow {
  int64_t at;  // in lse
  Range range;
  float top, sum;
};

template <class T, bool kCap>
class LseTask {
 public:
  LseTask(const LseArgs& args, const LseWork& work, int64_t task, int64_t slot)
      : l(args), w(work), g(args.a.g), operands(args.a), logit(args.a, 1.0f) {
    const int64_t all = int64_t(g.group()) * g.T, blocks = row_blocks(all), pairs = int64_t(g.B) * g.Hkv;
    split = int(task % w.splits);
    const int64_t block = blocks - 1 - task / w.splits / pairs;  // late rows, which see most keys, come first
    b = int(task / w.splits % pairs / g.Hkv);
    kv = int(task / w.splits % g.Hkv);
    row_begin = block * kRowBlock;
    row_end = row_begin + kRowBlock < all ? row_begin + kRowBlock : all;
    begin = split * w.keys_per_split;
    end = g.S - begin < w.keys_per_split ? g.S : begin + w.keys_per_split;
    keys = w.scratch + slot * w.scratch_words;
    words = keys + int64_t(kKeyBlock) * operands.padded;
    bias = reinterpret_cast<float*>(words + int64_t(kRowBlock) * operands.padded);
    buffer = bias + kKeyBlock;
  }

  void run() {
    collect();
    first = first / kKeyBlock * kKeyBlock;
    for (int i = 0; i < count; ++i) {
      fill(rows[i], begin, first);
      fill(rows[i], (last + kKeyBlock - 1) / kKeyBlock * kKeyBlock, end);
    }
    for (int j = first; j < last; j += kKeyBlock) {
      operands.pack_keys(b, kv, j, kKeyBlock, keys);
      load_bias(l.a, b, kv, j, kKeyBlock, 1.0f, bias);
      for (int i = 0; i < count; i += kRowTile) fold(i, j);
    }
    for (int i = 0; i < count; ++i) write(rows[i]);
  }

 private:
  // Rows that see a key of this split; the others are done at once.
  void collect() {
    first = end;
    last = begin;
    for (int64_t r = row_begin; r < row_end; ++r) {
      const int h = int(kv * g.group() + r / g.T), t = int(r % g.T);
      Range range = visible(g, b, kv, t);
      range.begin = range.begin > begin ? range.begin : begin;
      range.end = range.end < end ? range.end : end;
      const LseRow row{(int64_t(b) * g.Hq + h) * g.T + t, range, -INFINITY, 0.0f};
      if (range.begin >= range.end) {
        fill(row, begin, end);
        write(row);
        continue;
      }
      first = range.begin < first ? range.begin : first;
      last = range.end > last ? range.end : last;
      operands.pack_query(b, h, t, words + int64_t(count) * operands.padded);
      rows[count++] = row;
    }
    for (int i = count; i % kRowTile; ++i) {  // rows that fill the last tile see nothing
      rows[i] = {-1, {0, 0}, -INFINITY, 0.0f};
      for (int word = 0; word < operands.padded; ++word) words[int64_t(i) * operands.padded + word] = 0;
    }
  }

  // Logits of keys that no block reaches.
  void fill(const LseRow& row, int from, int to) const {
    for (int j = from; l.logits && j < to; ++j) l.logits[row.at * g.S + j] = -INFINITY;
  }

  void write(const LseRow& row) const {
    float* out = w.partial + (int64_t(split) * g.B * g.Hq * g.T + row.at) * 2;
    out[0] = row.top;
    out[1] = row.sum;
  }

  // Keys [j, j + kKeyBlock) for rows i ... i + kRowTile.
  void fold(int i, int j) {
    Vec top[kRowTile];
    for (int r = 0; r < kRowTile; ++r) top[r] = broadcast(-INFINITY);
    const int used = (end - j < kKeyBlock ? end - j + kLaneTile - 1 : kKeyBlock) / kLaneTile * kLaneTile;
    for (int u = 0; u < used; u += kLaneTile) {
      Vec s[kRowTile][kLaneVecs];
      lane_products<T>(words + int64_t(i) * operands.padded, operands.padded, keys + int64_t(u) * operands.padded,
                       operands.words, s);
      for (int r = 0; r < kRowTile; ++r) {
        const Range range = rows[i + r].range;
        for (int v = 0; v < kLaneVecs; ++v) {
          const int key = j + u + v * kWidth;
          const Vec lowest = broadcast(-INFINITY);
          Vec z = logit(s[r][v], load(bias + u + v * kWidth));
          z = between(max(z, lowest), range.begin - key, range.end - key, -INFINITY);  // NaN counts as -inf
          top[r] = max(z, top[r]);
          store(buffer + r * kKeyBlock + u + v * kWidth, z);
        }
      }
    }
    for (int r = 0; r < kRowTile && i + r < count; ++r) fold_row(rows[i + r], maximum(top[r]), r, j, used);
  }

  void fold_row(LseRow& row, float top, int r, int j, int used) {
    const float* z = buffer + r * kKeyBlock;
    if (l.logits) {
      const int n = end - j < kKeyBlock ? end - j : kKeyBlock;
      for (int u = 0; u < n; u += kWidth) {
        store_some(l.logits + row.at * g.S + j + u, load(z + u), n - u < kWidth ? n - u : kWidth);
      }
    }
    if (top == -INFINITY) return;
    if (top > row.top) {
      row.sum *= exp2f((row.top - top) * kLog2e);
      row.top = top;
    }
    const Vec log2e = broadcast(kLog2e), origin = broadcast(row.top);
    Vec sum_of[2] = {broadcast(0.0f), broadcast(0.0f)};
    for (int u = 0; u < used; u += 2 * kWidth) {
      for (int v = 0; v < 2; ++v) sum_of[v] = add(sum_of[v], exp2(mul(sub(load(z + u + v * kWidth), origin), log2e)));
    }
    row.sum += sum(add(sum_of[0], sum_of[1]));
  }

  const LseArgs& l;
  const LseWork& w;
  const Geometry& g;
  const Operands<T> operands;
  const Logit<kCap> logit;
  int split, b, kv, begin, end, first, last, count = 0;
  int64_t row_begin, row_end;
  Word *keys, *words;
  float *bias, *buffer;
  LseRow rows[kRowBlock];
};

void merge_splits(const LseArgs& l, const LseWork& w) {
  const Geometry& g = l.a.g;
  const int64_t rows = int64_t(g.B) * g.Hq * g.T;
  parallel_for(rows, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float top = -INFINITY, sum = 0.0f;
      for (int s = 0; s < w.splits; ++s) top = fmaxf(top, w.partial[(s * rows + r) * 2]);
      for (int s = 0; s < w.splits && is_finite(top); ++s) {
        const float* part = w.partial + (s * rows + r) * 2;
        if (part[1] > 0.0f) sum += part[1] * expf(part[0] - top);
      }
      l.lse[r] = is_finite(top) ? top + logf(sum) : top;
    }
  });
}

}  // namespace

void score_lse(const LseArgs& l, const LseWork& w) {
  const Geometry& g = l.a.g;
  const int64_t blocks = row_blocks(int64_t(g.group()) * g.T);
  dispatch_dtype(l.a.dtype, [&]<class T> {
    dispatch_cap(l.a, [&]<bool kCap> {
      for_each_task(int64_t(g.B) * g.Hkv * blocks * w.splits, w.slots,
                    [&](int64_t task, int64_t slot) { LseTask<T, kCap>(l, w, task, slot).run(); });
    });
  });
  merge_splits(l, w);
}

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
