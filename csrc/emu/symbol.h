// Names for places in the program, for messages: file and line of an instruction, name and line of a kernel. They come
// from the debug information through addr2line; without it (or without -g) a message shows library and offset instead.
#pragma once
#include <string>

#pragma GCC visibility push(hidden)

namespace emu {

std::string line_of(const void* return_address);  // the innermost line that is neither a wrapper's nor the library's
// Whether an instruction belongs to a function of the C++ library that was not inlined. Where the linker keeps an
// instrumented copy of such a function, the run time's own messages and lists are reported like accesses of a kernel.
bool in_standard_library(const void* return_address);
std::string kernel_at(const void* entry);
std::string linkage_name(const void* entry);  // mangled

}  // namespace emu

#pragma GCC visibility pop
