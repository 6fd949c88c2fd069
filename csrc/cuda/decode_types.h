// Decode over pages of several types with 16-bit queries.
#pragma once

#include "op/decode.h"

namespace tokencomp::decode {

void launch_types(const DecodeArgs& a, const Tensor& q);

}  // namespace tokencomp::decode
