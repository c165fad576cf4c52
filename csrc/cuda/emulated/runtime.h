// What device.h asks of the emulated GPU: who a thread is, barriers, shuffles, shared memory; and
// the launch of a kernel.
#pragma once
#include <sys/mman.h>

#include <cstring>
#include <stdexcept>

#include "machine.h"

namespace clae_fast {
namespace gpu {
namespace emulated {

CLAE_UNSEEN inline int thread_index() { return machine.current->index; }
CLAE_UNSEEN inline int block_index() { return machine.current->block->index; }
CLAE_UNSEEN inline int block_count() { return machine.grid; }
CLAE_UNSEEN inline Thread& self() { return *machine.current; }

// Whether any thread of the block said so.
inline bool sync_block(bool any) {
  Quiet quiet;
  Thread& t = self();
  Block& b = *t.block;
  void* order = b.order.now();
  release(order);
  hold(t, kSyncBlock);
  b.any |= any;
  if (++b.arrived == machine.block) {
    b.arrived = 0;
    b.any_before = b.any;
    b.any = false;
    ++b.order.phase;
    let_go(b);
    yield();
  } else {
    suspend(t, kSyncBlock);
  }
  acquire(order);
  return b.any_before;
}

inline void sync_warp() {
  Quiet quiet;
  Thread& t = self();
  void* order = t.warp->order.now();
  release(order);
  if (arrive(t, kSyncWarp, nullptr)) {
    ++t.warp->order.phase;
    finish(t);
  }
  acquire(order);
}

struct Shuffle {
  std::uint32_t given, taken;
  int lane;
};
inline std::uint32_t shuffle_from(Wait op, std::uint32_t value, int lane) {
  Quiet quiet;
  Thread& t = self();
  if (lane < 0 || lane > 31)
    fail(std::string(kWaitNames[op]) + ": lane " + std::to_string(lane) + place(t));
  Shuffle mine{value, 0, lane};
  if (arrive(t, op, &mine)) {
    void** all = t.warp->arguments;
    for (int i = 0; i < 32; ++i) {
      Shuffle& to = *static_cast<Shuffle*>(all[i]);
      to.taken = static_cast<Shuffle*>(all[to.lane])->given;
    }
    finish(t);
  }
  return mine.taken;
}
inline std::uint32_t shuffle_xor(std::uint32_t value, int mask) {
  return shuffle_from(kShuffleXor, value, (thread_index() % 32) ^ mask);
}
inline std::uint32_t shuffle(std::uint32_t value, int lane) {
  return shuffle_from(kShuffle, value, lane);
}

// Arrays of shared memory lie apart, and what lies between is nobody's to touch: AddressSanitizer
// sees it touched, and without it the end of a launch sees it written.
constexpr std::size_t kGap = 48, kGaps = 64;

struct SharedCursor {
  std::size_t used, at;
};
inline SharedCursor dynamic_smem() { return {0, 0}; }

inline void* carve(SharedCursor& cursor, std::size_t bytes) {
  Quiet quiet;
  Thread& t = self();
  const std::size_t rounded = (bytes + 15) / 16 * 16;
  cursor.used += rounded;
  if (cursor.used > machine.smem)
    fail("carve: " + std::to_string(cursor.used) + " bytes of the launch's " +
         std::to_string(machine.smem) + place(t));
  const std::pair<std::size_t, std::size_t> range(cursor.at, bytes);
  bool known = false;
  for (const auto& r : t.block->carved) known |= r == range;
  char* array = t.block->shared + cursor.at;
  if (!known) {
    if (cursor.at + rounded + kGap > machine.stride) fail("carve: too many arrays" + place(t));
    t.block->carved.push_back(range);
    unpoison(array, bytes);
  }
  cursor.at += rounded + kGap;
  return array;
}

inline void require_aligned(const void* p, const char* what) {
  if (reinterpret_cast<std::uintptr_t>(p) % 16) {
    Quiet quiet;
    fail(std::string("misaligned: ") + what + " of 16 bytes" + place(self()));
  }
}
CLAE_UNSEEN inline bool in_shared(const void* p) {
  const char* base = machine.current->block->shared;
  return p >= base && p < base + machine.stride;
}
inline void require_shared(const void* p, const char* what) {
  require_aligned(p, what);
  if (!in_shared(p)) {
    Quiet quiet;
    fail(std::string(what) + ": not an address of the block's shared memory" + place(self()));
  }
}

// The life of a thread.
inline void enter() {
  Machine& m = machine;
  {
    Quiet quiet;
    arrived(self().fiber, *m.previous);
  }
  acquire(m.begun);
  try {
    m.call(m.kernel, m.params);
  } catch (const std::exception& error) {
    fail(std::string("the kernel threw: ") + error.what());
  }
  Thread* next;
  {
    Quiet quiet;
    Thread& t = self();
    if (!t.copies.empty()) fail("a thread exits with copies that it never waited for" + place(t));
    hold(t, kExited);
    t.wait = kExited;
    set_ready(*t.warp, t.warp->ready & ~(1u << t.lane));
    if (!CLAE_TSAN) {  // to which two threads on one stack are a race
      if (m.retired_stack) m.free_stacks.push_back(m.retired_stack);
      m.retired_stack = t.fiber.stack;
    }
    next = choose();
  }
  release(m.ended);
  run(next, true);
}

inline std::string census() {
  int counts[kWaits] = {};
  for (const Thread& t : machine.threads) ++counts[t.wait];
  std::string text;
  for (int wait = 1; wait < kWaits; ++wait)
    if (counts[wait])
      text += (text.empty() ? "" : ", ") + std::to_string(counts[wait]) + " threads " +
              (wait == kExited ? "" : "wait in ") + kWaitNames[wait];
  return text;
}

struct Mapped {
  explicit Mapped(std::size_t n) : bytes(n) {
    memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("emulated: no memory for stacks");
#if defined(MADV_NOHUGEPAGE)
    madvise(memory, bytes, MADV_NOHUGEPAGE);  // a thread touches two pages of its many
#endif
  }
  ~Mapped() {
    unpoison(memory, bytes);
    munmap(memory, bytes);
  }
  Mapped(const Mapped&) = delete;
  void* memory;
  std::size_t bytes;
};

inline void run_machine() {
  Machine& m = machine;
  const int count = m.grid * m.block;
  m.threads = std::vector<Thread>(count);
  m.warps = std::vector<Warp>(count / 32);
  m.blocks = std::vector<Block>(m.grid);
  m.ready.assign((count / 32 + 63) / 64, 0);
  m.current = nullptr;
  m.blocks_arrived = 0;
  m.order = Order();
  m.error.clear();
  m.random = settings.seed * 2 + 1;
  for (int i = 0; i < 8; ++i) random_bits();  // small seeds start alike
  m.stack_bytes = CLAE_ASAN || CLAE_TSAN ? 128 << 10 : 64 << 10;
  // Not a power of two, or the tops of all stacks would share few sets of the caches.
  m.stack_stride = m.stack_bytes + 17 * 64;
  m.stacks_used = 0;
  m.free_stacks.clear();
  m.retired_stack = nullptr;
  m.enter = enter;
  // One more, for the first to overflow into before it is seen.
  const Mapped stacks(m.stack_stride * (std::size_t(count) + 1));
  m.stacks = static_cast<char*>(stacks.memory) + m.stack_stride;
  m.stride = (m.smem + kGaps * kGap + 15) / 16 * 16;
  const std::size_t bytes = m.stride * m.grid;
  const std::vector<char> shared(bytes + 16, char(0xff));  // NaN, whatever the format
  char* base = const_cast<char*>(shared.data());
  base += -reinterpret_cast<std::uintptr_t>(base) & 15;
  poison(base, bytes);
  for (int i = 0; i < count; ++i) {
    Thread& t = m.threads[i];
    t.block = &m.blocks[i / m.block];
    t.warp = &m.warps[i / 32];
    t.index = i % m.block;
    t.lane = i % 32;
#if CLAE_TSAN
    if (int(m.tsan_fibers.size()) == i) m.tsan_fibers.push_back(__tsan_create_fiber(0));
    t.fiber.tsan = m.tsan_fibers[i];
    start(t);
#endif
  }
  for (int i = 0; i < count / 32; ++i) {
    m.warps[i].index = i;
    set_ready(m.warps[i], ~0u);
  }
  for (int i = 0; i < m.grid; ++i) {
    m.blocks[i].index = i;
    m.blocks[i].shared = base + m.stride * i;
  }
#if CLAE_TSAN
  m.launcher.tsan = __tsan_get_current_fiber();
#endif
  release(m.begun);
  run(choose());
  acquire(m.ended);
  unpoison(base, bytes);
  for (const Thread& t : m.threads)
    if (m.error.empty() && t.wait != kExited) m.error = "deadlock: " + census();
  for (Block& b : m.blocks) {
    for (const auto& r : b.carved) std::memset(b.shared + r.first, 0xff, r.second);
    for (std::size_t i = 0; i < m.stride && m.error.empty(); ++i)
      if (b.shared[i] != char(0xff))
        m.error = "shared memory was written outside of every carved array (block " +
                  std::to_string(b.index) + ", byte " + std::to_string(i) + ")";
  }
  // Threads that were left waiting ignore accesses for ever: the next launch makes others.
  if (!m.error.empty()) m.tsan_fibers.clear();
  if (!m.error.empty()) throw std::runtime_error(m.error);
}

// Runs the kernel to its end; throws std::runtime_error where a GPU would hang, or do as it likes.
template <typename Params>
void launch(void (*kernel)(Params), int grid, int block, std::size_t smem, const Params& params) {
  if (grid < 1 || block < 32 || block > 1024 || block % 32)
    throw std::runtime_error("emulated: " + std::to_string(grid) + " blocks of " +
                             std::to_string(block) + " threads");
  if (smem > 232448) throw std::runtime_error("emulated: more shared memory than any GPU has");
  Quiet quiet;
  machine.grid = grid;
  machine.block = block;
  machine.smem = smem;
  machine.kernel = reinterpret_cast<const void*>(kernel);
  machine.params = &params;
  machine.call = [](const void* k, const void* p) {
    reinterpret_cast<void (*)(Params)>(const_cast<void*>(k))(*static_cast<const Params*>(p));
  };
  run_machine();
}

}  // namespace emulated
}  // namespace gpu
}  // namespace clae_fast
