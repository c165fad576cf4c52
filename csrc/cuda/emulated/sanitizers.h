// What the emulator tells AddressSanitizer and ThreadSanitizer; without them, nothing.
#pragma once
#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define CLAE_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CLAE_ASAN 1
#endif
#endif
#if defined(__SANITIZE_THREAD__)
#define CLAE_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define CLAE_TSAN 1
#endif
#endif
#if !defined(CLAE_ASAN)
#define CLAE_ASAN 0
#endif
#if !defined(CLAE_TSAN)
#define CLAE_TSAN 0
#endif

#if CLAE_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if CLAE_TSAN
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void* __tsan_get_current_fiber();
void __tsan_acquire(void* object);
void __tsan_release(void* object);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
// Not inlined, or it would be instrumented as part of the kernel.
#define CLAE_UNSEEN __attribute__((no_sanitize("thread"), noinline))
#else
#define CLAE_UNSEEN
#endif

namespace clae_fast {
namespace gpu {
namespace emulated {

// Accesses of the emulator itself are no races: all fibers run on one OS thread.
struct Quiet {
  Quiet() {
#if CLAE_TSAN
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
  }
  ~Quiet() {
#if CLAE_TSAN
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
#endif
  }
  Quiet(const Quiet&) = delete;
};

inline void poison([[maybe_unused]] const void* p, [[maybe_unused]] std::size_t bytes) {
#if CLAE_ASAN
  __asan_poison_memory_region(p, bytes);
#endif
}
inline void unpoison([[maybe_unused]] const void* p, [[maybe_unused]] std::size_t bytes) {
#if CLAE_ASAN
  __asan_unpoison_memory_region(p, bytes);
#endif
}

// What came before a release comes before what follows an acquire of the same object.
inline void release([[maybe_unused]] void* object) {
#if CLAE_TSAN
  __tsan_release(object);
#endif
}
inline void acquire([[maybe_unused]] void* object) {
#if CLAE_TSAN
  __tsan_acquire(object);
#endif
}

// A barrier's two objects, used in turn: who already waits at the next barrier must not seem to
// come before who has not yet left this one.
struct Order {
  char objects[2][8];
  unsigned phase = 0;
  void* now() { return objects[phase & 1]; }
};

}  // namespace emulated
}  // namespace gpu
}  // namespace clae_fast
