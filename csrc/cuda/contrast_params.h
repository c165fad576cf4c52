// What a launch of the one-launch `contrast` is given, and how its tile lies in shared memory.
#pragma once
#include "contrast_call.h"
#include "stored.h"

namespace clae_fast {
namespace gpu {

constexpr int kSliceBytes = 128;  // of each row in a slice of the width
constexpr int kChunks = 8;        // of 16 bytes in them

// Rows of one tensor, or of two, one below the other.
struct Operand {
  const char* first;
  const char* second;
  std::int64_t first_stride, second_stride;  // bytes
  int split;                                 // rows of the first

  CLAE_DEVICE const char* row(int r) const {
    return r < split ? first + r * first_stride : second + (r - split) * second_stride;
  }
};

// One call. A side is a set of rows that meets a set of columns: nt_xent has one, of all rows with
// themselves; one_way and two_way have q against k, and k against q where that is asked for.
struct Params {
  Operand operand[2];  // rows of each side; the columns are the rows of the other
  int form, sides;
  int N;  // rows of a side, and its columns
  int B;  // pairs
  int D;
  int row_blocks, chunks;
  bool fold;  // nt_xent of two equal sets: B rows stand for 2 B
  bool normalize;
  bool aligned;  // all rows begin at multiples of 16 bytes
  bool gradient;
  bool reciprocal;
  int scale_type;
  float scale;
  const void* scale_tensor;
  float factor;  // of the gradients and the total

  // Results, null where not wanted.
  float* loss;          // rows: (2 B), (B) or (B, 2)
  float* total;         // their sum times factor
  float* lse[2];        // of each side's rows
  float* gradients[2];  // dq, dk: (B, D)
  float* dscale;

  // Between the blocks: nothing of it needs to be set before.
  float* sums;     // (sides, chunks, N): of exponentials
  float* tops;     // (sides, chunks, N): what they refer to, where it is not known beforehand
  float* cosine;   // (B)
  float* alarm;    // (B): NaN where a row holds NaN or Inf
  float* partial;  // (sides, chunks, N, D): gradients before their scale
  float* dots;     // (sides, chunks, N): sum_j G_ij s_ij, before G is rounded
  float* slopes;   // (sides, N): of the scale
  unsigned* ticket;
};

inline Params params_of(const Call& call, int BN) {
  const Extents e = extents_of(call, BN);
  const Workspace w = workspace_of(call, BN);
  Params p{};
  const char *q = static_cast<const char*>(call.q), *k = static_cast<const char*>(call.k);
  if (call.form == kNtXent) {
    p.operand[0] = {q, k, call.q_stride, call.k_stride, call.B};
    p.operand[1] = p.operand[0];
  } else {
    p.operand[0] = {q, q, call.q_stride, call.q_stride, call.B};
    p.operand[1] = {k, k, call.k_stride, call.k_stride, call.B};
  }
  p.form = call.form;
  p.sides = e.sides;
  p.N = e.N;
  p.B = call.B;
  p.D = call.D;
  p.row_blocks = e.row_blocks;
  p.chunks = e.chunks;
  p.fold = folds(call);
  p.normalize = call.normalize;
  const auto bits = reinterpret_cast<std::uintptr_t>(call.q) |
                    reinterpret_cast<std::uintptr_t>(call.k) | std::uintptr_t(call.q_stride) |
                    std::uintptr_t(call.k_stride);
  p.aligned = bits % 16 == 0;
  p.gradient = call.dq || call.dk || call.dscale;
  p.reciprocal = call.reciprocal;
  p.scale_type = call.scale_type;
  p.scale = call.scale;
  p.scale_tensor = call.scale_tensor;
  p.factor = call.factor;
  float* const base = call.workspace;
  p.loss = call.loss ? call.loss : base + w.loss;
  p.total = call.total;
  p.lse[0] = call.lse_row;
  p.lse[1] = call.lse_col;
  p.gradients[0] = call.dq;
  p.gradients[1] = call.dk;
  p.dscale = call.dscale;
  p.sums = base + w.sums;
  p.tops = base + w.tops;
  p.cosine = base + w.cosine;
  p.alarm = base + w.alarm;
  p.partial = base + w.partial;
  p.dots = base + w.dots;
  p.slopes = base + w.slopes;
  p.ticket = reinterpret_cast<unsigned*>(base + w.ticket);
  return p;
}

// Bytes of each element of the weights G in shared memory: those of bfloat16 rows are rounded to
// bfloat16, others meet the rows as tf32.
template <typename Format>
inline constexpr int kWeightBytes = 4;
template <>
inline constexpr int kWeightBytes<Bf16> = 2;

template <int BN>
inline constexpr int slice_bytes = (kRows + BN) * kSliceBytes;

template <typename Format, int BN>
struct Layout {
  static constexpr int weight_bytes = kRows * BN * kWeightBytes<Format>;
  static constexpr int bytes = 2 * slice_bytes<BN> + weight_bytes +
                               3 * carved_bytes<float>(kRows + BN) + carved_bytes<float>(4 * kRows);
};

template <int BN>
struct Tile {
  char* slices;    // two, by turns: an array of pointers would lie in local memory
  char* weights;   // G, (64, BN), chunks of 16 bytes swizzled
  float* inverse;  // 1 / |row| of the 64 rows, then of the BN columns
  float* weight;
  float* level;  // log-sum-exps in base 2, where the maximum was not known
  float* parts;  // (4, 64): of the warps side by side

  CLAE_DEVICE char* slice(int s) const { return slices + (s & 1) * slice_bytes<BN>; }
};

template <typename Format, int BN>
CLAE_DEVICE Tile<BN> carve_tile() {
  using L = Layout<Format, BN>;
  SharedCursor cursor = dynamic_smem();
  Tile<BN> tile;
  tile.slices = carve<char>(cursor, 2 * slice_bytes<BN>);
  tile.weights = carve<char>(cursor, L::weight_bytes);
  tile.inverse = carve<float>(cursor, kRows + BN);
  tile.weight = carve<float>(cursor, kRows + BN);
  tile.level = carve<float>(cursor, kRows + BN);
  tile.parts = carve<float>(cursor, 4 * kRows);
  return tile;
}

// Where 16 bytes lie in rows of `stride` bytes: neighbours of a column of chunks meet other banks.
CLAE_DEVICE int swizzled(int row, int chunk, int stride) {
  return row * stride + ((chunk ^ (row & 7)) << 4);
}

}  // namespace gpu
}  // namespace clae_fast
