// Launch of decode over pages of several types.
#include "cuda/decode_types.h"

#include "cuda/decode_launch.h"
#include "cuda/decode_types_kernels.h"

namespace tokencomp::decode {
namespace {

int log2_of(int x) {
  int shift = 0;
  while (1 << shift < x) ++shift;
  return shift;
}

Tier tier_of(const kvquant::Format& f) {
  if (f.kind == kvquant::Kind::fp8) return Tier::fp8;
  return f.bits == 8 ? Tier::int8 : f.bits == 4 ? Tier::int4 : f.bits == 3 ? Tier::int3 : Tier::int2;
}

StepHalf half_of(const PageHalf& h) {
  const bool by_channel = h.format.axis == page_blob::Axis::channel;
  return {tier_of(h.format), by_channel, log2_of(h.format.group), h.format.bits, h.codes, h.params};
}

// As many as fit into a stage and lie in one group of tokens.
int blocks_of(const StepType& type, int D, int stage_bytes, int most) {
  const auto fits = [&](int blocks) {
    const auto half = [&](const StepHalf& h) {
      return (h.bits < 8 || blocks < kMaxStepBlocks) && (!h.by_channel || blocks * kStepTokens <= 1 << h.group_shift);
    };
    return half(type.k) && half(type.v) && sections_of(type, D, blocks * kStepTokens).bytes() <= stage_bytes;
  };
  return most == 1 ? 1 : fits(4) ? 4 : fits(2) ? 2 : 1;
}

StepTypes types_of(const DecodeArgs& a, int stage_bytes, int most) {
  StepTypes t;
  for (int i = 0; i < a.types.count; ++i) {
    const PagePool& pool = a.types.pool[i];
    StepType& type = t.type[i + 1];
    type = {pool.base, pool.page_bytes, 1, half_of(pool.k), half_of(pool.v)};
    type.blocks = blocks_of(type, a.D, stage_bytes, most);
  }
  t.maps = a.types.maps;
  t.whole = whole(a.k) && whole(a.v);
  return t;
}

template <int kD>
void launch_shape(const DecodeArgs& a, const Tensor& q) {
  using S = TypesShape<kD>;
  static_assert(sizeof(TypesSmem<S>) <= kSmemOfSm80);
  launch(a, q, S::kRows, S::kBlocks, sizeof(TypesSmem<S>), decode_types<S>,
         types_of(a, S::kStageBytes, S::kMostBlocks));
}

}  // namespace

void launch_types(const DecodeArgs& a, const Tensor& q) {
  if (a.D == 64) return launch_shape<64>(a, q);
  if (a.D == 128) return launch_shape<128>(a, q);
  launch_shape<256>(a, q);
}

}  // namespace tokencomp::decode
