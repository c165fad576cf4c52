// The two products of a tile: S = X Y^T, kept in registers, and G Y from weights in shared memory.
//
// Eight warps, two by four. Of S a warp has 32 rows and BN / 4 columns; of G Y 32 rows and a
// quarter of a slice. float32 is multiplied as tf32 in three products of high and low parts, with
// accumulators of their own for each slice: a tensor core's truncate, and the error grows with
// their length.
#pragma once
#include "contrast_slices.h"
#include "mma.h"

namespace clae_fast {
namespace gpu {

CLAE_DEVICE int warp_row() { return warp_index() / 4; }
CLAE_DEVICE int warp_col() { return warp_index() % 4; }

// What one warp holds of S: s[m][n] is the 16 x 8 accumulator of its rows 16 m, columns 8 n.
template <int BN>
struct Scores {
  static constexpr int kM = 2, kN = BN / 32;
  float s[kM][kN][4];

  // Rows and columns of the tile that accumulator c of [m][n] stands for.
  static CLAE_DEVICE int row(int m, int c) {
    return warp_row() * 32 + m * 16 + (c / 2) * 8 + lane_index() / 4;
  }
  static CLAE_DEVICE int col(int n, int c) {
    return warp_col() * (BN / 4) + n * 8 + 2 * (lane_index() % 4) + c % 2;
  }
};

// Rows of 8 x 16-byte matrices for ldmatrix: for the left operand (16 rows, two chunks along k) the
// matrices go down first, for the right one along k first.
CLAE_DEVICE const char* left_address(const char* at, int row, int chunk, int stride) {
  const int lane = lane_index();
  return at + swizzled(row + (lane / 8 % 2) * 8 + lane % 8, chunk + lane / 16, stride);
}
CLAE_DEVICE const char* right_address(const char* at, int row, int chunk, int stride) {
  const int lane = lane_index();
  return at + swizzled(row + (lane / 16) * 8 + lane % 8, chunk + lane / 8 % 2, stride);
}

struct Split {
  unsigned hi, lo;
};
CLAE_DEVICE Split split(float x) {
  const unsigned hi = to_tf32_here(x);
  return {hi, to_tf32_here(x - float_of(hi))};
}

// c += a b for float32 as three tf32 products, the small ones first.
CLAE_DEVICE void mma_float(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  unsigned hi[4], lo[4];
  CLAE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const Split part = split(float_of(a[i]));
    hi[i] = part.hi;
    lo[i] = part.lo;
  }
  const Split first = split(float_of(b0)), second = split(float_of(b1));
  mma<Tf32>(c, lo, first.hi, second.hi);
  mma<Tf32>(c, hi, first.lo, second.lo);
  mma<Tf32>(c, hi, first.hi, second.hi);
}

template <int BN>
CLAE_DEVICE void add_float_scores(const char* slice, Scores<BN>& scores) {
  using S = Scores<BN>;
  CLAE_UNROLL
  for (int n = 0; n < S::kN; n += 2) {
    CLAE_UNROLL
    for (int m = 0; m < S::kM; ++m) {
      float c[2][4] = {};
      CLAE_ROLLED
      for (int k = 0; k < kChunks; k += 2) {
        unsigned a[4], b[4];
        ldmatrix_x4(a, left_address(slice, warp_row() * 32 + m * 16, k, kSliceBytes));
        const int col = kRows + warp_col() * (BN / 4) + n * 8;
        ldmatrix_x4(b, right_address(slice, col, k, kSliceBytes));
        mma_float(c[0], a, b[0], b[1]);
        mma_float(c[1], a, b[2], b[3]);
      }
      CLAE_UNROLL
      for (int i = 0; i < 4; ++i) {
        scores.s[m][n][i] += c[0][i];
        scores.s[m][n + 1][i] += c[1][i];
      }
    }
  }
}

// Adds a slice's share of S. A step along k takes two chunks: 16 numbers of 16 bits, 8 of 32.
template <typename Format, int BN>
CLAE_DEVICE void add_scores(const char* slice, Scores<BN>& scores) {
  using S = Scores<BN>;
  if constexpr (sizeof(typename Stored<Format>::type) == 4) {
    add_float_scores(slice, scores);
  } else {
    CLAE_ROLLED
    for (int k = 0; k < kChunks; k += 2) {
      unsigned a[S::kM][4];
      CLAE_UNROLL
      for (int m = 0; m < S::kM; ++m) {
        ldmatrix_x4(a[m], left_address(slice, warp_row() * 32 + m * 16, k, kSliceBytes));
      }
      CLAE_UNROLL
      for (int n = 0; n < S::kN; n += 2) {
        unsigned b[4];
        const int col = kRows + warp_col() * (BN / 4) + n * 8;
        ldmatrix_x4(b, right_address(slice, col, k, kSliceBytes));
        CLAE_UNROLL
        for (int m = 0; m < S::kM; ++m) {
          mma<Format>(scores.s[m][n], a[m], b[0], b[1]);
          mma<Format>(scores.s[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
}

// The weights of one row, columns col and col + 1, to shared memory.
template <typename Format, int BN>
CLAE_DEVICE void store_weights(char* weights, int row, int col, float first, float second) {
  constexpr int stride = BN * kWeightBytes<Format>;
  const int at = col * kWeightBytes<Format>;
  char* to = weights + swizzled(row, at / 16, stride) + at % 16;
  if constexpr (kWeightBytes<Format> == 2) {
    *reinterpret_cast<unsigned*>(to) = pack<Bf16>(first, second);
  } else {
    *reinterpret_cast<Float2*>(to) = {first, second};
  }
}

// What one warp has of G Y in a slice: 32 rows, 16 elements of 16 bits or 8 of 32.
template <typename Format>
struct Products {
  static constexpr int kM = 2;
  static constexpr int kN = 16 / int(sizeof(typename Stored<Format>::type)) / 4;
  float c[kM][kN][4];

  static CLAE_DEVICE int row(int m, int c) { return Scores<64>::row(m, c); }
  static CLAE_DEVICE int element(int n, int c) {
    return (warp_col() * kN + n) * 8 + 2 * (lane_index() % 4) + c % 2;
  }
};

// G Y of bfloat16: rows j of a slice are k, its elements n.
template <int BN>
CLAE_DEVICE void weigh_bf16(const char* weights, const char* slice, Products<Bf16>& out) {
  const int lane = lane_index();
  CLAE_ROLLED
  for (int k = 0; k < BN; k += 16) {
    unsigned b[4];
    const int j = kRows + k + (lane / 8 % 2) * 8 + lane % 8;
    ldmatrix_x4_trans(b, slice + swizzled(j, warp_col() * 2 + lane / 16, kSliceBytes));
    CLAE_UNROLL
    for (int m = 0; m < 2; ++m) {
      unsigned a[4];
      ldmatrix_x4(a, left_address(weights, warp_row() * 32 + m * 16, k / 8, BN * 2));
      mma<Bf16>(out.c[m][0], a, b[0], b[1]);
      mma<Bf16>(out.c[m][1], a, b[2], b[3]);
    }
  }
}

// G Y as tf32: float16 has no range for weights, and as tf32 its elements are exact. float32 takes
// three products. Sums of 32 columns have accumulators of their own.
template <typename Format, int BN>
CLAE_DEVICE void weigh_tf32(const char* weights, const char* slice, Products<Format>& out) {
  using T = typename Stored<Format>::type;
  using P = Products<Format>;
  constexpr int per_chunk = 16 / int(sizeof(T));
  const int g = lane_index() / 4, t = lane_index() % 4;
  CLAE_ROLLED
  for (int k0 = 0; k0 < BN; k0 += 32) {
    float c[P::kM][P::kN][4] = {};
    CLAE_ROLLED
    for (int k = k0; k < k0 + 32; k += 8) {
      unsigned b[P::kN][2];
      CLAE_UNROLL
      for (int n = 0; n < P::kN; ++n) {
        const int element = (warp_col() * P::kN + n) * 8 + g;
        CLAE_UNROLL
        for (int half = 0; half < 2; ++half) {
          const char* chunk =
              slice + swizzled(kRows + k + t + 4 * half, element / per_chunk, kSliceBytes);
          b[n][half] =
              bits_of(to_float<Format>(reinterpret_cast<const T*>(chunk)[element % per_chunk]));
        }
      }
      CLAE_UNROLL
      for (int m = 0; m < P::kM; ++m) {
        unsigned a[4];
        ldmatrix_x4(a, left_address(weights, warp_row() * 32 + m * 16, k / 4, BN * 4));
        CLAE_UNROLL
        for (int n = 0; n < P::kN; ++n) {
          if constexpr (sizeof(T) == 4) {
            mma_float(c[m][n], a, b[n][0], b[n][1]);
          } else {
            unsigned rounded[4];
            CLAE_UNROLL
            for (int i = 0; i < 4; ++i) rounded[i] = to_tf32_here(float_of(a[i]));
            mma<Tf32>(c[m][n], rounded, b[n][0], b[n][1]);
          }
        }
      }
    }
    CLAE_UNROLL
    for (int m = 0; m < P::kM; ++m) {
      CLAE_UNROLL
      for (int n = 0; n < P::kN; ++n) {
        CLAE_UNROLL
        for (int i = 0; i < 4; ++i) out.c[m][n][i] += c[m][n][i];
      }
    }
  }
}

template <typename Format, int BN>
CLAE_DEVICE void weigh(const char* weights, const char* slice, Products<Format>& out) {
  if constexpr (kWeightBytes<Format> == 2) {
    weigh_bf16<BN>(weights, slice, out);
  } else {
    weigh_tf32<Format, BN>(weights, slice, out);
  }
}

}  // namespace gpu
}  // namespace clae_fast
