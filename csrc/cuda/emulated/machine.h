// The emulated GPU: its threads, warps and blocks, and who runs next.
//
// One fiber per thread, all on one OS thread, so one launch at a time. A thread runs until it must
// wait, and then switches to the next by itself; the launcher's own fiber only starts, and hears of
// the end or of an error.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "fiber.h"

namespace clae_fast {
namespace gpu {
namespace emulated {

// Which of the threads that could run does. The first two run ahead: a warp goes as far as it can,
// and then the first (the last) of those that can go on. Nothing else shows a missing barrier as
// well, but each only shows what is wrong in its direction.
enum class Schedule { kAscending, kDescending, kRandom, kRoundRobin };
// Tensor cores align what they add to its largest term and cut off the rest.
enum class Accumulation { kNearest, kTruncating };

struct Settings {
  Schedule schedule = Schedule::kAscending;
  std::uint64_t seed = 1;
  Accumulation accumulation = Accumulation::kNearest;
};
inline Settings settings;

// clang-format off
enum Wait : std::uint8_t {
  kRuns, kShuffleXor, kShuffle, kSyncWarp, kLdmatrix, kLdmatrixTrans, kMma16, kMma32, kSyncBlock,
  kSyncGrid, kExited, kWaits
};
// clang-format on
inline constexpr const char* kWaitNames[kWaits] = {
    "run",        "shuffle_xor", "shuffle",    "sync_warp", "ldmatrix_x4", "ldmatrix_x4_trans",
    "16-bit mma", "tf32 mma",    "sync_block", "sync_grid", "have exited"};

// Where a copy stands that was issued and has not landed.
struct Copy {
  char* shared;
  const char* global;
  int bytes;
  int group;
};

struct Warp;
struct Block;

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int index = 0, lane = 0;
  Wait wait = kRuns;
  bool started = false;
  int groups = 0;  // of copies, committed
  std::vector<Copy> copies;
};

struct Warp {
  int index = 0;              // in the grid
  std::uint32_t ready = ~0u;  // lanes that can run
  std::uint32_t arrived = 0;  // lanes that wait in `op`
  Wait op = kRuns;
  int held = 0;  // lanes at a barrier of more than the warp, or gone
  Wait held_by = kRuns;
  void* arguments[32] = {};
  Order order;
};

struct Block {
  int index = 0;
  char* shared = nullptr;
  int arrived = 0, arrived_grid = 0;
  bool any = false, any_before = false;  // of sync_block_or: of this phase, of the last one
  std::vector<std::pair<std::size_t, std::size_t>> carved;  // from, bytes
  Order order;
};

struct Machine {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Block> blocks;
  std::vector<std::uint64_t> ready;  // a bit per warp that has a lane to run
  Thread* current = nullptr;
  Fiber launcher;
  Fiber* previous = nullptr;  // who switched to the one that runs
  int grid = 0, block = 0;
  std::size_t smem = 0, stride = 0;  // of a block's shared memory: asked for, and with gaps

  int blocks_arrived = 0;
  Order order;  // of the grid barrier

  std::string error;
  std::uint64_t random = 1;

  char* stacks = nullptr;
  std::size_t stacks_used = 0, stack_stride = 0, stack_bytes = 0;
  std::vector<char*> free_stacks;
  char* retired_stack = nullptr;  // of the thread that exited last, which may yet stand on it

  std::vector<void*> tsan_fibers;  // kept between launches: they are slow to make
  char begun[8], ended[8];         // what comes before and after all threads

  void (*enter)() = nullptr;
  void (*call)(const void* kernel, const void* params) = nullptr;
  const void *kernel = nullptr, *params = nullptr;
};
inline Machine machine;

inline std::uint64_t random_bits() {
  std::uint64_t& x = machine.random;
  x ^= x << 13;
  x ^= x >> 7;
  return x ^= x << 17;
}

// The first warp from `at` on that has a lane to run, round the end; -1 if none has.
inline int warp_from(int at) {
  const int words = int(machine.ready.size());
  std::uint64_t here = machine.ready[at / 64] & (~std::uint64_t(0) << at % 64);
  for (int i = 0; i <= words; ++i) {
    const int word = (at / 64 + i) % words;
    if (i > 0) here = machine.ready[word];
    if (here) return word * 64 + __builtin_ctzll(here);
  }
  return -1;
}
inline int last_warp() {
  for (int word = int(machine.ready.size()) - 1; word >= 0; --word)
    if (machine.ready[word]) return word * 64 + 63 - __builtin_clzll(machine.ready[word]);
  return -1;
}

// Who runs next; nullptr if nobody can.
inline Thread* choose() {
  Machine& m = machine;
  const int here = m.current ? m.current->warp->index : 0;
  const bool ahead = m.warps[here].ready != 0;
  const int count = int(m.warps.size());
  const auto lane_of = [&](int warp, int lane) { return &m.threads[warp * 32 + lane]; };
  int warp = here;
  switch (settings.schedule) {
    case Schedule::kAscending:
      if (!ahead) warp = warp_from(0);
      return warp < 0 ? nullptr : lane_of(warp, __builtin_ctz(m.warps[warp].ready));
    case Schedule::kDescending:
      if (!ahead) warp = last_warp();
      return warp < 0 ? nullptr : lane_of(warp, 31 - __builtin_clz(m.warps[warp].ready));
    case Schedule::kRoundRobin:
      warp = warp_from((here + 1) % count);
      return warp < 0 ? nullptr : lane_of(warp, __builtin_ctz(m.warps[warp].ready));
    case Schedule::kRandom:
      break;
  }
  const std::uint64_t bits = random_bits();
  // Seldom enough that a warp can get ahead, often enough that warps mix.
  if (!ahead || bits % 64 == 0) warp = warp_from(int((bits >> 8) % count));
  if (warp < 0) return nullptr;
  const int turn = int(bits >> 48) % 32;
  const std::uint32_t lanes = m.warps[warp].ready,
                      turned = (lanes >> turn) | (lanes << (-turn & 31));
  return lane_of(warp, (__builtin_ctz(turned) + turn) % 32);
}

inline void set_ready(Warp& warp, std::uint32_t lanes) {
  warp.ready = lanes;
  const std::uint64_t bit = std::uint64_t(1) << warp.index % 64;
  if (lanes) {
    machine.ready[warp.index / 64] |= bit;
  } else {
    machine.ready[warp.index / 64] &= ~bit;
  }
}

inline char* new_stack() {
  Machine& m = machine;
  if (!m.free_stacks.empty()) {
    char* stack = m.free_stacks.back();
    m.free_stacks.pop_back();
    return stack;
  }
  return m.stacks + m.stack_stride * m.stacks_used++;
}

inline void start(Thread& t) {
  t.started = true;
  prepare(t.fiber, new_stack(), machine.stack_bytes, machine.enter);
}

// From whoever runs to `to`, or to the launcher if that is nullptr.
CLAE_UNSEEN inline void run(Thread* to, bool last = false) {
  Machine& m = machine;
  Thread* self = m.current;
  if (to == self) return;
  if (to && !to->started) start(*to);
  Fiber& from = self ? self->fiber : m.launcher;
  m.previous = &from;
  m.current = to;
  switch_fiber(from, to ? to->fiber : m.launcher, last);
  arrived(from, *m.previous);
}

// Ends the launch, which throws `why`.
[[noreturn]] inline void fail(const std::string& why) {
  machine.error = why;
  release(machine.ended);
  run(nullptr);
  __builtin_unreachable();  // nobody switches back
}

inline std::string place(const Thread& t) {
  return " (block " + std::to_string(t.block->index) + ", thread " + std::to_string(t.index) + ")";
}

// Until somebody makes this thread ready again.
inline void suspend(Thread& t, Wait wait) {
  // Below is the next thread's stack.
  if (static_cast<char*>(__builtin_frame_address(0)) < t.fiber.stack + 2048)
    fail("a thread's stack overflowed" + place(t));
  t.wait = wait;
  release(machine.ended);  // in case this is its last
  set_ready(*t.warp, t.warp->ready & ~(1u << t.lane));
  run(choose());
  t.wait = kRuns;
}

// Where others may come first though nobody has to wait, for the schedules that mix.
inline void yield() {
  if (settings.schedule == Schedule::kRandom || settings.schedule == Schedule::kRoundRobin)
    run(choose());
}

// A collective of the warp: true for the lane that came last, which acts for all and then calls
// finish; the others return when it has.
inline bool arrive(Thread& t, Wait op, void* arguments) {
  Warp& w = *t.warp;
  if (w.held)
    fail(std::string("divergent collective: a lane calls ") + kWaitNames[op] + " while " +
         std::to_string(w.held) + " of its warp " + (w.held_by == kExited ? "" : "wait in ") +
         kWaitNames[w.held_by] + place(t));
  if (w.arrived == 0) w.op = op;
  if (w.op != op)
    fail(std::string("divergent collective: a lane calls ") + kWaitNames[op] + " while " +
         std::to_string(__builtin_popcount(w.arrived)) + " of its warp wait in " +
         kWaitNames[w.op] + place(t));
  w.arguments[t.lane] = arguments;
  w.arrived |= 1u << t.lane;
  if (w.arrived == ~0u) return true;
  suspend(t, op);
  return false;
}
inline void finish(Thread& t) {
  t.warp->arrived = 0;
  set_ready(*t.warp, ~0u);
  yield();
}

// Marks a lane that leaves for a barrier of the block or the grid, or for good.
inline void hold(Thread& t, Wait by) {
  Warp& w = *t.warp;
  if (w.arrived)
    fail(std::string("divergent collective: a lane ") + (by == kExited ? "exits" : "calls ") +
         (by == kExited ? "" : kWaitNames[by]) + " while " +
         std::to_string(__builtin_popcount(w.arrived)) + " of its warp wait in " +
         kWaitNames[w.op] + place(t));
  ++w.held;
  w.held_by = by;
}
inline void let_go(Block& block) {
  const int warps = machine.block / 32;
  for (int i = block.index * warps; i < (block.index + 1) * warps; ++i) {
    machine.warps[i].held = 0;
    set_ready(machine.warps[i], ~0u);
  }
}

}  // namespace emulated
}  // namespace gpu
}  // namespace clae_fast
