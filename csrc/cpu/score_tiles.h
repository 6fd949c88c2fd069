// Attention scores on the CPU: the tiles of attention_tiles.h by the blocks of this family.
#pragma once

#include "cpu/attention_tiles.h"
#include "cpu/score_kernels.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {

using namespace score;

static_assert(kKeyBlock % kLaneTile == 0 && kRowBlock % kRowTile == 0 && kWordPadding % kWidth == 0);

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
