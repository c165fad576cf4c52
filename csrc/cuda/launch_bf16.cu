// The kernels for bfloat16 inputs.
#include "launch_body.cuh"

template struct clae_fast::gpu::Launcher<clae_fast::gpu::Bf16>;
