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
#if !defined(CLAE_ONE_TILE)  // compiled sooner, where a test needs no other
  if (BN == 64) return launch<Format, 64>(p, blocks);
  if (BN == 256) return launch<Format, 256>(p, blocks);
  if constexpr (kWeightBytes<Format> == 2) {
    if (BN == 512) return launch<Format, 512>(p, blocks);
  }
#endif
  if (BN == 128) return launch<Format, 128>(p, blocks);
  throw std::runtime_error("no kernel has " + std::to_string(BN) + " columns");
}

// What a test sets beside the call; format: 0 float32, 1 bfloat16, 2 float16.
struct How {
  int format, BN, schedule, truncating;
  std::uint64_t seed;
};

// Bytes of shared memory that a block takes; 0 where there is no such kernel.
extern "C" int tile_bytes(int format, int BN) {
  const auto of = [&](auto tag) {
    using Format = decltype(tag);
    return BN == 64    ? Layout<Format, 64>::bytes
           : BN == 128 ? Layout<Format, 128>::bytes
           : BN == 256 ? Layout<Format, 256>::bytes
                       : 0;
  };
  if (BN == 512) return format == 1 ? Layout<Bf16, 512>::bytes : 0;
  return format == 0 ? of(F32()) : format == 1 ? of(Bf16()) : of(F16());
}

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
    if (how->format == 1) launch_of<Bf16>(how->BN, p, blocks);
#if !defined(CLAE_ONE_TILE)
    if (how->format == 0) launch_of<F32>(how->BN, p, blocks);
    if (how->format == 2) launch_of<F16>(how->BN, p, blocks);
#endif
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
  return nullptr;
}

// ------------------------------------------------------------------------- for the sanitizers

static std::uint64_t state = 1;
static float uniform() {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return float(state >> 40) / float(1u << 23) - 1;
}

// Bits of all results of one call; the same rows every time.
template <typename Format>
static std::vector<unsigned> results(int format, int form, int B, int D, int BN, float scale,
                                     emulated::Schedule schedule) {
  using T = typename Stored<Format>::type;
  state = 1;
  std::vector<T> q(B * D), k(B * D);
  for (auto* rows : {&q, &k}) {
    for (T& x : *rows) x = from_float<Format>(uniform());
  }
  const int rows = form == kNtXent ? 2 * B : B;
  std::vector<float> out(2 * B + 1 + 2 * B + B + 2 * B * D + 1, kNaN);
  float* at = out.data();
  const auto take = [&at](int n) {
    float* begin = at;
    at += n;
    return begin;
  };
  Call call{};
  call.q = q.data();
  call.k = k.data();
  call.q_stride = call.k_stride = D * sizeof(T);
  call.B = B;
  call.D = D;
  call.form = form;
  call.normalize = true;
  call.scale = scale;
  call.factor = 1.0f / float(rows);
  call.loss = take(form == kOneWay ? B : 2 * B);
  call.total = take(1);
  call.lse_row = take(rows);
  call.lse_col = form == kTwoWay ? take(B) : nullptr;
  call.dq = take(B * D);
  call.dk = take(B * D);
  call.dscale = take(1);
  std::vector<float> workspace(workspace_of(call, BN).floats, kNaN);
  call.workspace = workspace.data();
  const How how{format, BN, int(schedule), 0, 7};
  if (const char* error = contrast_emulated(&call, &how)) {
    std::printf("failed: %s\n", error);
    std::exit(1);
  }
  std::vector<unsigned> bits;
  for (float* x = out.data(); x != at; ++x) {
    if (!(*x - *x == 0.0f)) {
      std::printf("failed: number %d of form %d is not finite\n", int(x - out.data()), form);
      std::exit(1);
    }
    bits.push_back(bits_of(*x));
  }
  return bits;
}

template <typename Format>
static void check(int format, bool schedules) {
  using emulated::Schedule;
  for (int form : {kNtXent, kOneWay, kTwoWay}) {
    for (float scale : {10.0f, 100.0f}) {  // both ways of finding the maximum
      const auto one = results<Format>(format, form, 37, 150, 64, scale, Schedule::kAscending);
      for (Schedule other : {Schedule::kDescending, Schedule::kRandom}) {
        if (schedules && results<Format>(format, form, 37, 150, 64, scale, other) != one) {
          std::printf("failed: other bits under another schedule, form %d\n", form);
          std::exit(1);
        }
      }
    }
  }
  std::printf("right %d\n", format);
}

// With a word, under one schedule only: ThreadSanitizer sees a race whatever comes first.
int main(int words, char**) {
  check<F32>(0, words == 1);
  check<Bf16>(1, words == 1);
  check<F16>(2, words == 1);
}
