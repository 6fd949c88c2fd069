// What the launches of decode kernels share: the plan of parts, and working memory.
#pragma once

#include <cstdlib>

#include "core/decode_plan.h"
#include "cuda/decode_parts.h"
#include "op/decode.h"
#include "op/stream.h"

namespace tokencomp::decode {

constexpr size_t kSmemOfSm80 = 163 << 10;  // what a block may have there

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Each row starts on a 16-byte boundary and is a whole number of 16-byte chunks.
inline bool whole(const Pages& p) {
  const int64_t strides = p.page_stride | p.head_stride | p.slot_stride | p.channels;
  return ((int64_t(reinterpret_cast<uintptr_t>(p.base)) | strides * 2) & 15) == 0;
}

// The plan's, or those that TOKENCOMP_DECODE_PARTS asks for.
inline int choose_parts(const DecodeArgs& a, int64_t units, int blocks_per_sm) {
  const char* forced = std::getenv("TOKENCOMP_DECODE_PARTS");
  if (forced && *forced) {
    const int parts = std::atoi(forced);
    STD_TORCH_CHECK(parts >= 1 && parts <= kMaxParts, "paged_decode: TOKENCOMP_DECODE_PARTS must be in [1, ", kMaxParts,
                    "], got '", forced, "'");
    return parts;
  }
  return plan_parts(units, a.index ? a.listed : a.slots, int64_t(gpu::sm_count()) * blocks_per_sm);
}

// -inf for all logits, if they are asked for.
void hide_logits(const DecodeArgs& a, gpu::LaunchConfig config);

// `rows` of a group go to a block; `more` are arguments of the kernel.
template <class... More>
void launch(const DecodeArgs& a, const Tensor& q, int rows, int blocks_per_sm, size_t smem,
            void (*kernel)(DecodeArgs, Workspace, More...), const std::type_identity_t<More>&... more) {
  Workspace w{};
  const int64_t blocks = ceil_div(a.rows(), rows), units = int64_t(a.B) * a.Hkv * blocks;
  w.parts = choose_parts(a, units, blocks_per_sm);
  const int64_t floats = w.parts > 1 ? units * w.parts * rows * (a.Dv + 2) : 0;
  Tensor partial = torch::stable::new_empty(q, {floats}, ScalarType::Float);
  Tensor ticket = torch::stable::new_zeros(q, {w.parts > 1 ? units : 0}, ScalarType::Int);
  w.partial = static_cast<float*>(partial.mutable_data_ptr());
  w.ticket = static_cast<uint32_t*>(ticket.mutable_data_ptr());
  if (floats) gpu::watch(w.partial, floats * 4, "partial", false);
  if (floats) gpu::watch(w.ticket, units * 4, "ticket", true);
  gpu::LaunchConfig config{dim3(unsigned(a.B * a.Hkv), unsigned(w.parts), unsigned(blocks)), dim3(kThreads)};
  config.stream = gpu::stream_of(a.device);
  hide_logits(a, config);
  config.smem = smem;
  gpu::launch(kernel, config, a, w, more...);
}

}  // namespace tokencomp::decode
