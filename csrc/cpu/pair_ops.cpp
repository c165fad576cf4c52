// pair_lse, pair_grad, pair_mean, pair_sigmoid and pair_uel for PyTorch: one private operator,
// whose `op` says which. Python has validated; checked here is what would read or write elsewhere.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "pair_sweep.h"
#include "tensors.h"

namespace {

using namespace clae_fast;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const std::int32_t* ids(const std::optional<Tensor>& t, std::int64_t rows, const char* name) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->is_cpu() && t->is_contiguous() && t->numel() == rows &&
                      t->scalar_type() == ScalarType::Int,
                  name, " must be ", rows, " contiguous int32 on the CPU");
  return static_cast<const std::int32_t*>(t->const_data_ptr());
}

template <typename C>
const C* numbers(const std::optional<Tensor>& t, const Tensor& like, std::int64_t rows,
                 const char* name) {
  if (!t.has_value()) return nullptr;
  check_output(*t, like, rows, name);
  return static_cast<const C*>(t->const_data_ptr());
}

template <typename C>
C* result(const Tensor& t, const Tensor& like, std::int64_t elements, const char* name) {
  if (t.numel() == 0) return nullptr;
  check_output(t, like, elements, name);
  return static_cast<C*>(t.mutable_data_ptr());
}

std::int64_t pairs(std::int64_t op, Tensor q, Tensor k, double scale, double bias,
                   double negative_weight, std::int64_t skip, std::int64_t offset,
                   std::optional<Tensor> row_ids, std::optional<Tensor> col_ids,
                   std::optional<Tensor> row_lse, std::optional<Tensor> row_weight,
                   std::optional<Tensor> col_lse, std::optional<Tensor> col_weight, Tensor rows,
                   Tensor slope, Tensor dq, Tensor dk, std::optional<Tensor> memory,
                   std::int64_t token, std::int64_t pause_ms) {
  STD_TORCH_CHECK(op >= 0 && op <= 4, "pairs: op must be 0 to 4");
  STD_TORCH_CHECK(skip >= 0 && skip <= 2, "pairs: skip must be 0, 1 or 2");
  const Matrix a = matrix(q, "q"), b = matrix(k, "k");
  STD_TORCH_CHECK(q.size(1) == k.size(1) && a.kind == b.kind, "pairs: q and k must be alike");
  const PairOp which = static_cast<PairOp>(op);
  STD_TORCH_CHECK(
      which != PairOp::kUel || (offset >= 0 && offset <= b.rows && a.rows <= b.rows - offset),
      "pairs: pair_uel needs a key for each row");
  const auto go = [&](auto zero) {
    using C = decltype(zero);
    PairArguments<C> arg{
        which, a, b, q.size(1), scale, bias, negative_weight, static_cast<Skip>(skip), offset};
    arg.row_ids = ids(row_ids, a.rows, "row_ids");
    arg.col_ids = ids(col_ids, b.rows, "col_ids");
    arg.row_lse = numbers<C>(row_lse, q, a.rows, "row_lse");
    arg.row_weight = numbers<C>(row_weight, q, a.rows, "row_weight");
    arg.col_lse = numbers<C>(col_lse, q, b.rows, "col_lse");
    arg.col_weight = numbers<C>(col_weight, q, b.rows, "col_weight");
    const bool sums = which == PairOp::kLse || which == PairOp::kMean;
    if (sums && rows.numel() > 0 && rows.scalar_type() == ScalarType::Double) {
      check_output(rows, rows, a.rows, "rows");
      arg.lse = static_cast<double*>(rows.mutable_data_ptr());
    } else {
      arg.rows = result<C>(rows, q, a.rows, "rows");
    }
    arg.slope = result<C>(slope, q, a.rows, "slope");
    arg.dq = result<C>(dq, q, a.rows * q.size(1), "dq");
    arg.dk = result<C>(dk, q, b.rows * q.size(1), "dk");
    STD_TORCH_CHECK(
        a.rows == 0 || which == PairOp::kGrad || arg.rows != nullptr || arg.lse != nullptr,
        "pairs: rows must be given");
    STD_TORCH_CHECK(a.rows == 0 || which != PairOp::kSigmoid || arg.slope != nullptr,
                    "pairs: slope must be given");
    STD_TORCH_CHECK(which != PairOp::kGrad || ((row_lse.has_value() == row_weight.has_value()) &&
                                               (col_lse.has_value() == col_weight.has_value())),
                    "pairs: lse and weight come together");
    PairSweep<C> job(arg);
    return run_steps<C>(job, memory, token, pause_ms);
  };
  return a.kind == Kind::kDouble ? go(0.0) : go(0.0f);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clae_fast_C, CPU, m) { m.impl("pairs", TORCH_BOX(&pairs)); }
