// The instruction sets of the CPU kernels: chosen when they run, never from the machine that
// builds.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(CLAE_FAST_NO_SIMD)
#define CLAE_FAST_X86 1
#else
#define CLAE_FAST_X86 0
#endif

// Clang has neither GCC's pragma nor its names for these registers.
#if CLAE_FAST_X86 && !defined(__clang__)
#define CLAE_FAST_X86_BF16 1
#else
#define CLAE_FAST_X86_BF16 0
#endif

namespace clae_fast {

enum class Isa { kBaseline, kAvx2, kAvx512 };

inline const char* isa_name(Isa isa) {
  return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "baseline";
}

// Asks for exactly what for_each_isa.h compiles for; the operating system's support is included.
inline bool isa_supported(Isa isa) {
#if CLAE_FAST_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::kAvx2) return avx2;
  if (isa == Isa::kAvx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == Isa::kBaseline;
}

// Products of bfloat16 with float32 sums, beside AVX-512.
inline bool bf16_supported() {
#if CLAE_FAST_X86_BF16
  return isa_supported(Isa::kAvx512) && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

inline Isa best_isa() {
  static const Isa best = isa_supported(Isa::kAvx512) ? Isa::kAvx512
                          : isa_supported(Isa::kAvx2) ? Isa::kAvx2
                                                      : Isa::kBaseline;
  return best;
}

}  // namespace clae_fast
