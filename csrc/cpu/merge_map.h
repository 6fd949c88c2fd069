// One item's token map from its match.
#pragma once

#include "core/merge.h"

namespace tokencomp::cpu {

void map_item(const merge::MapArgs& args, int b);

}  // namespace tokencomp::cpu
