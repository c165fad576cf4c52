// What `contrast` does to single rows: positives before the barrier; losses, weights and the way
// back through the normalisation after it. The same as kernels/rows.py.
#pragma once
#include "contrast_slices.h"

namespace clae_fast {
namespace gpu {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

CLAE_DEVICE float scale_of(const Params& p) {
  float value = 1.0f;
  switch (p.scale_type) {
    case kFloat:
      value = *static_cast<const float*>(p.scale_tensor);
      break;
    case kDouble:
      value = float(*static_cast<const double*>(p.scale_tensor));
      break;
    case kBFloat16:
      value = widen<Bf16>(*static_cast<const std::uint16_t*>(p.scale_tensor));
      break;
    case kHalf:
      value = widen<F16>(*static_cast<const std::uint16_t*>(p.scale_tensor));
      break;
    default:
      break;
  }
  return p.reciprocal ? p.scale / value : p.scale * value;
}

// What exponents refer to. Of unit rows |s| <= |t|: one maximum serves all rows while sums of n
// terms, and their inverses, stay within float32. All threads find the same.
struct Exponents {
  float t;
  float zero;  // the known maximum, natural units
  bool known;
};
CLAE_DEVICE Exponents exponents_of(const Params& p) {
  const float t = scale_of(p), bound = fabsf(t) * 1.008f;
  const float n = float(p.fold ? 2 * p.N : p.N);
  const bool known = p.normalize && t > 0.0f && 2.0f * bound + kLn2 * log2_approx(n) <= 140.0f;
  return {t, bound - fmaxf(2.0f * bound - 80.0f, 0.0f), known};
}

// log(1 + e^x) and its slope; NaN stays.
struct Softplus {
  float value, slope;
};
CLAE_DEVICE Softplus softplus(float x) {
  const float e = expf(-fabsf(x));
  return {(x > 0.0f ? x : x <= 0.0f ? 0.0f : x) + log1pf(e), (x >= 0.0f ? 1.0f : e) / (1.0f + e)};
}

// A row, spread over a warp: lane l has the elements l, l + 32, ...
struct Row {
  float x[kMaxWidth / kWarp];
};

template <typename Format>
CLAE_DEVICE Row load_row(const char* at, int D) {
  using T = typename Stored<Format>::type;
  Row row;
  CLAE_UNROLL
  for (int i = 0; i < kMaxWidth / kWarp; ++i) {
    const int d = lane_index() + kWarp * i;
    row.x[i] = d < D ? to_float<Format>(reinterpret_cast<const T*>(at)[d]) : 0.0f;
  }
  return row;
}

CLAE_DEVICE float warp_sum(float x) {
  CLAE_UNROLL
  for (int mask = 16; mask; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}
CLAE_DEVICE float dot(const Row& a, const Row& b) {
  float sum = 0.0f;
  CLAE_UNROLL
  for (int i = 0; i < kMaxWidth / kWarp; ++i) sum += a.x[i] * b.x[i];
  return warp_sum(sum);
}

struct UnitRow {
  Row z;
  Norm norm;
};
template <typename Format>
CLAE_DEVICE UnitRow load_unit_row(const Params& p, const char* at) {
  UnitRow row{load_row<Format>(at, p.D), {}};
  row.norm = norm_of(dot(row.z, row.z), p.normalize);
  CLAE_UNROLL
  for (int i = 0; i < kMaxWidth / kWarp; ++i) row.z.x[i] *= row.norm.inverse;
  return row;
}

// The rows of pair i; nt_xent has both sets in one operand.
CLAE_DEVICE const char* row_of_pair(const Params& p, int set, int i) {
  if (p.form != kNtXent) return p.operand[set].row(i);
  return p.operand[0].row(set == 0 || p.fold ? i : p.B + i);
}

// The cosines of the positives, from the unrounded rows: 1 - |a - b|^2 / 2 on the sphere keeps its
// digits where the pair is aligned. Warps of the whole grid share the pairs.
template <typename Format>
CLAE_DEVICE void positives(const Params& p) {
  const int warps = kThreads / kWarp;
  for (int i = block_index() + block_count() * warp_index(); i < p.B; i += block_count() * warps) {
    const UnitRow a = load_unit_row<Format>(p, row_of_pair(p, 0, i));
    const UnitRow b = load_unit_row<Format>(p, row_of_pair(p, 1, i));
    float apart = 0.0f, alarm = 0.0f;
    CLAE_UNROLL
    for (int j = 0; j < kMaxWidth / kWarp; ++j) {
      const float d = a.z.x[j] - b.z.x[j];
      apart += d * d;
      alarm += 0.0f * a.z.x[j] + 0.0f * b.z.x[j];
    }
    apart = warp_sum(apart);
    alarm = warp_sum(alarm);
    const float product = dot(a.z, b.z);
    if (lane_index() == 0) {
      const bool both = a.norm.on_sphere && b.norm.on_sphere;
      p.cosine[i] = both ? 1.0f - 0.5f * apart : product;
      p.alarm[i] = alarm;
    }
  }
}

// The sum of a row's numbers, one a chunk, in their order.
CLAE_DEVICE float sum_chunks(const Params& p, const float* numbers, int side, int row) {
  const float* at = numbers + std::int64_t(side) * p.chunks * p.N + row;
  float sum = 0.0f;
  CLAE_UNROLL_BY(4)
  for (int c = 0; c < p.chunks; ++c) sum += load_l2(at + std::int64_t(c) * p.N);
  return sum;
}

// Of a row: log-sum-exp over its negatives, loss, 1 - p of its positive; and what its column or row
// of G is made with: weight e^(s - level), or weight alone times e^(s - zero) where the maximum is
// known (level is then unused).
struct Weights {
  float lse, loss, slope, weight, level;
};
CLAE_DEVICE Weights weights_of(const Params& p, const Exponents& e, int side, int row) {
  const float positive = e.t * load_l2(p.cosine + (row < p.B ? row : row - p.B));
  const std::int64_t first = std::int64_t(side) * p.chunks * p.N + row;
  const float twice = p.fold ? 2.0f : 1.0f;
  Weights w;
  if (e.known) {
    const float sum = twice * sum_chunks(p, p.sums, side, row);
    w.lse = sum == 0.0f ? -kInfinity : e.zero + logf(sum);
    w.level = 0.0f;
    // (1 - p) e^(zero - lse), with 1 - p = e^lse / (e^lse + e^positive)
    w.weight = 1.0f / (sum + expf(positive - e.zero));
  } else {
    float top = -kInfinity, sum = 0.0f;
    for (int c = 0; c < p.chunks; ++c) {
      const std::int64_t at = first + std::int64_t(c) * p.N;
      const float more = load_l2(p.sums + at), here = load_l2(p.tops + at);
      if (more == 0.0f) continue;  // saw no column
      const float now = fmaxf(top, here);
      sum = sum * (top == -kInfinity ? 0.0f : exp2f(top - now)) + more * exp2f(here - now);
      top = now;
    }
    sum *= twice;
    w.level = sum == 0.0f ? 0.0f : top + log2f(sum);
    w.lse = sum == 0.0f ? -kInfinity : kLn2 * w.level;
  }
  const Softplus s = softplus(w.lse - positive);
  w.loss = s.value;
  w.slope = s.slope;
  if (!e.known) w.weight = s.slope;
  return w;
}

// Whether rows of a side have sums of their own, and whether those of its columns count.
CLAE_DEVICE bool rows_count(const Params& p, int side) { return p.form != kOneWay || side == 0; }
CLAE_DEVICE bool cols_count(const Params& p, int side) { return p.form != kOneWay || side == 1; }

// The parts of a row's gradient, in their order: as many loads as can be are on their way at once.
CLAE_DEVICE Row sum_parts(const Params& p, int side, int row) {
  const float* part = p.partial + (std::int64_t(side) * p.chunks * p.N + row) * p.D + lane_index();
  const std::int64_t step = std::int64_t(p.N) * p.D;
  Row u;
  CLAE_UNROLL
  for (int i = 0; i < kMaxWidth / kWarp; ++i) u.x[i] = 0.0f;
  CLAE_UNROLL_BY(2)
  for (int c = 0; c < p.chunks; ++c, part += step) {
    CLAE_UNROLL
    for (int i = 0; i < kMaxWidth / kWarp; ++i) {
      if (lane_index() + kWarp * i < p.D) u.x[i] += load_l2(part + kWarp * i);
    }
  }
  return u;
}

// What the rows of a set are called where their results go: a set is q or k.
struct Place {
  int set, index;
};
CLAE_DEVICE Place place_of(const Params& p, int side, int row) {
  if (p.form != kNtXent) return {side, row};
  return row < p.B ? Place{0, row} : Place{1, row - p.B};
}

// Loss, log-sum-exp and gradient of one row by a warp; u are the sums of G Y.
template <typename Format>
CLAE_DEVICE void finish_row(const Params& p, const Exponents& e, int side, int row, float alarm) {
  const Place place = place_of(p, side, row);
  const int other_row = p.form == kNtXent && !p.fold ? (row < p.B ? row + p.B : row - p.B) : row;
  const int other_side = p.form == kNtXent ? side : 1 - side;
  const Weights own = weights_of(p, e, rows_count(p, side) ? side : 0, row);
  float share = own.slope;
  if (p.form != kOneWay) share += weights_of(p, e, other_side, other_row).slope;
  const int copies = p.fold ? 2 : 1;
  if (lane_index() == 0 && rows_count(p, side)) {
    for (int copy = 0; copy < copies; ++copy) {
      const int to = p.form == kTwoWay ? 2 * row + side : row + copy * p.B;
      p.loss[to] = own.loss + alarm;
      (side == 0 ? p.lse[0] : p.lse[1])[row + copy * p.B] = own.lse;
    }
  }
  if (!p.gradient) return;

  const UnitRow mine = load_unit_row<Format>(p, row_of_pair(p, place.set, place.index));
  const UnitRow other = load_unit_row<Format>(p, row_of_pair(p, 1 - place.set, place.index));
  const Row u = sum_parts(p, side, row);
  if (p.dscale != nullptr) {
    // Euler: t dL/dt is half of sum z dz over all rows, or the whole of it over one side.
    // G is rounded where it meets rows, and u with it: where terms cancel, that would show.
    const float exact = sum_chunks(p, p.dots, side, row) / (e.t * kLog2e);
    const float euler = e.t == 0.0f ? dot(mine.z, u) : exact;
    const float cosine = load_l2(p.cosine + place.index);
    const bool half = p.form == kNtXent;
    const float slope = half ? 0.5f * euler - own.slope * cosine : euler - share * cosine;
    if (lane_index() == 0) p.slopes[side * p.N + row] = (half || side == 0 ? slope : 0.0f) * copies;
  }
  Row g;
  CLAE_UNROLL
  for (int i = 0; i < kMaxWidth / kWarp; ++i) {
    const float own_z = mine.norm.on_sphere ? mine.z.x[i] : 0.0f;
    g.x[i] = e.t * (u.x[i] - share * (other.z.x[i] - own_z));
  }
  const float along = dot(mine.z, g);
  const float radial = mine.norm.on_sphere ? along : 0.0f;
  for (int copy = 0; copy < copies; ++copy) {
    float* out = copy == 0 && place.set == 0 ? p.gradients[0] : p.gradients[1];
    if (out == nullptr) continue;
    CLAE_UNROLL
    for (int i = 0; i < kMaxWidth / kWarp; ++i) {
      const int d = lane_index() + kWarp * i;
      if (d < p.D) {
        out[std::int64_t(place.index) * p.D + d] =
            (g.x[i] - radial * mine.z.x[i]) * (mine.norm.inverse * p.factor);
      }
    }
  }
}

}  // namespace gpu
}  // namespace clae_fast
