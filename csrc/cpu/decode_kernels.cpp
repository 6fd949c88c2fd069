// Decode attention over pages on the CPU, compiled once per instruction-set level. A task is one part of the keys of a
// (sequence, kv head) against all rows of the group. It goes by chunks that fit L1: products with the keys, softmax,
// weighted sum of the values, four rows at a time; while one half works on a chunk, the other half's next rows are on
// their way. Logits of a tile lie as [row][key] in one vector, so that no row needs sums across lanes.
#include "cpu/decode_kernels.h"

#include "core/dispatch.h"
#include "cpu/decode_codes.h"
#include "cpu/parallel.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {

namespace {

template <class T, int kRows, bool kCap>
class PartTask {
  using Tile = Tiles<T, kRows>;
  using W = typename Tile::W;
  using Stored = typename Tile::Stored;
  static constexpr int kKeys = Tile::kKeys;

 public:
  PartTask(const DecodeArgs& args, const DecodeWork& work, int64_t task, int64_t slot)
      : a(args),
        w(work),
        own_task(task),
        rows(args.rows()),
        values(int(padded_values(args))),
        words(int(round_up(args.D, kPack<T>))),
        far(rows_are_far(args, work)),
        coded(args, work.tasks[task].pair, work.scratch + slot * work.scratch_bytes + working_bytes(args)) {
    pair = w.tasks[task].pair;
    part = w.tasks[task].part;
    b = pair / a.Hkv;
    kv = pair % a.Hkv;
    length = length_of(a, b, kv);
    const int candidates = candidates_of(a, b, kv);
    last_part = task + 1 == w.first_task[pair + 1];
    first_part = task == w.first_task[pair];
    begin = part * kPartKeys;
    end = candidates - begin < kPartKeys ? candidates : begin + kPartKeys;
    top = w.partial + task * w.partial_floats;
    total = top + padded_rows(a);
    sums = total + padded_rows(a);
    carve(w.scratch + slot * w.scratch_bytes);
  }

  void run() {
    const bool ahead = far || (a.types.count && !a.index);
    if (ahead) fetch_first();
    collect();
    pack_queries();
    const int64_t padded = padded_rows(a);
    for (int64_t r = 0; r < padded; ++r) top[r] = -INFINITY, total[r] = 0.0f;
    for (int64_t i = 0; i < padded * values; i += kWidth) store(sums + i, broadcast(0.0f));
    if (a.logits && !a.index) hide_logits();
    for (int j = 0; j < count; j += kChunkKeys) {
      const int keys = count - j < kChunkKeys ? count - j : kChunkKeys, tiles = (keys + kKeys - 1) / kKeys;
      if (ahead) look_ahead(j);
      if (is_coded(j)) coded.open(slots + j, side + j, keys, a.index, key + j, value + j);
      for (int r = 0; r < rows; r += kRows) {
        multiply(j, tiles, r);
        soften(j, tiles, r);
        weigh(j, tiles, r);
      }
      if (ahead) coded.ahead.fetch_rest();
    }
  }

 private:
  // Fetching a whole chunk ahead pays where rows come from memory, in long pieces; in caches it costs a quarter.
  static bool rows_are_far(const DecodeArgs& a, const DecodeWork& w) {
    const bool pieces = a.table.page_size() >= kChunkKeys / 2 && a.k.slot_stride == a.D && a.v.slot_stride == a.Dv;
    const int64_t bytes = w.task_count * kPartKeys * int64_t(a.D + a.Dv) * int64_t(sizeof(T));
    return pieces && !a.index && !a.types.count && bytes > kCacheBytes;
  }

  // Whether the chunk from key j on has quantized pages.
  bool is_coded(int j) const { return coded_chunks >> j / kChunkKeys & 1; }

  // The pages of the first chunk, where nobody looked ahead.
  void fetch_first() {
    coded.ahead.template look<T>(a, b, kv, begin, end, far, far, 1);
    coded.ahead.fetch_rest();
  }

  // What comes after the chunk from key j on: the next one, or the first of the task that will likely be this thread's.
  // Working keys after working ones are left to the products with values, unless they are far.
  void look_ahead(int j) {
    const bool is_last = j + kChunkKeys >= count;
    const int tiles = kChunkKeys / kKeys,
              far_steps = tiles * (1 + Tile::passes(a.Dv)) * int(round_up(rows, kRows)) / kRows;
    const int steps = is_coded(j) ? coded.kSteps : far ? far_steps : tiles;
    const bool keys = far || is_coded(j);
    if (!is_last) return coded.ahead.template look<T>(a, b, kv, begin + j + kChunkKeys, end, keys, far, steps);
    const int64_t task = own_task + w.slots;
    if (task >= w.task_count) return;
    const int other = w.tasks[task].pair, first = w.tasks[task].part * kPartKeys;
    const int row = other / a.Hkv, head = other % a.Hkv;
    coded.ahead.template look<T>(a, row, head, first, candidates_of(a, row, head), keys, far, steps);
  }

  void carve(unsigned char* p) {
    constexpr int kMost = kPartKeys + kChunkKeys;
    key = reinterpret_cast<const T**>(p);
    value = key + kMost;
    side = reinterpret_cast<float*>(value + kMost);
    slots = reinterpret_cast<int*>(side + kMost);
    logits = reinterpret_cast<float*>(slots + kMost);
    weights = reinterpret_cast<Stored*>(logits + kChunkKeys * kRowPadding);
    query = reinterpret_cast<T*>(logits + 2 * kChunkKeys * kRowPadding);
  }

  // Where the keys and values of the part lie, and what is added to their logits. -inf hides a key from all rows.
  void collect() {
    count = end > begin ? end - begin : 0;
    for (int i = 0; i < round_up(count, kChunkKeys); ++i) {
      slots[i] = -1, side[i] = -INFINITY;
      key[i] = value[i] = reinterpret_cast<const T*>(kZeroRow);
    }
    const int newest = a.causal && a.T == 1 ? length : end_of(a, a.T - 1, length);
    if (a.index) {
      const int* list = a.index + int64_t(pair) * a.listed + begin;
      for (int i = 0; i < count; ++i) {
        if (list[i] >= 0 && list[i] < newest) place(i, list[i], 1);
      }
      return;
    }
    for (int s = begin, last = newest < end ? newest : end; s < last;) {
      const int rest = a.table.page_size() - a.table.slot_in_page(s), keys = rest < last - s ? rest : last - s;
      place(s - begin, s, keys);
      s += keys;
    }
  }

  // Slots [s, s + n) of one page are keys from i on.
  TC_INLINE_MEMBER void place(int i, int s, int n) {
    for (int t = 0; t < n; ++t) slots[i + t] = s + t;
    const int32_t entry = entry_of(a, b, kv, s);
    if (entry == kNoPage) return;
    for (int t = 0; t < n; ++t) side[i + t] = 0.0f;
    if (a.key_bias) {
      const float* bias = a.key_bias + b * a.bias_stride_b + kv * a.bias_stride_h + s;
      for (int t = 0; t < n; ++t) side[i + t] = bias[t] > -INFINITY ? bias[t] : -INFINITY;
    }
    if (a.T == 1 && a.window) {
      const int floor = floor_of(a, b, kv, 0, length);
      for (int t = 0; t < n; ++t) side[i + t] = position_of(a, b, kv, s + t) > floor ? side[i + t] : -INFINITY;
    }
    if (page_type(entry) != 0) {
      for (int j = i / kChunkKeys; j <= (i + n - 1) / kChunkKeys; ++j) coded_chunks |= 1u << j;
      if (!a.index) LinesAhead::touch(a.types.page(entry), a.types.pool_of(page_type(entry)).page_bytes);
      return;
    }
    const T* k = static_cast<const T*>(a.k.base) + a.k.offset(entry, kv, a.table.slot_in_page(s));
    const T* v = static_cast<const T*>(a.v.base) + a.v.offset(entry, kv, a.table.slot_in_page(s));
    if (a.types.count && !a.index) {
      LinesAhead::touch(reinterpret_cast<const uint8_t*>(k), n * a.k.slot_stride * int64_t(sizeof(T)));
      LinesAhead::touch(reinterpret_cast<const uint8_t*>(v), n * a.v.slot_stride * int64_t(sizeof(T)));
    }
    for (int t = 0; t < n; ++t) {
      if (!(side[i + t] > -INFINITY)) continue;
      key[i + t] = k + t * a.k.slot_stride, value[i + t] = v + t * a.v.slot_stride;
      if (!far && i + t < kChunkKeys) prefetch_row(key[i + t], a.D);
    }
  }

  void pack_queries() {
    for (int r = 0; r < round_up(rows, kRows); ++r) {
      const T* row = static_cast<const T*>(a.q) + b * a.q_stride_b + (kv * a.group() + r / a.T) * a.q_stride_h +
                     r % a.T * a.q_stride_t;
      T* own = query + r * words;
      if (r < rows) __builtin_memcpy(own, row, size_t(a.D) * sizeof(T));
      for (int c = r < rows ? a.D : 0; c < words; ++c) own[c] = T{};
      if (coded_chunks) coded.add_query(r, r < rows ? row : nullptr);
    }
  }

  float* logits_of(int r) const {
    const int64_t at = (int64_t(b) * a.Hq + kv * a.group()) * a.T + r;
    return a.logits + at * a.capacity;
  }

  // -inf where no tile writes: before the first part and after the last.
  void hide_logits() const {
    for (int r = 0; r < rows; ++r) {
      float* out = logits_of(r);
      for (int s = 0; first_part && s < begin; ++s) out[s] = -INFINITY;
      for (int s = begin; s < end; ++s) out[s] = -INFINITY;
      for (int s = end < 0 ? 0 : end; last_part && s < a.capacity; ++s) out[s] = -INFINITY;
    }
  }

  // Rows [r, r + kRows) against keys [j, j + tiles * kKeys) of the part.
  TC_INLINE_MEMBER void multiply(int j, int tiles, int r) {
    const Vec scale = broadcast(kCap ? a.scale / a.softcap : a.scale), cap = broadcast(a.softcap);
    const Vec lowest = broadcast(-INFINITY);
    if (is_coded(j)) coded.multiply_bytes(tiles * kKeys, r);
    for (int i = 0; i < tiles; ++i) {
      const int at = j + i * kKeys;
      Vec z = is_coded(j) ? coded.products(key + j, at - j, r, query + r * words, words)
                          : Tile::products(key + at, query + r * words, words, 0, a.D);
      if (!far && r == 0 && value[at] != reinterpret_cast<const T*>(kZeroRow)) {
        for (int t = 0; t < kKeys; ++t) prefetch_row(value[at + t], a.Dv);
      }
      if (is_coded(j) ? i % (tiles / 2 + 1) == 0 : far || r == 0) coded.ahead.fetch();
      const Vec bias = repeat<kKeys>(side + at);
      if constexpr (kCap) {
        z = fma(tanh(mul(z, scale)), cap, bias);
      } else {
        z = fma(z, scale, bias);
      }
      z = max(z, lowest);  // NaN counts as -inf
      float* out = logits + i * kWidth;
      store(out, z);
      if (a.T > 1) hide_rows(out, at, r);
      if (a.logits) write_logits(out, at, r);
    }
  }

  // What single query rows do not see: slots after their own, and those that left their window.
  void hide_rows(float* z, int at, int r) const {
    for (int t = 0; t < kKeys; ++t) {
      const int s = slots[at + t];
      if (s < 0 || (!a.window && s < end_of(a, 0, length))) continue;
      for (int i = 0; i < kRows; ++i) {
        const int row = (r + i) % a.T;
        const bool seen =
            s < end_of(a, row, length) && (!a.window || position_of(a, b, kv, s) > floor_of(a, b, kv, row, length));
        if (!seen) z[i * kKeys + t] = -INFINITY;
      }
    }
  }

  void write_logits(const float* z, int at, int r) const {
    for (int i = 0; i < kRows && r + i < rows; ++i) {
      float* out = logits_of(r + i);
      for (int t = 0; t < kKeys; ++t) {
        if (slots[at + t] >= 0) out[slots[at + t]] = z[i * kKeys + t];
      }
    }
  }

  // Logits become weights relative to the new maxima; what the rows gathered before is brought to them.
  TC_INLINE_MEMBER void soften(int j, int tiles, int r) {
    Vec highest = load(logits);
    for (int i = 1; i < tiles; ++i) highest = max(highest, load(logits + i * kWidth));
    float lanes[kWidth], origin[kWidth];
    store(lanes, highest);
    for (int i = 0; i < kRows; ++i) {
      float high = top[r + i];
      for (int t = 0; t < kKeys; ++t) high = lanes[i * kKeys + t] > high ? lanes[i * kKeys + t] : high;
      if (high > top[r + i]) rescale(r + i, high);
      for (int t = 0; t < kKeys; ++t) origin[i * kKeys + t] = high;
    }
    const Vec from = load(origin), log2e = broadcast(kLog2e);
    Vec sum_of = broadcast(0.0f);
    for (int i = 0; i < tiles; ++i) {
      const Vec p = exp2(mul(sub(load(logits + i * kWidth), from), log2e));  // -inf less -inf is NaN: 0
      sum_of = add(sum_of, p);
      W::store_weights(weights + i * kWidth, p);
      if (is_coded(j)) {
        store(logits + i * kWidth, p);
        if (i % (tiles / 2 + 1) == 0) coded.ahead.fetch();
      }
    }
    store(lanes, sum_of);
    for (int i = 0; i < kRows; ++i) {
      for (int t = 0; t < kKeys; ++t) total[r + i] += lanes[i * kKeys + t];
    }
  }

  TC_INLINE_MEMBER void rescale(int r, float high) {
    const float factor = exp2f((top[r] - high) * kLog2e);
    top[r] = high;
    total[r] *= factor;
    float* row = sums + int64_t(r) * values;
    for (int c = 0; c < values; c += kWidth) store(row + c, mul(load(row + c), broadcast(factor)));
  }

  TC_INLINE_MEMBER void weigh(int j, int tiles, int r) {
    float* out = sums + int64_t(r) * values;
    if (is_coded(j)) return coded.weigh(value + j, logits, weights, tiles, out);
    const T* const* next = !far && r == 0 && j + kChunkKeys < count ? key + j + kChunkKeys : nullptr;
    Tile::weigh(value + j, weights, tiles, 0, a.Dv, out, values, next, far ? &coded.ahead : nullptr);
  }

  const DecodeArgs& a;
  const DecodeWork& w;
  const int64_t own_task;
  const int rows, values, words;
  const bool far;  // all rows of the next chunk are fetched during this one
  int pair, part, b, kv, length, begin, end, count = 0;
  bool first_part, last_part;
  float *top, *total, *sums;
  const T **key, **value;
  float *side, *logits;
  int* slots;
  Stored* weights;
  T* query;
  uint32_t coded_chunks = 0;  // a bit for each
  CodedChunk<T, kRows> coded;
};

// All parts of a pair, in order: the result does not depend on who finished first.
template <class T>
void merge_parts(const DecodeArgs& a, const DecodeWork& w, int pair, float* row) {
  const int b = pair / a.Hkv, kv = pair % a.Hkv, values = int(padded_values(a));
  const int64_t padded = padded_rows(a);
  const float* first = w.partial + w.first_task[pair] * w.partial_floats;
  const int parts = w.first_task[pair + 1] - w.first_task[pair];
  for (int r = 0; r < a.rows(); ++r) {
    const int head = kv * a.group() + r / a.T;
    float top = a.sinks ? a.sinks[head] : -INFINITY, total = 0.0f;
    for (int i = 0; i < parts; ++i) top = fmaxf(top, first[i * w.partial_floats + r]);
    if (a.sinks && is_finite(top)) total = exp2f((a.sinks[head] - top) * kLog2e);
    for (int c = 0; c < values; c += kWidth) store(row + c, broadcast(0.0f));
    for (int i = 0; i < parts; ++i) {
      const float *part = first + i * w.partial_floats, *own = part + 2 * padded + int64_t(r) * values;
      if (!(part[r] > -INFINITY)) continue;
      const float factor = exp2f((part[r] - top) * kLog2e);
      total += factor * part[padded + r];
      for (int c = 0; c < values; c += kWidth) store(row + c, fma(load(own + c), broadcast(factor), load(row + c)));
    }
    const int64_t at = (int64_t(b) * a.Hq + head) * a.T + r % a.T;
    a.lse[at] = total > 0.0f ? top + logf(total) : top;
    const Vec inverse = broadcast(total > 0.0f ? 1.0f / total : 0.0f);
    T* out = static_cast<T*>(a.out) + at * a.Dv;
    for (int c = 0; c < a.Dv; c += kWidth) {
      constexpr int kStep = Weights<T>::kElements;
      const Vec x = Weights<T>::in_order(row + c / kStep * kStep, c % kStep / kWidth);
      store_up_to(out + c, mul(x, inverse), a.Dv - c);
    }
  }
}

template <class T, int kRows, bool kCap>
void run_parts(const DecodeArgs& a, const DecodeWork& w) {
  for_each_task(w.task_count, w.slots, [&](int64_t task, int64_t slot) {
    PartTask<T, kRows, kCap>(a, w, task, slot).run();
    const int pair = w.tasks[task].pair, parts = w.first_task[pair + 1] - w.first_task[pair];
    if (int(__atomic_add_fetch(w.done + pair, 1u, __ATOMIC_ACQ_REL)) != parts) return;
    merge_parts<T>(a, w, pair, reinterpret_cast<float*>(w.scratch + slot * w.scratch_bytes));
  });
}

}  // namespace

void paged_decode(const DecodeArgs& a, const DecodeWork& w) {
  dispatch_dtype(a.dtype, [&]<class T> {
    const auto with_rows = [&]<int kRows> {
      a.softcap > 0.0f ? run_parts<T, kRows, true>(a, w) : run_parts<T, kRows, false>(a, w);
    };
    if (a.rows() == 1) {
      with_rows.template operator()<1>();
    } else if (a.rows() == 2) {
      with_rows.template operator()<2>();
    } else {
      with_rows.template operator()<4>();
    }
  });
}

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
