// Asking addr2line. See symbol.h.
#include "emu/symbol.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <vector>

namespace emu {
namespace {

struct Place {
  std::string library;
  size_t offset = 0;

  explicit Place(const void* p) {
    Dl_info info;
    if (!dladdr(p, &info)) return;
    library = info.dli_fname;
    offset = size_t(static_cast<const char*>(p) - static_cast<const char*>(info.dli_fbase));
  }

  std::string raw() const {
    char text[32];
    std::snprintf(text, sizeof text, "+%#zx", offset);
    return library + text;
  }
};

std::vector<std::string> ask(const char* options, const Place& place) {
  std::vector<std::string> lines;
  char command[1024];
  std::snprintf(command, sizeof command, "addr2line %s -e '%s' %#zx 2>/dev/null", options, place.library.c_str(),
                place.offset);
  FILE* pipe = popen(command, "r");
  if (!pipe) return lines;
  char line[2048];
  while (std::fgets(line, sizeof line, pipe)) {
    std::string text(line, std::strcspn(line, "\n"));
    lines.push_back(text.substr(0, text.find(" (discriminator")));
  }
  pclose(pipe);
  return lines;
}

constexpr const char* kLibrary = "/include/c++/";

bool is_wrapper(const std::string& line) {
  for (const char* part : {"csrc/emu/", "cuda/arch/", kLibrary}) {
    if (line.find(part) != std::string::npos) return true;
  }
  return false;
}

}  // namespace

std::string line_of(const void* return_address) {
  Place place(return_address);
  place.offset--;  // the call is before the address that it returns to
  std::string innermost;
  for (const std::string& line : ask("-C -i", place)) {
    if (line.starts_with("?")) continue;
    if (!is_wrapper(line)) return line;
    if (innermost.empty()) innermost = line;
  }
  return innermost.empty() ? place.raw() : innermost;
}

bool in_standard_library(const void* return_address) {
  return line_of(return_address).find(kLibrary) != std::string::npos;
}

std::string linkage_name(const void* entry) {
  const auto lines = ask("-f", Place(entry));
  return lines.empty() ? "?" : lines[0];
}

std::string kernel_at(const void* entry) {
  const Place place(entry);
  const auto lines = ask("-C -f", place);
  if (lines.size() < 2 || lines[0].starts_with("?")) return "kernel " + place.raw();
  std::string name = lines[0];
  for (size_t i; (i = name.find("(anonymous namespace)::")) != std::string::npos;) name.erase(i, 23);
  return lines[1] + ": kernel " + name.substr(0, name.find('('));
}

}  // namespace emu
