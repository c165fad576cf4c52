// What blocks tell each other through integers in global memory: a barrier of the grid, and
// tickets.
//
// Both leave their words ready for the next launch, so a workspace is zeroed once in its life, and
// no launch of a stream or replay of a graph needs a memset. Launches that may run at the same time
// need a workspace each. Neither adds floats: results do not depend on who came first.
#pragma once
#include "device.h"
#if !defined(__CUDACC__)
#include "emulated/grid.h"
#endif

namespace clae_fast {
namespace gpu {

// Waits for every thread of the grid: all blocks must be resident (a cooperative launch), at most
// 65,535 of them. What any block wrote before is there for all after; read it with load_l2.
//
// The low half of the word counts blocks, the high half finished barriers: block 0 adds what makes
// the sum of one barrier 2^16, so the high half changes with the last arrival, whoever that is.
// The block's barrier makes its writes thread 0's to release, and what it acquires everyone's.
CLAE_DEVICE void sync_grid(unsigned* word) {
#if defined(__CUDACC__)
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned mine = blockIdx.x == 0 ? 0x10000u - (gridDim.x - 1) : 1u;
    unsigned before, now;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(__cvta_generic_to_global(word)), "r"(mine)
                 : "memory");
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                   : "=r"(now)
                   : "l"(__cvta_generic_to_global(word))
                   : "memory");
    } while ((now ^ before) >> 16 == 0);
  }
  __syncthreads();
#else
  emulated::sync_grid(word);
#endif
}

// Called by every thread of a block, by `count` blocks for one counter: whether this block is the
// last of them. It sees what the others wrote before theirs (load_l2), and the counter is zero
// again.
CLAE_DEVICE bool take_ticket(unsigned* counter, unsigned count) {
#if defined(__CUDACC__)
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    unsigned before;  // inc wraps to zero after count - 1
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(__cvta_generic_to_global(counter)), "r"(count - 1)
                 : "memory");
    last = before == count - 1;
  }
  return __syncthreads_or(last) != 0;
#else
  return emulated::take_ticket(counter, count);
#endif
}

}  // namespace gpu
}  // namespace clae_fast
