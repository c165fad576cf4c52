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
  m.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(clae_fast_C, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
}
