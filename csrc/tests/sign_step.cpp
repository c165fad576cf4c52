// Every instruction set against the portable loop, bit for bit, on buffers of exactly the size that
// may be touched. Prints the instruction set that would run and a hash of all results.
#include "../cpu/sign_step.h"

#include <cmath>
#include <cstdio>
#include <memory>

using namespace clae_fast;

static std::uint64_t state = 1, hash = 14695981039346656037ull;
static std::uint32_t next() {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<std::uint32_t>(state >> 33);
}
static float value() {
  const float special[] = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, 1e-42f, 3e38f, 0.5f};
  const std::uint32_t r = next();
  return r % 16 == 0 ? special[next() % 8] : static_cast<float>(next() % 4001) / 2000.0f - 1.0f;
}
static void put(float v, float* out) { *out = v; }
static void put(float v, double* out) { *out = v * (1.0 + 1e-9); }
static void put(float v, BFloat16* out) {
  std::uint32_t bits;
  std::memcpy(&bits, &v, 4);
  out->bits = static_cast<std::uint16_t>(bits >> 16 | (v != v ? 0x40 : 0));
}

template <typename T>
static std::unique_ptr<T[]> fill(std::int64_t n) {
  std::unique_ptr<T[]> data(new T[n]);
  for (std::int64_t i = 0; i < n; ++i) put(value(), &data[i]);
  return data;
}

template <typename S>
static bool check(std::int64_t n, std::int64_t columns, std::int64_t inner) {
  using C = typename SignStep<S>::C;
  const auto x = fill<S>(n), grad = fill<S>(n), x0 = fill<S>(n), expected = fill<S>(n);
  const auto table = fill<C>(4 * columns);
  SignStep<S> s{x.get(), grad.get(), x0.get(), expected.get(), C(0.25), C(0.5), C(-0.75), C(1)};
  std::vector<C> storage;
  if (columns > 0) {
    s.table = table.get();
    s.columns = columns;
    s.inner = inner;
  }
  sign_step(Isa::kBaseline, s, 0, n);
  repeat_table(s, storage);
  const auto* bytes = reinterpret_cast<const unsigned char*>(expected.get());
  for (std::int64_t i = 0; i < n * std::int64_t(sizeof(S)); ++i) {
    hash = (hash ^ bytes[i]) * 1099511628211ull;
  }
  for (Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (!isa_supported(isa)) continue;
    const std::unique_ptr<S[]> out(new S[n]);
    std::memset(static_cast<void*>(out.get()), 0xff, n * sizeof(S));
    s.out = out.get();
    sign_step(isa, s, 0, n / 3);
    sign_step(isa, s, n / 3, n);
    if (std::memcmp(out.get(), expected.get(), n * sizeof(S)) != 0) {
      std::printf("%s differs: n %ld columns %ld inner %ld\n", isa_name(isa), long(n),
                  long(columns), long(inner));
      return false;
    }
  }
  return true;
}

int main() {
  bool ok = true;
  for (std::int64_t n : {1, 2, 15, 16, 17, 127, 1031, 9973}) {
    for (std::int64_t columns : {0, 1, 3, 64, 700}) {
      for (std::int64_t inner : {1, 7, 9, 1000}) {
        ok = ok && check<float>(n, columns, inner) && check<double>(n, columns, inner) &&
             check<BFloat16>(n, columns, inner);
      }
    }
  }
  std::printf("%s %016lx\n", isa_name(best_isa()), static_cast<unsigned long>(hash));
  return ok ? 0 : 1;
}
