// The paged KV cache on CUDA, torch side: launches, working memory, registration. The kernels are in kvcache_copy.h
// (append, gather, compact), kvcache_shift.h, kvcache_assign.h and kvcache_merge.h.
#include <torch/csrc/stable/library.h>

#include <utility>

#include "core/dispatch.h"
#include "cuda/kvcache_assign.h"
#include "cuda/kvcache_copy.h"
#include "cuda/kvcache_merge.h"
#include "cuda/kvcache_shift.h"
#include "op/kvcache_merge.h"
#include "op/stream.h"

namespace tokencomp::kvcache {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

gpu::LaunchConfig config(const char* op, int64_t blocks, int halves, int threads, size_t smem, int device) {
  STD_TORCH_CHECK(blocks <= 0x7fffffff, op, ": the call must fit into 2147483647 blocks of a GPU, got ", blocks);
  gpu::LaunchConfig c{dim3(unsigned(blocks), unsigned(halves)), dim3(unsigned(threads)), smem};
  c.stream = gpu::stream_of(device);
  return c;
}

// Bits that must be clear for 16-byte units: addresses and strides of pages, channels of a slot.
int64_t page_bits(const Pages& p, int bytes) {
  return int64_t(reinterpret_cast<uintptr_t>(p.base)) |
         (p.page_stride | p.head_stride | p.slot_stride | p.channels) * bytes;
}
bool whole_pages(const Store& s) {
  const int64_t values = s.v.base ? page_bits(s.v, s.element_bytes()) : 0;
  return ((page_bits(s.k, s.element_bytes()) | values) & 15) == 0;
}

// Calls f with the unit that slots are copied by.
template <class F>
void dispatch_unit(bool whole, int element_bytes, F&& f) {
  if (whole) return f.template operator()<uint4>();
  if (element_bytes == 4) return f.template operator()<uint32_t>();
  f.template operator()<uint16_t>();
}
template <class U>
int64_t units_of(const Store& s) {
  const int channels = s.k.channels > s.v.channels ? s.k.channels : s.v.channels;
  return int64_t(channels) * s.element_bytes() / int64_t(sizeof(U));
}

// ---- what the checker is told

int64_t span(const Tensor& t) {
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) == 0) return 0;
    last += (t.size(d) - 1) * t.stride(d);
  }
  return last + 1;
}
void watch(const Tensor& t, int64_t element_bytes, const char* name, bool written = true) {
  gpu::watch(t.const_data_ptr(), size_t(span(t) * element_bytes), name, written);
}
void watch(const MaybeTensor& t, const char* name) {
  if (t) watch(*t, 4, name);
}

// Pages of keys and values may lie in one another: one region then.
void watch_pages(const Tensor& k_pages, const Tensor& v_pages, int64_t bytes) {
  const auto begin = [](const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); };
  const auto end = [&](const Tensor& t) { return begin(t) + span(t) * bytes; };
  const bool apart = end(k_pages) <= begin(v_pages) || end(v_pages) <= begin(k_pages);
  if (apart) {
    watch(k_pages, bytes, "k_pages");
    watch(v_pages, bytes, "v_pages");
    return;
  }
  const char* first = begin(k_pages) < begin(v_pages) ? begin(k_pages) : begin(v_pages);
  const char* last = end(k_pages) > end(v_pages) ? end(k_pages) : end(v_pages);
  gpu::watch(first, size_t(last - first), "pages", true);
}

void watch_rows(const Tensor& block_table, const Tensor& lengths) {
  watch(block_table, 4, "block_table");
  watch(lengths, 4, "lengths");
}

// ---- copies

void kv_append_(const Tensor& k_pages, const Tensor& v_pages, const Tensor& k, const Tensor& v,
                const Tensor& block_table, const Tensor& lengths, MaybeTensor starts, MaybeTensor counts) {
  const AppendArgs a = make_append_args(k_pages, v_pages, k, v, block_table, lengths, starts, counts);
  if (a.s.rows() == 0 || a.T == 0) return;
  const int bytes = a.s.element_bytes();
  const gpu::DeviceGuard device(a.s.device);
  const gpu::WatchScope scope;
  watch_pages(k_pages, v_pages, bytes);
  watch_rows(block_table, lengths);
  watch(k, bytes, "k");
  watch(v, bytes, "v");
  watch(starts, "starts");
  watch(counts, "counts");
  const int64_t bits =
      int64_t(reinterpret_cast<uintptr_t>(a.k)) | int64_t(reinterpret_cast<uintptr_t>(a.v)) |
      (a.k_stride_b | a.k_stride_h | a.k_stride_t | a.v_stride_b | a.v_stride_h | a.v_stride_t) * bytes;
  dispatch_unit(whole_pages(a.s) && (bits & 15) == 0, bytes, [&]<class U> {
    const int64_t tiles = ceil_div(a.T * units_of<U>(a.s), kCopyTile);
    gpu::launch(append_slots<U>, config("kv_append_", tiles * a.s.rows(), 2, kCopyThreads, 0, a.s.device), a,
                int(tiles));
  });
}

void kv_compact_(const Tensor& k_pages, const Tensor& v_pages, const Tensor& block_table, const Tensor& lengths,
                 const Tensor& index, const Tensor& count, std::string order, MaybeTensor out_table) {
  const CompactArgs c = make_compact_args(k_pages, v_pages, block_table, lengths, index, count, order, out_table);
  if (c.s.rows() == 0 || c.K == 0) return;
  const gpu::DeviceGuard device(c.s.device);
  const gpu::WatchScope scope;
  watch_pages(k_pages, v_pages, c.s.element_bytes());
  watch_rows(block_table, lengths);
  watch(index, 4, "index");
  watch(count, 4, "count");
  watch(out_table, "out_table");
  dispatch_unit(whole_pages(c.s), c.s.element_bytes(), [&]<class U> {
    const int64_t columns = ceil_div(units_of<U>(c.s), kColumnUnits<U>);
    gpu::launch(compact_slots<U>, config("kv_compact_", columns * c.s.rows(), 2, kCopyThreads, 0, c.s.device), c,
                int(columns));
  });
}

std::tuple<Tensor, Tensor> kv_gather(const Tensor& k_pages, const Tensor& v_pages, const Tensor& block_table,
                                     const Tensor& lengths, MaybeTensor index, MaybeTensor count, int64_t size) {
  GatherArgs g = make_gather_args(k_pages, v_pages, block_table, lengths, index, count, size);
  std::tuple<Tensor, Tensor> out = make_gather_outputs(g, k_pages);
  if (g.s.rows() == 0 || g.size == 0) return out;
  const int bytes = g.s.element_bytes();
  const gpu::DeviceGuard device(g.s.device);
  const gpu::WatchScope scope;
  watch_pages(k_pages, v_pages, bytes);
  watch_rows(block_table, lengths);
  watch(index, "index");
  watch(count, "count");
  watch(std::get<0>(out), bytes, "k", false);
  watch(std::get<1>(out), bytes, "v", false);
  dispatch_unit(whole_pages(g.s), bytes, [&]<class U> {
    const int64_t tiles = ceil_div(g.size * units_of<U>(g.s), kCopyTile);
    gpu::launch(gather_slots<U>, config("kv_gather", tiles * g.s.rows(), 2, kCopyThreads, 0, g.s.device), g,
                int(tiles));
  });
  return out;
}

// ---- arithmetic

void rope_shift_(const Tensor& k_pages, const Tensor& block_table, const Tensor& lengths, const Tensor& old_position,
                 const Tensor& new_position, const Tensor& inv_freq, std::string layout) {
  const ShiftArgs a = make_shift_args(k_pages, block_table, lengths, old_position, new_position, inv_freq, layout);
  if (a.s.rows() == 0 || a.S == 0) return;
  const gpu::DeviceGuard device(a.s.device);
  const gpu::WatchScope scope;
  watch(k_pages, a.s.element_bytes(), "k_pages");
  watch_rows(block_table, lengths);
  watch(old_position, 4, "old_position");
  watch(new_position, 4, "new_position");
  watch(inv_freq, 4, "inv_freq");
  const int64_t tiles = ceil_div(int64_t(a.S) * a.pairs, kShiftThreads);
  const gpu::LaunchConfig c = config("rope_shift_", tiles * a.s.rows(), 1, kShiftThreads, 0, a.s.device);
  dispatch_dtype(a.s.dtype, [&]<class T> { gpu::launch(shift_keys<T>, c, a, int(tiles)); });
}

// Working memory by the piece, announced to the checker.
class Floats {
 public:
  Floats(const Tensor& like, int64_t count, const char* name)
      : memory_(torch::stable::new_empty(like, {count}, ScalarType::Float)),
        next_(static_cast<float*>(memory_.mutable_data_ptr())) {
    if (count > 0) gpu::watch(next_, size_t(count) * 4, name, false);
  }
  float* take(int64_t count) { return std::exchange(next_, next_ + count); }

 private:
  Tensor memory_;
  float* next_;
};

void watch_lists(const Tensor& keep_index, const Tensor& keep_count, const Tensor& member_index) {
  watch(keep_index, 4, "keep_index");
  watch(keep_count, 4, "keep_count");
  watch(member_index, 4, "member_index");
}

std::tuple<Tensor, Tensor> evict_assign(const Tensor& k_pages, const Tensor& v_pages, const Tensor& block_table,
                                        const Tensor& lengths, const Tensor& keep_index, const Tensor& keep_count,
                                        const Tensor& member_index, std::string similarity, bool clamp,
                                        std::optional<double> min_similarity) {
  AssignArgs a = make_assign_args(k_pages, v_pages, block_table, lengths, keep_index, keep_count, member_index,
                                  similarity, clamp, min_similarity);
  std::tuple<Tensor, Tensor> out = make_assign_outputs(a, k_pages);
  if (a.s.rows() == 0 || a.lists.M == 0) return out;
  const gpu::DeviceGuard device(a.s.device);
  const gpu::WatchScope scope;
  watch_pages(k_pages, v_pages, a.s.element_bytes());
  watch_rows(block_table, lengths);
  watch_lists(keep_index, keep_count, member_index);
  watch(std::get<0>(out), 4, "target", false);
  watch(std::get<1>(out), 4, "similarity", false);
  const int64_t centers = int64_t(a.s.rows()) * a.lists.K, members = int64_t(a.s.rows()) * a.lists.M;
  const int halves = a.with_values ? 2 : 1;
  Floats memory(k_pages, halves * (centers + members), "inverse norms");
  Norms norms{};
  norms.key_center = memory.take(centers);
  norms.key_member = memory.take(members);
  if (a.with_values) norms.value_center = memory.take(centers), norms.value_member = memory.take(members);
  const int64_t tiles = ceil_div(a.lists.M, kAssignTile);
  const bool whole = whole_pages(a.s);
  dispatch_dtype(a.s.dtype, [&]<class T> {
    const int64_t blocks = ceil_div(centers + members, kAssignWarps);
    gpu::launch(inverse_norms<T>, config("evict_assign", blocks, halves, kAssignThreads, 0, a.s.device), a.s, a.lists,
                norms, whole);
    const gpu::LaunchConfig c =
        config("evict_assign", tiles * a.s.rows(), 1, kAssignThreads, sizeof(TileSmem<T>), a.s.device);
    gpu::launch(assign_members<T>, c, a, norms, whole, int(tiles));
  });
  return out;
}

void evict_merge_(const Tensor& k_pages, const Tensor& v_pages, const Tensor& block_table, const Tensor& lengths,
                  const Tensor& keep_index, const Tensor& keep_count, const Tensor& member_index, const Tensor& target,
                  const Tensor& weight, const Tensor& center, std::string values, std::string keys, bool by_norm) {
  const MergeArgs m = make_merge_args(k_pages, v_pages, block_table, lengths, keep_index, keep_count, member_index,
                                      target, weight, center, values, keys, by_norm);
  if (m.s.rows() == 0 || m.lists.M == 0 || m.lists.K == 0) return;
  const gpu::DeviceGuard device(m.s.device);
  const gpu::WatchScope scope;
  watch_pages(k_pages, v_pages, m.s.element_bytes());
  watch_rows(block_table, lengths);
  watch_lists(keep_index, keep_count, member_index);
  watch(target, 4, "target");
  watch(weight, 4, "weight");
  watch(center, 4, "center");
  const int64_t members = int64_t(m.s.rows()) * m.lists.M, centers = int64_t(m.s.rows()) * m.lists.K;
  const bool by_direction = m.keys == Keys::direction, whole = whole_pages(m.s);
  const int arrays = by_direction ? 3 : m.by_norm ? 1 : 0;
  Floats memory(k_pages, arrays * members, "weights");
  float* plain = arrays > 0 ? memory.take(members) : nullptr;
  float* unit = by_direction ? memory.take(members) : nullptr;
  float* length = by_direction ? memory.take(members) : nullptr;
  const auto launch = [&](int64_t warps) {
    return config("evict_merge_", ceil_div(warps, kMergeWarps), 1, kMergeThreads, 0, m.s.device);
  };
  dispatch_dtype(m.s.dtype, [&]<class T> {
    if (plain) gpu::launch(weigh_members<T>, launch(members), m, whole, plain, unit, length);
    gpu::launch(merge_members<T>, launch(centers), m, Weights{plain ? plain : m.weight, unit, length}, whole);
  });
}

}  // namespace
}  // namespace tokencomp::kvcache

STABLE_TORCH_LIBRARY_IMPL(TOKENCOMP_NAMESPACE, TOKENCOMP_KEY, m) {
  m.impl("kv_append_", TORCH_BOX(&tokencomp::kvcache::kv_append_));
  m.impl("kv_compact_", TORCH_BOX(&tokencomp::kvcache::kv_compact_));
  m.impl("kv_gather", TORCH_BOX(&tokencomp::kvcache::kv_gather));
  m.impl("rope_shift_", TORCH_BOX(&tokencomp::kvcache::rope_shift_));
  m.impl("evict_assign", TORCH_BOX(&tokencomp::kvcache::evict_assign));
  m.impl("evict_merge_", TORCH_BOX(&tokencomp::kvcache::evict_merge_));
}
