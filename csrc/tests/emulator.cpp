// The host emulator against kernels that are right, under every schedule, and against planted bugs.
// Without a word it runs all and prints what was seen; with the name of a bug, that one only, for a
// sanitizer to see; "busy" and a number of products times a launch of 32,768 threads.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <set>

#include "toy_kernels.h"

using namespace clae_fast::gpu;
using emulated::Accumulation;
using emulated::Schedule;
using emulated::settings;

static std::uint64_t state = 1;
static float uniform() {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return float(state >> 40) / float(1u << 23) - 1;
}

[[noreturn]] static void die(const std::string& why) {
  std::printf("failed: %s\n", why.c_str());
  std::exit(1);
}

using Bits = std::vector<unsigned>;
static Bits bits_of_all(const std::vector<float>& x) {
  Bits bits;
  for (float v : x) bits.push_back(bits_of(v));
  return bits;
}

// Sixteen-byte aligned and NaN: what a kernel does not write shows.
struct Memory {
  explicit Memory(std::size_t bytes)
      : vectors((bytes + 15) / 16, Vec16{{~0u, ~0u, ~0u, ~0u}}), data(vectors.data()) {}
  std::vector<Vec16> vectors;
  void* data;
};

// A stored number, and the number it stands for.
template <typename Format>
double store(float x, void* at, std::size_t i) {
  if constexpr (kMmaDepth<Format> == 8) {
    const unsigned bits = to_tf32(x);
    static_cast<unsigned*>(at)[i] = bits;
    return float_of(bits);
  } else {
    static_cast<std::uint16_t*>(at)[i] = narrow<Format>(x);
    return widen<Format>(narrow<Format>(x));
  }
}

// Throws where a number is not the truth's, to what the sum of K products in float32 may lose.
static void compare(const std::vector<float>& got, const std::vector<double>& truth, double limit) {
  for (std::size_t i = 0; i < truth.size(); ++i)
    if (!(std::fabs(got[i] - truth[i]) <= limit))
      throw std::runtime_error("wrong number " + std::to_string(i) + ": " + std::to_string(got[i]) +
                               ", not " + std::to_string(truth[i]));
}

template <typename Format, bool kTrans, int kBug>
Bits run_gemm() {
  const int M = 45, N = 72, K = 104;
  constexpr int size = kMmaDepth<Format> == 16 ? 2 : 4;
  state = 1;
  Memory a(std::size_t(M) * K * size), b(std::size_t(N) * K * size);
  std::vector<double> as(M * K), bs(N * K), truth(M * N);
  for (int i = 0; i < M * K; ++i) as[i] = store<Format>(uniform(), a.data, i);
  for (int i = 0; i < N * K; ++i) bs[i] = store<Format>(uniform(), b.data, i);
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j)
      for (int k = 0; k < K; ++k)
        truth[i * N + j] += as[i * K + k] * (kTrans ? bs[k * N + j] : bs[j * K + k]);
  std::vector<float> c(M * N, kNaN);
  const int blocks = (M + kTile - 1) / kTile * ((N + kTile - 1) / kTile);
  emulated::launch(gemm<Format, kTrans, kBug>, blocks, 128, kGemmBytes,
                   GemmParams{a.data, b.data, c.data(), M, N, K});
  compare(c, truth, 2e-5);
  return bits_of_all(c);
}

struct Vectors {
  explicit Vectors(int n, int blocks) : x(4 * n), y(4 * n), partial(4 * blocks) {
    state = 2;
    for (int i = 0; i < n; ++i) xs()[i] = uniform() + 2;
  }
  float* xs() { return static_cast<float*>(x.data); }
  float* ys() { return static_cast<float*>(y.data); }
  VectorParams params(int n) {
    return {xs(), ys(), static_cast<float*>(partial.data), workspace, n};
  }
  Memory x, y, partial;
  unsigned workspace[2] = {0, 0};
};

template <int kBug, int kBytes = 1024>
Bits run_swap() {
  const int n = 2 * 64 * 4;
  Vectors v(n + 4, 2);
  emulated::launch(swap_neighbours<64, kBug>, 2, 64, kBytes, v.params(n));
  std::vector<float> y(v.ys(), v.ys() + n);
  std::vector<double> truth(n);
  for (int i = 0; i < n; ++i) truth[i] = v.xs()[i ^ 4];
  compare(y, truth, 0);
  return bits_of_all(y);
}

template <typename Format>
Bits run_twice() {
  Vectors v(512, 1);
  for (int i = 0; i < 512; ++i) v.xs()[i] = std::nearbyint(2 * uniform());
  std::vector<double> truth(v.xs(), v.xs() + 256);  // a, then a b, then a b b
  for (int time = 0; time < 2; ++time) {
    std::vector<double> product(256);
    for (int i = 0; i < 256; ++i)
      for (int k = 0; k < 16; ++k)
        product[i] += truth[i / 16 * 16 + k] * v.xs()[256 + k * 16 + i % 16];
    truth = product;
  }
  emulated::launch(twice<Format>, 1, 32, 32 * 24 * 2, v.params(0));
  std::vector<float> y(v.ys(), v.ys() + 256);
  compare(y, truth, 0);
  return bits_of_all(y);
}

// Three launches on one workspace that is never cleared, of different grids.
template <int kBug>
Bits run_normalise() {
  Bits all;
  Vectors v(4 * 64, 4);
  for (int blocks : {4, 3, 1}) {
    const int n = blocks * 64 - 20;
    emulated::launch(normalise<64, kBug>, blocks, 64, kVectorBytes<64>, v.params(n));
    std::vector<float> y(v.ys(), v.ys() + n);
    std::vector<double> truth(v.xs(), v.xs() + n);
    double sum = 0;
    for (double x : truth) sum += x;
    for (double& x : truth) x /= sum;
    compare(y, truth, 1e-7);
    for (unsigned bits : bits_of_all(y)) all.push_back(bits);
  }
  return all;
}

static Bits run_dirty() {
  Vectors v(128, 2);
  v.workspace[1] = 7;
  emulated::launch(total<64, kRight>, 2, 64, kVectorBytes<64>, v.params(128));
  return {};
}

template <int kBug>
Bits run_total() {
  Bits all;
  Vectors v(5 * 96, 5);
  for (int blocks : {5, 2, 1}) {
    const int n = blocks * 96 - 7;
    emulated::launch(total<96, kBug>, blocks, 96, carved_bytes<float>(3), v.params(n));
    double sum = 0;
    for (int i = 0; i < n; ++i) sum += v.xs()[i];
    compare({v.ys()[0]}, {sum}, 1e-3);
    all.push_back(bits_of(v.ys()[0]));
    if (v.workspace[1]) throw std::runtime_error("the tickets did not leave their counter zero");
  }
  return all;
}

struct Scheduled {
  const char* name;
  Schedule schedule;
  std::uint64_t seed;
};
static const Scheduled kSchedules[] = {
    {"ascending", Schedule::kAscending, 1}, {"descending", Schedule::kDescending, 1},
    {"random-1", Schedule::kRandom, 1},     {"random-2", Schedule::kRandom, 2},
    {"random-3", Schedule::kRandom, 3},     {"round-robin", Schedule::kRoundRobin, 1},
};

static void check_right(const char* name, Bits (*run)()) {
  std::set<Bits> seen;
  for (const Scheduled& s : kSchedules) {
    settings.schedule = s.schedule;
    settings.seed = s.seed;
    try {
      seen.insert(run());
    } catch (const std::exception& error) {
      die(std::string(name) + ", " + s.name + ": " + error.what());
    }
  }
  if (seen.size() != 1) die(std::string(name) + ": schedules differ in bits");
  std::printf("right %s\n", name);
}

struct Planted {
  const char* name;
  const char* says;  // part of the error
  Bits (*run)();
};
static const Planted kPlanted[] = {
    {"missing-sync_block", "wrong number", run_gemm<Bf16, false, kNoSyncBlock>},
    {"missing-sync_block-after", "wrong number", run_gemm<Bf16, false, kNoSyncAfter>},
    {"missing-sync_block-in-sum", "wrong number", run_total<kNoSyncBlock>},
    {"missing-copy-wait", "wrong number", run_gemm<Tf32, false, kNoCopyWait>},
    {"missing-last-wait", "copies that it never waited for", run_gemm<Bf16, true, kNoLastWait>},
    {"missing-grid-barrier", "wrong number", run_normalise<kNoSyncGrid>},
    {"missing-sync_warp", "wrong number", run_swap<kNoSyncWarp>},
    {"wrong-fragment", "wrong number", run_gemm<F16, false, kWrongFragment>},
    {"half-warp", "divergent collective: ", run_total<kHalfWarp>},
    {"two-collectives", "divergent collective: a lane calls ", run_total<kTwoCollectives>},
    {"early-exit", "deadlock: ", run_normalise<kEarlyExit>},
    {"one-past", "outside of every carved array", run_normalise<kOnePast>},
    {"read-past", "wrong number", run_normalise<kReadPast>},
    {"misaligned", "misaligned: load_global of 16 bytes", run_swap<kMisaligned>},
    {"skipped-barrier", "deadlock: ", run_total<kSkippedBarrier>},
    {"wrong-ticket-count", "wrong number", run_total<kTooFewTickets>},
    {"not-shared", "copy_async: not an address of the block's shared", run_swap<kNotShared>},
    {"large-array", "a thread's stack overflowed", run_swap<kLargeArray>},
    {"too-little-shared", "carve: 1024 bytes of the launch's 1008", run_swap<kRight, 1008>},
    {"dirty-workspace", "take_ticket: the counter is 7 before", run_dirty},
};

static std::string error_of(const Planted& bug) {
  try {
    bug.run();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

static void check_planted(const Planted& bug) {
  std::string where, first;
  for (const Scheduled& s : kSchedules) {
    settings.schedule = s.schedule;
    settings.seed = s.seed;
    const std::string error = error_of(bug);
    if (error.find(bug.says) == std::string::npos) continue;
    if (where.empty()) first = error;
    where += (where.empty() ? "" : ",") + std::string(s.name);
  }
  if (where.empty()) die(std::string(bug.name) + " was not seen");
  std::printf("caught %s by %s | %s\n", bug.name, where.c_str(), first.c_str());
}

// A sum of 2,048 positive products against double: rounding to nearest errs either way, by about
// the square root of the roundings, truncation always downwards and by their number.
static void check_accumulation() {
  settings.schedule = Schedule::kAscending;
  double errors[2];
  for (int model = 0; model < 2; ++model) {
    settings.accumulation = model ? Accumulation::kTruncating : Accumulation::kNearest;
    const int K = 2048;
    Memory a(2 * K), b(2 * K * 8);
    double truth = 0;
    state = 3;
    for (int k = 0; k < K; ++k) {
      const double x = store<Bf16>(std::fabs(uniform()), a.data, k);
      double y = 0;
      const float other = std::fabs(uniform());
      for (int j = 0; j < 8; ++j) y = store<Bf16>(other, b.data, j * K + k);
      truth += x * y;
    }
    std::vector<float> c(8);
    emulated::launch(gemm<Bf16, false, kRight>, 1, 128, kGemmBytes,
                     GemmParams{a.data, b.data, c.data(), 1, 8, K});
    errors[model] = (c[0] - truth) / truth;
  }
  check_right("gemm-truncating", run_gemm<F16, true, kRight>);
  settings.accumulation = Accumulation::kNearest;
  std::printf("accumulation %.2e %.2e\n", errors[0], errors[1]);
  if (!(std::fabs(errors[0]) < 2e-6)) die("rounding to nearest lost too much");
  if (!(errors[1] < -5e-6 && errors[1] > -3e-5)) die("truncation does not bias the sum down");
}

// Every 16-bit pattern there and back, and neighbours of float32 against the definition.
template <typename Format>
void check_format(int mantissa, int least) {
  for (unsigned bits = 0; bits < 0x10000u; ++bits) {
    const float x = widen<Format>(std::uint16_t(bits));
    if (x == x ? narrow<Format>(x) != bits : narrow<Format>(x) != 0x7fff) die("a format's bits");
  }
  state = 4;
  for (int i = 0; i < 100000; ++i) {
    const float x = std::ldexp(uniform(), int(state >> 20) % 34 - 26);
    const int exponent = x == 0 ? least : std::max(std::ilogb(x), least);
    const double unit = std::ldexp(1.0, exponent - mantissa);
    if (widen<Format>(narrow<Format>(x)) != std::nearbyint(x / unit) * unit) die("rounding");
  }
  if (unpack<Format>(pack<Format>(1.5f, -2.0f)).lo != 1.5f) die("pack");
  if (unpack<Format>(pack<Format>(1.5f, -2.0f)).hi != -2.0f) die("pack");
}

static void check_numbers() {
  check_format<Bf16>(7, -126);
  check_format<F16>(10, -14);
  if (narrow<F16>(65519.0f) != 0x7bff || narrow<F16>(65520.0f) != 0x7c00) die("the end of f16");
  if (narrow<Bf16>(kInfinity) != 0x7f80 || narrow<F16>(-kInfinity) != 0xfc00) die("infinity");
  if (float_of(to_tf32(1 + 0x1p-11f)) != 1 + 0x1p-10f) die("a tie of tf32 goes away from zero");
  if (float_of(to_tf32(-1 - 0x1p-12f)) != -1) die("tf32");
  if (max_nan(kNaN, 1) == max_nan(kNaN, 1) || max_nan(1, kNaN) == max_nan(1, kNaN)) die("max_nan");
  if (max_nan(-1, 2) != 2 || exp2_approx(3) != 8 || exp2_approx(-140) != 0) die("max, exp2");
  std::printf("right numbers\n");
}

static double busy_seconds(int products) {
  settings.schedule = Schedule::kAscending;
  Vectors v(128 * 256, 1);
  const auto start = std::chrono::steady_clock::now();
  emulated::launch(busy<256>, 128, 256, 4096, v.params(products));
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  for (int i = 0; i < 128 * 256; ++i)
    if (v.ys()[i] != 64.0f * float(products)) die("busy");
  return took.count();
}

int main(int argc, char** argv) {
  if (argc == 3) {
    std::printf("%.2f s\n", busy_seconds(std::atoi(argv[2])));
    return 0;
  }
  if (argc == 2) {  // for a sanitizer
    for (const Planted& bug : kPlanted)
      if (argv[1] == std::string(bug.name)) std::printf("%s\n", error_of(bug).c_str());
    return 0;
  }
  check_numbers();
  check_right("gemm-bf16", run_gemm<Bf16, false, kRight>);
  check_right("gemm-bf16-trans", run_gemm<Bf16, true, kRight>);
  check_right("gemm-f16", run_gemm<F16, false, kRight>);
  check_right("gemm-f16-trans", run_gemm<F16, true, kRight>);
  check_right("gemm-tf32", run_gemm<Tf32, false, kRight>);
  check_right("twice-bf16", run_twice<Bf16>);
  check_right("twice-f16", run_twice<F16>);
  check_right("swap", run_swap<kRight>);
  check_right("normalise", run_normalise<kRight>);
  check_right("total", run_total<kRight>);
  check_accumulation();
  if (CLAE_ASAN || CLAE_TSAN) return 0;  // which end the program where they see a bug
  for (const Planted& bug : kPlanted) check_planted(bug);
  std::printf("busy %.2f\n", busy_seconds(32));
  return 0;
}
