// A page of a quantized KV cache: P tokens of one sequence and KV head in one contiguous blob,
//
//   [K codes | K params | V codes | V params]        each section starts on a 16-byte boundary
//
// Its type says how keys and values are stored, independently of each other: in a tier, a number format, with its
// parameters. Tier 0 is the working dtype, stored as rows (or fragments) of whole elements, without parameters.
#pragma once

#include <cstdint>

#include "core/bitpack.h"

namespace tokencomp::page_blob {

enum class Tier { working, fp8, int8, int4, int3, int2 };
enum class Axis { token, channel };

constexpr int kTiers = 6;
constexpr int kSectionAlignment = 16;
constexpr int kParamBytes = 4;  // two fp16: step in the low half, minimum in the high half

TC_HD constexpr int tier_bits(Tier tier) {
  constexpr int bits[kTiers] = {16, 8, 8, 4, 3, 2};
  return bits[int(tier)];
}

// One of keys and values: a (step, minimum) for `group` channels of a token, or for `group` tokens of a channel.
struct Format {
  Tier tier = Tier::working;
  Axis axis = Axis::token;
  int group = 0;
};

struct PageType {
  Format k, v;
  int tokens = 64, D = 128;
  int element_bytes = 2;  // of the working dtype
};

struct Sections {
  int64_t k_codes = 0, k_params = 0, v_codes = 0, v_params = 0, bytes = 0;  // offsets; bytes of the page
};

TC_HD constexpr bool page_tokens_allowed(int tokens) { return tokens == 16 || tokens == 32 || tokens == 64; }
TC_HD constexpr int64_t aligned(int64_t bytes) {
  return (bytes + kSectionAlignment - 1) / kSectionAlignment * kSectionAlignment;
}
TC_HD constexpr int64_t code_bytes(const PageType& p, const Format& f) {
  const int64_t elements = int64_t(p.tokens) * p.D;
  return f.tier == Tier::working ? elements * p.element_bytes : elements * tier_bits(f.tier) / 8;
}
TC_HD constexpr int64_t param_bytes(const PageType& p, const Format& f) {
  return f.tier == Tier::working ? 0 : int64_t(p.tokens) * p.D / f.group * kParamBytes;
}

TC_HD constexpr Sections sections(const PageType& p) {
  Sections s;
  s.k_params = aligned(code_bytes(p, p.k));
  s.v_codes = s.k_params + aligned(param_bytes(p, p.k));
  s.v_params = s.v_codes + aligned(code_bytes(p, p.v));
  s.bytes = s.v_params + aligned(param_bytes(p, p.v));
  return s;
}

namespace golden {

constexpr int64_t bytes(int tokens, Tier tier, Axis k_axis, int k_group, int v_group) {
  return sections({{tier, k_axis, k_group}, {tier, Axis::token, v_group}, tokens, 128, 2}).bytes;
}
static_assert(bytes(64, Tier::working, Axis::token, 128, 128) == 32768);
static_assert(bytes(64, Tier::int8, Axis::token, 128, 128) == 16896 &&
              bytes(64, Tier::fp8, Axis::token, 128, 128) == 16896);
static_assert(bytes(64, Tier::int4, Axis::token, 128, 128) == 8704);
static_assert(bytes(64, Tier::int4, Axis::channel, 64, 128) == 8960);
static_assert(bytes(32, Tier::int4, Axis::channel, 32, 128) == 4736);
static_assert(bytes(32, Tier::int3, Axis::token, 128, 128) == 3328);
static_assert(bytes(16, Tier::int2, Axis::token, 64, 64) == 1280);
static_assert(bytes(16, Tier::int2, Axis::channel, 16, 128) == 1600);
static_assert(bytes(64, Tier::int2, Axis::channel, 64, 128) == 4864);

}  // namespace golden
}  // namespace tokencomp::page_blob
