// kvcache family at the torch boundary: the schemas, and the only place where their arguments are checked.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "core/kvcache.h"
#include "op/pages.h"

namespace tokencomp::kvcache {

constexpr const char* kSchemas[] = {
    "kv_append_(Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor k, Tensor v, Tensor block_table, Tensor lengths, *, "
    "Tensor? starts=None, Tensor? counts=None) -> ()",
    "kv_compact_(Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor block_table, Tensor lengths, Tensor index, Tensor "
    "count, *, str order='stable', Tensor? out_table=None) -> ()",
    "kv_gather(Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor lengths, *, Tensor? index=None, Tensor? "
    "count=None, int size) -> (Tensor k, Tensor v)",
    "rope_shift_(Tensor(a!) k_pages, Tensor block_table, Tensor lengths, Tensor old_position, Tensor new_position, "
    "Tensor inv_freq, *, str layout='half') -> ()",
    "evict_assign(Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor lengths, Tensor keep_index, Tensor "
    "keep_count, Tensor member_index, *, str similarity='k', bool clamp=True, float? min_similarity=None) -> (Tensor "
    "target, Tensor similarity)",
    "evict_merge_(Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor block_table, Tensor lengths, Tensor keep_index, "
    "Tensor "
    "keep_count, Tensor member_index, Tensor target, Tensor weight, Tensor center, *, str values='mean', str "
    "keys='keep', bool by_norm=False) -> ()",
};

using MaybeTensor = std::optional<Tensor>;

// What every operator of the family takes: pages, table, lengths.
struct StoreTensors {
  const char* op;
  const Tensor& k_pages;
  const Tensor* v_pages;  // null: keys alone
  const Tensor& block_table;
  const Tensor& lengths;
};

inline Store make_store(const StoreTensors& t) {
  const char* op = t.op;
  STD_TORCH_CHECK(t.lengths.dim() == 2, op, ": lengths must have shape [B, Hkv], got ", shape_of(t.lengths));
  const int64_t B = t.lengths.size(0), Hkv = t.lengths.size(1);
  STD_TORCH_CHECK(B * Hkv <= kMaxRows, op, ": lengths must have at most ", kMaxRows, " rows, got ", B * Hkv);
  Store s;
  s.lengths = side_array<int>(op, "lengths", t.lengths, t.k_pages, ScalarType::Int, {B, Hkv}, "k_pages");
  s.dtype = dtype_of(op, "k_pages", t.k_pages);
  s.k = pages_of(op, "k_pages", t.k_pages, Hkv);
  const int64_t P = t.k_pages.size(2);
  if (t.v_pages) {
    const Tensor& v = *t.v_pages;
    STD_TORCH_CHECK(same_device(v, t.k_pages), op, ": v_pages must be on the device of k_pages, got another device");
    STD_TORCH_CHECK(v.scalar_type() == t.k_pages.scalar_type(), op, ": v_pages must have the dtype of k_pages, ",
                    torch::headeronly::toString(t.k_pages.scalar_type()), ", got ",
                    torch::headeronly::toString(v.scalar_type()));
    s.v = pages_of(op, "v_pages", v, Hkv);
    STD_TORCH_CHECK(v.size(0) == t.k_pages.size(0) && v.size(1) == t.k_pages.size(1) && v.size(2) == P, op,
                    ": v_pages must have shape [N=", t.k_pages.size(0), ", Hx=", t.k_pages.size(1), ", P=", P,
                    ", Dv], got ", shape_of(v));
  }
  s.table = table_of(op, "block_table", t.block_table, t.lengths, P);
  s.B = int(B);
  s.Hkv = int(Hkv);
  s.device = t.k_pages.get_device_index();
  return s;
}

inline TableCheck table_check(const StoreTensors& t, const char* argument, const Tensor& table) {
  return {t.op, argument, HostInts(table), t.k_pages.size(0), int(t.k_pages.size(2))};
}

// Every row's length must fit its table and all its slots must have pages. Returns the lengths, on the host.
inline HostInts check_rows(const StoreTensors& t) {
  HostInts lengths(t.lengths);
  const TableCheck table = table_check(t, "block_table", t.block_table);
  const int64_t B = t.lengths.size(0), Hkv = t.lengths.size(1);
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t h = 0; h < Hkv; ++h) {
      const int length = lengths[b * Hkv + h];
      STD_TORCH_CHECK(length >= 0, t.op, ": lengths must be >= 0, got ", length, " at [", b, ", ", h, "]");
      table.slots(b, h, 0, length);
    }
  }
  return lengths;
}

inline void check_tokens(const char* op, const char* argument, const Tensor& t, const Tensor& pages,
                         const char* pages_name, const Tensor& lengths, int64_t T) {
  STD_TORCH_CHECK(same_device(t, pages), op, ": ", argument, " must be on the device of ", pages_name,
                  ", got another device");
  STD_TORCH_CHECK(t.scalar_type() == pages.scalar_type(), op, ": ", argument, " must have the dtype of ", pages_name,
                  ", ", torch::headeronly::toString(pages.scalar_type()), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(has_shape(t, {lengths.size(0), lengths.size(1), T, pages.size(3)}), op, ": ", argument,
                  " must have shape [B=", lengths.size(0), ", Hkv=", lengths.size(1), ", T=", T, ", ", pages.size(3),
                  "], got ", shape_of(t));
  STD_TORCH_CHECK(t.stride(3) == 1 || t.size(3) == 1, op, ": ", argument,
                  " must be contiguous in its last dimension, got stride ", t.stride(3));
}

inline void check_append_values(const StoreTensors& t, const AppendArgs& a, const MaybeTensor& starts,
                                const MaybeTensor& counts) {
  const HostInts lengths(t.lengths), first(starts), number(counts);
  const TableCheck table = table_check(t, "block_table", t.block_table);
  for (int b = 0; b < a.s.B; ++b) {
    const int start = first ? first[b] : 0, count = number ? number[b] : a.T - start;
    STD_TORCH_CHECK(start >= 0 && start <= a.T, t.op, ": starts must be in [0, T=", a.T, "], got ", start, " at [", b,
                    "]");
    STD_TORCH_CHECK(count >= 0 && count <= a.T - start, t.op, ": counts must be in [0, T-starts=", a.T - start,
                    "], got ", count, " at [", b, "]");
    for (int h = 0; h < a.s.Hkv; ++h) {
      const int length = lengths[int64_t(b) * a.s.Hkv + h];
      STD_TORCH_CHECK(length >= 0, t.op, ": lengths must be >= 0, got ", length, " at [", b, ", ", h, "]");
      table.slots(b, h, length, int64_t(length) + count);
    }
  }
}

inline AppendArgs make_append_args(const Tensor& k_pages, const Tensor& v_pages, const Tensor& k, const Tensor& v,
                                   const Tensor& block_table, const Tensor& lengths, const MaybeTensor& starts,
                                   const MaybeTensor& counts) {
  const StoreTensors t{"kv_append_", k_pages, &v_pages, block_table, lengths};
  AppendArgs a;
  a.s = make_store(t);
  STD_TORCH_CHECK(k.dim() == 4, t.op, ": k must have shape [B, Hkv, T, D], got ", shape_of(k));
  STD_TORCH_CHECK(k.size(2) <= kMaxSlots, t.op, ": T must be at most ", kMaxSlots, ", got ", k.size(2));
  a.T = int(k.size(2));
  check_tokens(t.op, "k", k, k_pages, "k_pages", lengths, a.T);
  check_tokens(t.op, "v", v, v_pages, "v_pages", lengths, a.T);
  a.starts = side_array<int>(t.op, "starts", starts, k_pages, ScalarType::Int, {a.s.B}, "k_pages");
  a.counts = side_array<int>(t.op, "counts", counts, k_pages, ScalarType::Int, {a.s.B}, "k_pages");
  a.k = k.const_data_ptr();
  a.v = v.const_data_ptr();
  a.k_stride_b = k.stride(0), a.k_stride_h = k.stride(1), a.k_stride_t = k.stride(2);
  a.v_stride_b = v.stride(0), a.v_stride_h = v.stride(1), a.v_stride_t = v.stride(2);
  if (readable(lengths)) check_append_values(t, a, starts, counts);
  return a;
}

// Lists of slots [B, Hkv, K]: ascending, of slots in use, as many as count says.
inline void check_list(const char* op, const char* argument, const char* count_name, const HostInts& list, int64_t K,
                       const HostInts& count, const HostInts& lengths, int64_t B, int64_t Hkv) {
  for (int64_t row = 0; row < B * Hkv; ++row) {
    const int n = count ? count[row] : int(K);
    STD_TORCH_CHECK(n >= 0 && n <= K, op, ": ", count_name, " must be in [0, ", K, "], got ", n, " at [", row / Hkv,
                    ", ", row % Hkv, "]");
    const int* slots = list.data() + row * K;
    for (int i = 0; i < n; ++i) {
      const int low = i ? slots[i - 1] + 1 : 0;
      STD_TORCH_CHECK(slots[i] >= low && slots[i] < lengths[row], op, ": ", argument,
                      " must be ascending in [0, length=", lengths[row], "), got ", slots[i], " at [", row / Hkv, ", ",
                      row % Hkv, ", ", i, "]");
    }
  }
}

// A page that takes a moved slot may be the one it replaces; no row may use it anywhere else.
inline void check_moves(const StoreTensors& t, const CompactArgs& c, const HostInts& lengths, const HostInts& count,
                        const HostInts& list, const TableCheck& from, const TableCheck& to) {
  struct Use {
    int64_t key, place;
    bool operator<(const Use& o) const { return key < o.key; }
  };
  const int64_t P = t.k_pages.size(2), heads = t.k_pages.size(1), Hkv = c.s.Hkv;
  std::vector<Use> uses, targets;
  for (int64_t row = 0; row < c.s.rows(); ++row) {
    const int64_t b = row / Hkv, h = row % Hkv, head = heads == 1 ? 0 : h;
    const auto use = [&](const TableCheck& table, int64_t place) -> Use {
      const int32_t entry = table.table[b * table.table.stride(0) + h * table.table.stride(1) + place];
      return {entry * heads + head, row << 32 | place};
    };
    for (int64_t place = 0; place * P < lengths[row]; ++place) uses.push_back(use(from, place));
    for (int64_t place = 0; place * P < count[row]; ++place) {
      const Use target = use(to, place), own = use(from, place);
      const int64_t last = std::min<int64_t>(count[row], (place + 1) * P) - 1;
      const bool moves = target.key != own.key || list[row * c.K + last] != last;
      if (moves) targets.push_back(target);
    }
  }
  std::sort(uses.begin(), uses.end());
  std::sort(targets.begin(), targets.end());
  for (size_t i = 0; i < targets.size(); ++i) {
    bool alone = i == 0 || targets[i - 1].key != targets[i].key;
    for (auto u = std::lower_bound(uses.begin(), uses.end(), targets[i]); u != uses.end() && u->key == targets[i].key;
         ++u) {
      alone = alone && u->place == targets[i].place;
    }
    STD_TORCH_CHECK(alone, t.op, ": ", to.argument, " must name pages that nobody else uses, got page ",
                    targets[i].key / heads, " of another place at [", (targets[i].place >> 32) / Hkv, ", ",
                    (targets[i].place >> 32) % Hkv, ", ", targets[i].place & 0xffffffff, "]");
  }
}

inline CompactArgs make_compact_args(const Tensor& k_pages, const Tensor& v_pages, const Tensor& block_table,
                                     const Tensor& lengths, const Tensor& index, const Tensor& count,
                                     const std::string& order, const MaybeTensor& out_table) {
  const StoreTensors t{"kv_compact_", k_pages, &v_pages, block_table, lengths};
  CompactArgs c;
  c.s = make_store(t);
  const int64_t P = k_pages.size(2);
  STD_TORCH_CHECK(index.dim() == 3, t.op, ": index must have shape [B, Hkv, K], got ", shape_of(index));
  STD_TORCH_CHECK(index.size(2) <= kMaxSlots, t.op, ": K must be at most ", kMaxSlots, ", got ", index.size(2));
  c.K = int(index.size(2));
  c.index = side_array<int>(t.op, "index", index, k_pages, ScalarType::Int, {c.s.B, c.s.Hkv, c.K}, "k_pages");
  c.count = side_array<int>(t.op, "count", count, k_pages, ScalarType::Int, {c.s.B, c.s.Hkv}, "k_pages");
  c.order = choice<Order>(t.op, "order", order, {"stable", "holefill"});
  c.to = out_table ? table_of(t.op, "out_table", *out_table, lengths, P) : c.s.table;
  if (readable(lengths)) {
    const HostInts rows = check_rows(t), list(index), number(count);
    check_list(t.op, "index", "count", list, c.K, number, rows, c.s.B, c.s.Hkv);
    const TableCheck from = table_check(t, "block_table", block_table);
    const TableCheck to = out_table ? table_check(t, "out_table", *out_table) : from;
    for (int row = 0; row < c.s.rows(); ++row) to.slots(row / c.s.Hkv, row % c.s.Hkv, 0, number[row]);
    check_moves(t, c, rows, number, list, from, to);
  }
  return c;
}

inline GatherArgs make_gather_args(const Tensor& k_pages, const Tensor& v_pages, const Tensor& block_table,
                                   const Tensor& lengths, const MaybeTensor& index, const MaybeTensor& count,
                                   int64_t size) {
  const StoreTensors t{"kv_gather", k_pages, &v_pages, block_table, lengths};
  GatherArgs g;
  g.s = make_store(t);
  STD_TORCH_CHECK(size >= 0 && size <= kMaxSlots, t.op, ": size must be in [0, ", kMaxSlots, "], got ", size);
  g.size = int(size);
  STD_TORCH_CHECK(index || !count, t.op, ": count must be None unless index is given, got a tensor");
  if (index) {
    STD_TORCH_CHECK(index->dim() == 3, t.op, ": index must have shape [B, Hkv, K], got ", shape_of(*index));
    STD_TORCH_CHECK(index->size(2) <= kMaxSlots, t.op, ": K must be at most ", kMaxSlots, ", got ", index->size(2));
    g.K = int(index->size(2));
  }
  g.index = side_array<int>(t.op, "index", index, k_pages, ScalarType::Int, {g.s.B, g.s.Hkv, g.K}, "k_pages");
  g.count = side_array<int>(t.op, "count", count, k_pages, ScalarType::Int, {g.s.B, g.s.Hkv}, "k_pages");
  if (readable(lengths)) {
    const HostInts rows = check_rows(t), list(index);
    const int64_t entries = index ? index->numel() : 0;
    for (int64_t i = 0; i < entries; ++i) {
      const int length = rows[i / g.K];
      STD_TORCH_CHECK(list[i] >= -1 && list[i] < length, t.op, ": index must be in [-1, length=", length, "), got ",
                      list[i], " at [", i / g.K / g.s.Hkv, ", ", i / g.K % g.s.Hkv, ", ", i % g.K, "]");
    }
  }
  return g;
}

inline std::tuple<Tensor, Tensor> make_gather_outputs(GatherArgs& g, const Tensor& k_pages) {
  const auto out = [&](int channels) {
    return torch::stable::new_empty(k_pages, {g.s.B, g.s.Hkv, g.size, channels}, k_pages.scalar_type());
  };
  Tensor k = out(g.s.k.channels), v = out(g.s.v.channels);
  g.k = k.mutable_data_ptr();
  g.v = v.mutable_data_ptr();
  return {k, v};
}

}  // namespace tokencomp::kvcache
