// `contrast` for PyTorch. Python has validated; checked here is what would read or write elsewhere.
#include "contrast.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "tensors.h"

namespace {

using namespace clae_fast;
using torch::stable::Tensor;

template <typename C>
std::int64_t run(Form form, const Matrix& q, const Matrix& k, const Matrix* negatives,
                 std::int64_t width, double scale, bool normalize, const ContrastOutputs<C>& out,
                 const std::optional<Tensor>& memory, std::int64_t token, std::int64_t pause_ms) {
  Contrast<C> contrast(form, q, k, negatives, width, scale, normalize, out);
  return run_steps<C>(contrast, memory, token, pause_ms);
}

std::int64_t contrast(Tensor q, Tensor k, std::optional<Tensor> negatives, double scale,
                      std::int64_t form, bool normalize, std::int64_t reduction, Tensor loss,
                      Tensor lse_row, Tensor lse_col, Tensor dq, Tensor dk, Tensor dnegatives,
                      Tensor dscale, std::optional<Tensor> memory, std::int64_t token,
                      std::int64_t pause_ms) {
  STD_TORCH_CHECK(form >= 0 && form <= 2, "contrast: form must be 0, 1 or 2");
  const Matrix a = matrix(q, "q"), b = matrix(k, "k");
  STD_TORCH_CHECK(a.rows == b.rows && q.size(1) == k.size(1) && a.kind == b.kind,
                  "contrast: q and k must be alike");
  Matrix n;
  if (negatives.has_value()) {
    n = matrix(*negatives, "negatives");
    STD_TORCH_CHECK(form == 1 && negatives->size(1) == q.size(1) && n.kind == a.kind,
                    "contrast: negatives must be like q, with form one_way");
  }
  const std::int64_t B = a.rows, width = q.size(1);
  STD_TORCH_CHECK(reduction >= 0 && reduction <= 2, "contrast: reduction must be 0, 1 or 2");
  const std::int64_t rows = form == 1 ? B : 2 * B;
  check_output(loss, q, reduction == 0 ? rows : 1, "loss");
  check_output(lse_row, q, form == 0 ? 2 * B : B, "lse_row");
  check_output(lse_col, q, form == 2 ? B : 0, "lse_col");
  const auto asked = [&](const Tensor& out, std::int64_t elements, const char* name) {
    if (out.numel() == 0) return false;
    check_output(out, q, elements, name);
    return true;
  };
  const bool need_dq = asked(dq, B * width, "dq"), need_dk = asked(dk, B * width, "dk"),
             need_dn = asked(dnegatives, n.rows * width, "dnegatives"),
             need_dscale = asked(dscale, 1, "dscale");
  const auto go = [&](auto zero) {
    using C = decltype(zero);
    const auto at = [](const Tensor& t, bool there) {
      return there ? static_cast<C*>(t.mutable_data_ptr()) : nullptr;
    };
    const ContrastOutputs<C> out{
        at(loss, true),          at(lse_row, true), at(lse_col, true),
        at(dq, need_dq),         at(dk, need_dk),   at(dnegatives, need_dn),
        at(dscale, need_dscale), reduction != 0,    C(reduction == 2 ? 1.0 / double(rows) : 1.0)};
    return run<C>(static_cast<Form>(form), a, b, negatives.has_value() ? &n : nullptr, width, scale,
                  normalize, out, memory, token, pause_ms);
  };
  return a.kind == Kind::kDouble ? go(0.0) : go(0.0f);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clae_fast_C, CPU, m) { m.impl("contrast", TORCH_BOX(&contrast)); }
