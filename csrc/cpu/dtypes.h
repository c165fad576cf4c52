// The element types of the kernels: what is stored, and what it is computed in.
#pragma once

#include <cstdint>
#include <cstring>

namespace clae_fast {

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

template <typename S>
struct ComputeType {
  using type = S;
};
template <>
struct ComputeType<BFloat16> {
  using type = float;
};
template <>
struct ComputeType<Float16> {
  using type = float;
};

}  // namespace clae_fast
