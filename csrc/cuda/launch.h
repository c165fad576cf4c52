// The launches of the CUDA kernels, as the operators call them: no CUDA header here.
#pragma once
#include "contrast_call.h"
#include "sign_step_params.h"

namespace clae_fast {
namespace gpu {

struct Bf16;
struct F16;
struct F32;

// Of one input format; each is compiled in a file of its own.
template <typename Format>
struct Launcher {
  // Null if the kernels can run on the device, else what CUDA says.
  static const char* unusable(int device);
  // The columns of the tile to take: the smallest whose blocks have a multiprocessor each, else the
  // smallest whose blocks are all resident at once, as the barrier needs; 0 if there is none.
  static int columns(const Call& call, int device);
  // Null, or what CUDA says. `device` is the current one.
  static const char* contrast(const Call& call, int device, void* stream);
  static const char* sign_step(const SignStepParams& params, void* stream);
};

}  // namespace gpu
}  // namespace clae_fast
