// What the compiler calls for each memory access under -fsanitize=thread. Kernels compiled so are linked with these
// definitions instead of libtsan: no start-up cost, no preloading, and CUDA's notion of order instead of the host's.
#include "emu/race.h"

using emu::race::Kind;
using emu::race::on_access;

#define EMU_PC __builtin_return_address(0)

#define EMU_ACCESS(bytes)                                                                   \
  void __tsan_read##bytes(void* p) { on_access(p, bytes, Kind::read, EMU_PC); }             \
  void __tsan_write##bytes(void* p) { on_access(p, bytes, Kind::write, EMU_PC); }           \
  void __tsan_unaligned_read##bytes(void* p) { on_access(p, bytes, Kind::read, EMU_PC); }   \
  void __tsan_unaligned_write##bytes(void* p) { on_access(p, bytes, Kind::write, EMU_PC); } \
  void __tsan_volatile_read##bytes(void* p) { on_access(p, bytes, Kind::read, EMU_PC); }    \
  void __tsan_volatile_write##bytes(void* p) { on_access(p, bytes, Kind::write, EMU_PC); }

#define EMU_FETCH(bits, T, op)                                           \
  T __tsan_atomic##bits##_fetch_##op(volatile T* p, T v, int) {          \
    on_access(const_cast<T*>(p), sizeof(T), Kind::atomic_write, EMU_PC); \
    return __atomic_fetch_##op(p, v, __ATOMIC_SEQ_CST);                  \
  }

#define EMU_CAS(bits, T, strength, weak)                                                             \
  int __tsan_atomic##bits##_compare_exchange_##strength(volatile T* p, T* expected, T v, int, int) { \
    on_access(const_cast<T*>(p), sizeof(T), Kind::atomic_write, EMU_PC);                             \
    return __atomic_compare_exchange_n(p, expected, v, weak, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);    \
  }

#define EMU_ATOMIC(bits, T)                                                   \
  T __tsan_atomic##bits##_load(const volatile T* p, int) {                    \
    on_access(const_cast<const T*>(p), sizeof(T), Kind::atomic_read, EMU_PC); \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                              \
  }                                                                           \
  void __tsan_atomic##bits##_store(volatile T* p, T v, int) {                 \
    on_access(const_cast<T*>(p), sizeof(T), Kind::atomic_write, EMU_PC);      \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                 \
  }                                                                           \
  T __tsan_atomic##bits##_exchange(volatile T* p, T v, int) {                 \
    on_access(const_cast<T*>(p), sizeof(T), Kind::atomic_write, EMU_PC);      \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                       \
  }                                                                           \
  EMU_FETCH(bits, T, add)                                                     \
  EMU_FETCH(bits, T, sub)                                                     \
  EMU_FETCH(bits, T, and)                                                     \
  EMU_FETCH(bits, T, or)                                                      \
  EMU_FETCH(bits, T, xor)                                                     \
  EMU_FETCH(bits, T, nand)                                                    \
  EMU_CAS(bits, T, strong, false)                                             \
  EMU_CAS(bits, T, weak, true)

#pragma GCC visibility push(hidden)
extern "C" {

void __tsan_init() { emu::race::enabled = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* p, unsigned long bytes) { on_access(p, bytes, Kind::read, EMU_PC); }
void __tsan_write_range(void* p, unsigned long bytes) { on_access(p, bytes, Kind::write, EMU_PC); }
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}

EMU_ACCESS(1)
EMU_ACCESS(2)
EMU_ACCESS(4)
EMU_ACCESS(8)
EMU_ACCESS(16)
EMU_ATOMIC(8, uint8_t)
EMU_ATOMIC(16, uint16_t)
EMU_ATOMIC(32, uint32_t)
EMU_ATOMIC(64, uint64_t)

}  // extern "C"
#pragma GCC visibility pop
