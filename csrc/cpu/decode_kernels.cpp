// Decode attention over pages on the CPU, compiled once per instruction-set level. A task is one part of the keys of a
// (sequence, kv head) against all rows of the group. It goes by chunks that fit L1: products with the keys, softmax,
// weighted sum of the values, four rows at a time; while one half works on a chunk, the other half's next rows are on
// their way. Logits of a tile lie as [row][key] in one vector, so that no row needs sums across lanes.
#include "cpu/decode_kernels.h"

#include "core/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/simd_math.h"
#include "cpu/simd_pairs.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {

using namespace decode;

namespace {

alignas(64) const unsigned char kZeros[kMaxHeadDim * 4] = {};  // the key and value of a slot that is not there

template <class T>
TC_INLINE void prefetch_row(const T* p, int n) {
  for (int i = 0; i < n; i += 64 / int(sizeof(T))) __builtin_prefetch(p + i);
}

template <class T, int kRows, bool kCap>
class PartTask {
  using W = Weights<T>;
  using Stored = typename W::Stored;
  static constexpr int kKeys = kWidth / kRows;  // of a tile
  static_assert(kChunkKeys % kKeys == 0 && kKeys % 2 == 0);

 public:
  PartTask(const DecodeArgs& args, const DecodeWork& work, int64_t task, int64_t slot)
      : a(args), w(work), rows(args.rows()), values(int(padded_values(args))), words(int(round_up(args.D, kPack<T>))) {
    pair = w.tasks[task].pair;
    part = w.tasks[task].part;
    b = pair / a.Hkv;
    kv = pair % a.Hkv;
    length = length_of(a, b, kv);
    const int candidates = candidates_of(a, b, kv), parts = w.first_task[pair + 1] - w.first_task[pair];
    last_part = task + 1 == w.first_task[pair + 1];
    first_part = task == w.first_task[pair];
    (void)parts;
    begin = part * kPartKeys;
    end = candidates - begin < kPartKeys ? candidates : begin + kPartKeys;
    top = w.partial + task * w.partial_floats;
    total = top + padded_rows(a);
    sums = total + padded_rows(a);
    carve(w.scratch + slot * w.scratch_bytes);
  }

  void run() {
    collect();
    pack_queries();
    const int64_t padded = padded_rows(a);
    for (int64_t r = 0; r < padded; ++r) top[r] = -INFINITY, total[r] = 0.0f;
    for (int64_t i = 0; i < padded * values; i += kWidth) store(sums + i, broadcast(0.0f));
    if (a.logits && !a.index) hide_logits();
    for (int j = 0; j < count; j += kChunkKeys) {
      const int tiles = ((count - j < kChunkKeys ? count - j : kChunkKeys) + kKeys - 1) / kKeys;
      for (int r = 0; r < rows; r += kRows) {
        multiply(j, tiles, r);
        soften(tiles, r);
        weigh(j, tiles, r);
      }
    }
  }

 private:
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
    const int floor = a.T == 1 ? floor_of(a, b, kv, 0, length) : 0;
    const int* list = a.index ? a.index + int64_t(pair) * a.listed : nullptr;
    const float* bias = a.key_bias ? a.key_bias + b * a.bias_stride_b + kv * a.bias_stride_h : nullptr;
    int page_slot = -1;
    int64_t k_page = -1, v_page = -1;
    const int newest = a.causal && a.T == 1 ? length : end_of(a, a.T - 1, length);
    count = 0;
    for (int i = begin; i < end; ++i, ++count) {
      const int s = list ? list[i] : i;
      slots[count] = s;
      key[count] = value[count] = reinterpret_cast<const T*>(kZeros);
      side[count] = -INFINITY;
      if (s < 0 || s >= newest) {
        slots[count] = -1;
        continue;
      }
      if (s >> a.table.shift != page_slot) {
        page_slot = s >> a.table.shift;
        const int page = page_of(a, b, kv, s);
        k_page = page < 0 ? -1 : a.k.offset(page, kv, 0);
        v_page = page < 0 ? -1 : a.v.offset(page, kv, 0);
      }
      float z = bias ? bias[s] : 0.0f;
      if (a.T == 1 && a.window && !(position_of(a, b, kv, s) > floor)) z = -INFINITY;
      if (k_page < 0 || !(z > -INFINITY)) continue;
      const int in_page = a.table.slot_in_page(s);
      key[count] = static_cast<const T*>(a.k.base) + k_page + in_page * a.k.slot_stride;
      value[count] = static_cast<const T*>(a.v.base) + v_page + in_page * a.v.slot_stride;
      side[count] = z;
      if (count < kChunkKeys) prefetch_row(key[count], a.D);
    }
    for (int i = count; i % kChunkKeys; ++i) {
      key[i] = value[i] = reinterpret_cast<const T*>(kZeros);
      side[i] = -INFINITY;
      slots[i] = -1;
    }
  }

  void pack_queries() {
    const int padded = int(round_up(rows, kRows));
    for (int r = 0; r < padded; ++r) {
      const T* row = static_cast<const T*>(a.q) + b * a.q_stride_b + (kv * a.group() + r / a.T) * a.q_stride_h +
                     r % a.T * a.q_stride_t;
      for (int c = 0; c < words; ++c) query[r * words + c] = r < rows && c < a.D ? row[c] : T{};
    }
  }

  float* logits_of(int r) const {
    const int64_t at = (int64_t(b) * a.Hq + kv * a.group()) * a.T + r;
    return a.logits + at * capacity_of(a);
  }

  // -inf where no tile writes: before the first part and after the last.
  void hide_logits() const {
    for (int r = 0; r < rows; ++r) {
      float* out = logits_of(r);
      for (int s = 0; first_part && s < begin; ++s) out[s] = -INFINITY;
      for (int s = begin; s < end; ++s) out[s] = -INFINITY;
      for (int s = end < 0 ? 0 : end; last_part && s < capacity_of(a); ++s) out[s] = -INFINITY;
    }
  }

  // Rows [r, r + kRows) against keys [j, j + tiles * kKeys) of the part.
  TC_INLINE_MEMBER void multiply(int j, int tiles, int r) {
    const Vec scale = broadcast(kCap ? a.scale / a.softcap : a.scale), cap = broadcast(a.softcap);
    const Vec lowest = broadcast(-INFINITY);
    for (int i = 0; i < tiles; ++i) {
      const int at = j + i * kKeys;
      Vec z = products(key + at, query + r * words);
      if (r == 0) {
        for (int t = 0; t < kKeys; ++t) prefetch_row(value[at + t], a.Dv);
      }
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

  TC_INLINE_MEMBER Vec products(const T* const* k, const T* q) const {
    Vec x[kWidth];
    for (int i = 0; i < kWidth; ++i) x[i] = broadcast(0.0f);
    int c = 0;
    for (; c + kPack<T> <= a.D; c += kPack<T>) {
      typename PackOf<T>::type own[kRows];
      for (int i = 0; i < kRows; ++i) own[i] = load_pack(q + i * words + c);
      for (int t = 0; t < kKeys; ++t) {
        const auto other = load_pack(k[t] + c);
        for (int i = 0; i < kRows; ++i) x[i * kKeys + t] = multiply_add(own[i], other, x[i * kKeys + t]);
      }
    }
    if (c < a.D) {
      for (int t = 0; t < kKeys; ++t) {
        const auto other = load_pack_some(k[t] + c, a.D - c);
        for (int i = 0; i < kRows; ++i) {
          x[i * kKeys + t] = multiply_add(load_pack(q + i * words + c), other, x[i * kKeys + t]);
        }
      }
    }
    return sum_each(x);
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
  TC_INLINE_MEMBER void soften(int tiles, int r) {
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
    constexpr int kStep = W::kSteps * W::kElements;
    int c = 0;
    for (; c + kStep <= a.Dv; c += kStep) weigh_columns<W::kSteps>(j, tiles, r, c);
    for (; c < a.Dv; c += W::kElements) weigh_columns<1>(j, tiles, r, c);
  }

  template <int kSteps>
  TC_INLINE_MEMBER void weigh_columns(int j, int tiles, int r, int c) {
    Vec x[kRows][kSteps * W::kSums];
    float* out = sums + int64_t(r) * values + c;
    for (int i = 0; i < kRows; ++i) {
      for (int n = 0; n < kSteps * W::kSums; ++n) x[i][n] = load(out + i * values + n * kWidth);
    }
    const bool ahead = r == 0 && j + kChunkKeys < count;
    for (int tile = 0; tile < tiles; ++tile) {
      const T* const* v = value + j + tile * kKeys;
      const Stored* p = weights + tile * kWidth;
      for (int t = 0; t < kKeys; t += 2) {
        typename W::Rows two[kSteps];
        for (int n = 0; n < kSteps; ++n) {
          const int at = c + n * W::kElements;
          two[n] = W::rows(v[t] + at, v[t + 1] + at, kSteps > 1 ? W::kElements : a.Dv - at);
        }
        for (int i = 0; i < kRows; ++i) {
          const auto both = W::pair(p + i * kKeys + t);
          for (int n = 0; n < kSteps; ++n) W::add(x[i] + n * W::kSums, two[n], both);
        }
      }
      if (ahead) {
        const T* const* next = key + j + kChunkKeys + tile * kKeys;
        for (int t = 0; t < kKeys; ++t) prefetch_row(next[t] + c, kSteps * W::kElements);
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int n = 0; n < kSteps * W::kSums; ++n) store(out + i * values + n * kWidth, x[i][n]);
    }
  }

  const DecodeArgs& a;
  const DecodeWork& w;
  const int rows, values, words;
  int pair, part, b, kv, length, begin, end, count = 0;
  bool first_part, last_part;
  float *top, *total, *sums;
  const T **key, **value;
  float *side, *logits;
  int* slots;
  Stored* weights;
  T* query;
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

void merge_states(const MergeArgs& m) {
  dispatch_dtype(m.dtype, [&]<class T> {
    parallel_for(m.rows, 1 + (1 << 15) / (int64_t(m.D + 1) * (m.states + 1)), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        float top = -INFINITY, total = 0.0f;
        for (int s = 0; s < m.states; ++s) top = fmaxf(top, m.lse[s * m.rows + r]);
        const auto weight = [&](int s) {
          const float lse = m.lse[s * m.rows + r];
          return lse > -INFINITY ? exp2f((lse - top) * kLog2e) : 0.0f;
        };
        for (int s = 0; s < m.states; ++s) total += weight(s);
        m.merged_lse[r] = total > 0.0f ? top + logf(total) : -INFINITY;
        T* out = static_cast<T*>(m.merged) + r * m.D;
        for (int c = 0; c < m.D; c += kWidth) {
          Vec x = broadcast(0.0f);
          for (int s = 0; s < m.states; ++s) {
            const T* own = static_cast<const T*>(m.out) + (s * m.rows + r) * m.D + c;
            const float factor = weight(s);
            if (factor > 0.0f) x = fma(load_up_to(own, m.D - c), broadcast(factor / total), x);
          }
          store_up_to(out + c, x, m.D - c);
        }
      }
    });
  });
}

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
