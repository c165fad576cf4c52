// What a launch of `sign_step` is given. Neither CUDA nor the emulator is needed here.
#pragma once
#include <cstdint>
#include <initializer_list>

namespace clae_fast {
namespace gpu {

// A number, or one for all (stride 0) or for each channel (stride 1), read on the device.
struct Size {
  const float* tensor;
  float number;
  int stride;
};

struct SignStepParams {
  const void *x, *grad, *x0;
  void* out;
  std::uint64_t n;
  Size step, eps, low, high;
  bool varies;  // by channel: element i has channel i / inner % channels
  bool aligned;
  std::uint64_t inner;
  unsigned channels;
};

constexpr int kSignStepThreads = 256;

inline bool is_aligned(const SignStepParams& p) {
  std::uintptr_t bits = 0;
  for (const void* at : {p.x, p.grad, p.x0, static_cast<const void*>(p.out)}) {
    bits |= reinterpret_cast<std::uintptr_t>(at);
  }
  return bits % 16 == 0;
}

}  // namespace gpu
}  // namespace clae_fast
