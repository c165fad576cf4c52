// The loops of sign_step.h, included once per instruction set by for_each_isa.h.

#include "widen_body.h"

static inline void narrow(float value, float* out) { *out = value; }
static inline void narrow(double value, double* out) { *out = value; }
// To nearest, ties to even. A NaN would round up into an infinity or a number, so it is named.
static inline void narrow(float value, BFloat16* out) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<std::uint16_t>(value != value ? 0x7fc0u : rounded);
}

#define CLAE_FAST_EVERYWHERE
#include "../linf_move.h"
#undef CLAE_FAST_EVERYWHERE

template <typename S, typename C>
static void uniform(const S* x, const S* grad, const S* x0, S* __restrict out, std::int64_t n,
                    C step, C eps, C low, C high) {
  for (std::int64_t i = 0; i < n; ++i) {
    narrow(move(widen(x[i]), widen(grad[i]), widen(x0[i]), step, eps, low, high), out + i);
  }
}

template <typename S, typename C>
static void varying(const S* x, const S* grad, const S* x0, S* __restrict out, std::int64_t n,
                    const C* step, const C* eps, const C* low, const C* high) {
  for (std::int64_t i = 0; i < n; ++i) {
    narrow(move(widen(x[i]), widen(grad[i]), widen(x0[i]), step[i], eps[i], low[i], high[i]),
           out + i);
  }
}

// Elements [begin, end) of the whole.
template <typename S>
static void sign_step(const SignStep<S>& s, std::int64_t begin, std::int64_t end) {
  if (s.table == nullptr) {
    uniform(s.x + begin, s.grad + begin, s.x0 + begin, s.out + begin, end - begin, s.step, s.eps,
            s.low, s.high);
    return;
  }
  while (begin < end) {
    const std::int64_t column = begin / s.inner % s.columns;
    const std::int64_t left = s.inner == 1 ? s.columns - column : s.inner - begin % s.inner;
    const std::int64_t n = left < end - begin ? left : end - begin;
    const S *x = s.x + begin, *grad = s.grad + begin, *x0 = s.x0 + begin;
    const auto *step = s.table + column, *eps = step + s.columns, *low = eps + s.columns,
               *high = low + s.columns;
    if (s.inner == 1) {
      varying(x, grad, x0, s.out + begin, n, step, eps, low, high);
    } else {
      uniform(x, grad, x0, s.out + begin, n, *step, *eps, *low, *high);
    }
    begin += n;
  }
}
