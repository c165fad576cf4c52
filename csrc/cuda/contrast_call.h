// A call of the one-launch `contrast`, as a host makes it, how it falls into blocks, and its
// workspace. Neither CUDA nor the emulator is needed here.
#pragma once
#include <cstdint>

namespace clae_fast {
namespace gpu {

constexpr int kThreads = 256;
constexpr int kRows = 64;           // of a tile; its columns are the kernel's BN
constexpr int kMaxWidth = 256;      // of the embeddings
constexpr int kMaxPairs = 1 << 20;  // far beyond what any GPU holds at once

enum Form { kNtXent = 0, kOneWay = 1, kTwoWay = 2 };
enum ScaleType { kNoTensor = 0, kFloat = 1, kDouble = 2, kBFloat16 = 3, kHalf = 4 };

struct Call {
  const void *q, *k;                // (B, D) of the format, elements of a row side by side
  std::int64_t q_stride, k_stride;  // bytes
  int B, D, form;
  int element_bytes;
  bool normalize, reciprocal;
  float scale, factor;
  const void* scale_tensor;
  int scale_type;
  float *loss, *total, *lse_row, *lse_col, *dq, *dk, *dscale;  // null where not wanted
  float* workspace;
};

// Two equal sets: each row of B stands for itself and its twin, and the work is a fourth.
inline bool folds(const Call& call) {
  return call.form == kNtXent && call.q == call.k && call.q_stride == call.k_stride;
}

struct Extents {
  int sides, N, row_blocks, chunks;
  std::int64_t blocks() const { return std::int64_t(sides) * row_blocks * chunks; }
};
inline Extents extents_of(const Call& call, int BN) {
  Extents e;
  e.sides = call.form == kNtXent || (call.form == kOneWay && call.dk == nullptr) ? 1 : 2;
  e.N = call.form == kNtXent && !folds(call) ? 2 * call.B : call.B;
  e.row_blocks = (e.N + kRows - 1) / kRows;
  e.chunks = (e.N + BN - 1) / BN;
  return e;
}

// Floats of the workspace, and where each part of it begins.
struct Workspace {
  std::int64_t sums, tops, cosine, alarm, dots, slopes, loss, partial, ticket, floats;
};
inline Workspace workspace_of(const Call& call, int BN) {
  const Extents e = extents_of(call, BN);
  const std::int64_t rows = std::int64_t(e.sides) * e.chunks * e.N;
  Workspace w;
  std::int64_t at = 0;
  const auto take = [&at](std::int64_t& part, std::int64_t n) {
    part = at;
    at += (n + 3) / 4 * 4;
  };
  take(w.sums, rows);
  take(w.tops, rows);
  take(w.cosine, call.B);
  take(w.alarm, call.B);
  take(w.dots, call.dscale ? rows : 0);
  take(w.slopes, std::int64_t(e.sides) * e.N);
  take(w.loss, 2 * std::int64_t(call.B));
  take(w.partial, call.dq || call.dk || call.dscale ? rows * call.D : 0);
  take(w.ticket, 1);
  w.floats = at;
  return w;
}

}  // namespace gpu
}  // namespace clae_fast
