// What the operators over pairs share on PyTorch's side: checked views of tensors, and steps.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <memory>
#include <optional>

#include "operand.h"
#include "parallel.h"

namespace clae_fast {

inline Matrix matrix(const torch::stable::Tensor& t, const char* name) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2, name, " must be a matrix on the CPU");
  STD_TORCH_CHECK(t.size(1) <= 1 || t.stride(1) == 1, name, " must have dense rows");
  Matrix m{t.const_data_ptr(), t.size(0), t.stride(0)};
  switch (t.scalar_type()) {
    case ScalarType::Float:
      m.kind = Kind::kFloat;
      break;
    case ScalarType::Double:
      m.kind = Kind::kDouble;
      break;
    case ScalarType::BFloat16:
      m.kind = Kind::kBFloat16;
      break;
    case ScalarType::Half:
      m.kind = Kind::kFloat16;
      break;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
  return m;
}

// A dense result in the type of the arithmetic on `input`.
inline void check_output(const torch::stable::Tensor& out, const torch::stable::Tensor& input,
                         std::int64_t elements, const char* name) {
  using torch::headeronly::ScalarType;
  const bool wide = input.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(out.is_cpu() && out.is_contiguous() && out.numel() == elements &&
                      out.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
                  name, " must be contiguous, with ", elements,
                  " elements of the arithmetic's type");
}

// Memory for one small job. One block is kept for the next one: its pages are there already, and
// faulting them in costs a small loss a fifth of its time.
class Workspace {
 public:
  explicit Workspace(std::size_t bytes) : block_(spare().exchange(nullptr)) {
    if (block_ != nullptr && block_->bytes >= bytes) return;
    delete block_;
    block_ = new Block{std::unique_ptr<char[]>(new char[bytes]), bytes};
  }
  ~Workspace() {
    if (block_->bytes <= kKept) block_ = spare().exchange(block_);
    delete block_;
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  char* data() const { return block_->data.get(); }

 private:
  static constexpr std::size_t kKept = std::size_t(32) << 20;
  struct Block {
    std::unique_ptr<char[]> data;
    std::size_t bytes;
  };
  static std::atomic<Block*>& spare() {
    static std::atomic<Block*> one{nullptr};
    return one;
  }
  Block* block_;
};

// Runs a job from where `token` says. Without memory a small job is run whole, in memory of its
// own; a larger one answers with minus the bytes it needs. With memory it stops between two tasks
// once `pause_ms` have passed (the caller may then be interrupted) and answers with the token to go
// on with, or 0 when it is done.
template <typename C, typename Job>
std::int64_t run_steps(Job& job, const std::optional<torch::stable::Tensor>& memory,
                       std::int64_t token, std::int64_t pause_ms) {
  constexpr double kSmall = 1e10;  // operations: a tenth of a second on one core
  constexpr int kStepBits = 31;
  STD_TORCH_CHECK(token == 0 || memory.has_value(), "token must be 0 without memory");
  Arena sizes;
  job.place(sizes);
  const std::size_t bytes = sizes.used() + 64;
  std::optional<Workspace> own;
  char* block = nullptr;
  if (memory.has_value()) {
    STD_TORCH_CHECK(memory->is_contiguous() && memory->numel() >= std::int64_t(bytes),
                    "memory must be contiguous, with ", bytes, " bytes");
    block = static_cast<char*>(memory->mutable_data_ptr());
  } else if (job.work() > kSmall) {
    return -std::int64_t(bytes);
  } else {
    own.emplace(bytes);
    block = own->data();
  }
  block += (64 - reinterpret_cast<std::uintptr_t>(block) % 64) % 64;
  Arena arena(block);
  job.place(arena);
  std::int64_t step = token & ((std::int64_t(1) << kStepBits) - 1), task = token >> kStepBits;
  job.resume(step);
  STD_TORCH_CHECK(step < job.steps() && task >= 0, "token must come from an earlier call");
  using Clock = typename Parallel<C>::Clock;
  const Parallel<C> parallel(memory.has_value() ? Clock::now() + std::chrono::milliseconds(pause_ms)
                                                : Clock::time_point::max());
  while (step < job.steps()) {
    task = job.run(step, task, parallel);
    if (task == 0) ++step;
    if (step < job.steps() && parallel.late()) return step | task << kStepBits;
  }
  return 0;
}

}  // namespace clae_fast
