// What contrast.h is told and gives, and the arithmetic of one row.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "operand.h"

namespace clae_fast {

enum class Form { kNtXent, kOneWay, kTwoWay };

template <typename C>
struct ContrastOutputs {
  C *loss, *lse_row, *lse_col;       // (2B,), (N,) or (B, 2); rows; columns of two_way
  C *dq, *dk, *dnegatives, *dscale;  // null: not asked for
  bool reduced = false;              // loss is one number, the sum of the rows times `factor`
  C factor = 1;                      // multiplies the gradients too
};

// log(1 + e^x), and its slope.
template <typename C>
C softplus(C x, C& sigmoid) {
  const C e = std::exp(-std::abs(x));
  sigmoid = x != x ? x : (x >= 0 ? C(1) : e) / (1 + e);
  return (x > 0 ? x : C(0)) + std::log1p(e);
}

// The log-sum-exp of a row or column of terms e^(s - zero), and what turns sigmoid into its weight.
template <typename C>
C log_sum(double sum, double zero) {
  return sum == 0 ? -std::numeric_limits<C>::infinity() : C(std::log(sum) + zero);
}
template <typename C>
C weight_of(double sum, C share) {
  return sum == 0 ? C(0) : C(double(share) / sum);
}

// operand.sum from the parts of each row's sum, in the order of the tiles.
template <typename C>
void add_up(const Operand<C>& operand, const double* parts, std::int64_t slots) {
  for (std::int64_t i = 0; i < operand.x.rows; ++i) operand.sum[i] = parts[i];
  for (std::int64_t slot = 1; slot < slots; ++slot) {
    parts += operand.x.padded;
    for (std::int64_t i = 0; i < operand.x.rows; ++i) operand.sum[i] += parts[i];
  }
}

}  // namespace clae_fast
