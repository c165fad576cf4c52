// nt_xent, one_way and two_way InfoNCE from raw embeddings: loss, dq, dk and dscale in one launch.
//
//   s_ij = t cos(x_i, y_j), positives left out          L_i = sum_j e^(s_ij)
//   loss_i = log(1 + e^(log L_i - s_i+)),  r_i = 1 - p_i+ = sigmoid(log L_i - s_i+)
//   G_ij = r_i e^(s_ij) / L_i (+ r_j e^(s_ij) / L_j),   u_i = sum_j G_ij y_j / |y_j|
//   dx_i = J_i t (u_i - share_i (positive_i - z_i))
//
// Work: 2 GEMMs and 1 exponential a pair (2 where the maximum is not known beforehand), for
// one_way and two_way once for each side that is asked for. A block owns 64 rows and BN columns:
// it keeps their e^s (or s) in registers across a grid barrier, where the sums of rows are
// exchanged, then makes G of them and multiplies. The raw rows are the operands of both products:
// norms go into the exponent and into G, so that 16-bit inputs are exact in S.
//
// Behind a second barrier the blocks of 64 rows share them, add the gradients of the BN-column
// parts in their order, and go back through the normalisation; the last of all adds the losses in
// theirs: the same bits every run. Saved: sums of (columns / BN) parts a row and the parts of the
// gradient, in memory of the caller that needs no value beforehand.
#pragma once
#include "contrast_products.h"
#include "contrast_rows.h"
#include "grid.h"

namespace clae_fast {
namespace gpu {

struct Place3 {
  int side, row_block, chunk;
};

// S of the tile, and the norms of its entries in shared memory. The last two slices stay.
template <typename Format, int BN>
CLAE_DEVICE void make_scores(const Params& p, const Place3& at, const Tile<BN>& tile,
                             Scores<BN>& scores) {
  const int first_row = at.row_block * kRows, first_col = at.chunk * BN;
  const int slices = slices_of<Format>(p.D);
  CLAE_UNROLL
  for (int m = 0; m < Scores<BN>::kM; ++m) {
    CLAE_UNROLL
    for (int n = 0; n < Scores<BN>::kN; ++n) {
      CLAE_UNROLL
      for (int c = 0; c < 4; ++c) scores.s[m][n][c] = 0.0f;
    }
  }
  for (int s = 0; s < 2; ++s) {
    if (s < slices) {
      fetch_slice<Format, BN>(p, at.side, first_row, first_col, s, 0, tile.slice(s));
    } else {
      commit_copies();
    }
  }
  positives<Format>(p);
  float squares[kEntries<BN>] = {};
  CLAE_ROLLED
  for (int s = 0; s < slices; ++s) {
    char* slice = tile.slice(s);
    wait_copies<1>();
    sync_block();
    add_squares<Format, BN>(slice, squares);
    add_scores<Format, BN>(slice, scores);
    if (s + 2 < slices) {
      sync_block();  // everyone is done with it
      fetch_slice<Format, BN>(p, at.side, first_row, first_col, s + 2, 0, slice);
    } else {
      commit_copies();
    }
  }
  store_norms<BN>(p, squares, tile);
  wait_copies<0>();
  sync_block();
}

// The exponents in base 2 that take the place of S; -inf what is outside and what is left out.
template <int BN>
CLAE_DEVICE void make_exponents(const Params& p, const Place3& at, const Exponents& e,
                                const Tile<BN>& tile, Scores<BN>& scores) {
  using S = Scores<BN>;
  CLAE_UNROLL
  for (int m = 0; m < S::kM; ++m) {
    CLAE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int r = S::row(m, 2 * half), row = at.row_block * kRows + r;
      const float scale = e.t * kLog2e * tile.inverse[r];
      const int twin = p.form != kNtXent || p.fold ? row : row < p.B ? row + p.B : row - p.B;
      CLAE_UNROLL
      for (int n = 0; n < S::kN; ++n) {
        CLAE_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int c = 2 * half + i, k = S::col(n, c), col = at.chunk * BN + k;
          float& x = scores.s[m][n][c];
          x = x * scale * tile.inverse[kRows + k];
          if (row >= p.N || col >= p.N || col == row || col == twin) x = -kInfinity;
        }
      }
    }
  }
}

// Adds what four lanes have of a row, or takes their maximum.
CLAE_DEVICE float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
CLAE_DEVICE float quad_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}

// One number a row from the warps side by side: their sum or maximum, of the 64 rows, for all.
template <int BN>
CLAE_DEVICE void exchange(const float (&rows)[Scores<BN>::kM][2], float* parts) {
  if (lane_index() % 4 == 0) {
    for (int m = 0; m < Scores<BN>::kM; ++m) {
      for (int half = 0; half < 2; ++half) {
        parts[warp_col() * kRows + Scores<BN>::row(m, 2 * half)] = rows[m][half];
      }
    }
  }
  sync_block();
}

// What the warps side by side exchanged, added up, to where all blocks find it.
CLAE_DEVICE void store_row_sums(const Params& p, const Place3& at, const float* parts, float* to) {
  const int row = at.row_block * kRows + thread_index();
  if (thread_index() >= kRows || row >= p.N) return;
  const float* part = parts + thread_index();
  to[(std::int64_t(at.side) * p.chunks + at.chunk) * p.N + row] =
      (part[0] + part[kRows]) + (part[2 * kRows] + part[3 * kRows]);
}

// The sums of exponentials of the tile's rows, to where all blocks find them. With the known
// maximum the exponentials take the place of the exponents.
template <int BN>
CLAE_DEVICE void sum_rows(const Params& p, const Place3& at, const Exponents& e,
                          const Tile<BN>& tile, Scores<BN>& scores) {
  using S = Scores<BN>;
  float rows[S::kM][2];
  float zero[S::kM][2];
  CLAE_UNROLL
  for (int m = 0; m < S::kM; ++m) zero[m][0] = zero[m][1] = e.zero * kLog2e;
  if (!e.known) {
    CLAE_UNROLL
    for (int m = 0; m < S::kM; ++m) {
      CLAE_UNROLL
      for (int half = 0; half < 2; ++half) {
        float top = -kInfinity;
        CLAE_UNROLL
        for (int n = 0; n < S::kN; ++n) {
          top = fmaxf(top, fmaxf(scores.s[m][n][2 * half], scores.s[m][n][2 * half + 1]));
        }
        rows[m][half] = quad_max(top);
      }
    }
    exchange<BN>(rows, tile.parts);
    CLAE_UNROLL
    for (int m = 0; m < S::kM; ++m) {
      CLAE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float* part = tile.parts + S::row(m, 2 * half);
        const float top =
            fmaxf(fmaxf(part[0], part[kRows]), fmaxf(part[2 * kRows], part[3 * kRows]));
        zero[m][half] = top;
      }
    }
    const int row = at.row_block * kRows + thread_index();
    if (thread_index() < kRows && row < p.N) {
      const float* part = tile.parts + thread_index();
      p.tops[(std::int64_t(at.side) * p.chunks + at.chunk) * p.N + row] =
          fmaxf(fmaxf(part[0], part[kRows]), fmaxf(part[2 * kRows], part[3 * kRows]));
    }
    sync_block();
  }
  CLAE_UNROLL
  for (int m = 0; m < S::kM; ++m) {
    CLAE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float top = zero[m][half] == -kInfinity ? 0.0f : zero[m][half];
      float sum = 0.0f;
      CLAE_UNROLL
      for (int n = 0; n < S::kN; ++n) {
        CLAE_UNROLL
        for (int i = 0; i < 2; ++i) {
          float& x = scores.s[m][n][2 * half + i];
          const float y = exp2_approx(x - top);
          if (e.known) x = y;
          sum += y;
        }
      }
      rows[m][half] = quad_sum(sum);
    }
  }
  exchange<BN>(rows, tile.parts);
  store_row_sums(p, at, tile.parts, p.sums);
}

// The weights of the tile's rows and columns, to shared memory; 0 where they do not count.
template <int BN>
CLAE_DEVICE void load_weights(const Params& p, const Place3& at, const Exponents& e,
                              const Tile<BN>& tile) {
  for (int entry = thread_index(); entry < kRows + BN; entry += kThreads) {
    const bool is_row = entry < kRows;
    const int i = is_row ? at.row_block * kRows + entry : at.chunk * BN + entry - kRows;
    const int side = is_row || p.form == kNtXent ? at.side : 1 - at.side;
    const bool counts = is_row ? rows_count(p, at.side) : cols_count(p, at.side);
    Weights w{};
    if (counts && i < p.N) w = weights_of(p, e, side, i);
    tile.weight[entry] = w.weight;
    // 0 times e^(x - level) must be 0 whatever x is.
    tile.level[entry] = counts && i < p.N ? w.level : kInfinity;
  }
  sync_block();
}

// An element of G: x is e^(s - zero) where the maximum is known, else the exponent.
template <int BN>
CLAE_DEVICE float weight_at(const Tile<BN>& tile, bool known, float x, int row, int col) {
  const float by_row = tile.weight[row], by_col = tile.weight[col];
  return known ? x * (by_row + by_col)
               : by_row * exp2_approx(x - tile.level[row]) +
                     by_col * exp2_approx(x - tile.level[col]);
}

// G times the exponent of its element, in base 2; 0 of what was left out.
CLAE_DEVICE float with_exponent(float g, float x, const Exponents& e) {
  const float exponent = e.known ? log2_approx(x) + e.zero * kLog2e : x;
  return x == (e.known ? 0.0f : -kInfinity) ? 0.0f : g * exponent;
}

// The sums of G s over the tile's columns, which the gradient of the scale is made of, to where the
// rows are finished. A loop of its own: beside the one below there are no registers for it.
template <int BN>
CLAE_DEVICE void sum_dots(const Params& p, const Place3& at, const Exponents& e,
                          const Tile<BN>& tile, const Scores<BN>& scores) {
  using S = Scores<BN>;
  float dots[S::kM][2];
  CLAE_UNROLL
  for (int m = 0; m < S::kM; ++m) {
    CLAE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = S::row(m, 2 * half);
      float dot = 0.0f;
      CLAE_UNROLL
      for (int n = 0; n < S::kN; ++n) {
        CLAE_UNROLL
        for (int i = 0; i < 2; ++i) {
          const float x = scores.s[m][n][2 * half + i];
          dot += with_exponent(weight_at(tile, e.known, x, row, kRows + S::col(n, i)), x, e);
        }
      }
      dots[m][half] = quad_sum(p.fold ? 2.0f * dot : dot);
    }
  }
  exchange<BN>(dots, tile.parts);
  store_row_sums(p, at, tile.parts, p.dots);
}

// G, with the norms of the columns, to shared memory.
template <typename Format, int BN>
CLAE_DEVICE void make_weights(const Params& p, const Exponents& e, const Tile<BN>& tile,
                              const Scores<BN>& scores) {
  using S = Scores<BN>;
  const float twice = p.fold ? 2.0f : 1.0f;
  CLAE_UNROLL
  for (int m = 0; m < S::kM; ++m) {
    CLAE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = S::row(m, 2 * half);
      CLAE_UNROLL
      for (int n = 0; n < S::kN; ++n) {
        const int col = S::col(n, 0), k = kRows + col;
        const float x0 = scores.s[m][n][2 * half], x1 = scores.s[m][n][2 * half + 1];
        const float g0 = weight_at(tile, e.known, x0, row, k) * tile.inverse[k];
        const float g1 = weight_at(tile, e.known, x1, row, k + 1) * tile.inverse[k + 1];
        store_weights<Format, BN>(tile.weights, row, col, twice * g0, twice * g1);
      }
    }
  }
  sync_block();
}

// G Y of the tile, to the block's part of the gradients. From the last slice backwards: two are
// still there.
template <typename Format, int BN>
CLAE_DEVICE void weigh_rows(const Params& p, const Place3& at, const Tile<BN>& tile) {
  using P = Products<Format>;
  constexpr int width = kSliceBytes / int(sizeof(typename Stored<Format>::type));
  const int slices = slices_of<Format>(p.D);
  float* out = p.partial + (std::int64_t(at.side) * p.chunks + at.chunk) * p.N * p.D;
  CLAE_ROLLED
  for (int step = 0; step < slices; ++step) {
    const int s = slices - 1 - step;
    char* slice = tile.slice(s);
    if (step > 0) {
      wait_copies<1>();
      sync_block();
    }
    P products{};
    weigh<Format, BN>(tile.weights, slice, products);
    CLAE_UNROLL
    for (int m = 0; m < P::kM; ++m) {
      CLAE_UNROLL
      for (int n = 0; n < P::kN; ++n) {
        CLAE_UNROLL
        for (int c = 0; c < 4; c += 2) {
          const int row = at.row_block * kRows + P::row(m, c);
          const int d = s * width + P::element(n, c);
          if (row >= p.N || d >= p.D) continue;
          float* const to = out + std::int64_t(row) * p.D + d;
          if (p.D % 2 == 0) {
            *reinterpret_cast<Float2*>(to) = {products.c[m][n][c], products.c[m][n][c + 1]};
          } else {
            to[0] = products.c[m][n][c];
            if (d + 1 < p.D) to[1] = products.c[m][n][c + 1];
          }
        }
      }
    }
    if (s >= 2) {
      sync_block();  // everyone is done with it
      fetch_slice<Format, BN>(p, at.side, 0, at.chunk * BN, s - 2, kRows, slice);
    } else {
      commit_copies();
    }
  }
  wait_copies<0>();
}

// Whether anything is asked for that the gradients of these rows are needed for.
CLAE_DEVICE bool rows_wanted(const Params& p, int side, int row_block) {
  if (!p.gradient) return false;
  const bool first = p.gradients[0] != nullptr, second = p.gradients[1] != nullptr;
  if (p.form == kNtXent) {
    const int begin = row_block * kRows, end = begin + kRows;
    return p.dscale != nullptr || p.fold || (first && begin < p.B) || (second && end > p.B);
  }
  return side == 0 ? first || p.dscale != nullptr : second;
}

// NaN if any row held NaN or Inf where nothing is normalised: s = -inf would hide it.
CLAE_DEVICE float alarm_of(const Params& p) {
  if (p.normalize) return 0.0f;
  float alarm = 0.0f;
  for (int i = lane_index(); i < p.B; i += kWarp) alarm += load_l2(p.alarm + i);
  return warp_sum(alarm);
}

// The sum of n numbers that other blocks wrote: always in the same order.
CLAE_DEVICE float block_sum(const float* numbers, int n, float* parts) {
  float sum = 0.0f;
  for (int i = thread_index(); i < n; i += kThreads) sum += load_l2(numbers + i);
  sum = warp_sum(sum);
  sync_block();
  if (lane_index() == 0) parts[warp_index()] = sum;
  sync_block();
  float all = 0.0f;
  for (int w = 0; w < kThreads / kWarp; ++w) all += parts[w];
  return all;
}

template <typename Format, int BN>
CLAE_KERNEL(kThreads, BN <= 128 ? 2 : 1)
contrast_kernel(CLAE_PARAMS(Params) p) {
  const Tile<BN> tile = carve_tile<Format, BN>();
  const Exponents e = exponents_of(p);
  Place3 at;
  at.chunk = block_index() % p.chunks;
  at.row_block = block_index() / p.chunks % p.row_blocks;
  at.side = block_index() / p.chunks / p.row_blocks;
  if (block_index() == 0 && thread_index() == 0) *p.ticket = 0;  // taken after a barrier
  {
    Scores<BN> scores;
    make_scores<Format, BN>(p, at, tile, scores);
    make_exponents<BN>(p, at, e, tile, scores);
    sum_rows<BN>(p, at, e, tile, scores);
    sync_grid();
    if (rows_wanted(p, at.side, at.row_block)) {
      load_weights<BN>(p, at, e, tile);
      if (p.dscale != nullptr) sum_dots<BN>(p, at, e, tile, scores);
      make_weights<Format, BN>(p, e, tile, scores);
      weigh_rows<Format, BN>(p, at, tile);
    }
  }
  if (p.gradient) sync_grid();
  // The blocks of 64 rows share them: a last one alone would load for ten times as long.
  const float alarm = alarm_of(p);
  for (int i = at.chunk + p.chunks * warp_index(); i < kRows; i += p.chunks * kThreads / kWarp) {
    const int row = at.row_block * kRows + i;
    if (row < p.N) finish_row<Format>(p, e, at.side, row, alarm);
  }
  if (p.total == nullptr && p.dscale == nullptr) return;
  if (!take_ticket(p.ticket, unsigned(block_count()))) return;
  if (p.total != nullptr) {
    const int anchors = p.form == kOneWay ? p.B : 2 * p.B;
    const float total = block_sum(p.loss, anchors, tile.parts);
    if (thread_index() == 0) *p.total = total * p.factor;
  }
  if (p.dscale != nullptr) {
    const float slope = block_sum(p.slopes, p.form == kOneWay ? p.N : p.sides * p.N, tile.parts);
    if (thread_index() == 0) *p.dscale = slope * p.factor;
  }
}

}  // namespace gpu
}  // namespace clae_fast
