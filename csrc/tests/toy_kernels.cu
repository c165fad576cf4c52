// The right toy kernels, for nvcc.
#include "toy_kernels.h"

namespace clae_fast {
namespace gpu {

template CLAE_KERNEL(128) gemm<Bf16, false, kRight>(CLAE_PARAMS(GemmParams));
template CLAE_KERNEL(128) gemm<Bf16, true, kRight>(CLAE_PARAMS(GemmParams));
template CLAE_KERNEL(128) gemm<F16, false, kRight>(CLAE_PARAMS(GemmParams));
template CLAE_KERNEL(128) gemm<Tf32, false, kRight>(CLAE_PARAMS(GemmParams));
template CLAE_KERNEL(128) swap_neighbours<128, kRight>(CLAE_PARAMS(VectorParams));
template CLAE_KERNEL(128) normalise<128, kRight>(CLAE_PARAMS(VectorParams));
template CLAE_KERNEL(128) total<128, kRight>(CLAE_PARAMS(VectorParams));
template CLAE_KERNEL(32) twice<Bf16>(CLAE_PARAMS(VectorParams));
template CLAE_KERNEL(256) busy<256>(CLAE_PARAMS(VectorParams));

}  // namespace gpu
}  // namespace clae_fast
