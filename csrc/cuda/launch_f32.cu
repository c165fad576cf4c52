// The kernels for float32 inputs.
#include "launch_body.cuh"

template struct clae_fast::gpu::Launcher<clae_fast::gpu::F32>;
