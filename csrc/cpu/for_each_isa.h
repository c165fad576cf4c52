// Includes CLAE_FAST_BODY once per instruction set, each time inside its own namespace:
//
//   #define CLAE_FAST_BODY "my_op_body.h"
//   #include "for_each_isa.h"
//
// CLAE_FAST_VECTOR_BYTES says how wide the registers are. A body includes nothing but parts of
// itself and defines only static functions. An inline function shared with other
// files (a template of the standard library, say) would be emitted with AVX instructions here, and
// the linker could keep that copy for a processor without them.
#include "isa.h"

#define CLAE_FAST_VECTOR_BYTES 16
namespace clae_fast::baseline {
#include CLAE_FAST_BODY
}  // namespace clae_fast::baseline
#undef CLAE_FAST_VECTOR_BYTES

#if CLAE_FAST_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define CLAE_FAST_VECTOR_BYTES 32
namespace clae_fast::avx2 {
#include CLAE_FAST_BODY
}  // namespace clae_fast::avx2
#undef CLAE_FAST_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define CLAE_FAST_VECTOR_BYTES 64
namespace clae_fast::avx512 {
#include CLAE_FAST_BODY
}  // namespace clae_fast::avx512
#undef CLAE_FAST_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // CLAE_FAST_X86

#undef CLAE_FAST_BODY
