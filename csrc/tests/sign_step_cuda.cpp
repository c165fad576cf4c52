// The CUDA kernel of `sign_step` in the host emulator, as a shared library for tests.
#include <string>

#include "../cuda/sign_step_kernel.h"

using namespace clae_fast::gpu;

template <typename Format>
static void launch(const SignStepParams& p) {
  const int per_block = kSignStepThreads * kVector<Format>;
  emulated::launch(sign_step_kernel<Format>, int((p.n + per_block - 1) / per_block),
                   kSignStepThreads, 0, p);
}

// format: 0 float32, 1 bfloat16, 2 float16
extern "C" const char* sign_step_emulated(SignStepParams* p, int format) {
  static std::string error;
  p->aligned = is_aligned(*p);
  try {
    if (format == 0) launch<F32>(*p);
    if (format == 1) launch<Bf16>(*p);
    if (format == 2) launch<F16>(*p);
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
  return nullptr;
}
