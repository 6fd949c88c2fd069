// What was launched and how it used the banks of shared memory, a line of JSON for each launch, in the file that
// TOKENCOMP_EMU_RECORD names. With TOKENCOMP_EMU_DRY kernels do not run, so that the launches of large problems can be
// looked at. Banks are counted for ldmatrix and stmatrix alone: there a warp meets, other accesses come lane by lane.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdio>

#pragma GCC visibility push(hidden)

namespace emu {

struct Launch;

namespace record {

extern std::atomic<bool> counting;

// The 32 rows of 16 bytes of an ldmatrix or stmatrix: eight of them at a time, one wavefront where no two of the eight
// are different rows of one bank group.
void matrix_rows(const void* const* rows);

// Around a launch; writes the line where the launch succeeds.
class LaunchScope {
 public:
  explicit LaunchScope(const Launch& launch);
  ~LaunchScope();
  LaunchScope(const LaunchScope&) = delete;

 private:
  void write() const;
  const Launch& launch_;
  std::FILE* file_ = nullptr;
  int exceptions_;
};

}  // namespace record
}  // namespace emu

#pragma GCC visibility pop
