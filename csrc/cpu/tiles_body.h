// One tile of the similarity matrix, and what is made of it; see pairs.h.

template <typename C>
static inline std::int64_t padded_columns(const Side<C>& side, std::int64_t tile) {
  return (side.size(tile) + kPanel - 1) / kPanel * kPanel;
}

// tile[i][j] = <a_i, b_j>, rows of kEdge elements. Whole blocks of registers are computed: past the
// last row and column stands what `mask` then takes away.
template <typename C>
static void dot_tile(const Sweep<C>& s, std::int64_t I, std::int64_t J, C* tile) {
  constexpr int kColumns = 2 * kLanes<C>;
  const std::int64_t rows = s.row.size(I), cols = s.col.size(J), width = s.width;
  const C* a = s.row.x.panels + s.row.begin(I) * width;
  const C* b = s.col.x.panels + s.col.begin(J) * width;
  for (std::int64_t j = 0; j < cols; j += kPanel) {
    for (int sub = 0; sub < kPanel; sub += kColumns) {
      for (std::int64_t i = 0; i < rows; i += kRows) {
        block_product<C, 1, kPanel, false>(a + i / kPanel * kPanel * width + i % kPanel,
                                           b + j * width + sub, width, tile + i * kEdge + j + sub,
                                           kEdge);
      }
    }
  }
}

#include "half_body.h"

// The three products of a sweep, on bfloat16 units where the sweep says so.
static inline bool half_dots(const Sweep<float>& s, std::int64_t I, std::int64_t J, float* tile) {
#if CLAE_FAST_BF16
  if (s.half) half_dot_tile(s, I, J, tile);
#endif
  static_cast<void>(I), static_cast<void>(J), static_cast<void>(tile);
  return CLAE_FAST_BF16 && s.half;
}
static inline bool half_into(const Sweep<float>& s, std::int64_t I, std::int64_t J, bool rows,
                             float* tile) {
#if CLAE_FAST_BF16
  if (s.half) rows ? half_rows(s, I, J, tile) : half_columns(s, I, J, tile);
#endif
  static_cast<void>(I), static_cast<void>(J), static_cast<void>(rows), static_cast<void>(tile);
  return CLAE_FAST_BF16 && s.half;
}
static inline bool half_dots(const Sweep<double>&, std::int64_t, std::int64_t, double*) {
  return false;
}
static inline bool half_into(const Sweep<double>&, std::int64_t, std::int64_t, bool, double*) {
  return false;
}

template <typename C>
static inline void leave_out(C* tile, std::int64_t i, std::int64_t j, std::int64_t cols) {
  if (j >= 0 && j < cols) tile[i * kEdge + j] = -__builtin_inf();
}

// -inf where the skip rule says so, and past the last row and column.
template <typename C>
static void mask(const Sweep<C>& s, std::int64_t I, std::int64_t J, C* tile) {
  const std::int64_t i0 = s.row.begin(I), j0 = s.col.begin(J);
  const std::int64_t rows = s.row.size(I), cols = s.col.size(J);
  const std::int64_t all_rows = (rows + kRows - 1) / kRows * kRows;
  const std::int64_t all_cols = (cols + kPanel - 1) / kPanel * kPanel;
  const C out = -__builtin_inf();
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = cols; j < all_cols; ++j) tile[i * kEdge + j] = out;
  }
  for (std::int64_t i = rows; i < all_rows; ++i) {
    for (std::int64_t j = 0; j < all_cols; ++j) tile[i * kEdge + j] = out;
  }
  if (s.skip != Skip::kNone) {
    const std::int64_t half = s.col.x.rows / 2;
    for (std::int64_t i = 0; i < rows; ++i) {
      const std::int64_t own = i0 + i + s.offset;
      leave_out(tile, i, own - j0, cols);
      if (s.skip == Skip::kTwins) {
        leave_out(tile, i, (own + half) % s.col.x.rows - j0, cols);
      }
    }
  }
  if (s.row.ids != nullptr && s.col.ids != nullptr) {
    for (std::int64_t i = 0; i < rows; ++i) {
      const std::int32_t id = s.row.ids[i0 + i];
      for (std::int64_t j = 0; j < cols; ++j) {
        tile[i * kEdge + j] = s.col.ids[j0 + j] == id ? out : tile[i * kEdge + j];
      }
    }
  }
}

// <a, b> masked with a known maximum, else s = t <a, b>, rounded: a sweep that comes back must meet
// the very same s, or a maximum is not the maximum.
template <typename C>
static void exponents(const Sweep<C>& s, std::int64_t I, std::int64_t J, C* tile) {
  if (!half_dots(s, I, J, tile)) dot_tile(s, I, J, tile);
  if (!s.known) {  // before -inf comes in: the scale may be negative, or 0
    const std::int64_t rows = s.row.size(I), cols = padded_columns(s.col, J);
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = 0; j < cols; j += kLanes<C>) at(tile + i * kEdge + j) *= s.scale;
    }
  }
  mask(s, I, J, tile);
}

// Known maximum: e = 2^(scale * s - shift) once for both directions.
template <typename C>
static void known_sums(const Sweep<C>& s, std::int64_t I, std::int64_t J, bool columns, C* tile,
                       C* stored) {
  const std::int64_t rows = s.row.size(I), cols = padded_columns(s.col, J);
  alignas(64) C of_columns[kEdge];
  for (std::int64_t j = 0; j < cols; ++j) of_columns[j] = C(0);
  for (std::int64_t i = 0; i < rows; ++i) {
    const C* from = tile + i * kEdge;
    C* to = stored == nullptr ? nullptr : stored + i * s.col.edge;
    Vector<C> of_row = {};
    for (std::int64_t j = 0; j < cols; j += kLanes<C>) {
      Vector<C> e = at(from + j) * s.scale - s.shift;
      exp2_of(e);
      of_row += e;
      at(of_columns + j) += e;
      if (to != nullptr) at(to + j) = e;
    }
    if (s.row.sum == nullptr) continue;
    double& sum = s.row.sum[J * s.row_slot + s.row.begin(I) + i];
    sum = (s.row_slot == 0 ? sum : 0.0) + double(sum_of<C>(of_row));
  }
  if (!columns) return;
  double* sums = s.col.sum + I * s.col_slot + s.col.begin(J);
  for (std::int64_t j = 0; j < s.col.size(J); ++j) {
    sums[j] = (s.col_slot == 0 ? sums[j] : 0.0) + double(of_columns[j]);
  }
}

// What a sum relative to the maximum `before` is worth relative to `now`.
template <typename C>
static inline double rescale(C before, C now) {
  return before == now ? 1.0 : __builtin_exp(double(before) - double(now));
}
// The reference point of exponents whose maximum is `top`: any number will do where all are -inf.
template <typename C>
static inline C finite_or_zero(C top) {
  return top == C(-__builtin_inf()) ? C(0) : top;
}

// e^(x - zero) in x's place. The difference comes first: it is exact where x is the maximum.
template <typename C>
CLAE_FAST_INLINE void exp_of_difference(Vector<C>& x, const Vector<C>& zero) {
  x = (x - zero) * C(1.4426950408889634);
  exp2_of(x);
}

// Running maximum of each row; the tile's exponents turn into e^(x - maximum) if `keep`.
template <typename C>
static void running_row(const Side<C>& side, std::int64_t row, C* x, std::int64_t cols, bool keep,
                        double* factor) {
  Vector<C> tops = at(x);
  for (std::int64_t j = kLanes<C>; j < cols; j += kLanes<C>) {
    tops = at(x + j) > tops ? at(x + j) : tops;
  }
  const C before = side.top[row], here = largest_of<C>(tops);
  const C now = here > before ? here : before;
  Vector<C> sums = {}, zero = {};
  zero += finite_or_zero(now);
  for (std::int64_t j = 0; j < cols; j += kLanes<C>) {
    Vector<C> e = at(x + j);
    exp_of_difference<C>(e, zero);
    sums += e;
    if (keep) at(x + j) = e;
  }
  *factor = side.sum[row] == 0.0 ? 1.0 : rescale(before, now);
  side.top[row] = now;
  side.sum[row] = side.sum[row] * *factor + double(sum_of<C>(sums));
}

template <typename C>
static void running_columns(const Side<C>& side, std::int64_t begin, std::int64_t size,
                            std::int64_t rows, const C* tile) {
  for (std::int64_t j = 0; j < size; j += kLanes<C>) {
    Vector<C> tops = at(tile + j);
    for (std::int64_t i = 1; i < rows; ++i) {
      tops = at(tile + i * kEdge + j) > tops ? at(tile + i * kEdge + j) : tops;
    }
    Vector<C> zeros;
    for (int l = 0; l < kLanes<C>; ++l) {
      const C before = j + l < size ? side.top[begin + j + l] : C(0);
      tops[l] = tops[l] > before ? tops[l] : before;
      zeros[l] = finite_or_zero(tops[l]);
    }
    Vector<C> sums = {};
    for (std::int64_t i = 0; i < rows; ++i) {
      Vector<C> e = at(tile + i * kEdge + j);
      exp_of_difference<C>(e, zeros);
      sums += e;
    }
    for (int l = 0; l < kLanes<C> && j + l < size; ++l) {
      double& sum = side.sum[begin + j + l];
      C& top = side.top[begin + j + l];
      sum = (sum == 0.0 ? 0.0 : sum * rescale(top, C(tops[l]))) + double(sums[l]);
      top = tops[l];
    }
  }
}

template <typename C>
static void sums_tile(const Sweep<C>& s, std::int64_t I, std::int64_t J, C* tile) {
  const bool columns = s.col.sum != nullptr && !(s.symmetric && I == J);
  exponents(s, I, J, tile);
  if (s.known) return known_sums(s, I, J, columns, tile, s.stored_tile(I, J));
  const std::int64_t rows = s.row.size(I), cols = padded_columns(s.col, J);
  if (C* stored = s.stored_tile(I, J)) {
    for (std::int64_t i = 0; i < rows; ++i) {
      std::memcpy(stored + i * s.col.edge, tile + i * kEdge, cols * sizeof(C));
    }
  }
  double factor;
  // Columns first: they need every exponent as it is.
  if (columns) running_columns(s.col, s.col.begin(J), s.col.size(J), rows, tile);
  if (s.row.sum == nullptr) return;
  for (std::int64_t i = 0; i < rows; ++i) {
    running_row(s.row, s.row.begin(I) + i, tile + i * kEdge, cols, false, &factor);
  }
}

// out[rows] += tile * blocks, or the tile's transpose. out and blocks start at the first row of
// their tile; a block of 32 columns is `apart` elements from the next.
template <typename C, bool kTransposed>
static void accumulate(const C* tile, std::int64_t rows, std::int64_t steps, const C* blocks,
                       std::int64_t blocks_apart, C* out, std::int64_t out_apart,
                       std::int64_t width_blocks) {
  constexpr int kColumns = 2 * kLanes<C>, kRowStride = kTransposed ? 1 : kEdge,
                kStepStride = kTransposed ? kEdge : 1;
  for (std::int64_t d = 0; d < width_blocks; ++d) {
    for (int sub = 0; sub < kPanel; sub += kColumns) {
      for (std::int64_t i = 0; i < rows; i += kRows) {
        block_product<C, kRowStride, kStepStride, true>(
            tile + i * kRowStride, blocks + d * blocks_apart + sub, steps,
            out + d * out_apart + i * kPanel + sub, kPanel);
      }
    }
  }
}

template <typename C>
static void accumulate_rows(const Sweep<C>& s, std::int64_t I, std::int64_t J, C* tile) {
  if (half_into(s, I, J, true, tile)) return;
  accumulate<C, false>(tile, s.row.size(I), s.col.size(J), s.col.x.blocks + s.col.begin(J) * kPanel,
                       s.col.x.padded * kPanel, s.row.gradient + s.row.begin(I) * kPanel,
                       s.row.x.padded * kPanel, s.width_blocks());
}

template <typename C>
static void accumulate_columns(const Sweep<C>& s, std::int64_t I, std::int64_t J, C* tile) {
  if (half_into(s, I, J, false, tile)) return;
  accumulate<C, true>(tile, s.col.size(J), s.row.size(I), s.row.x.blocks + s.row.begin(I) * kPanel,
                      s.row.x.padded * kPanel, s.col.gradient + s.col.begin(J) * kPanel,
                      s.col.x.padded * kPanel, s.width_blocks());
}

// Weights of a tile with the known maximum: g_ij = e_ij (wa_i + wb_j); either may be absent.
template <typename C>
static void known_weights(const Sweep<C>& s, std::int64_t I, std::int64_t J, C* tile) {
  const std::int64_t rows = s.row.size(I), cols = padded_columns(s.col, J);
  const C* stored = s.stored_tile(I, J);
  if (stored == nullptr) exponents(s, I, J, tile);
  alignas(64) C of_columns[kEdge];
  for (std::int64_t j = 0; j < cols; ++j) {
    of_columns[j] =
        s.col.weight != nullptr && j < s.col.size(J) ? s.col.weight[s.col.begin(J) + j] : C(0);
  }
  for (std::int64_t i = 0; i < rows; ++i) {
    const C weight = s.row.weight == nullptr ? C(0) : s.row.weight[s.row.begin(I) + i];
    C* to = tile + i * kEdge;
    const C* from = stored == nullptr ? nullptr : stored + i * s.col.edge;
    for (std::int64_t j = 0; j < cols; j += kLanes<C>) {
      Vector<C> e;
      if (from != nullptr) {
        e = at(from + j);
      } else {
        e = at(to + j) * s.scale - s.shift;
        exp2_of(e);
      }
      at(to + j) = e * (at(of_columns + j) + weight);
    }
  }
}

// Weights of a tile from the log-sum-exps: one exponential per direction.
template <typename C>
static void online_weights(const Sweep<C>& s, std::int64_t I, std::int64_t J, C* tile) {
  const std::int64_t rows = s.row.size(I), cols = padded_columns(s.col, J);
  const C* stored = s.stored_tile(I, J);
  if (stored == nullptr) exponents(s, I, J, tile);
  alignas(64) C weights[kEdge], zeros[kEdge];
  const bool by_column = s.col.weight != nullptr, by_row = s.row.weight != nullptr;
  for (std::int64_t j = 0; j < cols; ++j) {
    const bool there = by_column && j < s.col.size(J);
    weights[j] = there ? s.col.weight[s.col.begin(J) + j] : C(0);
    zeros[j] = there ? finite_or_zero(s.col.lse[s.col.begin(J) + j]) : C(0);
  }
  for (std::int64_t i = 0; i < rows; ++i) {
    const std::int64_t row = s.row.begin(I) + i;
    const C weight = by_row ? s.row.weight[row] : C(0);
    Vector<C> zero = {};
    if (by_row) zero += finite_or_zero(s.row.lse[row]);
    C* to = tile + i * kEdge;
    const C* x = stored == nullptr ? to : stored + i * s.col.edge;
    for (std::int64_t j = 0; j < cols; j += kLanes<C>) {
      Vector<C> g = {};
      if (by_row) {
        Vector<C> e = at(x + j);
        exp_of_difference<C>(e, zero);
        g += e * weight;
      }
      if (by_column) {
        Vector<C> e = at(x + j);
        exp_of_difference<C>(e, at(zeros + j));
        g += e * at(weights + j);
      }
      at(to + j) = g;
    }
  }
}

// Rows past the last one, which the products of whole blocks read.
template <typename C>
static void clear_rows(const Side<C>& side, std::int64_t tile_of_side, std::int64_t cols, C* tile) {
  const std::int64_t rows = side.size(tile_of_side);
  for (std::int64_t i = rows; i < (rows + kRows - 1) / kRows * kRows; ++i) {
    for (std::int64_t j = 0; j < cols; ++j) tile[i * kEdge + j] = C(0);
  }
}

template <typename C>
static void gradient_tile(const Sweep<C>& s, std::int64_t I, std::int64_t J, bool rows,
                          bool columns, C* tile) {
  s.known ? known_weights(s, I, J, tile) : online_weights(s, I, J, tile);
  clear_rows(s.row, I, padded_columns(s.col, J), tile);
  if (rows) accumulate_rows(s, I, J, tile);
  if (columns) accumulate_columns(s, I, J, tile);
}

template <typename C>
static void mean_tile(const Sweep<C>& s, std::int64_t I, std::int64_t J, C* tile) {
  const std::int64_t rows = s.row.size(I), cols = padded_columns(s.col, J);
  exponents(s, I, J, tile);
  for (std::int64_t i = 0; i < rows; ++i) {
    const std::int64_t row = s.row.begin(I) + i;
    C* x = tile + i * kEdge;
    if (s.known) {
      Vector<C> sums = {};
      for (std::int64_t j = 0; j < cols; j += kLanes<C>) {
        Vector<C> e = at(x + j) * s.scale - s.shift;
        exp2_of(e);
        sums += e;
        at(x + j) = e;
      }
      s.row.sum[row] += double(sum_of<C>(sums));
      continue;
    }
    double factor;
    running_row(s.row, row, x, cols, true, &factor);
    if (factor == 1.0) continue;
    for (std::int64_t d = 0; d < s.width_blocks(); ++d) {
      C* o = s.row.gradient + (d * s.row.x.padded + row) * kPanel;
      for (int c = 0; c < kPanel; ++c) o[c] *= C(factor);
    }
  }
  clear_rows(s.row, I, cols, tile);
  accumulate_rows(s, I, J, tile);
}

// The sigmoid loss of every pair. log(1 + e^x) = max(x, 0) + log(1 + u), u = e^-|x|, and its slope
// 1 / (1 + u) or u / (1 + u). Pairs with equal ids are left out (x = -inf), the diagonal never.
template <typename C>
static void sigmoid_tile(const Sweep<C>& s, std::int64_t I, std::int64_t J, C* tile) {
  const std::int64_t rows = s.row.size(I), cols = s.col.size(J);
  const std::int64_t i0 = s.row.begin(I), j0 = s.col.begin(J);
  const C log2e = C(1.4426950408889634), out = -__builtin_inf();
  dot_tile(s, I, J, tile);
  for (std::int64_t i = 0; i < rows; ++i) {
    C* x = tile + i * kEdge;
    const std::int64_t own = i0 + i + s.offset - j0;
    for (std::int64_t j = 0; j < cols; j += kLanes<C>) at(x + j) = at(x + j) * s.scale + s.bias;
    const bool here = own >= 0 && own < cols;
    const C positive = here ? -x[own] : C(0);
    if (s.row.ids != nullptr && s.col.ids != nullptr) {
      for (std::int64_t j = 0; j < cols; ++j) {
        x[j] = s.col.ids[j0 + j] == s.row.ids[i0 + i] ? out : x[j];
      }
    }
    for (std::int64_t j = cols; j < padded_columns(s.col, J); ++j) x[j] = out;
    if (here) x[own] = positive;
    const C weight = s.row.weight == nullptr ? C(1) : s.row.weight[i0 + i];
    Vector<C> losses = {}, slopes = {};
    for (std::int64_t j = 0; j < cols; j += kLanes<C>) {
      const Vector<C> v = at(x + j), zero = {};
      Vector<C> u = (v > zero ? -v : v) * log2e;
      exp2_of(u);
      const Vector<C> inverse = C(1) / (u + C(1));
      const Vector<C> g = v > zero ? inverse : u * inverse;
      log1p_of(u);
      losses += (v > zero ? v : zero) + u;
      slopes += g;
      at(x + j) = g * weight;
    }
    double slope = double(sum_of<C>(slopes));
    if (here) {  // its slope in s is negative
      slope -= 2 * double(x[own]) / double(weight == C(0) ? C(1) : weight);
      x[own] = -x[own];
    }
    s.row.sum[i0 + i] += double(sum_of<C>(losses));
    s.slope[i0 + i] += slope * double(weight);
  }
  clear_rows(s.row, I, padded_columns(s.col, J), tile);
  if (s.row.wants(I)) accumulate_rows(s, I, J, tile);
  if (s.col.wants(J)) accumulate_columns(s, I, J, tile);
}
