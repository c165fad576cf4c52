// Numbers of kernels: 16-bit formats as integer bits, packing, and what IEEE leaves to the device.
#pragma once
#include "device.h"

#if !defined(__CUDACC__)
#include <cmath>
#endif

namespace clae_fast {
namespace gpu {

// Names of formats; Bf16 and F16 are stored as uint16_t.
struct Bf16 {};
struct F16 {};
struct Tf32 {};

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kNaN = __builtin_nanf("");

struct Float2 {
  float lo, hi;
};

#if defined(__CUDACC__)

CLAE_DEVICE unsigned bits_of(float x) { return __float_as_uint(x); }
CLAE_DEVICE float float_of(unsigned bits) { return __uint_as_float(bits); }

// 2^x, to about two units in the last place; results below 2^-126 are zero.
CLAE_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
CLAE_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
CLAE_DEVICE float inverse_sqrt(float x) { return rsqrtf(x); }

// The larger; NaN if either is, which fmaxf would drop.
CLAE_DEVICE float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

#else

inline unsigned bits_of(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}
inline float log2_approx(float x) { return std::log2(x); }
inline float inverse_sqrt(float x) { return 1.0f / std::sqrt(x); }
inline float max_nan(float a, float b) { return a != a ? a : b != b ? b : a > b ? a : b; }

#endif

// The float of 16 bits of a format.
template <typename Format>
CLAE_DEVICE float widen(std::uint16_t bits);

template <>
CLAE_DEVICE float widen<Bf16>(std::uint16_t bits) {
  return float_of(unsigned(bits) << 16);
}

template <>
CLAE_DEVICE float widen<F16>(std::uint16_t bits) {
#if defined(__CUDACC__)
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
#else
  const unsigned size = (bits & 0x7fffu) << 13, sign = unsigned(bits & 0x8000u) << 16;
  // The exponent moves by a multiplication, which makes subnormals normal; not that of Inf and NaN.
  const bool finite = (bits & 0x7c00u) != 0x7c00u;
  return float_of(sign | (finite ? bits_of(float_of(size) * 0x1p112f) : size | 0x7f800000u));
#endif
}

// The 16 bits nearest to a float, ties to even; every NaN becomes 0x7fff, as on the device.
template <typename Format>
CLAE_DEVICE std::uint16_t narrow(float x);

template <>
CLAE_DEVICE std::uint16_t narrow<Bf16>(float x) {
#if defined(__CUDACC__)
  std::uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#else
  const unsigned bits = bits_of(x);
  return x != x ? 0x7fff : std::uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
#endif
}

template <>
CLAE_DEVICE std::uint16_t narrow<F16>(float x) {
#if defined(__CUDACC__)
  std::uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#else
  const unsigned sign = bits_of(x) >> 16 & 0x8000u, size = bits_of(x) & 0x7fffffffu;
  const float abs = float_of(size);
  if (x != x) return 0x7fff;
  if (abs >= 65520.0f) return std::uint16_t(sign | 0x7c00u);
  // Units of 2^-24, the step of float32 at 1/2, are those of the subnormals.
  if (abs < 0x1p-14f) return std::uint16_t(sign | (bits_of(abs + 0.5f) - bits_of(0.5f)));
  return std::uint16_t(sign | ((size + 0xfffu + (size >> 13 & 1u) - (112u << 23)) >> 13));
#endif
}

// Two numbers in one register; `lo` is the one at the lower address.
template <typename Format>
CLAE_DEVICE unsigned pack(float lo, float hi);

#if defined(__CUDACC__)
template <>
CLAE_DEVICE unsigned pack<Bf16>(float lo, float hi) {
  unsigned bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(hi), "f"(lo));
  return bits;
}
template <>
CLAE_DEVICE unsigned pack<F16>(float lo, float hi) {
  unsigned bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(hi), "f"(lo));
  return bits;
}
#else
template <typename Format>
unsigned pack(float lo, float hi) {
  return narrow<Format>(lo) | unsigned(narrow<Format>(hi)) << 16;
}
#endif

template <typename Format>
CLAE_DEVICE Float2 unpack(unsigned bits) {
  return {widen<Format>(std::uint16_t(bits)), widen<Format>(std::uint16_t(bits >> 16))};
}

// The nearest tf32 (10 bits of mantissa), ties away from zero, as the bits of a float.
CLAE_DEVICE unsigned to_tf32(float x) {
#if defined(__CUDACC__)
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#else
  const unsigned bits = bits_of(x);
  if (x != x) return 0x7fffffffu;
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
#endif
}

// The same, done where it stands: of what does not change in a loop, a compiler would otherwise
// keep the results of all rounds in registers.
CLAE_DEVICE unsigned to_tf32_here(float x) {
#if defined(__CUDACC__)
  unsigned bits;
  asm volatile("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#else
  return to_tf32(x);
#endif
}

}  // namespace gpu
}  // namespace clae_fast
