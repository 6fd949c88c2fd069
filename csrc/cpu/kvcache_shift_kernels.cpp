// Turning keys on the CPU, compiled once per instruction-set level. Neighbours often move by as many positions as each
// other (a whole window does): sines are computed where that number changes.
#include "core/dispatch.h"
#include "core/rope.h"
#include "cpu/kvcache_kernels.h"
#include "cpu/simd.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {
namespace {

using namespace kvcache;

TC_INLINE void fill_table(const ShiftArgs& a, int delta, float* cosine, float* sine) {
  for (int i = 0; i < a.pairs; ++i) {
    const Rotation r = rotation_by_turns(delta * turns_per_position(a.inv_freq[i]));
    cosine[i] = r.cosine;
    sine[i] = r.sine;
  }
}

template <class T>
TC_INLINE void turn_halves(T* key, int pairs, const float* cosine, const float* sine) {
  for (int i = 0; i < pairs; i += kWidth) {
    const int n = pairs - i;
    const Vec x = load_up_to(key + i, n), y = load_up_to(key + pairs + i, n);
    const Vec c = load_up_to(cosine + i, n), s = load_up_to(sine + i, n);
    store_up_to(key + i, sub(mul(x, c), mul(y, s)), n);
    store_up_to(key + pairs + i, fma(y, c, mul(x, s)), n);
  }
}

template <class T>
TC_INLINE void turn_pairs(T* key, int pairs, const float* cosine, const float* sine) {
  for (int i = 0; i < pairs; ++i) {
    const float x = to_float(key[2 * i]), y = to_float(key[2 * i + 1]);
    key[2 * i] = from_float<T>(x * cosine[i] - y * sine[i]);
    key[2 * i + 1] = from_float<T>(y * cosine[i] + x * sine[i]);
  }
}

}  // namespace

void kv_shift(const ShiftArgs& a, int b, int h, int begin, int end, float* table) {
  const int row = b * a.s.Hkv + h;
  float *cosine = table, *sine = table + a.pairs;
  int filled = 0;  // the table's delta; none: a slot that does not move needs no table
  dispatch_dtype(a.s.dtype, [&]<class T>() {
    for (int slot = begin; slot < end; ++slot) {
      const int delta = a.delta(row, slot);
      T* key = delta ? slot_of<T>(a.s.k, a.s.table, b, h, slot) : nullptr;
      if (!key) continue;
      if (delta != filled) fill_table(a, delta, cosine, sine);
      filled = delta;
      if (a.interleaved) {
        turn_pairs(key, a.pairs, cosine, sine);
      } else {
        turn_halves(key, a.pairs, cosine, sine);
      }
    }
  });
}

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
