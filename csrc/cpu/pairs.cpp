// The kernels of pairs.h for every instruction set, and the choice between them.
#include "pairs.h"

#define CLAE_FAST_BF16 0
#define CLAE_FAST_BODY "pairs_body.h"
#include "for_each_isa.h"
#undef CLAE_FAST_BF16

// Once more for processors with bfloat16 units, which the sweeps of bfloat16 inputs ask for.
#if CLAE_FAST_X86_BF16
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#define CLAE_FAST_BF16 1
#define CLAE_FAST_VECTOR_BYTES 64
namespace clae_fast::avx512bf16 {
#include "pairs_body.h"
}  // namespace clae_fast::avx512bf16
#undef CLAE_FAST_VECTOR_BYTES
#undef CLAE_FAST_BF16
#pragma GCC pop_options
#define CLAE_FAST_HALF(call) \
  if (s.half) return avx512bf16::call
#else
#define CLAE_FAST_HALF(call) static_cast<void>(0)
#endif

#if CLAE_FAST_X86
#define CLAE_FAST_CHOOSE(call)                  \
  if (isa == Isa::kAvx512) return avx512::call; \
  if (isa == Isa::kAvx2) return avx2::call;     \
  static_cast<void>(isa);                       \
  return baseline::call
#else
#define CLAE_FAST_CHOOSE(call) \
  static_cast<void>(isa);      \
  return baseline::call
#endif

namespace clae_fast {

template <typename C>
void sums_tile(Isa isa, const Sweep<C>& s, std::int64_t I, std::int64_t J, C* buffer) {
  CLAE_FAST_HALF(sums_tile(s, I, J, buffer));
  CLAE_FAST_CHOOSE(sums_tile(s, I, J, buffer));
}
template <typename C>
void gradient_tile(Isa isa, const Sweep<C>& s, std::int64_t I, std::int64_t J, bool rows,
                   bool columns, C* buffer) {
  CLAE_FAST_HALF(gradient_tile(s, I, J, rows, columns, buffer));
  CLAE_FAST_CHOOSE(gradient_tile(s, I, J, rows, columns, buffer));
}
template <typename C>
void mean_tile(Isa isa, const Sweep<C>& s, std::int64_t I, std::int64_t J, C* buffer) {
  CLAE_FAST_HALF(mean_tile(s, I, J, buffer));
  CLAE_FAST_CHOOSE(mean_tile(s, I, J, buffer));
}
template <typename C>
void sigmoid_tile(Isa isa, const Sweep<C>& s, std::int64_t I, std::int64_t J, C* buffer) {
  CLAE_FAST_CHOOSE(sigmoid_tile(s, I, J, buffer));
}
template <typename C>
void uel_rows(Isa isa, const Uel<C>& u, std::int64_t begin, C* scores, C* buffer) {
  CLAE_FAST_CHOOSE(uel_rows(u, begin, scores, buffer));
}
template <typename S, typename C>
C pack_panel(Isa isa, const S* const* rows, std::int64_t width, bool normalize, std::int64_t first,
             const Packed<C>& out, const Norms<C>& norms) {
  CLAE_FAST_CHOOSE(pack_panel(rows, width, normalize, first, out, norms));
}
template <typename C>
C packed_cosine(Isa isa, const C* a, std::int64_t block_of_a, const C* b, std::int64_t block_of_b,
                std::int64_t width, bool on_sphere) {
  CLAE_FAST_CHOOSE(packed_cosine(a, block_of_a, b, block_of_b, width, on_sphere));
}
template <typename C>
C give_back(Isa isa, const Back<C>& row, std::int64_t width, C* out) {
  CLAE_FAST_CHOOSE(give_back(row, width, out));
}

#define CLAE_FAST_FOR(C)                                                                         \
  template void sums_tile(Isa, const Sweep<C>&, std::int64_t, std::int64_t, C*);                 \
  template void gradient_tile(Isa, const Sweep<C>&, std::int64_t, std::int64_t, bool, bool, C*); \
  template void mean_tile(Isa, const Sweep<C>&, std::int64_t, std::int64_t, C*);                 \
  template void sigmoid_tile(Isa, const Sweep<C>&, std::int64_t, std::int64_t, C*);              \
  template void uel_rows(Isa, const Uel<C>&, std::int64_t, C*, C*);                              \
  template C packed_cosine(Isa, const C*, std::int64_t, const C*, std::int64_t, std::int64_t,    \
                           bool);                                                                \
  template C give_back(Isa, const Back<C>&, std::int64_t, C*)
CLAE_FAST_FOR(float);
CLAE_FAST_FOR(double);
#undef CLAE_FAST_FOR
#define CLAE_FAST_FROM(S, C)                                                                      \
  template C pack_panel(Isa, const S* const*, std::int64_t, bool, std::int64_t, const Packed<C>&, \
                        const Norms<C>&)
CLAE_FAST_FROM(float, float);
CLAE_FAST_FROM(BFloat16, float);
CLAE_FAST_FROM(Float16, float);
CLAE_FAST_FROM(double, double);
#undef CLAE_FAST_FROM

}  // namespace clae_fast
