// Moving slots on the CPU: whole rows of channels, as bytes, with the processor's own memory copy.
#pragma once

#include "core/kvcache.h"

namespace tokencomp::kvcache {

// Tokens [begin, end) of the list of a row's tokens.
void append_tokens(const AppendArgs& a, int b, int h, int begin, int end);
void gather_tokens(const GatherArgs& g, int b, int h, int begin, int end);
// All of a row, keys or values: in place, a slot's source must not have been overwritten.
void compact_row(const CompactArgs& c, int b, int h, bool values);

}  // namespace tokencomp::kvcache
