// Token merging on CUDA, torch side: working memory, launches, registration. The kernels are in merge_match.h (match),
// merge_energy.h, merge_map.h and merge_rows.h.
#include "op/merge.h"

#include <torch/csrc/stable/library.h>

#include "core/dispatch.h"
#include "cuda/merge_energy.h"
#include "cuda/merge_map.h"
#include "cuda/merge_match.h"
#include "cuda/merge_rows.h"
#include "op/stream.h"

namespace tokencomp::merge {
namespace {

// Blocks that fill a device; the columns of a match are split until there are about so many.
constexpr int64_t kEnoughBlocks = 256;
constexpr int64_t kGroupSmemLimit = 48 << 10;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Each row starts on a 16-byte boundary and is a whole number of 16-byte chunks.
bool whole_chunks(const void* x, int64_t stride_b, int64_t stride_n, int64_t C, DType dtype) {
  const int64_t bytes = element_bytes(dtype);
  const int64_t bits = int64_t(reinterpret_cast<uintptr_t>(x)) | (stride_b | stride_n | C) * bytes;
  return (bits & 15) == 0;
}
bool whole_chunks(const Side& s, int64_t C, DType dtype) { return whole_chunks(s.x, s.stride_b, s.stride_n, C, dtype); }
bool whole_chunks2(const Side& s, int64_t C2, DType dtype) {
  return s.x2 && whole_chunks(s.x2, s.stride2_b, s.stride2_n, C2, dtype);
}

// A function of the shape alone: sums do not depend on the device.
int splits_of(int64_t B, int64_t rows, int64_t columns) {
  const int64_t blocks = B * ceil_div(rows, kTile), tiles = ceil_div(columns, kTile);
  const int64_t wanted = blocks > 0 ? ceil_div(kEnoughBlocks, blocks) : 1;
  return int(wanted < tiles ? wanted : tiles > 0 ? tiles : 1);
}

gpu::LaunchConfig config(dim3 grid, int threads, size_t smem, int device) {
  gpu::LaunchConfig c{grid, dim3(unsigned(threads)), smem};
  c.stream = gpu::stream_of(device);
  return c;
}

// Working memory by the piece, announced to the checker.
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t floats)
      : memory_(torch::stable::new_empty(like, {floats}, ScalarType::Float)),
        next_(static_cast<float*>(memory_.mutable_data_ptr())) {}

  template <class T>
  T* take(int64_t count, const char* name) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += words<T>(count);
    if (count > 0) gpu::watch(piece, size_t(count) * sizeof(T), name, false);
    return piece;
  }
  // Floats that take() of so many T uses: pieces start on 128-byte boundaries.
  template <class T>
  static int64_t words(int64_t count) {
    return ceil_div(count * int64_t(sizeof(T)), 128) * 32;
  }

 private:
  Tensor memory_;
  float* next_;
};

void watch_side(const Side& s, int B, int C, int C2, DType dtype, const char* name) {
  const int64_t bytes = element_bytes(dtype), places = int64_t(B) * s.R;
  if (B == 0 || s.N == 0) return;
  gpu::watch(s.x, size_t(((B - 1) * s.stride_b + (s.N - 1) * s.stride_n + C) * bytes), name, true);
  if (s.x2) gpu::watch(s.x2, size_t(((B - 1) * s.stride2_b + (s.N - 1) * s.stride2_n + C2) * bytes), "x2", true);
  if (s.index) gpu::watch(s.index, size_t(places) * 4, "index", true);
  if (s.weight) gpu::watch(s.weight, size_t(places) * 4, "weight", true);
  if (s.mask) gpu::watch(s.mask, size_t(places), "mask", true);
}

template <class T>
void launch_factors(const Side& s, const FactorShape& shape, float* factor, float* factor2, int* members, int device) {
  const int64_t places = int64_t(shape.B) * s.R;
  if (places == 0) return;
  gpu::launch(merge_factors<T>, config(dim3(unsigned(ceil_div(places, kWarps))), kThreads, 0, device), s, shape, factor,
              factor2, members);
}

template <class T>
void launch_match(const MatchArgs& m, const Factors& f, const MatchShape& shape, OrderKey* partial) {
  const FactorShape rows{m.B, m.C, m.C2, m.alpha, 1 - m.alpha, shape.whole, shape.whole2};
  const FactorShape columns{m.B, m.C, m.C2, 1, 1, shape.whole, shape.whole2};
  launch_factors<T>(m.a, rows, f.a, f.a2, nullptr, m.device);
  launch_factors<T>(m.b, columns, f.b, f.b2, nullptr, m.device);
  const unsigned row_tiles = unsigned(ceil_div(m.a.R, kTile));
  const dim3 grid(row_tiles, unsigned(shape.splits), unsigned(m.B));
  if (m.top > 1) {
    gpu::launch(merge_match_top<T>, config(grid, kThreads, sizeof(TopSmem<T>), m.device), m, shape, f);
    return;
  }
  gpu::launch(merge_match<T>, config(grid, kThreads, sizeof(TileSmem<T>), m.device), m, shape, f, partial);
  if (shape.splits == 1) return;
  const unsigned blocks = unsigned(ceil_div(int64_t(m.B) * m.a.R, kThreads));
  gpu::launch(merge_match_finish, config(dim3(blocks), kThreads, 0, m.device), m, shape.splits, partial);
}

// `like` is on the device that the working memory has to be on.
void match_all(const MatchArgs& m, const Tensor& like) {
  const int64_t rows = int64_t(m.B) * m.a.R, columns = int64_t(m.B) * m.b.R;
  if (rows == 0) return;
  const gpu::DeviceGuard device(m.device);
  const gpu::WatchScope scope;
  watch_side(m.a, m.B, m.C, m.C2, m.dtype, "a");
  watch_side(m.b, m.B, m.C, m.C2, m.dtype, "b");
  gpu::watch(m.value, size_t(rows * m.top) * 4, "value", false);
  gpu::watch(m.index, size_t(rows * m.top) * 4, "index", false);
  const MatchShape shape{m.top > 1 ? 1 : splits_of(m.B, m.a.R, m.b.R),
                         whole_chunks(m.a, m.C, m.dtype) && whole_chunks(m.b, m.C, m.dtype),
                         whole_chunks2(m.a, m.C2, m.dtype) && whole_chunks2(m.b, m.C2, m.dtype)};
  const int64_t features = m.C2 > 0 ? 2 : 1, keys = shape.splits > 1 ? rows * shape.splits : 0;
  Workspace memory(like, features * (Workspace::words<float>(rows) + Workspace::words<float>(columns)) +
                             Workspace::words<OrderKey>(keys));
  Factors f{memory.take<float>(rows, "a factors"), memory.take<float>(columns, "b factors"), nullptr, nullptr};
  if (m.C2 > 0) {
    f.a2 = memory.take<float>(rows, "a2 factors");
    f.b2 = memory.take<float>(columns, "b2 factors");
  }
  OrderKey* partial = memory.take<OrderKey>(keys, "partial keys");
  dispatch_dtype(m.dtype, [&]<class T> { launch_match<T>(m, f, shape, partial); });
}

std::tuple<Tensor, Tensor> cosine_match(const Tensor& a, const Tensor& b, std::optional<Tensor> a_index,
                                        std::optional<Tensor> b_index, std::optional<Tensor> a2,
                                        std::optional<Tensor> b2, double alpha, std::optional<Tensor> a_weight,
                                        std::optional<Tensor> b_weight, int64_t band, int64_t protect_a,
                                        int64_t protect_b, std::optional<Tensor> mask_a, std::optional<Tensor> mask_b,
                                        std::optional<double> min_similarity, int64_t top, bool exclude_self) {
  MatchArgs m = make_match_args(a, b, a_index, b_index, a2, b2, alpha, a_weight, b_weight, band, protect_a, protect_b,
                                mask_a, mask_b, min_similarity, top, exclude_self);
  MatchOutputs out = make_match_outputs(m, a);
  match_all(m, a);
  return {out.value, out.index};
}

template <class T, Energy kKind>
void launch_energy(const EnergyArgs& e, bool whole, int splits, float* factor, int* members, float* partial) {
  launch_factors<T>(e.x, {e.B, e.C, 0, 1, 1, whole, false}, factor, nullptr, members, e.device);
  const dim3 grid(unsigned(ceil_div(e.x.N, kTile)), unsigned(splits), unsigned(e.B));
  gpu::launch(merge_energy<T, kKind>, config(grid, kThreads, sizeof(TileSmem<T>), e.device), e, whole, splits, factor,
              members, partial);
  if (splits == 1) return;
  const unsigned blocks = unsigned(ceil_div(int64_t(e.B) * e.x.N, kThreads));
  gpu::launch(merge_energy_finish, config(dim3(blocks), kThreads, 0, e.device), e, splits, factor, members, partial);
}

Tensor energy_score(const Tensor& x, double margin, double alpha, std::string kind, int64_t prefix,
                    std::optional<Tensor> mask) {
  EnergyArgs e = make_energy_args(x, margin, alpha, kind, prefix, mask);
  Tensor out = make_energy_output(e, x);
  const int64_t tokens = int64_t(e.B) * e.x.N;
  if (tokens == 0) return out;
  const gpu::DeviceGuard device(e.device);
  const gpu::WatchScope scope;
  watch_side(e.x, e.B, e.C, 0, e.dtype, "x");
  gpu::watch(e.energy, size_t(tokens) * 4, "energy", false);
  const int splits = splits_of(e.B, e.x.N, e.x.N);
  const int64_t sums = splits > 1 ? tokens * splits : 0;
  Workspace memory(x, Workspace::words<float>(tokens) + Workspace::words<float>(sums) + Workspace::words<int>(e.B));
  float* factor = memory.take<float>(tokens, "factors");
  float* partial = memory.take<float>(sums, "partial sums");
  int* members = memory.take<int>(e.B, "members");
  gpu::memset_async(members, 0, size_t(e.B) * 4, gpu::stream_of(e.device));
  const bool whole = whole_chunks(e.x, e.C, e.dtype);
  dispatch_dtype(e.dtype, [&]<class T> {
    if (e.kind == Energy::elu) return launch_energy<T, Energy::elu>(e, whole, splits, factor, members, partial);
    if (e.kind == Energy::paper) return launch_energy<T, Energy::paper>(e, whole, splits, factor, members, partial);
    launch_energy<T, Energy::gauss>(e, whole, splits, factor, members, partial);
  });
  return out;
}

void map_all(const MapArgs& m, const char* op) {
  if (m.B == 0 || m.N == 0) return;
  const gpu::DeviceGuard device(m.device);
  const gpu::WatchScope scope;
  const size_t rows = size_t(m.B) * m.Ra * 4;
  if (rows) gpu::watch(m.value, rows, "value", true);
  if (rows) gpu::watch(m.index, rows, "index", true);
  if (m.a_tokens && m.Ra) gpu::watch(m.a_tokens, rows, "a_tokens", true);
  if (m.b_tokens && m.Rb) gpu::watch(m.b_tokens, size_t(m.B) * m.Rb * 4, "b_tokens", true);
  if (m.rest_tokens && m.Rr) gpu::watch(m.rest_tokens, size_t(m.B) * m.Rr * 4, "rest_tokens", true);
  gpu::watch(m.map, size_t(m.B) * m.N * 4, "token_map", false);
  MapShape shape{1};
  while (shape.keys < m.Ra) shape.keys *= 2;
  const size_t smem = sizeof(MapSmem) + size_t(shape.keys) * sizeof(OrderKey);
  STD_TORCH_CHECK(smem <= gpu::max_shared_memory_per_block(), op, ": there must be at most ",
                  gpu::max_shared_memory_per_block() / sizeof(OrderKey), " rows to rank on this device, got ", m.Ra);
  gpu::launch(merge_map, config(dim3(unsigned(m.B)), MapShape::threads, smem, m.device), m, shape);
}

Tensor bipartite_map(const Tensor& value, const Tensor& index, int64_t r, int64_t tokens, int64_t prefix, bool distill,
                     std::string order, std::optional<Tensor> a_tokens, std::optional<Tensor> b_tokens,
                     std::optional<Tensor> rest_tokens) {
  MapArgs m = make_map_args(value, index, r, tokens, prefix, distill, order, a_tokens, b_tokens, rest_tokens);
  Tensor out = make_map_output(m, value);
  map_all(m, "bipartite_map");
  return out;
}

void merge_all(const MergeArgs& m, const Tensor& like) {
  const int64_t tokens = int64_t(m.B) * m.N, rows = int64_t(m.B) * m.M;
  if (rows == 0) return;
  const gpu::DeviceGuard device(m.device);
  const gpu::WatchScope scope;
  const int64_t bytes = element_bytes(m.dtype);
  if (tokens > 0) {
    gpu::watch(m.x, size_t(((m.B - 1) * m.x_stride_b + (m.N - 1) * m.x_stride_n + m.C) * bytes), "x", true);
    gpu::watch(m.map, size_t(tokens) * 4, "token_map", true);
    if (m.size) gpu::watch(m.size, size_t(tokens) * 4, "size", true);
    if (m.weight) gpu::watch(m.weight, size_t(tokens) * 4, "weight", true);
  }
  gpu::watch(m.y, size_t(rows * m.C * bytes), "y", false);
  gpu::watch(m.out_size, size_t(rows) * 4, "size", false);
  const size_t smem = sizeof(GroupSmem) + size_t(m.M) * 4;
  const bool in_smem = smem <= kGroupSmemLimit;
  const int64_t firsts = int64_t(m.B) * (m.M + 1), cursors = in_smem ? 0 : rows;
  Workspace memory(like,
                   Workspace::words<int>(firsts) + Workspace::words<int>(tokens) + Workspace::words<int>(cursors));
  Groups groups{memory.take<int>(firsts, "first"), memory.take<int>(tokens, "token"), nullptr};
  if (!in_smem) groups.cursor = memory.take<int>(cursors, "cursor");
  gpu::launch(merge_groups, config(dim3(unsigned(m.B)), kGroupThreads, in_smem ? smem : sizeof(GroupSmem), m.device), m,
              groups);
  const bool whole = whole_chunks(m.x, m.x_stride_b, m.x_stride_n, m.C, m.dtype);
  const dim3 grid(unsigned(ceil_div(m.M, kRowWarps)), unsigned(m.B));
  const gpu::LaunchConfig c = config(grid, kRowThreads, 0, m.device);
  dispatch_dtype(m.dtype, [&]<class T> {
    if (whole) {
      gpu::launch(merge_rows<T, true>, c, m, groups);
    } else {
      gpu::launch(merge_rows<T, false>, c, m, groups);
    }
  });
}

std::tuple<Tensor, Tensor> merge_tokens(const Tensor& x, const Tensor& token_map, int64_t out_tokens,
                                        std::optional<Tensor> size, std::optional<Tensor> weight, std::string mode) {
  MergeArgs m = make_merge_args(x, token_map, out_tokens, size, weight, mode);
  MergeOutputs out = make_merge_outputs(m, x);
  merge_all(m, x);
  return {out.y, out.size};
}

std::tuple<Tensor, Tensor, Tensor> bipartite_merge(const Tensor& x, const Tensor& metric, int64_t r,
                                                   std::optional<Tensor> size, std::optional<Tensor> weight,
                                                   int64_t prefix, std::string order, std::string mode,
                                                   std::optional<Tensor> a_tokens, std::optional<Tensor> b_tokens,
                                                   std::optional<Tensor> rest_tokens) {
  BipartiteArgs all =
      make_bipartite_args(x, metric, r, size, weight, prefix, order, mode, a_tokens, b_tokens, rest_tokens);
  BipartiteOutputs out = make_bipartite_outputs(all, x);
  const int64_t rows = int64_t(all.map.B) * all.map.Ra;
  const Tensor value = new_output(x, {rows}, ScalarType::Float), index = new_output(x, {rows}, ScalarType::Int);
  all.through(static_cast<float*>(value.mutable_data_ptr()), static_cast<int*>(index.mutable_data_ptr()));
  match_all(all.match, x);
  map_all(all.map, "bipartite_merge");
  merge_all(all.merge, x);
  return {out.merged.y, out.merged.size, out.map};
}

}  // namespace
}  // namespace tokencomp::merge

STABLE_TORCH_LIBRARY_IMPL(TOKENCOMP_NAMESPACE, TOKENCOMP_KEY, m) {
  m.impl("cosine_match", TORCH_BOX(&tokencomp::merge::cosine_match));
  m.impl("energy_score", TORCH_BOX(&tokencomp::merge::energy_score));
  m.impl("bipartite_map", TORCH_BOX(&tokencomp::merge::bipartite_map));
  m.impl("merge_tokens", TORCH_BOX(&tokencomp::merge::merge_tokens));
  m.impl("bipartite_merge", TORCH_BOX(&tokencomp::merge::bipartite_merge));
}
