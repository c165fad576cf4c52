// One step of a linf attack, each element by itself:
//
//   v   = x + step * sign(grad)                 sign(0) = 0
//   v   = min(max(v, x0 - eps), x0 + eps)       stay within eps of x0
//   out = min(max(v, low), high)                stay within the bounds
//
// Three reads and one write per element, no exponential: bound by memory. A thread owns a range of
// elements and none depends on another, so the bits are the same for any number of threads. NaN in
// any input or parameter gives NaN. Where max or min meets +0 and -0, the bound wins. bfloat16 is
// computed in float32 and rounded once. No torch in here.
#pragma once

#include <vector>

#include "dtypes.h"
#include "isa.h"

namespace clae_fast {

template <typename S>
struct SignStep {
  using C = typename ComputeType<S>::type;

  const S *x, *grad, *x0;
  S* out;
  C step, eps, low, high;
  // With a table, (4, columns), element i takes column i / inner % columns of it instead.
  const C* table = nullptr;
  std::int64_t columns = 1, inner = 1;
};

// Repeats a short table, so that the inner loop runs over a few hundred elements with one set of
// parameters each and vectorises: three channels in channels_last order need it. `storage` holds
// the longer table.
template <typename S>
void repeat_table(SignStep<S>& s, std::vector<typename SignStep<S>::C>& storage) {
  constexpr std::int64_t kLength = 512, kVector = 16;
  if (s.table == nullptr || s.inner > kLength || s.columns > kLength / s.inner) return;
  const std::int64_t period = s.columns * s.inner;
  std::int64_t repeats = kLength / period;
  if (repeats > kVector) repeats -= repeats % kVector;
  const std::int64_t length = period * repeats;
  storage.resize(4 * length);
  for (std::int64_t row = 0; row < 4; ++row) {
    for (std::int64_t i = 0; i < length; ++i) {
      storage[row * length + i] = s.table[row * s.columns + i / s.inner % s.columns];
    }
  }
  s.table = storage.data();
  s.columns = length;
  s.inner = 1;
}

}  // namespace clae_fast

#define CLAE_FAST_BODY "sign_step_body.h"
#include "for_each_isa.h"

namespace clae_fast {

// Elements [begin, end) of the whole; the same bits whatever the instruction set.
template <typename S>
void sign_step(Isa isa, const SignStep<S>& s, std::int64_t begin, std::int64_t end) {
#if CLAE_FAST_X86
  if (isa == Isa::kAvx512) return avx512::sign_step(s, begin, end);
  if (isa == Isa::kAvx2) return avx2::sign_step(s, begin, end);
#endif
  static_cast<void>(isa);
  baseline::sign_step(s, begin, end);
}

}  // namespace clae_fast
