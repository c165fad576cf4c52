// Matrix products by a warp: ldmatrix, and mma.sync with float32 accumulators.
//
// With g = lane / 4 and t = lane % 4, and two 16-bit numbers (or one tf32) per register:
//   16 bit, 16 x 8 x 16   a[0] (g, 2t)  a[1] (g+8, 2t)  a[2] (g, 2t+8)  a[3] (g+8, 2t+8)
//                         b0 (2t, g)    b1 (2t+8, g)            pairs go along k
//   tf32,   16 x 8 x 8    a[0] (g, t)   a[1] (g+8, t)   a[2] (g, t+4)   a[3] (g+8, t+4)
//                         b0 (t, g)     b1 (t+4, g)
//   accumulators          c[0] (g, 2t)  c[1] (g, 2t+1)  c[2] (g+8, 2t)  c[3] (g+8, 2t+1)
#pragma once
#include "device.h"
#include "numbers.h"
#if !defined(__CUDACC__)
#include "emulated/fragments.h"
#endif

namespace clae_fast {
namespace gpu {

// The extent of k of one mma.
template <typename Format>
inline constexpr int kMmaDepth = 16;
template <>
inline constexpr int kMmaDepth<Tf32> = 8;

// Four 8 x 8 matrices of 16-bit numbers (or 8 x 4 of 32-bit ones) from shared memory. Lane 8 i + r
// gives the address of row r of matrix i; r[i] is its row lane / 4, numbers 2 (lane % 4) and next.
CLAE_DEVICE void ldmatrix_x4(unsigned (&r)[4], const void* row) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#else
  emulated::ldmatrix(r, row, false);
#endif
}

// The same, each matrix transposed: numbers of column lane / 4, rows 2 (lane % 4) and next.
CLAE_DEVICE void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#else
  emulated::ldmatrix(r, row, true);
#endif
}

// c += a b. The device adds with truncation and in an order of its own: compare with a tolerance.
template <typename Format>
CLAE_DEVICE void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);

#if defined(__CUDACC__)
#define CLAE_MMA(Format, shape)                                                                   \
  template <>                                                                                     \
  CLAE_DEVICE void mma<Format>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) { \
    asm("mma.sync.aligned." shape                                                                 \
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                        \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                          \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                          \
  }
CLAE_MMA(Bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
CLAE_MMA(F16, "m16n8k16.row.col.f32.f16.f16.f32")
CLAE_MMA(Tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef CLAE_MMA
#else
template <typename Format>
void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  emulated::mma<Format>(c, a, b0, b1);
}
#endif

}  // namespace gpu
}  // namespace clae_fast
