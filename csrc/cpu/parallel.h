// Tasks on PyTorch's threads; each thread has one buffer for a tile.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <memory>

#include "pairs.h"

namespace clae_fast {

template <typename C>
class Parallel {
 public:
  // f(task, buffer) for task in [0, n). Threads take the next task when they are free: which thread
  // takes it decides nothing.
  template <typename F>
  void operator()(std::int64_t n, double work_of_one, const F& f) const {
    const std::int64_t threads = std::min<std::int64_t>(torch::stable::get_num_threads(), n);
    if (threads <= 1 || double(n) * work_of_one < kWorthThreads) {
      for (std::int64_t i = 0; i < n; ++i) f(i, buffer());
      return;
    }
    std::atomic<std::int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](std::int64_t, std::int64_t) {
      for (std::int64_t i = next++; i < n; i = next++) f(i, buffer());
    });
  }

 private:
  static constexpr double kWorthThreads = 1e6;  // operations: about 10 us

  struct alignas(64) Tile {
    C data[kBuffer];
  };
  static C* buffer() {
    static thread_local std::unique_ptr<Tile> tile;
    if (tile == nullptr) tile.reset(new Tile);
    return tile->data;
  }
};

}  // namespace clae_fast
