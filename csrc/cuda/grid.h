// What blocks tell each other: a barrier of the grid, and tickets.
//
// The barrier is CUDA's own, whose memory the driver hands to each cooperative launch: launches
// that run at the same time, in streams and in graphs, cannot meet in one. Tickets leave their
// counter zero. Neither adds floats: results do not depend on who came first.
#pragma once
#include "device.h"
#if defined(__CUDACC__)
#include <cooperative_groups.h>
#else
#include "emulated/grid.h"
#endif

namespace clae_fast {
namespace gpu {

// Waits for every thread of the grid: all blocks must be resident (a cooperative launch). What any
// block wrote before is there for all after; read it with load_l2.
CLAE_DEVICE void sync_grid() {
#if defined(__CUDACC__)
  cooperative_groups::this_grid().sync();
#else
  emulated::sync_grid();
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
