// cp.async as late as it may be: a copy leaves NaN at its target, and lands when it is waited for.
#pragma once
#include "runtime.h"

namespace clae_fast {
namespace gpu {
namespace emulated {

inline void copy_async(void* shared, const void* global, int bytes) {
  require_shared(shared, "copy_async");
  require_aligned(global, "copy_async");
  // Word by word, as the sanitizers see it.
  for (int i = 0; i < 4; ++i) static_cast<std::uint32_t*>(shared)[i] = ~0u;
  Quiet quiet;
  Thread& t = self();
  if (bytes < 0 || bytes > 16)
    fail("copy_async: " + std::to_string(bytes) + " bytes of 16" + place(t));
  t.copies.push_back(
      {static_cast<char*>(shared), static_cast<const char*>(global), bytes, t.groups});
}

inline void commit_copies() {
  Quiet quiet;
  ++self().groups;
}

// Takes the next copy that the last `newest` groups do not hold; false if there is none.
inline bool next_copy(int newest, Copy& copy) {
  Quiet quiet;
  Thread& t = self();
  for (std::size_t i = 0; i < t.copies.size(); ++i)
    if (t.copies[i].group < t.groups - newest) {
      copy = t.copies[i];
      t.copies.erase(t.copies.begin() + std::ptrdiff_t(i));
      return true;
    }
  return false;
}

inline void wait_copies(int newest) {
  Copy copy;
  while (next_copy(newest, copy)) {
    for (int i = 0; i < copy.bytes; ++i) copy.shared[i] = copy.global[i];
    for (int i = copy.bytes; i < 16; ++i) copy.shared[i] = 0;
  }
  Quiet quiet;
  yield();
}

}  // namespace emulated
}  // namespace gpu
}  // namespace clae_fast
