// The private operators; the public ones are defined in clae_fast/ops.py and call these.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/isa.h"

namespace {

std::string isa() { return clae_fast::isa_name(clae_fast::best_isa()); }

}  // namespace

STABLE_TORCH_LIBRARY(clae_fast_C, m) {
  m.def(
      "sign_step(Tensor x, Tensor grad, Tensor x0, Tensor(a!) out, float step, float eps, "
      "float low, float high, Tensor? channels, bool channels_last) -> ()");
  m.def(
      "contrast(Tensor q, Tensor k, Tensor? negatives, float scale, int form, bool normalize, "
      "int reduction, "
      "Tensor(a!) loss, Tensor(b!) lse_row, Tensor(c!) lse_col, Tensor(d!) dq, Tensor(e!) dk, "
      "Tensor(f!) dnegatives, Tensor(g!) dscale, Tensor(h!)? memory, int token, "
      "int pause_ms) -> int");
  m.def(
      "pairs(int op, Tensor q, Tensor k, float scale, float bias, float negative_weight, int skip, "
      "int offset, Tensor? row_ids, Tensor? col_ids, Tensor? row_lse, Tensor? row_weight, "
      "Tensor? col_lse, Tensor? col_weight, Tensor(a!) rows, Tensor(b!) slope, Tensor(c!) dq, "
      "Tensor(d!) dk, Tensor(e!)? memory, int token, int pause_ms) -> int");
  m.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(clae_fast_C, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
}
