// The grid's barrier, and tickets with the arithmetic that the device does on their counter.
#pragma once
#include "runtime.h"

namespace clae_fast {
namespace gpu {
namespace emulated {

inline void sync_grid() {
  Quiet quiet;
  Machine& m = machine;
  Thread& t = self();
  Block& b = *t.block;
  void* order = m.order.now();
  release(order);
  hold(t, kSyncGrid);
  if (++b.arrived_grid == m.block) {
    b.arrived_grid = 0;
    ++m.blocks_arrived;
  }
  if (m.blocks_arrived == m.grid) {
    m.blocks_arrived = 0;
    ++m.order.phase;
    for (Block& block : m.blocks) let_go(block);
    yield();
  } else {
    suspend(t, kSyncGrid);
  }
  acquire(order);
}

inline bool take_ticket(unsigned* counter, unsigned count) {
  sync_block(false);
  bool last = false;
  if (thread_index() == 0) {
    Quiet quiet;
    yield();
    if (*counter >= count)
      fail("take_ticket: the counter is " + std::to_string(*counter) + " before ticket of " +
           std::to_string(count) + place(self()));
    release(counter);
    last = ++*counter == count;
    if (last) *counter = 0;
    acquire(counter);
    yield();
  }
  return sync_block(last);
}

}  // namespace emulated
}  // namespace gpu
}  // namespace clae_fast
