// Log-sum-exp of attention rows on the CPU, with or without the logits, compiled once per instruction-set level. The
// rows of all heads of a group form one list, so that a packed key serves them all; where they are few, keys are
// multiplied where they lie, packing them would take longer than that. Keys are split where rows are few; the parts are
// merged in order.
#include "core/dispatch.h"
#include "cpu/row_tiles.h"
#include "cpu/score_tiles.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {
namespace {

constexpr int kFewRows = 8;      // that are multiplied with keys where they lie; measured, see bench/notes/score.md
constexpr int kRowsAtOnce = 12;  // rows are padded to whole tiles of either kind
constexpr int kKeysAhead = 128;  // rows of keys that are fetched before they are multiplied
static_assert(kRowsAtOnce % kRowTile == 0 && kRowsAtOnce % 4 == 0 && kRowBlock % kRowsAtOnce == 0);

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
      load_bias(l.a, b, kv, j, kKeyBlock, 1.0f, bias);
      if (row_end - row_begin <= kFewRows) {
        fold_few(j);
      } else {
        operands.pack_keys(b, kv, j, kKeyBlock, keys);
        for (int i = 0; i < count; i += kRowTile) fold(i, j);
      }
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
    for (int i = count; i % kRowsAtOnce; ++i) {  // rows that fill the last tile see nothing
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

  // Of the block from key j on, the keys that are multiplied: whole tiles.
  int used_of(int j) const {
    return (end - j < kKeyBlock ? end - j + kLaneTile - 1 : kKeyBlock) / kLaneTile * kLaneTile;
  }

  // Keys [j, j + kKeyBlock) for rows i ... i + kRowTile.
  void fold(int i, int j) {
    Vec top[kRowTile];
    for (int r = 0; r < kRowTile; ++r) top[r] = broadcast(-INFINITY);
    const int used = used_of(j);
    for (int u = 0; u < used; u += kLaneTile) {
      Vec s[kRowTile][kLaneVecs];
      lane_products<T>(words + int64_t(i) * operands.padded, operands.padded, keys + int64_t(u) * operands.padded,
                       operands.words, s);
      for (int r = 0; r < kRowTile; ++r) {
        for (int v = 0; v < kLaneVecs; ++v) {
          top[r] = max(keep_logits(s[r][v], rows[i + r].range, r, j, u + v * kWidth), top[r]);
        }
      }
    }
    for (int r = 0; r < kRowTile && i + r < count; ++r) fold_row(rows[i + r], maximum(top[r]), r, j, used);
  }

  // Keys [j, j + kKeyBlock) for all rows.
  void fold_few(int j) {
    const T* key[kKeyBlock + kKeysAhead];
    operands.key_rows(b, kv, j, kKeyBlock, kKeysAhead, key, reinterpret_cast<T*>(keys));
    const int used = used_of(j);
    for (int i = 0; i < count;) {
      if (count - i == 1) {
        fold_rows<1>(key, i++, j, used);
      } else if (count - i == 2) {
        fold_rows<2>(key, i, j, used), i += 2;
      } else {
        fold_rows<4>(key, i, j, used), i += 4;
      }
    }
  }

  template <int kRows>
  void fold_rows(const T* const* key, int i, int j, int used) {
    using Tile = RowTiles<T, kRows>;
    constexpr int kKeys = Tile::kKeys;
    for (int u = 0; u < used; u += kKeys) {
      alignas(64) float z[kWidth];
      store(z, operands.template products<kRows>(key + u, words + int64_t(i) * operands.padded));
      for (int r = 0; r < kRows; ++r) {
        __builtin_memcpy(buffer + r * kKeyBlock + u, z + r * kKeys, kKeys * sizeof(float));
      }
      for (int t = 0; i == 0 && t < kKeys; ++t) operands.fetch(key[u + kKeysAhead + t]);
    }
    for (int r = 0; r < kRows && i + r < count; ++r) {
      Vec top = broadcast(-INFINITY);
      for (int u = 0; u < used; u += kWidth) {
        top = max(keep_logits(load(buffer + r * kKeyBlock + u), rows[i + r].range, r, j, u), top);
      }
      fold_row(rows[i + r], maximum(top), r, j, used);
    }
  }

  // The logits of kWidth products with the keys from j + u on, kept for `fold_row`.
  TC_INLINE_MEMBER Vec keep_logits(Vec product, Range range, int r, int j, int u) const {
    const int key = j + u;
    Vec z = max(logit(product, load(bias + u)), broadcast(-INFINITY));  // NaN counts as -inf
    z = between(z, range.begin - key, range.end - key, -INFINITY);
    store(buffer + r * kKeyBlock + u, z);
    return z;
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
