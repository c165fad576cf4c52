// Copies from global to shared memory that run behind the thread's back, in groups.
//
// What a copy brings is there for the thread that issued it after wait_copies, and for others
// after a barrier that follows.
#pragma once
#include "device.h"
#if !defined(__CUDACC__)
#include "emulated/copies.h"
#endif

namespace clae_fast {
namespace gpu {

// Sixteen bytes, both addresses aligned to 16; those from `bytes` on (0 to 16) become zero, and
// with bytes = 0 nothing is read.
CLAE_DEVICE void copy_async(void* shared, const void* global, int bytes = 16) {
#if defined(__CUDACC__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(bytes)
               : "memory");
#else
  emulated::copy_async(shared, global, bytes);
#endif
}

// Ends a group: this thread's copies since the last call, perhaps none.
CLAE_DEVICE void commit_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulated::commit_copies();
#endif
}

// Waits until at most the `kNewest` last groups of this thread are still on their way.
template <int kNewest>
CLAE_DEVICE void wait_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
#else
  emulated::wait_copies(kNewest);
#endif
}

}  // namespace gpu
}  // namespace clae_fast
