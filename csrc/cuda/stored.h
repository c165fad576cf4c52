// The formats of inputs, and how they are stored.
#pragma once
#include "numbers.h"

namespace clae_fast {
namespace gpu {

struct F32 {};
template <typename Format>
struct Stored {
  using type = std::uint16_t;
};
template <>
struct Stored<F32> {
  using type = float;
};
template <typename Format>
CLAE_DEVICE float to_float(typename Stored<Format>::type x) {
  return widen<Format>(x);
}
template <>
CLAE_DEVICE float to_float<F32>(float x) {
  return x;
}
template <typename Format>
CLAE_DEVICE typename Stored<Format>::type from_float(float x) {
  if constexpr (sizeof(typename Stored<Format>::type) == 4) {
    return x;
  } else {
    return narrow<Format>(x);
  }
}

}  // namespace gpu
}  // namespace clae_fast
