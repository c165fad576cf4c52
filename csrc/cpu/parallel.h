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
    const std::int64_t threads = threads_for(n, work_of_one);
    if (threads == 1) {
      for (std::int64_t i = 0; i < n; ++i) f(i, buffer());
      return;
    }
    // Each thread takes its own part first, the same in every loop: what it writes stays in its
    // caches. Then it helps the others. Which thread takes a task decides nothing.
    const std::int64_t parts = std::min<std::int64_t>(threads, kParts);
    Part of[kParts];
    for (std::int64_t p = 0; p < parts; ++p) {
      of[p].next = p * n / parts;
      of[p].end = (p + 1) * n / parts;
    }
    torch::stable::parallel_for(0, threads, 1, [&](std::int64_t begin, std::int64_t) {
      for (std::int64_t p = 0; p < parts; ++p) {
        Part& part = of[(begin * parts / threads + p) % parts];
        for (std::int64_t i = part.next++; i < part.end; i = part.next++) f(i, buffer());
      }
    });
  }

  // Tasks from `first` on until the deadline, at least one per thread. Returns the first that was
  // not run, 0 if there is none.
  template <typename F>
  std::int64_t some(std::int64_t n, double work_of_one, std::int64_t first, const F& f) const {
    STD_TORCH_CHECK(first >= 0 && (first == 0 || first < n),
                    "token must come from an earlier call");
    if (first == 0 && deadline_ == Clock::time_point::max()) {
      (*this)(n, work_of_one, f);
      return 0;
    }
    // A task that was taken is run, so that those that were are the first ones.
    std::atomic<std::int64_t> next{first};
    const auto work = [&](std::int64_t, std::int64_t) {
      do {
        const std::int64_t i = next++;
        if (i >= n) return;
        f(i, buffer());
      } while (!late());
    };
    const std::int64_t threads = threads_for(n - first, work_of_one);
    if (threads == 1) {
      work(0, 1);
    } else {
      torch::stable::parallel_for(0, threads, 1, work);
    }
    return next < n ? next.load() : 0;
  }

 private:
  static std::int64_t threads_for(std::int64_t n, double work_of_one) {
    if (n <= 1 || double(n) * work_of_one < kWorthThreads) return 1;
    return std::min<std::int64_t>(torch::stable::get_num_threads(), n);
  }

  static constexpr std::int64_t kParts = 64;
  struct alignas(64) Part {
    std::atomic<std::int64_t> next;
    std::int64_t end;
  };

  static constexpr double kWorthThreads = 1e6;  // operations: about 10 us of one core
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
