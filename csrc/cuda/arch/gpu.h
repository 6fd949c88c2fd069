// The only GPU header that kernels include. One set of names in namespace gpu, two implementations: PTX under nvcc, the
// emulator under any other C++ compiler. Instructions of sm_90 compile for sm_80 too and trap there; whether a kernel
// may run is the launcher's decision (gpu::compute_capability_major), kernels never ask for the architecture.
#pragma once
#ifdef __CUDACC__
#include "cuda/arch/async_copy.h"
#include "cuda/arch/cluster.h"
#include "cuda/arch/launch.h"
#include "cuda/arch/maths.h"
#include "cuda/arch/mbarrier.h"
#include "cuda/arch/memory.h"
#include "cuda/arch/mma.h"
#include "cuda/arch/wgmma.h"
#else
#include "emu/arch_emu.h"
#endif
#include "cuda/arch/reduce.h"
