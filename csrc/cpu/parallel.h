// Tasks on PyTorch's threads; each thread has one buffer for a tile.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>

#include "pairs.h"

namespace clae_fast {

template <typename C>
class Parallel {
 public:
  using Clock = std::chrono::steady_clock;
  explicit Parallel(Clock::time_point deadline = Clock::time_point::max()) : deadline_(deadline) {}

  bool late() const { return deadline_ != Clock::time_point::max() && Clock::now() >= deadline_; }

  // f(task, buffer) for every task in [0, n).
  template <typename F>
  void operator()(std::int64_t n, double work_of_one, const F& f) const {
    run(n, work_of_one, 0, f, [] { return false; });
  }

  // Tasks from `first` on until the deadline, at least one per thread. Returns the first that was
  // not run, 0 if there is none.
  template <typename F>
  std::int64_t some(std::int64_t n, double work_of_one, std::int64_t first, const F& f) const {
    const std::int64_t next = run(n, work_of_one, first, f, [this] { return late(); });
    return next < n ? next : 0;
  }

 private:
  // Threads take the next task when they are free: which thread takes it decides nothing. A task
  // that was taken is run, so that those that were are the first ones.
  template <typename F, typename Late>
  std::int64_t run(std::int64_t n, double work_of_one, std::int64_t first, const F& f,
                   const Late& late) const {
    std::atomic<std::int64_t> next{first};
    const auto work = [&](std::int64_t, std::int64_t) {
      do {
        const std::int64_t i = next++;
        if (i >= n) return;
        f(i, buffer());
      } while (!late());
    };
    const std::int64_t left = n - first;
    const std::int64_t threads = std::min<std::int64_t>(torch::stable::get_num_threads(), left);
    if (threads <= 1 || double(left) * work_of_one < kWorthThreads) {
      work(0, 1);
    } else {
      torch::stable::parallel_for(0, threads, 1, work);
    }
    return next;
  }

  static constexpr double kWorthThreads = 1e6;  // operations: about 10 us
  Clock::time_point deadline_;

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
