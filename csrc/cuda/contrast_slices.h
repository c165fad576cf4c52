// Slices of the embeddings' width in shared memory: 128 bytes of the tile's 64 rows and BN columns,
// raw, and what the norms need of them.
#pragma once
#include "contrast_params.h"
#include "copy_async.h"

namespace clae_fast {
namespace gpu {

template <typename Format>
CLAE_DEVICE int slices_of(int D) {
  return (D * int(sizeof(typename Stored<Format>::type)) + kSliceBytes - 1) / kSliceBytes;
}

// Sixteen bytes of a row that begin at byte `at`, element by element.
template <typename Format>
CLAE_DEVICE Vec16 gather_chunk(const char* row, int at, int bytes) {
  using T = typename Stored<Format>::type;
  constexpr int n = 16 / int(sizeof(T));
  union {
    T elements[n];
    Vec16 all;
  } chunk;
  CLAE_UNROLL
  for (int i = 0; i < n; ++i) {
    chunk.elements[i] = i * int(sizeof(T)) < bytes ? reinterpret_cast<const T*>(row + at)[i] : T(0);
  }
  return chunk.all;
}

// Begins to fetch slice s of entries from `begin` on: 0 to 63 are the tile's rows, then come its
// columns. What lies outside the matrix is zero. Ends a group of copies.
template <typename Format, int BN>
CLAE_DEVICE void fetch_slice(const Params& p, int side, int first_row, int first_col, int s,
                             int begin, char* slice) {
  using T = typename Stored<Format>::type;
  const Operand& rows = p.operand[side];
  const Operand& cols = p.operand[p.form == kNtXent ? side : 1 - side];
  const int width = p.D * int(sizeof(T));
  for (int i = begin * kChunks + thread_index(); i < (kRows + BN) * kChunks; i += kThreads) {
    const int entry = i / kChunks, chunk = i % kChunks;
    const int r = entry < kRows ? first_row + entry : first_col + entry - kRows;
    const int at = s * kSliceBytes + 16 * chunk;
    int bytes = width - at;
    bytes = r >= p.N || bytes < 0 ? 0 : bytes > 16 ? 16 : bytes;
    const char* row = (entry < kRows ? rows : cols).row(bytes ? r : 0);
    char* to = slice + swizzled(entry, chunk, kSliceBytes);
    if (p.aligned) {
      copy_async(to, row + (bytes ? at : 0), bytes);
    } else {
      store_shared(to, gather_chunk<Format>(row, at, bytes));
    }
  }
  commit_copies();
}

// How many of the tile's entries a thread sums the squares of.
template <int BN>
inline constexpr int kEntries = (kRows + BN + kThreads - 1) / kThreads;

// Adds the squares of a slice: thread t has the entries t, t + 256, ...
template <typename Format, int BN>
CLAE_DEVICE void add_squares(const char* slice, float (&squares)[kEntries<BN>]) {
  using T = typename Stored<Format>::type;
  CLAE_UNROLL
  for (int e = 0; e < kEntries<BN>; ++e) {
    const int entry = thread_index() + e * kThreads;
    if (entry < kRows + BN) {
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        union {
          Vec16 all;
          T elements[16 / sizeof(T)];
        } v;
        v.all = load_shared(slice + swizzled(entry, chunk, kSliceBytes));
        CLAE_UNROLL
        for (int i = 0; i < int(16 / sizeof(T)); ++i) {
          const float x = to_float<Format>(v.elements[i]);
          squares[e] += x * x;
        }
      }
    }
  }
}

struct Norm {
  float inverse;   // 1 / |x|; 0 of a zero row, 1 where nothing is normalised
  bool on_sphere;  // whether x / |x| has length 1
};

// Comparisons keep NaN, which fmaxf would drop.
CLAE_DEVICE Norm norm_of(float squares, bool normalize) {
  if (!normalize) return {1.0f, false};
  const float norm = sqrtf(squares);
  const float inverse = squares == 0.0f ? 0.0f : 1.0f / (norm < 1e-12f ? 1e-12f : norm);
  return {inverse, norm > 1e-12f && norm < kInfinity};
}

template <int BN>
CLAE_DEVICE void store_norms(const Params& p, const float (&squares)[kEntries<BN>],
                             const Tile<BN>& tile) {
  CLAE_UNROLL
  for (int e = 0; e < kEntries<BN>; ++e) {
    const int entry = thread_index() + e * kThreads;
    if (entry < kRows + BN) tile.inverse[entry] = norm_of(squares[e], p.normalize).inverse;
  }
}

}  // namespace gpu
}  // namespace clae_fast
