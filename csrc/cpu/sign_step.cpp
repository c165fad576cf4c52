// Python has validated and chosen the layout; checked here is what would read or write elsewhere.
#include "sign_step.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Below this many elements per thread, starting one costs more than it saves.
constexpr std::int64_t kGrain = 32768;

// Dense in the order the kernel walks: last dimension fastest, or dimension 1 for channels_last.
bool is_dense(const Tensor& t, bool channels_last) {
  if (t.numel() == 0) return true;
  const std::int64_t dims = t.dim();
  std::int64_t expected = 1;
  const auto fits = [&](std::int64_t d) {
    const bool ok = t.size(d) == 1 || t.stride(d) == expected;
    expected *= t.size(d);
    return ok;
  };
  if (!channels_last) {
    for (std::int64_t d = dims - 1; d >= 0; --d) {
      if (!fits(d)) return false;
    }
    return true;
  }
  if (!fits(1)) return false;
  for (std::int64_t d = dims - 1; d >= 2; --d) {
    if (!fits(d)) return false;
  }
  return fits(0);
}

void check_like_x(const Tensor& t, const Tensor& x, bool channels_last, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), "sign_step: ", name, " must be on the CPU");
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), "sign_step: ", name,
                  " must have the dtype of x");
  bool same = t.dim() == x.dim();
  for (std::int64_t d = 0; same && d < x.dim(); ++d) same = t.size(d) == x.size(d);
  STD_TORCH_CHECK(same, "sign_step: ", name, " must have the sizes of x");
  STD_TORCH_CHECK(is_dense(t, channels_last), "sign_step: ", name, " must be dense in ",
                  channels_last ? "channels_last" : "contiguous", " order");
}

void check_channels(const Tensor& channels, const Tensor& x, ScalarType compute) {
  STD_TORCH_CHECK(x.dim() >= 2, "sign_step: channels need an x of two dimensions or more");
  STD_TORCH_CHECK(channels.is_cpu(), "sign_step: channels must be on the CPU");
  STD_TORCH_CHECK(channels.scalar_type() == compute,
                  "sign_step: channels must have the dtype of the arithmetic");
  STD_TORCH_CHECK(channels.dim() == 2 && channels.size(0) == 4 && channels.size(1) == x.size(1) &&
                      is_dense(channels, false),
                  "sign_step: channels must be contiguous, (4, ", x.size(1), ")");
}

template <typename S>
bool overlap(const S* a, const S* b, std::int64_t n) {
  const auto first = reinterpret_cast<std::uintptr_t>(a),
             second = reinterpret_cast<std::uintptr_t>(b);
  const std::uintptr_t bytes = n * sizeof(S);
  return first < second + bytes && second < first + bytes;
}

template <typename S>
void run(const Tensor& x, const Tensor& grad, const Tensor& x0, const Tensor& out, double step,
         double eps, double low, double high, const std::optional<Tensor>& channels,
         bool channels_last) {
  using C = typename clae_fast::SignStep<S>::C;
  const std::int64_t n = x.numel();
  if (n == 0) return;
  clae_fast::SignStep<S> s{static_cast<const S*>(x.const_data_ptr()),
                           static_cast<const S*>(grad.const_data_ptr()),
                           static_cast<const S*>(x0.const_data_ptr()),
                           static_cast<S*>(out.mutable_data_ptr()),
                           static_cast<C>(step),
                           static_cast<C>(eps),
                           static_cast<C>(low),
                           static_cast<C>(high)};
  for (const S* input : {s.x, s.grad, s.x0}) {
    STD_TORCH_CHECK(!overlap<S>(s.out, input, n), "sign_step: out must not overlap an input");
  }
  std::vector<C> storage;
  if (channels.has_value()) {
    s.table = static_cast<const C*>(channels->const_data_ptr());
    s.columns = x.size(1);
    s.inner = channels_last ? 1 : n / x.size(0) / x.size(1);
    clae_fast::repeat_table(s, storage);
  }
  const clae_fast::Isa isa = clae_fast::best_isa();
  torch::stable::parallel_for(0, n, kGrain, [&](std::int64_t begin, std::int64_t end) {
    clae_fast::sign_step(isa, s, begin, end);
  });
}

void sign_step(Tensor x, Tensor grad, Tensor x0, Tensor out, double step, double eps, double low,
               double high, std::optional<Tensor> channels, bool channels_last) {
  STD_TORCH_CHECK(!channels_last || x.dim() == 4 || x.dim() == 5,
                  "sign_step: channels_last needs four or five dimensions, x has ", x.dim());
  check_like_x(x, x, channels_last, "x");
  check_like_x(grad, x, channels_last, "grad");
  check_like_x(x0, x, channels_last, "x0");
  check_like_x(out, x, channels_last, "out");
  const ScalarType dtype = x.scalar_type();
  if (channels.has_value()) {
    check_channels(*channels, x, dtype == ScalarType::BFloat16 ? ScalarType::Float : dtype);
  }
  if (dtype == ScalarType::Float) {
    run<float>(x, grad, x0, out, step, eps, low, high, channels, channels_last);
  } else if (dtype == ScalarType::Double) {
    run<double>(x, grad, x0, out, step, eps, low, high, channels, channels_last);
  } else {
    STD_TORCH_CHECK(dtype == ScalarType::BFloat16,
                    "sign_step: x must be float32, float64 or bfloat16");
    run<clae_fast::BFloat16>(x, grad, x0, out, step, eps, low, high, channels, channels_last);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clae_fast_C, CPU, m) { m.impl("sign_step", TORCH_BOX(&sign_step)); }
