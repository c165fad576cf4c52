// ldmatrix and mma by the lane that came last, from the fragments of all: mma.h has their layouts.
#pragma once
#include <cmath>

#include "../numbers.h"
#include "runtime.h"

namespace clae_fast {
namespace gpu {
namespace emulated {

struct Rows {
  const void* row;
  std::uint32_t* r;
};

inline void ldmatrix(unsigned (&r)[4], const void* row, bool trans) {
  require_shared(row, "ldmatrix");
  Rows mine{row, r};
  bool last;
  Thread& t = self();
  {
    Quiet quiet;
    last = arrive(t, trans ? kLdmatrixTrans : kLdmatrix, &mine);
  }
  if (!last) return;
  std::uint16_t matrices[4][8][8];
  for (int i = 0; i < 32; ++i) {
    const std::uint16_t* from;
    {
      Quiet quiet;
      from = static_cast<const std::uint16_t*>(static_cast<Rows*>(t.warp->arguments[i])->row);
    }
    // The only accesses to the kernel's memory, for the sanitizers to see.
    for (int j = 0; j < 8; ++j) matrices[i / 8][i % 8][j] = from[j];
  }
  Quiet quiet;
  for (int lane = 0; lane < 32; ++lane) {
    std::uint32_t* to = static_cast<Rows*>(t.warp->arguments[lane])->r;
    const int g = lane / 4, k = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const auto& m = matrices[i];
      to[i] = trans ? m[k][g] | std::uint32_t(m[k + 1][g]) << 16
                    : m[g][k] | std::uint32_t(m[g][k + 1]) << 16;
    }
  }
  finish(t);
}

// Adds the products of `depth` steps of k as a tensor core might: all terms are cut to the
// precision of the largest, plus one bit, and so is their sum to float32.
inline float truncated_sum(float c, const float* a, const float* b, int depth) {
  double largest = std::fabs(double(c));
  for (int k = 0; k < depth; ++k)
    largest = std::fmax(largest, std::fabs(double(a[k]) * double(b[k * 8])));
  float plain = c;
  for (int k = 0; k < depth; ++k) plain += a[k] * b[k * 8];
  if (largest == 0 || !std::isfinite(plain)) return plain;
  const double unit = std::ldexp(1.0, std::ilogb(largest) - 24);
  double sum = std::trunc(c / unit);
  for (int k = 0; k < depth; ++k) sum += std::trunc(double(a[k]) * double(b[k * 8]) / unit);
  sum *= unit;
  const float nearest = float(sum);
  return std::fabs(double(nearest)) > std::fabs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
}

struct Mma {
  float* c;
  const unsigned* a;
  unsigned b[2];
};

template <typename Format>
inline constexpr bool kIsTf32 = false;
template <>
inline constexpr bool kIsTf32<Tf32> = true;

template <typename Format>
__attribute__((no_sanitize("address"))) void mma_of_warp(void* const* arguments) {
  constexpr int depth = kIsTf32<Format> ? 8 : 16, pair = kIsTf32<Format> ? 1 : 2;
  float a[16][depth], b[depth][8], c[16][8];
  const auto put = [](unsigned bits, float* at, int step) {
    if constexpr (kIsTf32<Format>) {
      *at = float_of(bits & ~0x1fffu);  // the device looks at no more of it
    } else {
      at[0] = widen<Format>(std::uint16_t(bits));
      at[step] = widen<Format>(std::uint16_t(bits >> 16));
    }
  };
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& of = *static_cast<const Mma*>(arguments[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      put(of.a[i], &a[g + i % 2 * 8][t * pair + i / 2 * depth / 2], 1);
      c[g + i / 2 * 8][2 * t + i % 2] = of.c[i];
    }
    for (int i = 0; i < 2; ++i) put(of.b[i], &b[t * pair + i * depth / 2][g], 8);
  }
  if (settings.accumulation == Accumulation::kNearest) {
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < depth; ++k)
        for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
  } else {
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < depth; k += depth / 2)
        for (int j = 0; j < 8; ++j) c[i][j] = truncated_sum(c[i][j], &a[i][k], &b[k][j], depth / 2);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& of = *static_cast<const Mma*>(arguments[lane]);
    for (int i = 0; i < 4; ++i) of.c[i] = c[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
  }
}

template <typename Format>
void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  Quiet quiet;
  Thread& t = self();
  Mma mine{c, a, {b0, b1}};
  if (arrive(t, kIsTf32<Format> ? kMma32 : kMma16, &mine)) {
    mma_of_warp<Format>(t.warp->arguments);
    finish(t);
  }
}

}  // namespace emulated
}  // namespace gpu
}  // namespace clae_fast
