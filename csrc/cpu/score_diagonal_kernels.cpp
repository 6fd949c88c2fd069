// Diagonal scores on the CPU, compiled once per instruction-set level. A task owns a range of offsets (position of the
// row minus key) of one head: for every block of rows it visits the band of keys at these offsets, so that an offset's
// sum never leaves the task. O(T S D), memory O(T + S).
#include "core/dispatch.h"
#include "cpu/score_tiles.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {
namespace {

template <class T, bool kCap>
class Diagonals {
 public:
  Diagonals(const ColumnArgs& args, const ColumnWork& work, int64_t task, int64_t slot)
      : c(args), w(work), g(args.a.g), operands(args.a), logit(args.a, float(args.power) * kLog2e) {
    const int64_t blocks = key_blocks(g.S);
    first = int(task % blocks) * kKeyBlock;
    b = int(task / blocks / g.Hq);
    h = int(task / blocks % g.Hq);
    keys = w.scratch + slot * w.scratch_words;
    words = keys + int64_t(kKeyBlock) * operands.padded;
    bias = reinterpret_cast<float*>(words + int64_t(kRowBlock) * operands.padded);
    total = reinterpret_cast<double*>(bias + kKeyBlock);
  }

  void run() {
    for (int o = 0; o < kKeyBlock; ++o) total[o] = 0.0;
    const int64_t head = int64_t(b) * g.Hq + h;
    for (int t = 0; t < g.T; ++t) {
      const float beta = w.beta[head * g.T + t];
      const Range range = w.range[int64_t(b) * g.T + t];
      if (beta != INFINITY && range.begin < range.end) take(t, beta, range);
    }
    flush();
    float* out = w.per_head + head * g.S + first;
    for (int o = 0; o < kKeyBlock && first + o < g.S; ++o) out[o] = float(total[o]);
  }

 private:
  // Only the keys of the row at this task's offsets.
  void take(int t, float beta, Range range) {
    const int p = position_of(g, b, 0, t), low = p - first - kKeyBlock + 1, high = p - first + 1;
    range.begin = range.begin > low ? range.begin : low;
    range.end = range.end < high ? range.end : high;
    if (range.begin >= range.end) return;
    from = count && from < range.begin ? from : range.begin;
    to = count && to > range.end ? to : range.end;
    operands.pack_query(b, h, t, words + int64_t(count) * operands.padded);
    this->beta[count] = beta;
    position[count] = p;
    this->range[count++] = range;
    if (count == kRowBlock) flush();
  }

  void flush() {
    for (int i = count; i % kRowTile; ++i) {
      range[i] = {0, 0};
      for (int word = 0; word < operands.padded; ++word) words[int64_t(i) * operands.padded + word] = 0;
    }
    for (int j = from / kKeyBlock * kKeyBlock; count && j < to; j += kKeyBlock) {
      operands.pack_keys(b, h / g.group(), j, kKeyBlock, keys);
      load_bias(c.a, b, h / g.group(), j, kKeyBlock, float(c.power) * kLog2e, bias);
      for (int u = 0; u < kKeyBlock && j + u < g.S; u += kLaneTile) {
        for (int i = 0; i < count; i += kRowTile) fold(i, j + u, u);
      }
    }
    count = 0;
  }

  // Rows i ... i + kRowTile and the tile of keys from `key`, `u` keys into what is packed.
  void fold(int i, int key, int u) {
    bool any = false;
    for (int r = 0; r < kRowTile; ++r) any |= range[i + r].begin < key + kLaneTile && range[i + r].end > key;
    if (!any) return;
    Vec s[kRowTile][kLaneVecs];
    lane_products<T>(words + int64_t(i) * operands.padded, operands.padded, keys + int64_t(u) * operands.padded,
                     operands.words, s);
    for (int r = 0; r < kRowTile && i + r < count; ++r) {
      const Vec row_beta = broadcast(beta[i + r]);
      alignas(64) float p[kLaneTile];
      for (int v = 0; v < kLaneVecs; ++v) {
        store(p + v * kWidth, exp2(sub(logit(s[r][v], load(bias + u + v * kWidth)), row_beta)));
      }
      const Range seen = range[i + r];
      const int begin = seen.begin > key ? seen.begin : key;
      const int end = seen.end < key + kLaneTile ? seen.end : key + kLaneTile;
      for (int j = begin; j < end; ++j) total[position[i + r] - j - first] += double(p[j - key]);
    }
  }

  const ColumnArgs& c;
  const ColumnWork& w;
  const Geometry& g;
  const Operands<T> operands;
  const Logit<kCap> logit;
  int first, b, h, count = 0, from = 0, to = 0;
  Word *keys, *words;
  float* bias;
  double* total;  // a diagonal is as long as there are rows
  float beta[kRowBlock];
  int position[kRowBlock];
  Range range[kRowBlock];
};

}  // namespace

void score_diagonals(const ColumnArgs& c, const ColumnWork& w) {
  const Geometry& g = c.a.g;
  dispatch_dtype(c.a.dtype, [&]<class T> {
    dispatch_cap(c.a, [&]<bool kCap> {
      for_each_task(int64_t(g.B) * g.Hq * key_blocks(g.S), w.slots,
                    [&](int64_t task, int64_t slot) { Diagonals<T, kCap>(c, w, task, slot).run(); });
    });
  });
}

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
