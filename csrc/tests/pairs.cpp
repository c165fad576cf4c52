// Every instruction set against double loops, on memory of exactly the size that may be touched,
// filled with NaN first. Prints the instruction set that would run and the largest error.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <vector>

#include "../cpu/contrast.h"
#include "../cpu/pair_sweep.h"

using namespace clae_fast;

static std::uint64_t state = 1;
static double uniform() {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return double(state >> 33) / double(1u << 31) * 2 - 1;
}

// Runs a step's tasks backwards (none may depend on an earlier one), or the first alone.
template <typename C>
struct Serial {
  template <typename F>
  void operator()(std::int64_t n, double, const F& f) const {
    for (std::int64_t i = n - 1; i >= 0; --i) f(i, buffer());
  }
  template <typename F>
  std::int64_t some(std::int64_t n, double work, std::int64_t first, const F& f) const {
    if (!one_by_one) {
      (*this)(n, work, f);
      return 0;
    }
    f(first, buffer());
    return first + 1 < n ? first + 1 : 0;
  }
  C* buffer() const {
    std::memset(static_cast<void*>(tile.get()), 0xff, sizeof(Tile));
    return tile->data;
  }

  bool one_by_one;
  struct alignas(64) Tile {
    C data[kBuffer];
  };
  std::unique_ptr<Tile> tile{new Tile};
};

// How the exponentials were kept, over all runs.
static int modes[3];
template <typename C>
static void count(const Contrast<C>& job) {
  ++modes[job.mode()];
}
template <typename C>
static void count(const PairSweep<C>&) {}

// With a fresh object for every step and task, as a paused caller has, or for every step.
template <typename C, typename Make>
static void run(const Make& make, Isa isa, bool one_by_one = false) {
  auto sized = make();
  sized.use_isa(isa);
  Arena sizes;
  sized.place(sizes);
  const std::size_t bytes = sizes.used() + 64;
  const std::unique_ptr<char[]> block(new char[bytes]);
  std::memset(block.get(), 0xff, bytes);
  char* memory = block.get() + (64 - reinterpret_cast<std::uintptr_t>(block.get()) % 64) % 64;
  const Serial<C> parallel{one_by_one};
  for (std::int64_t step = 0, task = 0;;) {
    auto now = make();
    now.use_isa(isa);
    Arena arena(memory);
    now.place(arena);
    count(now);
    now.resume(step);
    if (step >= now.steps()) return;
    task = now.run(step, task, parallel);
    if (task == 0) ++step;
  }
}

static double worst = 0;
static bool ok = true;
static void compare(const char* what, Isa isa, const std::vector<double>& a,
                    const std::vector<double>& b, double tolerance) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < b.size(); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  const double error = std::sqrt(difference / std::max(norm, 1e-66));  // float ends at 1e-38
  worst = std::max(worst, error);
  if (!(error <= tolerance)) {
    std::printf("%s on %s: error %g\n", what, isa_name(isa), error);
    ok = false;
  }
}

template <typename C>
static std::vector<double> doubles(const std::vector<C>& x) {
  return std::vector<double>(x.begin(), x.end());
}
template <typename C>
static std::vector<C> matrix(std::int64_t n) {
  std::vector<C> x(n);
  for (C& v : x) v = C(uniform());
  return x;
}
template <typename C>
static Matrix view(const std::vector<C>& x, std::int64_t rows) {
  const Kind kind = sizeof(C) == 8 ? Kind::kDouble : Kind::kFloat;
  return {x.data(), rows, rows == 0 ? 0 : std::int64_t(x.size()) / rows, kind};
}

// Losses, dq and dk of one_way and two_way over unit rows, by loops in double.
template <typename C>
static void contrast_truth(Form form, const std::vector<C>& q, const std::vector<C>& k,
                           std::int64_t B, std::int64_t D, double t, std::vector<double>& loss,
                           std::vector<double>& gradient, double& dscale) {
  std::vector<double> z(2 * B * D), inverse(2 * B);
  for (std::int64_t r = 0; r < 2 * B; ++r) {
    const C* x = r < B ? &q[r * D] : &k[(r - B) * D];
    double squares = 0;
    for (std::int64_t d = 0; d < D; ++d) squares += double(x[d]) * double(x[d]);
    inverse[r] = 1 / std::sqrt(squares);
    for (std::int64_t d = 0; d < D; ++d) z[r * D + d] = double(x[d]) * inverse[r];
  }
  const auto dot = [&](std::int64_t a, std::int64_t b) {
    double sum = 0;
    for (std::int64_t d = 0; d < D; ++d) sum += z[a * D + d] * z[b * D + d];
    return sum;
  };
  loss.clear();
  dscale = 0;
  std::vector<double> dz(2 * B * D);
  const auto anchor = [&](std::int64_t row, std::int64_t positive, std::int64_t from,
                          std::int64_t to) {
    double top = -1e300, negatives = 0;
    for (std::int64_t c = from; c < to; ++c) {
      if (c != row) top = std::max(top, t * dot(row, c));
    }
    for (std::int64_t c = from; c < to; ++c) {
      if (c != row && c != positive) negatives += std::exp(t * dot(row, c) - top);
    }
    const double of_positive = std::exp(t * dot(row, positive) - top);
    loss.push_back(std::log1p(negatives / of_positive));
    const double all = negatives + of_positive;
    for (std::int64_t c = from; c < to; ++c) {
      if (c == row) continue;
      const double e = std::exp(t * dot(row, c) - top);
      const double g = c == positive ? -negatives / all : e / all;
      dscale += g * dot(row, c);
      for (std::int64_t d = 0; d < D; ++d) {
        dz[row * D + d] += t * g * z[c * D + d];
        dz[c * D + d] += t * g * z[row * D + d];
      }
    }
  };
  for (std::int64_t i = 0; i < B; ++i) {
    if (form == Form::kNtXent) anchor(i, i + B, 0, 2 * B);
    if (form != Form::kNtXent) anchor(i, i + B, B, 2 * B);
    if (form == Form::kTwoWay) anchor(i + B, i, 0, B);
  }
  for (std::int64_t i = 0; form == Form::kNtXent && i < B; ++i) anchor(i + B, i, 0, 2 * B);
  gradient.assign(2 * B * D, 0);
  for (std::int64_t r = 0; r < 2 * B; ++r) {
    double radial = 0;
    for (std::int64_t d = 0; d < D; ++d) radial += dz[r * D + d] * z[r * D + d];
    for (std::int64_t d = 0; d < D; ++d) {
      gradient[r * D + d] = (dz[r * D + d] - radial * z[r * D + d]) * inverse[r];
    }
  }
}

template <typename C>
static void check_contrast(Isa isa, std::int64_t room, std::int64_t B, std::int64_t D, double t,
                           double tolerance) {
  const std::vector<C> q = matrix<C>(B * D), k = matrix<C>(B * D);
  for (Form form : {Form::kNtXent, Form::kOneWay, Form::kTwoWay}) {
    std::vector<double> loss, gradient;
    double slope;
    contrast_truth(form, q, k, B, D, t, loss, gradient, slope);
    std::vector<C> rows(loss.size(), C(NAN)), lse(2 * B), lse_col(B), dq(B * D, C(NAN)),
        dk(B * D, C(NAN)), dscale(1);
    double loss_sum = 0;  // beside the slope, which may be next to nothing
    for (double v : loss) loss_sum += v;
    for (int need = 0; need < 8; ++need) {
      const ContrastOutputs<C> out{rows.data(),
                                   lse.data(),
                                   lse_col.data(),
                                   need & 1 ? dq.data() : nullptr,
                                   need & 2 ? dk.data() : nullptr,
                                   nullptr,
                                   need & 4 ? dscale.data() : nullptr};
      run<C>(
          [&] {
            Contrast<C> job(form, view(q, B), view(k, B), nullptr, D, t, true, out);
            job.use_room(room);
            return job;
          },
          isa, need % 3 == 1);
      compare("loss", isa, doubles(rows), loss, tolerance);
      if (need & 4)
        compare("dscale", isa, {double(dscale[0]), loss_sum}, {slope, loss_sum}, tolerance);
      if (need & 1) {
        compare("dq", isa, doubles(dq), {gradient.begin(), gradient.begin() + B * D}, tolerance);
      }
      if (need & 2) {
        compare("dk", isa, doubles(dk), {gradient.begin() + B * D, gradient.end()}, tolerance);
      }
    }
  }
}

// What has no loops of its own here (shared negatives, rows as they are, any sign of the scale, one
// number for all rows) is the same however the exponentials are kept: as on the portable path in
// double with room for all, which the tests of Python hold to the specification.
template <typename C>
static std::vector<double> any_contrast(Form form, bool queue, bool normalize, double t, int need,
                                        const std::vector<C>& q, const std::vector<C>& k,
                                        const std::vector<C>& negatives, std::int64_t B,
                                        std::int64_t D, Isa isa, std::int64_t room) {
  const std::int64_t M = std::int64_t(negatives.size()) / D;
  std::vector<C> loss(1), lse(2 * B), lse_col(B), dq(B * D), dk(B * D), dn(M * D), dscale(1);
  const ContrastOutputs<C> out{loss.data(),
                               lse.data(),
                               lse_col.data(),
                               need & 1 ? dq.data() : nullptr,
                               need & 2 ? dk.data() : nullptr,
                               queue && need & 1 ? dn.data() : nullptr,
                               need & 4 ? dscale.data() : nullptr,
                               true,
                               C(0.125)};
  const Matrix rows = view(negatives, M);
  run<C>(
      [&] {
        Contrast<C> job(form, view(q, B), view(k, B), queue ? &rows : nullptr, D, t, normalize,
                        out);
        job.use_room(room);
        return job;
      },
      isa, need == 3);
  std::vector<double> all = doubles(loss);
  for (const auto* part : {&lse, &dq, &dk, &dn, &dscale}) {
    all.insert(all.end(), part->begin(), part->end());
  }
  return all;
}

template <typename C>
static void check_rooms(Isa isa, std::int64_t room, std::int64_t B, std::int64_t D,
                        double tolerance) {
  const std::vector<C> q = matrix<C>(B * D), k = matrix<C>(B * D), n = matrix<C>((B + 7) * D);
  const std::vector<double> Q = doubles(q), K = doubles(k), N = doubles(n);
  for (int kind = 0; kind < 4; ++kind) {
    const Form form = kind == 0 ? Form::kNtXent : kind == 3 ? Form::kTwoWay : Form::kOneWay;
    for (bool normalize : {true, false}) {
      for (double t : {3.0, -2.0}) {
        for (int need : {0, 1, 2, 3, 7}) {
          compare("rooms", isa,
                  any_contrast(form, kind == 2, normalize, t, need, q, k, n, B, D, isa, room),
                  any_contrast(form, kind == 2, normalize, t, need, Q, K, N, B, D, Isa::kBaseline,
                               std::int64_t(32) << 20),
                  tolerance);
        }
      }
    }
  }
}

// bfloat16 inputs: the loss is as exact as float32's, weights may be rounded on the way.
static void check_bfloat16(Isa isa, std::int64_t room, std::int64_t B, std::int64_t D, double t) {
  std::vector<float> q = matrix<float>(B * D), k = matrix<float>(B * D);
  const auto halves = [](std::vector<float>& x) {
    std::vector<BFloat16> out(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) {
      std::uint32_t bits;
      std::memcpy(&bits, &x[i], 4);
      bits &= 0xffff0000u;
      std::memcpy(&x[i], &bits, 4);
      out[i].bits = std::uint16_t(bits >> 16);
    }
    return out;
  };
  const std::vector<BFloat16> q16 = halves(q), k16 = halves(k);
  for (Form form : {Form::kNtXent, Form::kOneWay, Form::kTwoWay}) {
    std::vector<double> loss, gradient;
    double slope;
    contrast_truth(form, q, k, B, D, t, loss, gradient, slope);
    std::vector<float> rows(loss.size(), NAN), lse(2 * B), lse_col(B), dq(B * D, NAN),
        dk(B * D, NAN);
    const ContrastOutputs<float> out{rows.data(), lse.data(), lse_col.data(), dq.data(),
                                     dk.data(),   nullptr,    nullptr};
    const Matrix a{q16.data(), B, D, Kind::kBFloat16}, b{k16.data(), B, D, Kind::kBFloat16};
    run<float>(
        [&] {
          Contrast<float> job(form, a, b, nullptr, D, t, true, out);
          job.use_room(room);
          return job;
        },
        isa);
    compare("loss", isa, doubles(rows), loss, t > 80 ? 2e-4 : 2e-5);
    // One negative alone can lie beside the positive: what is left of their difference is rounded.
    const double tolerance = B == 2 ? 2e-2 : 4e-3;
    compare("dq", isa, doubles(dq), {gradient.begin(), gradient.begin() + B * D}, tolerance);
    compare("dk", isa, doubles(dk), {gradient.begin() + B * D, gradient.end()}, tolerance);
  }
}

// One operator on inputs of another type: what the first type's results are compared with.
template <typename C>
struct Pairs {
  std::vector<C> q, k, row_lse, row_weight, col_lse, col_weight;
  std::vector<std::int32_t> row_ids, col_ids;
  std::int64_t N, M, D;

  template <typename W>
  Pairs<W> as() const {
    const auto wide = [](const std::vector<C>& x) { return std::vector<W>(x.begin(), x.end()); };
    return {wide(q),
            wide(k),
            wide(row_lse),
            wide(row_weight),
            wide(col_lse),
            wide(col_weight),
            row_ids,
            col_ids,
            N,
            M,
            D};
  }

  std::vector<double> run_op(PairOp op, Skip skip, bool ids, double t, Isa isa) const {
    const bool uel = op == PairOp::kUel;
    std::vector<C> out(2 * N + N * D + M * D, C(0));
    PairArguments<C> arg{op, view(q, N), uel ? view(q, N) : view(k, M), D, t, -0.5, 1.5, skip};
    if (ids) arg.row_ids = row_ids.data();
    if (ids) arg.col_ids = uel ? row_ids.data() : col_ids.data();
    arg.row_weight = row_weight.data();
    if (op == PairOp::kGrad) {
      arg.row_lse = row_lse.data();
      arg.col_lse = col_lse.data();
      arg.col_weight = col_weight.data();
    }
    arg.rows = out.data();
    arg.slope = out.data() + N;
    if (op != PairOp::kLse) arg.dq = out.data() + 2 * N;
    if (op == PairOp::kSigmoid) arg.dk = out.data() + 2 * N + N * D;
    run<C>([&] { return PairSweep<C>(arg); }, isa, ids);
    for (C& v : out) v = std::isinf(v) ? std::copysign(C(1), v) : v;
    return doubles(out);
  }
};

// The other operators: float against the portable path in double, which the tests of Python hold to
// the specification, and double against that path.
template <typename C>
static void check_pairs(Isa isa, std::int64_t N, std::int64_t M, std::int64_t D, double t,
                        double tolerance) {
  Pairs<C> pairs{matrix<C>(N * D),
                 matrix<C>(M * D),
                 matrix<C>(N),
                 matrix<C>(N),
                 matrix<C>(M),
                 matrix<C>(M),
                 {},
                 {},
                 N,
                 M,
                 D};
  for (C& v : pairs.row_lse) v += C(t);
  for (C& v : pairs.col_lse) v += C(t);
  for (std::int64_t i = 0; i < N; ++i) pairs.row_ids.push_back(std::int32_t(i % 5));
  for (std::int64_t i = 0; i < M; ++i) pairs.col_ids.push_back(std::int32_t(i % 7));
  const Pairs<double> wide = pairs.template as<double>();
  for (PairOp op : {PairOp::kLse, PairOp::kGrad, PairOp::kMean, PairOp::kSigmoid, PairOp::kUel}) {
    for (Skip skip : {Skip::kNone, Skip::kDiagonal, Skip::kTwins}) {
      for (bool ids : {false, true}) {
        compare("pairs", isa, pairs.run_op(op, skip, ids, t, isa),
                wide.run_op(op, skip, ids, t, Isa::kBaseline), tolerance);
      }
    }
  }
}

// Bytes for exponentials: of no tile, of some, of all but what the panels' memory makes room for,
// and of all.
constexpr std::int64_t kRooms[] = {0, 100 << 10, 220 << 10, 32 << 20};

int main() {
  for (Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (!isa_supported(isa)) continue;
    for (std::int64_t B : {2, 9, 70, 133}) {
      for (std::int64_t D : {1, 3, 32, 45}) {
        for (double t : {3.0, 90.0}) {
          if (D == 1) continue;
          for (std::int64_t room : kRooms) {
            check_contrast<float>(isa, room, B, D, t, t > 80 ? 2e-4 : 2e-5);
            check_contrast<double>(isa, room, B, D, t, 1e-11);
            check_bfloat16(isa, room, B, D, t);
          }
        }
        for (std::int64_t room : kRooms) {
          if (D == 1 || D == 32 || B == 70) continue;
          check_rooms<float>(isa, room, B, D, 2e-5);
          check_rooms<double>(isa, room, B, D, 1e-11);
        }
        for (double t : {1.3, -2.0, 0.0}) {
          check_pairs<float>(isa, 2 * B, B + 3, D, t, 1e-5);
          check_pairs<double>(isa, B, 2 * B, D, t, 1e-12);
        }
      }
    }
  }
  for (int mode = 0; mode < 3; ++mode) {
    if (modes[mode] == 0) std::printf("mode %d was never run\n", mode), ok = false;
  }
  std::printf("%s %g\n", isa_name(best_isa()), worst);
  return ok ? 0 : 1;
}
