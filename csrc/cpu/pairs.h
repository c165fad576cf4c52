// What a sweep over all pairs of rows needs, without torch: packed operands, one tile of the
// similarity matrix at a time, and what is made of it.
//
//   s_ij = t <a_i, b_j>, left out by the skip rule: -inf
//   sums: 1 GEMM, 1 exponential a pair
//       L_i = sum_j e^(s_ij - c), and L_j where columns are wanted too
//   gradient: 2 to 3 GEMMs
//       g_ij = wa_i e^(s_ij - la_i) + wb_j e^(s_ij - lb_j)
//       da_i += sum_j g_ij b_j, db_j += sum_i g_ij a_i
//   mean: 2 GEMMs, 1 exponential
//       L_i and o_i += sum_j e^(s_ij - c) b_j
//   sigmoid: 1 to 3 GEMMs, 1 exponential
//       log(1 + e^x_ij) with x = -(s + bias) on the diagonal, s + bias elsewhere;
//       g_ij = w_i times its slope, da and db as above
//   uel: 2 GEMMs, 4 exponentials
//       a block of rows against all columns, in two levels: see uel_body.h
//
// With a known maximum (|s| <= bound, 2 bound + ln N within the range of the type) c is one
// constant for all rows and columns: one exponential serves both directions, and partial sums add.
// Otherwise c is each row's and column's own running maximum, and a gradient takes one exponential
// per direction. NaN arrives through the sums.
//
// A tile has at most kEdge rows and columns and stays in L2. It belongs to one task; no two tasks
// that run at once write the same rows, and each row meets its tiles in one fixed order: the bits
// do not depend on the number of threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "dtypes.h"
#include "isa.h"

#if CLAE_FAST_X86
#include <immintrin.h>
#endif

namespace clae_fast {

constexpr int kPanel = 32;
constexpr int kEdge = 128;

enum class Skip { kNone, kDiagonal, kTwins };

// N rows of width D, twice, each zero-padded to whole panels:
//   panels  (N / 32, D, 32)  for the product <a_i, b_j>
//   blocks  (D / 32, N, 32)  for the product with a tile
// and, for bfloat16 units, the rows as they were given, two numbers of a dot product side by side:
//   half_panels  (N / 32, D / 2, 32)   half_blocks  (D / 32, N / 2, 32)
template <typename C>
struct Packed {
  C *panels, *blocks;
  std::int64_t rows, padded;
  std::uint32_t *half_panels = nullptr, *half_blocks = nullptr;
};

template <typename C>
struct Side {
  Packed<C> x;
  std::int64_t edge;  // rows of a tile
  const std::int32_t* ids = nullptr;
  const C* inverse = nullptr;  // norms, which half_panels and half_blocks lack
  // sums
  double* sum = nullptr;
  C* top = nullptr;  // running maximum; unused with a known one
  // gradient; `lse` may be any reference point l with its own weight, and is unused with a known
  // maximum, where `weight` holds w e^(c - l)
  const C *weight = nullptr, *lse = nullptr;
  C* gradient = nullptr;  // (D / 32, N, 32)
  std::int64_t wanted_begin = 0, wanted_end = 0;

  std::int64_t tiles() const { return (x.rows + edge - 1) / edge; }
  std::int64_t begin(std::int64_t tile) const { return tile * edge; }
  std::int64_t size(std::int64_t tile) const {
    return x.rows - tile * edge < edge ? x.rows - tile * edge : edge;
  }
  bool wants(std::int64_t tile) const {
    return gradient != nullptr && begin(tile) < wanted_end && begin(tile) + edge > wanted_begin;
  }
};

template <typename C>
struct Sweep {
  Side<C> row, col;
  bool half = false;       // on bfloat16 units
  bool symmetric = false;  // row and col are the same; only tiles I <= J are visited
  std::int64_t width = 0;
  bool known = false;
  C scale = 0, shift = 0;   // exponents are scale * <a, b> - shift, in units of log 2
  C bias = 0;               // of the sigmoid loss, which has neither shift nor units of log 2
  double* slope = nullptr;  // and its sums of g over each row
  Skip skip = Skip::kNone;
  std::int64_t offset = 0;
  // Where sums of tile (I, J) go: row i to row.sum[J * row_slot + i], column j to
  // col.sum[I * col_slot + j]; without slots they are added up in the order of the visit.
  std::int64_t row_slot = 0, col_slot = 0;
  // Of the first tiles, kept from the sums: e^(s - c) with a known maximum, else s.
  C* stored = nullptr;
  std::int64_t stored_tiles = 0;

  std::int64_t width_blocks() const { return (width + kPanel - 1) / kPanel; }
  std::int64_t tile_index(std::int64_t I, std::int64_t J) const {
    return symmetric ? I * row.tiles() - I * (I - 1) / 2 + J - I : I * col.tiles() + J;
  }
  C* stored_tile(std::int64_t I, std::int64_t J) const {
    const std::int64_t index = tile_index(I, J);
    return index < stored_tiles ? stored + index * row.edge * col.edge : nullptr;
  }
};

// The row's norm, and what the Jacobian of the normalisation needs; as numerics.unit_rows.
template <typename C>
struct Norms {
  C* inverse;  // 0 for a zero row
  std::uint8_t*
      on_sphere;  // 0 where the norm is below 1e-12 or overflows, or nothing is normalised
  C* length;      // of the rows as they went into the sweep
};

// A row on its way back to the caller: g = gain * (weight * dz) - share * (partner - own), own = z
// on the sphere, then the Jacobian of the normalisation.
template <typename C>
struct Back {
  const C *dz, *z, *partner;  // at the row's place in blocks; dz (0) and partner may be null
  std::int64_t block, block_of_partner;  // elements from one block to the next
  C weight, gain, share, inverse;
  bool on_sphere;
};

// UEL (reference/pair_uel.py) for rows q against constant keys k; the weight is m.
constexpr int kUelRows = 8;
template <typename C>
struct Uel {
  Side<C> row, col;
  std::int64_t width;
  C scale;
  double m;
  const C* row_weight;  // null: 1
  C* loss;
  std::int64_t offset;  // of row 0 among the keys
  bool need_dq;         // row.gradient: the gradient over t
};

// buffer: kBuffer elements, aligned to 64 bytes: a tile, and the same in bfloat16 behind it.
constexpr int kBuffer = kEdge * kEdge * 3 / 2;
template <typename C>
void sums_tile(Isa, const Sweep<C>&, std::int64_t I, std::int64_t J, C* buffer);
// What tile (I, J) adds to the gradients of its rows and of its columns.
template <typename C>
void gradient_tile(Isa, const Sweep<C>&, std::int64_t I, std::int64_t J, bool rows, bool columns,
                   C* buffer);
template <typename C>
void mean_tile(Isa, const Sweep<C>&, std::int64_t I, std::int64_t J, C* buffer);
template <typename C>
void sigmoid_tile(Isa, const Sweep<C>&, std::int64_t I, std::int64_t J, C* buffer);
// Rows begin .. begin + kUelRows; scores: kUelRows rows of as many elements as col has, padded.
template <typename C>
void uel_rows(Isa, const Uel<C>&, std::int64_t begin, C* scores, C* buffer);

// One panel of 32 rows, from where `rows` points (null: past the end). Returns 0, or NaN where an
// element is not finite.
template <typename S, typename C>
C pack_panel(Isa, const S* const* rows, std::int64_t width, bool normalize, std::int64_t first,
             const Packed<C>&, const Norms<C>&);
// <a, b> of two packed rows; on the sphere as 1 - |a - b|^2 / 2.
template <typename C>
C packed_cosine(Isa, const C* a, std::int64_t block_of_a, const C* b, std::int64_t block_of_b,
                std::int64_t width, bool on_sphere);
// Writes the row (unless out is null) and returns <z, dz>.
template <typename C>
C give_back(Isa, const Back<C>&, std::int64_t width, C* out);

}  // namespace clae_fast
