// The machine as kernels see it, written twice: for nvcc, and for the host emulator that runs the
// same kernel source under g++ (emulated/). No torch here.
//
// What a kernel must keep to so that both run it: one pass-by-value Params struct; 1-D grids and
// blocks of whole warps; dynamic shared memory only, carved; inline PTX only in these headers;
// 16-bit data as integer bits; collectives by the full warp; no thread leaves before a barrier.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define CLAE_DEVICE __device__ __forceinline__
#define CLAE_HOST_DEVICE __host__ __device__
// CLAE_KERNEL(threads of a block[, blocks of a multiprocessor]) name(CLAE_PARAMS(Params) p) {...}
#define CLAE_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define CLAE_PARAMS(P) const __grid_constant__ P
#define CLAE_PRAGMA(x) _Pragma(#x)
#define CLAE_UNROLL _Pragma("unroll")
#define CLAE_UNROLL_BY(n) CLAE_PRAGMA(unroll n)
#define CLAE_ROLLED _Pragma("unroll 1")
#else
#include "emulated/runtime.h"
#define CLAE_DEVICE inline
#define CLAE_HOST_DEVICE
#define CLAE_KERNEL(...) inline void
#define CLAE_PARAMS(P) const P
#define CLAE_UNROLL
#define CLAE_UNROLL_BY(n)
#define CLAE_ROLLED
#endif

namespace clae_fast {
namespace gpu {

constexpr int kWarp = 32;

// Sixteen bytes, as one instruction moves them.
struct alignas(16) Vec16 {
  unsigned x[4];
};

// The bytes that carve<T>(cursor, n) takes; their sum is what a launch asks for.
template <typename T>
CLAE_HOST_DEVICE constexpr int carved_bytes(int n) {
  return (n * int(sizeof(T)) + 15) / 16 * 16;
}

#if defined(__CUDACC__)

CLAE_DEVICE int thread_index() { return int(threadIdx.x); }
CLAE_DEVICE int block_index() { return int(blockIdx.x); }
CLAE_DEVICE int block_count() { return int(gridDim.x); }

CLAE_DEVICE void sync_block() { __syncthreads(); }
CLAE_DEVICE void sync_warp() { __syncwarp(); }
CLAE_DEVICE bool sync_block_or(bool any) { return __syncthreads_or(any) != 0; }

template <typename T>
CLAE_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <typename T>
CLAE_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

struct SharedCursor {
  char* at;
};
CLAE_DEVICE SharedCursor dynamic_smem() {
  extern __shared__ __align__(128) char clae_fast_shared[];
  return {clae_fast_shared};
}
template <typename T>
CLAE_DEVICE T* carve(SharedCursor& cursor, int n) {
  T* array = reinterpret_cast<T*>(cursor.at);
  cursor.at += carved_bytes<T>(n);
  return array;
}
CLAE_DEVICE unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }

// Through the read-only path: what no block writes during the kernel.
CLAE_DEVICE Vec16 load_global(const void* p) {
  const uint4 v = __ldg(static_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}
CLAE_DEVICE void store_global(void* p, const Vec16& v) {
  *static_cast<uint4*>(p) = make_uint4(v.x[0], v.x[1], v.x[2], v.x[3]);
}
CLAE_DEVICE Vec16 load_shared(const void* p) {
  const uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
CLAE_DEVICE void store_shared(void* p, const Vec16& v) { store_global(p, v); }

// From L2: what another block wrote, after a grid barrier or a ticket. An L1 may hold older bytes.
template <typename T>  // float, int, unsigned
CLAE_DEVICE T load_l2(const T* p) {
  return __ldcg(p);
}
CLAE_DEVICE Vec16 load_l2(const Vec16* p) {
  const uint4 v = __ldcg(reinterpret_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}

#else

inline int thread_index() { return emulated::thread_index(); }
inline int block_index() { return emulated::block_index(); }
inline int block_count() { return emulated::block_count(); }

inline void sync_block() { emulated::sync_block(false); }
inline void sync_warp() { emulated::sync_warp(); }
inline bool sync_block_or(bool any) { return emulated::sync_block(any); }

template <typename T>
T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) == 4, "float, int or unsigned");
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = emulated::shuffle_xor(bits, mask);
  std::memcpy(&value, &bits, 4);
  return value;
}
template <typename T>
T shuffle(T value, int lane) {
  static_assert(sizeof(T) == 4, "float, int or unsigned");
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = emulated::shuffle(bits, lane);
  std::memcpy(&value, &bits, 4);
  return value;
}

using SharedCursor = emulated::SharedCursor;
inline SharedCursor dynamic_smem() { return emulated::dynamic_smem(); }
template <typename T>
T* carve(SharedCursor& cursor, int n) {
  return static_cast<T*>(emulated::carve(cursor, n * sizeof(T)));
}

inline Vec16 load_global(const void* p) {
  emulated::require_aligned(p, "load_global");
  return *static_cast<const Vec16*>(p);
}
inline void store_global(void* p, const Vec16& v) {
  emulated::require_aligned(p, "store_global");
  *static_cast<Vec16*>(p) = v;
}
inline Vec16 load_shared(const void* p) {
  emulated::require_shared(p, "load_shared");
  return *static_cast<const Vec16*>(p);
}
inline void store_shared(void* p, const Vec16& v) {
  emulated::require_shared(p, "store_shared");
  *static_cast<Vec16*>(p) = v;
}
template <typename T>
T load_l2(const T* p) {
  return *p;
}
inline Vec16 load_l2(const Vec16* p) {
  emulated::require_aligned(p, "load_l2");
  return *p;
}

#endif

CLAE_DEVICE int lane_index() { return thread_index() % kWarp; }
CLAE_DEVICE int warp_index() { return thread_index() / kWarp; }

}  // namespace gpu
}  // namespace clae_fast
