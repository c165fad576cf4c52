// The kernels for float16 inputs.
#include "launch_body.cuh"

template struct clae_fast::gpu::Launcher<clae_fast::gpu::F16>;
