// Selection by score on the CPU, compiled once per instruction-set level. One row at a time, in two ways:
//   sampled   a sample of the row gives a bound that a little more than k scores should reach; one pass over the row
//             packs those that do, and the exact selection is made among them. One read of the scores. Where far more
//             reach it, many are equal, and the bound is often the threshold itself: counting tells, two more reads.
//   counted   histograms of the whole row, digit by digit, then one pass that writes: four reads, for any data. Taken
//             where k is not small against the row, for sums, and where the sample was wrong.
// Both are exact; which one runs, and into how many chunks a row is cut, does not change the result.
#include "cpu/topk_kernels.h"

#include "core/dispatch.h"
#include "cpu/topk_radix.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {
namespace {

using namespace topk;

constexpr int kLeastSampled = 4096;  // tokens of a row from which a sample pays
constexpr int kSampledShare = 8;     // and k is at most this part of them

template <class T>
struct RowSource {
  const T* score;
  const uint8_t* keep;  // of the row, or null
  Row row;
  bool by_mass;
  int pieces;

  int chunks() const { return pieces; }
  int begin_of(int chunk) const { return int(int64_t(row.n) * chunk / pieces); }

  // The slots of tokens [begin, begin + n), n <= kBlockSlots, and kSkip up to a multiple of kWidth.
  void fill(int begin, int n, uint32_t* slots) const {
    float block[kBlockSlots];
    widen_block(begin, n, block);
    if (by_mass) {
      for (int i = 0; i < n; ++i) slots[i] = mass_key(mass_bits(block[i]));
    } else {
      for (int i = 0; i < n; ++i) slots[i] = sortable(block[i]);
    }
    if (keep || row.overfull || begin < row.head_end || begin + n > row.tail_begin) {
      const uint32_t others = row.overfull ? kSkip : kForced;  // what the tokens of the other kind become
      for (int i = 0; i < n; ++i) {
        const bool guarded = row.outside(begin + i) || (keep && keep[begin + i]);
        slots[i] = guarded == row.overfull ? slots[i] : others;
      }
    }
    for (int i = n; i % kWidth; ++i) slots[i] = kSkip;
  }

  void widen_block(int begin, int n, float* block) const {
    int i = 0;
    for (; i + kWidth <= n; i += kWidth) store(block + i, load(score + begin + i));
    for (; i < n; ++i) block[i] = to_float(score[begin + i]);
  }

  template <class F>
  TC_INLINE_MEMBER void visit_at(int chunk, F&& f) const {
    alignas(64) uint32_t slots[kBlockSlots];
    const int end = begin_of(chunk + 1);
    for (int begin = begin_of(chunk); begin < end; begin += kBlockSlots) {
      const int n = end - begin < kBlockSlots ? end - begin : kBlockSlots;
      fill(begin, n, slots);
      f(slots, n, begin);
    }
  }

  template <class F>
  TC_INLINE_MEMBER void visit(int chunk, F&& f) const {
    visit_at(chunk, [&](const uint32_t* slots, int n, int) { f(slots, n); });
  }
};

template <class T>
class Selection {
 public:
  Selection(const Args& args, const CpuScratch& scratch, int r) : a(args), s(scratch) {
    source.score = static_cast<const T*>(a.score) + r * a.stride;
    source.keep = a.keep ? a.keep + int64_t(r) * a.S : nullptr;
    source.row = row_of(a, r);
    source.by_mass = a.by_mass;
    source.pieces = s.chunks;
    index = a.index + int64_t(r) * a.k;
    count = a.count + r;
  }

  void run() {
    Row& row = source.row;
    const int64_t guarded = row.outside_count() + kept_inside();
    row.overfull = guarded > row.k;
    const int64_t forced = row.overfull ? 0 : guarded;
    int64_t written = a.by_mass ? counted_by_mass(forced) : counted_or_sampled(forced);
    *count = int(written);
    for (; written < a.k; ++written) index[written] = -1;
  }

 private:
  int64_t kept_inside() const {
    if (!source.keep) return 0;
    int64_t kept = 0;
    for (int i = source.row.head_end; i < source.row.tail_begin; ++i) kept += source.keep[i] != 0;
    return kept;
  }

  int64_t counted_or_sampled(int64_t forced) {
    const Goal goal = goal_of(a, source.row, forced, 0, 0);
    const uint32_t bound = sample_bound(goal.high);
    if (bound > sortable(-INFINITY)) {
      if (const int64_t written = select_above(bound, goal); written >= 0) return written;
      if (const int64_t written = select_from(bound, goal, forced); written >= 0) return written;
    }
    return write(search<false>(source, goal, s.histogram, tables_for(source.row.n), Units{}, false), forced);
  }

  // ---- sums

  int64_t counted_by_mass(int64_t forced) {
    const Row& row = source.row;
    const Units units = units_of(largest_mass(), row.n);
    const int tables = tables_for(row.n);
    fill_histograms<0, true>(source, s.histogram, tables, 0, units);
    uint64_t forced_mass = 0;
    for (int i = 0; i < row.head_end; ++i) forced_mass += mass_at(i, units);
    for (int i = row.tail_begin; i < row.n; ++i) forced_mass += mass_at(i, units);
    uint64_t total = forced_mass;
    for (int bin = 0; bin < kForcedBin; ++bin) total += s.histogram->mass[bin];
    const Goal goal = goal_of(a, row, forced, forced_mass, total);
    return write(search<true>(source, goal, s.histogram, tables, units, true), forced);
  }

  uint64_t mass_at(int i, Units units) const { return units.of(mass_bits(to_float(source.score[i]))); }

  uint32_t largest_mass() {
    parallel_for(source.pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) s.above[c] = largest_mass_of(int(c));
    });
    int64_t largest = 0;
    for (int c = 0; c < source.pieces; ++c) largest = most(largest, s.above[c]);
    return uint32_t(largest);
  }

  uint32_t largest_mass_of(int chunk) const {
    Vec best = broadcast(0);
    int i = source.begin_of(chunk);
    const int end = source.begin_of(chunk + 1);
    for (; i + kWidth <= end; i += kWidth) best = max(load(source.score + i), best);  // best, where the score is NaN
    uint32_t largest = mass_bits(maximum(best));
    for (; i < end; ++i) {
      const uint32_t mass = mass_bits(to_float(source.score[i]));
      largest = mass > largest ? mass : largest;
    }
    return largest;
  }

  // ---- writing, for all rows

  int64_t write(const Threshold& threshold, int64_t forced) {
    if (source.pieces > 1) count_chunks(threshold.key);
    parallel_for(source.pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) write_chunk(int(c), threshold);
    });
    return forced + threshold.above + threshold.ties;
  }

  void count_chunks(uint32_t key) {
    parallel_for(source.pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        int64_t above = 0, equal = 0;
        source.visit(int(c), [&](const uint32_t* slots, int n) {
          for (int i = 0; i < n; i += kWidth) {
            above += __builtin_popcount(lanes_above(slots + i, key));
            equal += __builtin_popcount(lanes_equal(slots + i, key));
          }
        });
        s.above[c] = above;
        s.equal[c] = equal;
      }
    });
  }

  void write_chunk(int chunk, const Threshold& threshold) {
    int64_t to = 0, ties = threshold.ties;
    for (int c = 0; c < chunk; ++c) {
      const int64_t taken = least(ties, s.equal[c]);
      to += s.above[c] + taken;
      ties -= taken;
    }
    source.visit_at(chunk, [&](const uint32_t* slots, int n, int begin) {
      int kept[kBlockSlots + kWidth];
      const int found = pack_kept(slots, n, threshold.key, ties, begin, kept);
      __builtin_memcpy(index + to, kept, found * sizeof(int));
      to += found;
    });
  }

  // ---- sampled

  // A key that somewhat more than `wanted` of the tokens inside should reach, or 0 where a sample does not pay. The
  // sample is made of vectors evenly spread over the row. Neighbours are often alike, so four standard deviations of
  // its rank are added, as if only every fourth token were independent.
  uint32_t sample_bound(int64_t wanted) {
    const int inside = source.row.tail_begin - source.row.head_end;
    if (source.row.overfull || inside < kLeastSampled || wanted < 1 || wanted * kSampledShare > inside) return 0;
    const int vectors = inside / kWidth, spread = 16, most_vectors = kSampleSize / kWidth;
    const int taken = vectors / spread < most_vectors ? vectors / spread : most_vectors;
    for (int v = 0; v < taken; ++v) {
      float lanes[kWidth];
      store(lanes, load(source.score + source.row.head_end + int64_t(vectors) * v / taken * kWidth));
      for (int i = 0; i < kWidth; ++i) s.sample[v * kWidth + i] = sortable(lanes[i]);
    }
    const int64_t size = int64_t(taken) * kWidth;
    const float expected = float(wanted) * float(size) / float(inside);
    const int64_t rank = int64_t(expected + 4 * sqrtf(4 * expected)) + 16;
    if (2 * rank > size) return 0;
    return search<false>(ArraySource{s.sample, size}, Goal{rank, rank, 0}, s.histogram, 1, Units{}, false).key;
  }

  // Selection among the tokens that reach the bound; the number written, or -1 if these are too few or too many.
  int64_t select_above(uint32_t bound, const Goal& goal) {
    const int64_t found = collect(unsortable(bound));
    int64_t candidates = 0;
    for (int64_t j = 0; j < found; ++j) {
      const int i = s.index[j];
      const bool kept = source.keep && source.keep[i];
      s.slots[j] = kept ? kForced : sortable(to_float(source.score[i]));
      candidates += !kept;
    }
    if (candidates < goal.high) return -1;
    for (int64_t j = found; j % kWidth; ++j) s.slots[j] = kSkip;
    const Threshold threshold =
        search<false>(ArraySource{s.slots, found}, goal, s.histogram, tables_for(found), Units{}, false);
    return write_candidates(found, threshold);
  }

  // Selection if the bound is the threshold, as it is where many scores are equal; the number written, or -1.
  int64_t select_from(uint32_t bound, const Goal& goal, int64_t forced) {
    count_chunks(bound);
    int64_t above = -forced, equal = 0;
    for (int c = 0; c < source.pieces; ++c) {
      above += s.above[c];
      equal += s.equal[c];
    }
    const bool found = above <= goal.high && goal.high <= above + equal;
    return found ? write({bound, above, goal.high - above}, forced) : -1;
  }

  // Packs the tokens inside that reach `bound` or are kept, ascending; their number, or -1 if there are too many.
  int64_t collect(float bound) {
    parallel_for(source.pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) s.above[c] = collect_chunk(int(c), bound);
    });
    int64_t found = s.above[0];
    for (int c = 1; c < source.pieces && found >= 0; ++c) {
      const int64_t more = s.above[c];
      if (more < 0 || found + more > s.candidates - kWidth) return -1;
      __builtin_memmove(s.index + found, s.index + c * s.candidates, more * sizeof(int));
      found += more;
    }
    return found;
  }

  int64_t collect_chunk(int chunk, float bound) const {
    const int low = source.row.head_end, high = source.row.tail_begin, first = source.begin_of(chunk);
    const int begin = first > low ? first : low;
    const int stop = source.begin_of(chunk + 1), end = stop < high ? stop : high;
    int* where = s.index + chunk * s.candidates;
    const Vec bounds = broadcast(bound);
    int64_t found = 0;
    int i = begin;
    for (; i + kWidth <= end; i += kWidth) {
      if (found > s.candidates - 2 * kWidth) return -1;
      uint32_t hits = lanes_ge(load(source.score + i), bounds);
      if (source.keep) hits |= lanes_set(source.keep + i);
      compress_index(where + found, i, hits);
      found += __builtin_popcount(hits);
    }
    for (; i < end; ++i) {
      const bool hit = to_float(source.score[i]) >= bound || (source.keep && source.keep[i]);
      if (hit) where[found++] = i;
    }
    return found <= s.candidates - kWidth ? found : -1;
  }

  int64_t write_candidates(int64_t found, const Threshold& threshold) {
    int64_t to = 0, ties = threshold.ties;
    for (int i = 0; i < source.row.head_end; ++i) index[to++] = i;
    for (int64_t begin = 0; begin < found; begin += kBlockSlots) {
      const int n = found - begin < kBlockSlots ? int(found - begin) : kBlockSlots;
      int kept[kBlockSlots + kWidth];
      const int packed = pack_kept(s.slots + begin, n, threshold.key, ties, int(begin), kept);
      for (int j = 0; j < packed; ++j) index[to++] = s.index[kept[j]];
    }
    for (int i = source.row.tail_begin; i < source.row.n; ++i) index[to++] = i;
    return to;
  }

  const Args& a;
  const CpuScratch& s;
  RowSource<T> source;
  int* index;
  int* count;
};

}  // namespace

void topk_select(const Args& args, const CpuScratch& scratch, int r) {
  dispatch_dtype(args.dtype, [&]<class T>() { Selection<T>(args, scratch, r).run(); });
}

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
