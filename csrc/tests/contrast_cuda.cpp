// The one-launch `contrast` in the host emulator. As a shared library: `contrast_emulated`, for
// tests to compare with the specification. As a program, for sanitizers: calls of every kind on
// random rows, which must give finite numbers, and the same bits under every schedule.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "../cuda/contrast_call.h"
#include "../cuda/contrast_kernel.h"

using namespace clae_fast::gpu;

template <typename Format, int BN>
static void launch(const Params& p, int blocks) {
  emulated::launch(contrast_kernel<Format, BN>, blocks, kThreads, Layout<Format, BN>::bytes, p);
}

template <typename Format>
static void launch_of(int BN, const Params& p, int blocks) {
  if (BN == 64) return launch<Format, 64>(p, blocks);
  if (BN == 128) return launch<Format, 128>(p, blocks);
  if (BN == 256) return launch<Format, 256>(p, blocks);
  if constexpr (kWeightBytes<Format> == 2) {
    if (BN == 512) return launch<Format, 512>(p, blocks);
  }
  throw std::runtime_error("no kernel has " + std::to_string(BN) + " columns");
}

// What a test sets beside the call; format: 0 float32, 1 bfloat16, 2 float16.
struct How {
  int format, BN, schedule, truncating;
  std::uint64_t seed;
};

extern "C" std::int64_t workspace_floats(const Call* call, int BN) {
  return workspace_of(*call, BN).floats;
}

extern "C" const char* contrast_emulated(const Call* call, const How* how) {
  static std::string error;
  emulated::settings.schedule = emulated::Schedule(how->schedule);
  emulated::settings.seed = how->seed;
  emulated::settings.accumulation =
      how->truncating ? emulated::Accumulation::kTruncating : emulated::Accumulation::kNearest;
  try {
    const Params p = params_of(*call, how->BN);
    const int blocks = extents_of(*call, how->BN).blocks();
    if (how->format == 0) launch_of<F32>(how->BN, p, blocks);
    if (how->format == 1) launch_of<Bf16>(how->BN, p, blocks);
    if (how->format == 2) launch_of<F16>(how->BN, p, blocks);
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
  return nullptr;
}
