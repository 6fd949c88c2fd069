// Prefill attention on the CPU, compiled once per instruction-set level. Keys and values are packed once for each kv
// head; a task is a query block of one head. It meets its keys in steps of a few units: products with keys in lanes,
// softmax row by row, products with value channels in lanes. O(pairs that are listed and seen), memory O(S).
#include "cpu/prefill_kernels.h"

#include "core/dispatch.h"
#include "cpu/attention_tiles.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {

using namespace prefill;

namespace {

static_assert(kUnit % kLaneTile == 0 && kUnit % (2 * kWidth) == 0 && kMostRows % kRowTile == 0 &&
              kDenseRows % kRowTile == 0 && kMostRows >= 128 && kWordPadding % kWidth == 0);

constexpr int kChunkRows = 4 * kRowTile;  // rows that go through a step together; measured, see bench/NOTES.md

// What packed units look like at this level. Keys: tiles of kLaneTile, as pack_lanes leaves them. Values: tiles of
// kLaneTile channels (the last may be narrower), a word row for each key or pair of keys.
template <class T>
struct Layout {
  static constexpr int kValueWords = kUnit / WordOf<T>::elements;  // word rows of a unit
  const PrefillArgs& p;
  const Operands<T> operands;
  int channels;  // of values, in whole registers
  int64_t key_words, value_words;

  TC_INLINE_MEMBER explicit Layout(const PrefillArgs& args)
      : p(args),
        operands(args.a),
        channels((args.Dv + kWidth - 1) / kWidth * kWidth),
        key_words(int64_t(kUnit) * operands.padded),
        value_words(int64_t(kValueWords) * channels) {}

  // Values of the kUnit keys at position(0), position(1), ...; zeros where that is negative.
  template <class F>
  TC_INLINE_MEMBER void gather_values(int b, int kv, F&& position, Word* out) const {
    if (p.a.table.entry) return gather_page_values(b, kv, position, out);
    const T* base = static_cast<const T*>(p.v) + b * p.v_stride_b + kv * p.v_stride_h;
    pack_values([&](int i) { return position(i) < 0 ? nullptr : base + position(i) * p.v_stride_s; }, out);
  }

  template <class F>
  TC_INLINE_MEMBER void gather_page_values(int b, int kv, F&& position, Word* out) const {
    alignas(64) T buffer[kUnit * kMaxHeadDim];
    const T* rows[kUnit];
    PageRows<T> pages({p.a, p.v, p.v_pages, p.Dv, true, b, kv});
    for (int i = 0; i < kUnit; ++i) {
      rows[i] = position(i) < 0 ? nullptr : pages.row(position(i), buffer + i * p.Dv);
    }
    pack_values([&](int i) { return rows[i]; }, out);
  }

  // row(i) is null where there is none: zeros.
  template <class F>
  TC_INLINE_MEMBER void pack_values(F&& row, Word* out) const {
    constexpr int kElements = WordOf<T>::elements;
    static const T nothing[2 * kWidth] = {};
    for (int c = 0; c < channels; c += kLaneTile) {
      const int width = channels - c < kLaneTile ? channels - c : kLaneTile;
      for (int w = 0; w < kValueWords; ++w, out += width) {
        const T *even = row(w * kElements), *odd = kElements == 2 ? row(w * kElements + 1) : nullptr;
        for (int v = 0; v < width; v += kWidth) {
          const Vec words = load_column_words(even ? even + c + v : nothing, odd ? odd + c + v : nullptr,
                                              even || odd ? p.Dv - c - v : kWidth);
          store(reinterpret_cast<float*>(out + v), words);
        }
      }
    }
  }
};

template <class T>
void pack(const PrefillArgs& p, const PrefillWork& w) {
  const Geometry& g = p.a.g;
  const Layout<T> layout(p);
  const int units = units_of(g.S);
  for_each_task(int64_t(w.pairs) * units, w.slots, [&](int64_t task, int64_t) {
    const int64_t pair = w.first_pair + task / units;
    const int b = int(pair / g.Hkv), kv = int(pair % g.Hkv), first = int(task % units) * kUnit;
    const Range keys = keys_of(g, b, kv);
    if (first >= keys.end || first + kUnit <= keys.begin) return;  // nobody sees it
    const auto position = [&](int i) { return first + i >= keys.begin && first + i < keys.end ? first + i : -1; };
    layout.operands.pack_keys(b, kv, first, kUnit, w.keys + task * layout.key_words);
    layout.gather_values(b, kv, position, w.values + task * layout.value_words);
  });
}

// Sixty-four keys of a step.
struct Unit {
  const Word *keys, *values;
  const int* columns;  // positions of its keys, ascending, or null: first, first + 1, ...
  int first, count;

  // The part of the unit that lies in a range of positions, as a range of its own keys.
  TC_INLINE_MEMBER Range part(Range r) const {
    if (!columns) return {r.begin - first, r.end - first};
    return {below(r.begin), below(r.end)};
  }
  TC_INLINE_MEMBER int below(int position) const {
    int n = 0;
    for (int i = 0; i < count; ++i) n += columns[i] < position;
    return n;
  }
};

template <class T, bool kCap>
class Attend {
 public:
  Attend(const PrefillArgs& args, const PrefillWork& work, const PrefillTask& task, int64_t slot)
      : p(args), w(work), g(args.a.g), layout(args), logit(args.a, kLog2e), b(task.b), h(task.h), block(task.block) {
    kv = h / g.group();
    t0 = block * w.rows;
    count = g.T - t0 < w.rows ? g.T - t0 : w.rows;
    padded = (count + kRowTile - 1) / kRowTile * kRowTile;
    queries = w.scratch + slot * w.scratch_words;
    out = reinterpret_cast<float*>(queries + kMostRows * padded_words(g.D));
    logits = out + kMostRows * padded_words(p.Dv);
    weights = reinterpret_cast<Word*>(logits + kMostRows * kStepKeys);
    bias = reinterpret_cast<float*>(weights + kMostRows * kStepKeys);
    own_keys = reinterpret_cast<Word*>(bias + 2 * kStepKeys);
    own_values = own_keys + kStepUnits * unit_words(g.D);
  }

  void run() {
    prepare();
    if (p.blocks.pointer) {
      meet_lists();
    } else {
      for (int key = first / kUnit * kUnit; key < last; key += kUnit) meet(key);
    }
    flush();
    for (int r = 0; r < count; ++r) finish(r);
  }

 private:
  // Rows, packed, with what they see; those that fill the last tile see nothing and may be shown anything.
  void prepare() {
    first = g.S;
    last = 0;
    for (int r = 0; r < padded; ++r) {
      range[r] = r < count ? visible(g, b, kv, t0 + r) : Range{0, 0};
      top[r] = -INFINITY;
      sum[r] = 0.0f;
      Word* row = queries + int64_t(r) * layout.operands.padded;
      if (r < count) {
        layout.operands.pack_query(b, h, t0 + r, row);
      } else {
        for (int i = 0; i < layout.operands.padded; ++i) row[i] = 0;
      }
      if (range[r].begin >= range[r].end) continue;
      first = range[r].begin < first ? range[r].begin : first;
      last = range[r].end > last ? range[r].end : last;
    }
    for (int64_t i = 0; i < int64_t(padded) * layout.channels; ++i) out[i] = 0.0f;
    for (int tile = 0; tile < padded / kRowTile; ++tile) {
      some[tile] = {g.S, 0};
      every[tile] = {0, g.S};
      for (int r = tile * kRowTile; r < (tile + 1) * kRowTile && r < count; ++r) {
        every[tile].begin = range[r].begin > every[tile].begin ? range[r].begin : every[tile].begin;
        every[tile].end = range[r].end < every[tile].end ? range[r].end : every[tile].end;
        if (range[r].begin >= range[r].end) continue;
        some[tile].begin = range[r].begin < some[tile].begin ? range[r].begin : some[tile].begin;
        some[tile].end = range[r].end > some[tile].end ? range[r].end : some[tile].end;
      }
    }
  }

  void meet_lists() {
    const Range blocks = list_of(p, p.blocks, b, h, block), columns = list_of(p, p.columns, b, h, block);
    for (int i = blocks.begin; i < blocks.end; ++i) {
      const int64_t key = int64_t(block_of(p.blocks.entries[i])) * p.block_k;
      for (int64_t j = key; j < key + p.block_k && j < g.S; j += kUnit) meet(int(j));
    }
    for (int i = columns.begin; i < columns.end; i += kUnit) {
      meet_columns(p.columns.entries + i, columns.end - i < kUnit ? columns.end - i : kUnit);
    }
  }

  // A unit of neighbouring keys, unless no row sees any of them.
  void meet(int key) {
    if (key >= last || key + kUnit <= first) return;
    const int64_t at = (int64_t(b) * g.Hkv + kv - w.first_pair) * units_of(g.S) + key / kUnit;
    load_bias(p.a, b, kv, key, kUnit, kLog2e, bias + used * kUnit);
    units[used] = {w.keys + at * layout.key_words, w.values + at * layout.value_words, nullptr, key, kUnit};
    if (++used == kStepUnits) flush();
  }

  // A unit of single keys, packed for this task. Those out of range, or behind the last, count as masked.
  void meet_columns(const int* entries, int n) {
    const Range keys = keys_of(g, b, kv);
    Word *packed_keys = own_keys + used * layout.key_words, *packed_values = own_values + used * layout.value_words;
    const auto there = [&](int i) { return i < n && entries[i] >= keys.begin && entries[i] < keys.end; };
    for (int j = 0; j < kUnit; j += kLaneTile) {
      layout.operands.gather_keys(
          b, kv, [&](int i) { return there(j + i) ? entries[j + i] : -1; },
          packed_keys + int64_t(j) * layout.operands.padded);
    }
    layout.gather_values(b, kv, [&](int i) { return there(i) ? entries[i] : -1; }, packed_values);
    for (int i = 0; i < kUnit; ++i) {
      float value = -INFINITY;
      if (there(i)) load_bias(p.a, b, kv, entries[i], 1, kLog2e, &value);
      bias[used * kUnit + i] = value;
    }
    units[used] = {packed_keys, packed_values, entries, 0, n};
    if (++used == kStepUnits) flush();
  }

  // All rows with the units that have come together.
  void flush() {
    for (int r = 0; used && r < padded; r += kChunkRows) {
      const int end = padded - r < kChunkRows ? padded : r + kChunkRows;
      for (int i = r; i < end; i += kRowTile) seen[i / kRowTile] = 0;
      for (int u = 0; u < used; ++u) {
        for (int i = r; i < end; i += kRowTile) multiply(i, u);
      }
      for (int i = r; i < end; ++i) soften(i);
      for (int c = 0; c < layout.channels; c += kLaneTile) {
        for (int i = r; i < end; i += kRowTile) accumulate(i, c);
      }
    }
    used = 0;
  }

  // Logits of a tile of rows with a unit, unless none of the rows sees it.
  TC_INLINE_MEMBER void multiply(int row, int u) {
    const Unit& unit = units[u];
    const int tile = row / kRowTile;
    const Range any = unit.part(some[tile]);
    if (any.begin >= kUnit || any.end <= 0 || any.begin >= any.end) return;
    seen[tile] |= 1u << u;
    const Range all = unit.part(every[tile]);
    if (all.begin <= 0 && all.end >= unit.count) {
      multiply_unit<false>(row, u);
    } else {
      multiply_unit<true>(row, u);
    }
  }

  template <bool kMask>
  TC_INLINE_MEMBER void multiply_unit(int row, int u) {
    const Vec lowest = broadcast(-INFINITY);
    [[maybe_unused]] Range part[kRowTile];
    for (int r = 0; kMask && r < kRowTile; ++r) part[r] = units[u].part(range[row + r]);
    for (int j = 0; j < kUnit; j += kLaneTile) {
      Vec s[kRowTile][kLaneVecs];
      lane_products<T>(queries + int64_t(row) * layout.operands.padded, layout.operands.padded,
                       units[u].keys + int64_t(j) * layout.operands.padded, layout.operands.words, s);
      for (int r = 0; r < kRowTile; ++r) {
        float* z = logits + int64_t(row % kChunkRows + r) * kStepKeys + u * kUnit + j;
        for (int v = 0; v < kLaneVecs; ++v) {
          Vec x = max(logit(s[r][v], load(bias + u * kUnit + j + v * kWidth)), lowest);  // NaN counts as -inf
          if constexpr (kMask) {
            const int key = j + v * kWidth;
            x = between(x, part[r].begin - key, part[r].end - key, -INFINITY);
          }
          store(z + v * kWidth, x);
        }
      }
    }
  }

  // Logits of one row to weights relative to its largest so far; what it had shrinks by `shrink`.
  TC_INLINE_MEMBER void soften(int row) {
    const float* z = logits + int64_t(row % kChunkRows) * kStepKeys;
    const uint32_t mask = seen[row / kRowTile];
    Vec most = broadcast(-INFINITY);
    for (int u = 0; u < used; ++u) {
      for (int j = 0; (mask >> u & 1) && j < kUnit; j += kWidth) most = max(load(z + u * kUnit + j), most);
    }
    const float highest = maximum(most), before = top[row];
    const bool grows = highest > before;
    shrink[row] = !grows ? 1.0f : before == -INFINITY ? 0.0f : exp2f(before - highest);
    if (grows) top[row] = highest;
    const Vec origin = broadcast(top[row] == -INFINITY ? 0.0f : top[row]);
    Vec total[2] = {broadcast(0.0f), broadcast(0.0f)};
    for (int u = 0; u < used; ++u) {
      if (!(mask >> u & 1)) continue;
      Word* to = weights + (int64_t(row % kChunkRows) * kStepUnits + u) * kUnit;
      for (int j = 0; j < kUnit; j += 2 * kWidth) {
        Vec e[2];
        for (int v = 0; v < 2; ++v) {
          e[v] = exp2(sub(load(z + u * kUnit + j + v * kWidth), origin));
          total[v] = add(total[v], e[v]);
        }
        to = store_row_words(to, e[0], e[1], T{});
      }
    }
    sum[row] = sum[row] * shrink[row] + tokencomp::cpu::TOKENCOMP_ISA::sum(add(total[0], total[1]));
  }

  // Values of up to kLaneTile channels from c on into the outputs of a tile of rows.
  TC_INLINE_MEMBER void accumulate(int row, int c) {
    if (!seen[row / kRowTile]) return;
    const int vecs = (layout.channels - c) / kWidth;
    if (vecs >= kLaneVecs) return add_channels<kLaneVecs>(row, c);
    if constexpr (kLaneVecs == 4) {
      if (vecs == 3) return add_channels<3>(row, c);
      if (vecs == 2) return add_channels<2>(row, c);
    }
    add_channels<1>(row, c);
  }

  template <int kVecs>
  TC_INLINE_MEMBER void add_channels(int row, int c) {
    using Lanes = typename WordOf<T>::Lanes;
    constexpr int kWords = Layout<T>::kValueWords;
    Vec acc[kRowTile][kVecs];
    for (int r = 0; r < kRowTile; ++r) {
      const Vec factor = broadcast(shrink[row + r]);
      for (int v = 0; v < kVecs; ++v) acc[r][v] = mul(load(output(row + r) + c + v * kWidth), factor);
    }
    for (uint32_t left = seen[row / kRowTile]; left; left &= left - 1) {
      const int u = __builtin_ctz(left);
      const Word* value = units[u].values + int64_t(c) * kWords;
      const Word* weight = weights + (int64_t(row % kChunkRows) * kStepUnits + u) * kUnit;
      for (int i = 0; i < kWords; ++i) {
        Lanes lane[kVecs];
        for (int v = 0; v < kVecs; ++v) lane[v] = load_words(value + (i * kVecs + v) * kWidth, Lanes{});
        for (int r = 0; r < kRowTile; ++r) {
          const Lanes own = broadcast_word(weight + int64_t(r) * kStepKeys + i, Lanes{});
          for (int v = 0; v < kVecs; ++v) acc[r][v] = multiply_add(lane[v], own, acc[r][v]);
        }
      }
    }
    for (int r = 0; r < kRowTile; ++r) {
      for (int v = 0; v < kVecs; ++v) store(output(row + r) + c + v * kWidth, acc[r][v]);
    }
  }

  TC_INLINE_MEMBER float* output(int row) { return out + int64_t(row) * layout.channels; }

  void finish(int r) {
    const int64_t at = (int64_t(b) * g.Hq + h) * g.T + t0 + r;
    const RowEnd end = finish_row(top[r], sum[r], p.sinks ? p.sinks + h : nullptr);
    p.lse[at] = end.lse;
    T* to = static_cast<T*>(p.out) + at * p.Dv;
    const Vec factor = broadcast(end.factor);
    for (int c = 0; c < p.Dv; c += kWidth) store_up_to(to + c, mul(load(output(r) + c), factor), p.Dv - c);
  }

  const PrefillArgs& p;
  const PrefillWork& w;
  const Geometry& g;
  const Layout<T> layout;
  const Logit<kCap> logit;
  int b, h, kv, block, t0, count, padded, first, last, used = 0;
  Word *queries, *weights, *own_keys, *own_values;
  float *out, *logits, *bias;
  Unit units[kStepUnits];
  uint32_t seen[kMostRows / kRowTile];                            // units of the step that a tile of rows sees
  Range range[kMostRows];                                         // keys that a row sees
  Range some[kMostRows / kRowTile], every[kMostRows / kRowTile];  // keys that one, or each, row of a tile sees
  float top[kMostRows], sum[kMostRows], shrink[kMostRows];
};

}  // namespace

void prefill_pack(const PrefillArgs& p, const PrefillWork& w) {
  dispatch_dtype(p.a.dtype, [&]<class T> { pack<T>(p, w); });
}

void prefill_attend(const PrefillArgs& p, const PrefillWork& w) {
  dispatch_dtype(p.a.dtype, [&]<class T> {
    dispatch_cap(p.a, [&]<bool kCap> {
      for_each_task(w.count, w.slots, [&](int64_t i, int64_t slot) { Attend<T, kCap>(p, w, w.tasks[i], slot).run(); });
    });
  });
}

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
