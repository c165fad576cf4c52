// One step of a linf attack, as cpu/sign_step.h has it, on a GPU.
//
// Two or three reads and one write an element and next to no arithmetic: bound by memory. A thread
// owns 16 bytes of x, one instruction each to read and write; what is left at the end, or all of it
// where the memory is not aligned to 16 bytes, goes element by element. No element depends on
// another: the same bits every run. Half precision is computed in float32 and rounded once.
#pragma once
#include "sign_step_params.h"
#include "stored.h"

namespace clae_fast {
namespace gpu {

#if defined(__CUDACC__)
#define CLAE_FAST_EVERYWHERE __device__
#else
#define CLAE_FAST_EVERYWHERE
#endif
#include "../linf_move.h"
#undef CLAE_FAST_EVERYWHERE

template <typename Format>
inline constexpr int kVector = 16 / int(sizeof(typename Stored<Format>::type));

// The numbers of one channel.
struct Sizes {
  float step, eps, low, high;

  CLAE_DEVICE Sizes(const SignStepParams& p, unsigned channel)
      : step(at(p.step, channel)),
        eps(at(p.eps, channel)),
        low(at(p.low, channel)),
        high(at(p.high, channel)) {}
  static CLAE_DEVICE float at(const Size& size, unsigned channel) {
    return size.tensor == nullptr ? size.number : size.tensor[size.stride * channel];
  }
  CLAE_DEVICE float move(float x, float grad, float x0) const {
    return gpu::move(x, grad, x0, step, eps, low, high);
  }
};

// The channel of an element, and how many of its run are left from there on.
struct Run {
  unsigned channel;
  std::uint64_t left;
};
CLAE_DEVICE Run run_of(const SignStepParams& p, std::uint64_t i) {
  if (!p.varies) return {0, p.n};
  if (p.n >> 32 == 0) {  // divisions of 32 bits take a fraction of the time
    const unsigned run = unsigned(i) / unsigned(p.inner);
    return {run % p.channels, p.inner - (i - run * p.inner)};
  }
  const std::uint64_t run = i / p.inner;
  return {unsigned(run % p.channels), p.inner - (i - run * p.inner)};
}

template <typename Format>
CLAE_KERNEL(kSignStepThreads)
sign_step_kernel(CLAE_PARAMS(SignStepParams) p) {
  using T = typename Stored<Format>::type;
  constexpr int V = kVector<Format>;
  union Vector {
    Vec16 all;
    T elements[V];
  };
  const std::uint64_t begin =
      (std::uint64_t(block_index()) * kSignStepThreads + thread_index()) * V;
  if (begin >= p.n) return;
  const T *x = static_cast<const T*>(p.x) + begin, *grad = static_cast<const T*>(p.grad) + begin,
          *x0 = static_cast<const T*>(p.x0) + begin;
  T* out = static_cast<T*>(p.out) + begin;
  if (p.aligned && begin + V <= p.n) {
    Vector a, g, from, to;
    a.all = load_global(x);
    g.all = load_global(grad);
    from.all = p.x0 == p.x ? a.all : load_global(x0);
    Run run = run_of(p, begin);
    Sizes sizes(p, run.channel);
    CLAE_UNROLL
    for (int i = 0; i < V; ++i) {
      if (run.left == 0) {
        run = {run.channel + 1 == p.channels ? 0 : run.channel + 1, p.inner};
        sizes = Sizes(p, run.channel);
      }
      --run.left;
      to.elements[i] = from_float<Format>(sizes.move(to_float<Format>(a.elements[i]),
                                                     to_float<Format>(g.elements[i]),
                                                     to_float<Format>(from.elements[i])));
    }
    store_global(out, to.all);
    return;
  }
  for (int i = 0; i < V && begin + i < p.n; ++i) {
    const Sizes sizes(p, run_of(p, begin + i).channel);
    out[i] = from_float<Format>(
        sizes.move(to_float<Format>(x[i]), to_float<Format>(grad[i]), to_float<Format>(x0[i])));
  }
}

}  // namespace gpu
}  // namespace clae_fast
