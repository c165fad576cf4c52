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
  // The columns of the smallest tile whose blocks are all resident on the device at once, as the
  // barrier needs; 0 if there is none.
  static int columns(const Call& call, int device);
  // Null, or what CUDA says. `device` is the current one.
  static const char* contrast(const Call& call, int device, void* stream);
  static const char* sign_step(const SignStepParams& params, void* stream);
};

}  // namespace gpu
}  // namespace clae_fast
