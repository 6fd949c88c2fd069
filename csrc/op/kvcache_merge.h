// Rotating, assigning and merging at the torch boundary; see op/kvcache.h.
#pragma once

#include <cmath>

#include "core/kvcache_merge.h"
#include "op/kvcache.h"

namespace tokencomp::kvcache {

inline ShiftArgs make_shift_args(const Tensor& k_pages, const Tensor& block_table, const Tensor& lengths,
                                 const Tensor& old_position, const Tensor& new_position, const Tensor& inv_freq,
                                 const std::string& layout) {
  const StoreTensors t{"rope_shift_", k_pages, nullptr, block_table, lengths};
  ShiftArgs a;
  a.s = make_store(t);
  STD_TORCH_CHECK(old_position.dim() == 3, t.op, ": old_position must have shape [B, Hkv, S], got ",
                  shape_of(old_position));
  const int64_t S = old_position.size(2), pairs = inv_freq.dim() == 1 ? inv_freq.size(0) : 0;
  STD_TORCH_CHECK(S <= kMaxSlots, t.op, ": S must be at most ", kMaxSlots, ", got ", S);
  STD_TORCH_CHECK(inv_freq.dim() == 1 && pairs >= 1 && 2 * pairs <= a.s.k.channels, t.op,
                  ": inv_freq must hold between 1 and D/2=", a.s.k.channels / 2, " frequencies, got shape ",
                  shape_of(inv_freq));
  a.S = int(S);
  a.pairs = int(pairs);
  a.old_position =
      side_array<int>(t.op, "old_position", old_position, k_pages, ScalarType::Int, {a.s.B, a.s.Hkv, S}, "k_pages");
  a.new_position =
      side_array<int>(t.op, "new_position", new_position, k_pages, ScalarType::Int, {a.s.B, a.s.Hkv, S}, "k_pages");
  a.inv_freq = side_array<float>(t.op, "inv_freq", inv_freq, k_pages, ScalarType::Float, {pairs}, "k_pages");
  a.interleaved = choice<int>(t.op, "layout", layout, {"half", "interleaved"}) == 1;
  if (readable(lengths)) {
    const HostInts rows = check_rows(t);
    for (int row = 0; row < a.s.rows(); ++row) {
      STD_TORCH_CHECK(rows[row] <= S, t.op, ": lengths must be at most S=", S, ", got ", rows[row], " at [",
                      row / a.s.Hkv, ", ", row % a.s.Hkv, "]");
    }
  }
  return a;
}

// Kept slots as in kv_compact_; members are other slots of the row, or -1.
inline void check_lists(const StoreTensors& t, const Store& s, const Lists& lists, const Tensor& keep_index,
                        const Tensor& keep_count, const Tensor& member_index) {
  const HostInts rows = check_rows(t), keep(keep_index), count(keep_count), member(member_index);
  check_list(t.op, "keep_index", "keep_count", keep, lists.K, count, rows, s.B, s.Hkv);
  for (int64_t row = 0; row < s.rows(); ++row) {
    const int* kept = keep.data() + row * lists.K;
    for (int64_t i = row * lists.M; i < (row + 1) * lists.M; ++i) {
      STD_TORCH_CHECK(member[i] >= -1 && member[i] < rows[row], t.op,
                      ": member_index must be in [-1, length=", rows[row], "), got ", member[i], " at [", row / s.Hkv,
                      ", ", row % s.Hkv, ", ", i - row * lists.M, "]");
      STD_TORCH_CHECK(member[i] < 0 || !std::binary_search(kept, kept + count[row], member[i]), t.op,
                      ": member_index must name slots that are not kept, got ", member[i], " at [", row / s.Hkv, ", ",
                      row % s.Hkv, ", ", i - row * lists.M, "]");
    }
  }
}

inline Lists make_lists(const StoreTensors& t, const Store& s, const Tensor& keep_index, const Tensor& keep_count,
                        const Tensor& member_index) {
  const auto width = [&](const char* argument, const Tensor& list) {
    STD_TORCH_CHECK(list.dim() == 3 && list.size(2) <= kMaxSlots, t.op, ": ", argument, " must have shape [B=", s.B,
                    ", Hkv=", s.Hkv, ", at most ", kMaxSlots, "], got ", shape_of(list));
    return int(list.size(2));
  };
  Lists lists;
  lists.K = width("keep_index", keep_index);
  lists.M = width("member_index", member_index);
  const auto ints = [&](const char* argument, const Tensor& list, std::initializer_list<int64_t> shape) {
    return side_array<int>(t.op, argument, list, t.k_pages, ScalarType::Int, shape, "k_pages");
  };
  lists.keep = ints("keep_index", keep_index, {s.B, s.Hkv, lists.K});
  lists.keep_count = ints("keep_count", keep_count, {s.B, s.Hkv});
  lists.member = ints("member_index", member_index, {s.B, s.Hkv, lists.M});
  if (readable(t.lengths)) check_lists(t, s, lists, keep_index, keep_count, member_index);
  return lists;
}

inline AssignArgs make_assign_args(const Tensor& k_pages, const Tensor& v_pages, const Tensor& block_table,
                                   const Tensor& lengths, const Tensor& keep_index, const Tensor& keep_count,
                                   const Tensor& member_index, const std::string& similarity, bool clamp,
                                   std::optional<double> min_similarity) {
  const StoreTensors t{"evict_assign", k_pages, &v_pages, block_table, lengths};
  AssignArgs a;
  a.s = make_store(t);
  a.with_values = choice<int>(t.op, "similarity", similarity, {"k", "kv"}) == 1;
  a.clamp = clamp;
  STD_TORCH_CHECK(!min_similarity || !std::isnan(*min_similarity), t.op, ": min_similarity must be a number, got nan");
  a.min_similarity = float(min_similarity.value_or(-INFINITY));
  a.lists = make_lists(t, a.s, keep_index, keep_count, member_index);
  return a;
}

inline std::tuple<Tensor, Tensor> make_assign_outputs(AssignArgs& a, const Tensor& k_pages) {
  Tensor target = torch::stable::new_empty(k_pages, {a.s.B, a.s.Hkv, a.lists.M}, ScalarType::Int);
  Tensor similarity = torch::stable::new_empty(k_pages, {a.s.B, a.s.Hkv, a.lists.M}, ScalarType::Float);
  a.target = static_cast<int*>(target.mutable_data_ptr());
  a.similarity = static_cast<float*>(similarity.mutable_data_ptr());
  return {target, similarity};
}

inline MergeArgs make_merge_args(const Tensor& k_pages, const Tensor& v_pages, const Tensor& block_table,
                                 const Tensor& lengths, const Tensor& keep_index, const Tensor& keep_count,
                                 const Tensor& member_index, const Tensor& target, const Tensor& weight,
                                 const Tensor& center, const std::string& values, const std::string& keys,
                                 bool by_norm) {
  const StoreTensors t{"evict_merge_", k_pages, &v_pages, block_table, lengths};
  MergeArgs m;
  m.s = make_store(t);
  m.values = choice<Values>(t.op, "values", values, {"mean", "sum"});
  m.keys = choice<Keys>(t.op, "keys", keys, {"keep", "mean", "direction"});
  m.by_norm = by_norm;
  m.lists = make_lists(t, m.s, keep_index, keep_count, member_index);
  const int64_t B = m.s.B, Hkv = m.s.Hkv;
  m.target = side_array<int>(t.op, "target", target, k_pages, ScalarType::Int, {B, Hkv, m.lists.M}, "k_pages");
  m.weight = side_array<float>(t.op, "weight", weight, k_pages, ScalarType::Float, {B, Hkv, m.lists.M}, "k_pages");
  m.center = side_array<float>(t.op, "center", center, k_pages, ScalarType::Float, {B, Hkv, m.lists.K}, "k_pages");
  if (readable(lengths)) {
    const HostInts rank(target), count(keep_count);
    for (int64_t i = 0; i < B * Hkv * m.lists.M; ++i) {
      const int64_t row = i / m.lists.M;
      STD_TORCH_CHECK(rank[i] >= -1 && rank[i] < count[row], t.op, ": target must be in [-1, keep_count=", count[row],
                      "), got ", rank[i], " at [", row / Hkv, ", ", row % Hkv, ", ", i % m.lists.M, "]");
    }
  }
  return m;
}

}  // namespace tokencomp::kvcache
