// The private CUDA operators. Python has validated and allocated; checked here is what would read
// or write elsewhere. The stream comes as a number: PyTorch's CUDA library is not linked to.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "launch.h"

namespace {

using namespace clae_fast::gpu;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(bool ok, const char* op, const char* what) { STD_TORCH_CHECK(ok, op, ": ", what); }

// What a launcher of the dtype does.
template <typename Do>
auto for_dtype(ScalarType dtype, const Do& run) {
  if (dtype == ScalarType::BFloat16) return run(Launcher<Bf16>());
  if (dtype == ScalarType::Half) return run(Launcher<F16>());
  check(dtype == ScalarType::Float, "clae_fast_C", "expected float32, bfloat16 or float16");
  return run(Launcher<F32>());
}

bool on_gpu(const Tensor& t, const Tensor& like) {
  return t.is_cuda() && t.get_device_index() == like.get_device_index();
}

int scale_type_of(const std::optional<Tensor>& scale, const Tensor& q) {
  if (!scale.has_value()) return kNoTensor;
  const ScalarType dtype = scale->scalar_type();
  check(on_gpu(*scale, q) && scale->numel() == 1, "contrast",
        "the scale is one number on the GPU of q");
  if (dtype == ScalarType::Float) return kFloat;
  if (dtype == ScalarType::Double) return kDouble;
  if (dtype == ScalarType::BFloat16) return kBFloat16;
  check(dtype == ScalarType::Half, "contrast", "the scale is of a float type");
  return kHalf;
}

// A result: null if it has no elements.
float* result(const Tensor& t, const Tensor& q, std::int64_t elements, const char* name) {
  if (t.numel() == 0) return nullptr;
  check(on_gpu(t, q) && t.scalar_type() == ScalarType::Float && t.numel() == elements &&
            t.is_contiguous(),
        "contrast", name);
  return static_cast<float*>(t.mutable_data_ptr());
}

Call call_of(const Tensor& q, const Tensor& k, std::int64_t form, bool normalize) {
  check(q.is_cuda() && on_gpu(k, q) && q.dim() == 2 && k.dim() == 2, "contrast",
        "q and k are matrices on the GPU");
  check(q.scalar_type() == k.scalar_type() && q.size(0) == k.size(0) && q.size(1) == k.size(1),
        "contrast", "q and k are alike");
  check(q.size(0) >= 1 && q.size(0) <= kMaxPairs && q.size(1) >= 1 && q.size(1) <= kMaxWidth,
        "contrast", "1 to 256 elements a row");
  check((q.stride(1) == 1 && k.stride(1) == 1) || q.size(1) == 1, "contrast",
        "elements of a row lie side by side");
  check(form >= kNtXent && form <= kTwoWay, "contrast", "an unknown form");
  Call call{};
  call.q = q.const_data_ptr();
  call.k = k.const_data_ptr();
  call.element_bytes = int(q.element_size());
  call.q_stride = q.stride(0) * call.element_bytes;
  call.k_stride = k.stride(0) * call.element_bytes;
  call.B = int(q.size(0));
  call.D = int(q.size(1));
  call.form = int(form);
  call.normalize = normalize;
  return call;
}

// Floats of workspace that a call needs; -1 if no tile fits the GPU. dtype: 0 float32, 1 bfloat16,
// 2 float16. `fold`: q and k are one.
std::int64_t contrast_cuda_workspace(std::int64_t dtype, std::int64_t B, std::int64_t D,
                                     std::int64_t form, bool fold, bool need_dq, bool need_dk,
                                     bool need_dscale, std::int64_t device) {
  check(B >= 1 && D >= 1, "contrast", "sizes of at least 1");
  if (B > kMaxPairs || D > kMaxWidth) return -1;
  float some[2];  // only whether pointers are null, and alike, is looked at
  Call call{};
  call.q = some;
  call.k = fold ? some : some + 1;
  call.B = int(B);
  call.D = int(D);
  call.form = int(form);
  call.dq = need_dq ? some : nullptr;
  call.dk = need_dk ? some : nullptr;
  call.dscale = need_dscale ? some : nullptr;
  const ScalarType types[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  check(dtype >= 0 && dtype < 3, "contrast", "dtype 0, 1 or 2");
  const int columns =
      for_dtype(types[dtype], [&](auto launcher) { return launcher.columns(call, int(device)); });
  return columns == 0 ? -1 : workspace_of(call, columns).floats;
}

// Why the kernels cannot run on a device, as CUDA says it; empty if they can.
std::string cuda_unusable(std::int64_t device) {
  const char* error = Launcher<F32>::unusable(int(device));
  return error == nullptr ? "" : error;
}

void contrast_cuda(Tensor q, Tensor k, double scale, std::optional<Tensor> scale_tensor,
                   bool reciprocal, std::int64_t form, bool normalize, double factor, Tensor loss,
                   Tensor total, Tensor lse_row, Tensor lse_col, Tensor dq, Tensor dk,
                   Tensor dscale, Tensor workspace, std::int64_t stream) {
  Call call = call_of(q, k, form, normalize);
  const std::int64_t B = call.B, rows = form == kNtXent ? 2 * B : B;
  call.scale = float(scale);
  call.factor = float(factor);
  call.reciprocal = reciprocal;
  call.scale_type = scale_type_of(scale_tensor, q);
  call.scale_tensor = scale_tensor.has_value() ? scale_tensor->const_data_ptr() : nullptr;
  call.loss = result(loss, q, form == kTwoWay ? 2 * B : rows, "loss: (2B,), (B,) or (B, 2)");
  call.total = result(total, q, 1, "total: one number");
  call.lse_row = result(lse_row, q, rows, "lse_row: a number a row");
  call.lse_col = result(lse_col, q, B, "lse_col: a number a column");
  call.dq = result(dq, q, B * call.D, "dq: as q");
  call.dk = result(dk, q, B * call.D, "dk: as k");
  call.dscale = result(dscale, q, 1, "dscale: one number");
  check(call.lse_row != nullptr && (call.lse_col != nullptr) == (form == kTwoWay), "contrast",
        "log-sum-exps of rows, and of columns for two_way");
  check(on_gpu(workspace, q) && workspace.scalar_type() == ScalarType::Float &&
            workspace.is_contiguous(),
        "contrast", "workspace: float32 on the GPU");
  call.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  const char* error = for_dtype(q.scalar_type(), [&](auto launcher) {
    const int device = q.get_device_index(), columns = launcher.columns(call, device);
    check(columns != 0 && workspace.numel() >= workspace_of(call, columns).floats, "contrast",
          "workspace: as many numbers as contrast_cuda_workspace says");
    return launcher.contrast(call, device, reinterpret_cast<void*>(stream));
  });
  STD_TORCH_CHECK(error == nullptr, "contrast: the launch failed: ", error);
}

// A number, or a tensor of one or of `channels` numbers.
Size size_of(double number, const std::optional<Tensor>& tensor, const Tensor& x,
             std::int64_t channels, const char* name) {
  if (!tensor.has_value()) return {nullptr, float(number), 0};
  check(on_gpu(*tensor, x) && tensor->scalar_type() == ScalarType::Float &&
            tensor->is_contiguous() && (tensor->numel() == 1 || tensor->numel() == channels),
        "sign_step", name);
  return {static_cast<const float*>(tensor->const_data_ptr()), 0.0f, tensor->numel() == 1 ? 0 : 1};
}

// `inner`: how many elements in the order of memory have the same channel; 0 where none vary.
void sign_step_cuda(Tensor x, Tensor grad, Tensor x0, Tensor out, double step, double eps,
                    double low, double high, std::optional<Tensor> step_tensor,
                    std::optional<Tensor> eps_tensor, std::optional<Tensor> low_tensor,
                    std::optional<Tensor> high_tensor, std::int64_t inner, std::int64_t channels,
                    std::int64_t stream) {
  for (const Tensor* t : {&grad, &x0, &out}) {
    check(on_gpu(*t, x) && t->scalar_type() == x.scalar_type() && t->numel() == x.numel(),
          "sign_step", "grad, x0 and out are as x");
  }
  check(x.is_cuda() && inner >= 0 && channels >= 1 && channels <= 0x7fffffff &&
            (inner == 0 || x.numel() % (inner * channels) == 0),
        "sign_step", "x is on the GPU, inner and channels divide it");
  SignStepParams p{};
  p.x = x.const_data_ptr();
  p.grad = grad.const_data_ptr();
  p.x0 = x0.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.n = std::uint64_t(x.numel());
  p.step = size_of(step, step_tensor, x, channels, "step: one number, or one a channel");
  p.eps = size_of(eps, eps_tensor, x, channels, "eps: one number, or one a channel");
  p.low = size_of(low, low_tensor, x, channels, "low: one number, or one a channel");
  p.high = size_of(high, high_tensor, x, channels, "high: one number, or one a channel");
  p.varies = inner > 0;
  p.inner = std::uint64_t(inner);
  p.channels = unsigned(channels);
  p.aligned = is_aligned(p);
  const char* error = for_dtype(x.scalar_type(), [&](auto launcher) {
    return launcher.sign_step(p, reinterpret_cast<void*>(stream));
  });
  STD_TORCH_CHECK(error == nullptr, "sign_step: the launch failed: ", error);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(clae_fast_C, m) {
  m.def(
      "contrast_cuda_workspace(int dtype, int B, int D, int form, bool fold, bool need_dq, "
      "bool need_dk, bool need_dscale, int device) -> int");
  m.def("cuda_unusable(int device) -> str");
  m.def(
      "contrast_cuda(Tensor q, Tensor k, float scale, Tensor? scale_tensor, bool reciprocal, "
      "int form, bool normalize, float factor, Tensor(a!) loss, Tensor(b!) total, "
      "Tensor(c!) lse_row, Tensor(d!) lse_col, Tensor(e!) dq, Tensor(f!) dk, Tensor(g!) dscale, "
      "Tensor(h!) workspace, int stream) -> ()");
  m.def(
      "sign_step_cuda(Tensor x, Tensor grad, Tensor x0, Tensor(a!) out, float step, float eps, "
      "float low, float high, Tensor? step_tensor, Tensor? eps_tensor, Tensor? low_tensor, "
      "Tensor? high_tensor, int inner, int channels, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(clae_fast_C, CompositeExplicitAutograd, m) {
  m.impl("contrast_cuda_workspace", TORCH_BOX(&contrast_cuda_workspace));
  m.impl("cuda_unusable", TORCH_BOX(&cuda_unusable));
}

STABLE_TORCH_LIBRARY_IMPL(clae_fast_C, CUDA, m) {
  m.impl("contrast_cuda", TORCH_BOX(&contrast_cuda));
  m.impl("sign_step_cuda", TORCH_BOX(&sign_step_cuda));
}
