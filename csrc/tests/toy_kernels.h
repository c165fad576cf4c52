// Small kernels through every primitive of csrc/cuda, and the same with one line wrong: the bugs
// that the emulator must see. nvcc compiles the right ones, too (toy_kernels.cu).
#pragma once
#include "../cuda/copy_async.h"
#include "../cuda/grid.h"
#include "../cuda/mma.h"

namespace clae_fast {
namespace gpu {

enum Bug {
  kRight,
  kNoSyncBlock,
  kNoSyncAfter,
  kNoCopyWait,
  kNoLastWait,
  kNoSyncGrid,
  kNoSyncWarp,
  kWrongFragment,
  kHalfWarp,
  kTwoCollectives,
  kEarlyExit,
  kOnePast,
  kReadPast,
  kMisaligned,
  kSkippedBarrier,
  kTooFewTickets,
  kNotShared,
  kLargeArray,
};

// c [M, N] = a [M, K] b, with b [N, K], or [K, N] if kTrans (16-bit formats). Tiles of 32 x 32 by
// four warps; slices of k are 64 bytes wide, two of them in turn. K and N are multiples of 16
// bytes.
struct GemmParams {
  const void *a, *b;
  float* c;
  int M, N, K;
};

constexpr int kTile = 32, kRowBytes = 64, kPitch = kRowBytes + 16, kSlice = kTile * kPitch;
constexpr int kGemmBytes = 2 * carved_bytes<char>(2 * kSlice);

// 32 rows of `row` on, 64 bytes of each from byte `at` on, zero where there are none.
CLAE_DEVICE void copy_slice(char* slice, const void* from, int row, int rows, int at, int bytes) {
  const int r = thread_index() / 4, chunk = thread_index() % 4 * 16;
  const int left = row + r < rows ? bytes - at - chunk : 0;
  const std::size_t offset = left > 0 ? std::size_t(row + r) * bytes + at + chunk : 0;
  copy_async(slice + r * kPitch + chunk, static_cast<const char*>(from) + offset,
             left < 0    ? 0
             : left < 16 ? left
                         : 16);
}

template <typename Format, bool kTrans, int kBug>
CLAE_KERNEL(128)
gemm(CLAE_PARAMS(GemmParams) p) {
  constexpr int kSize = kMmaDepth<Format> == 16 ? 2 : 4, kDepth = kRowBytes / kSize;
  SharedCursor cursor = dynamic_smem();
  char* as = carve<char>(cursor, 2 * kSlice);
  char* bs = carve<char>(cursor, 2 * kSlice);
  const int lane = lane_index(), warp_row = warp_index() / 2 * 16, warp_col = warp_index() % 2 * 16;
  const int across = (p.N + kTile - 1) / kTile;
  const int row = block_index() / across * kTile, col = block_index() % across * kTile;
  const int slices = (p.K + kDepth - 1) / kDepth;

  const auto fetch = [&](int slice) {
    if (slice < slices) {
      const int k = slice * kDepth, buffer = slice % 2 * kSlice;
      copy_slice(as + buffer, p.a, row, p.M, k * kSize, p.K * kSize);
      if (kTrans) {
        copy_slice(bs + buffer, p.b, k, p.K, col * kSize, p.N * kSize);
      } else {
        copy_slice(bs + buffer, p.b, col, p.N, k * kSize, p.K * kSize);
      }
    }
    commit_copies();  // of nothing past the end, so that the wait below counts right
  };

  float c[2][4] = {};
  fetch(0);
  for (int slice = 0; slice < slices; ++slice) {
    fetch(slice + 1);
    if (kBug == kNoCopyWait) {
      wait_copies<2>();
    } else {
      wait_copies<1>();
    }
    if (kBug != kNoSyncBlock) sync_block();
    const char* a_slice = as + slice % 2 * kSlice;
    const char* b_slice = bs + slice % 2 * kSlice;
    CLAE_UNROLL
    for (int half = 0; half < 2; ++half) {
      unsigned a[4], b[4];
      ldmatrix_x4(a, a_slice + (warp_row + lane % 16) * kPitch + half * 32 + lane / 16 * 16);
      if (kTrans) {
        ldmatrix_x4_trans(
            b, b_slice + (half * 16 + lane % 16) * kPitch + warp_col * kSize + lane / 16 * 16);
      } else {
        ldmatrix_x4(b, b_slice + (warp_col + lane % 8 + lane / 16 * 8) * kPitch + half * 32 +
                           lane / 8 % 2 * 16);
      }
      mma<Format>(c[0], a, b[0], b[kBug == kWrongFragment ? 2 : 1]);
      mma<Format>(c[1], a, b[kBug == kWrongFragment ? 1 : 2], b[3]);
    }
    if (kBug != kNoSyncAfter) sync_block();  // before the slice is overwritten
  }
  if (kBug == kNoLastWait) fetch(0);
  if (kBug != kNoLastWait) wait_copies<0>();
  for (int n = 0; n < 2; ++n)
    for (int i = 0; i < 4; ++i) {
      const int y = row + warp_row + lane / 4 + i / 2 * 8;
      const int x = col + warp_col + n * 8 + lane % 4 * 2 + i % 2;
      if (y < p.M && x < p.N) p.c[std::size_t(y) * p.N + x] = c[n][i];
    }
}

struct VectorParams {
  const float* x;
  float* y;
  float* partial;       // [blocks]
  unsigned* workspace;  // [2], zero at first
  int n;
};

// The sum over the block, the same for all its threads; `scratch` is [kThreads / 32].
template <int kThreads, int kBug>
CLAE_DEVICE float block_sum(float value, float* scratch) {
  for (int mask = 16; mask > 0; mask /= 2) {
    if (kBug == kHalfWarp) {
      if (lane_index() < 16) value += shuffle_xor(value, mask);
    } else if (kBug == kTwoCollectives && lane_index() == 5) {
      sync_warp();
    } else {
      value += shuffle_xor(value, mask);
    }
  }
  if (lane_index() == 0) scratch[warp_index()] = value;
  if (kBug == kSkippedBarrier ? warp_index() != 1 : kBug != kNoSyncBlock) sync_block();
  float sum = 0;
  for (int i = 0; i < kThreads / 32 + (kBug == kReadPast ? 1 : 0); ++i) sum += scratch[i];
  if (kBug == kOnePast && thread_index() == 0) scratch[kThreads / 32] = sum;
  return sum;
}

template <int kThreads>
constexpr int kVectorBytes = carved_bytes<float>(kThreads / 32) + carved_bytes<float>(kThreads);

// y = x with neighbours swapped, four numbers to a thread, through shared memory of the warp.
template <int kThreads, int kBug>
CLAE_KERNEL(kThreads)
swap_neighbours(CLAE_PARAMS(VectorParams) p) {
  SharedCursor cursor = dynamic_smem();
  float* scratch = carve<float>(cursor, 4 * kThreads);
  float* mine = scratch + 4 * thread_index();
  const int i = 4 * (block_index() * kThreads + thread_index());
  if (kBug == kNotShared) copy_async(p.y, p.x);
  if constexpr (kBug == kLargeArray) {
    volatile float large[1 << 14];
    large[i] = p.x[i];
    sync_warp();
    if (large[i] != p.x[i]) return;
  }
  const float* x = p.x + i + (kBug == kMisaligned ? 1 : 0);
  store_shared(mine, block_index() ? load_l2(reinterpret_cast<const Vec16*>(x)) : load_global(x));
  if (kBug != kNoSyncWarp) sync_warp();
  store_global(p.y + i, load_shared(scratch + 4 * (thread_index() ^ 1)));
}

// y = x / sum(x): each block sums its part, and after the grid's barrier all parts.
template <int kThreads, int kBug>
CLAE_KERNEL(kThreads)
normalise(CLAE_PARAMS(VectorParams) p) {
  SharedCursor cursor = dynamic_smem();
  float* scratch = carve<float>(cursor, kThreads / 32);
  float* kept = carve<float>(cursor, kThreads);
  const int i = block_index() * kThreads + thread_index();
  if (kBug == kEarlyExit && block_index() == 1) return;
  kept[thread_index()] = i < p.n ? p.x[i] : 0.0f;
  const float sum = block_sum<kThreads, kBug>(kept[thread_index()], scratch);
  if (thread_index() == 0) p.partial[block_index()] = sum;
  if (kBug != kNoSyncGrid) sync_grid();
  float total = 0;
  for (int b = 0; b < block_count(); ++b) total += load_l2(p.partial + b);
  if (i < p.n) p.y[i] = kept[thread_index()] / total;
}

// y[0] = sum(x), by the block that takes the last ticket.
template <int kThreads, int kBug>
CLAE_KERNEL(kThreads)
total(CLAE_PARAMS(VectorParams) p) {
  SharedCursor cursor = dynamic_smem();
  float* scratch = carve<float>(cursor, kThreads / 32);
  const int i = block_index() * kThreads + thread_index();
  const float sum = block_sum<kThreads, kBug>(i < p.n ? p.x[i] : 0.0f, scratch);
  if (thread_index() == 0) p.partial[block_index()] = sum;
  const int tickets = kBug == kTooFewTickets ? block_count() - 1 : block_count();
  if (!take_ticket(p.workspace + 1, unsigned(tickets))) return;
  if (thread_index() < kThreads - 1) return;  // not the one that took it
  float all = 0;
  for (int b = 0; b < block_count(); ++b) all += load_l2(p.partial + b);
  p.y[0] = all;
}

// y = (a b) b by one warp; a and b, 16 x 16 in x, hold whole numbers that stay exact. The first
// product's accumulators are the second's a, which pins the columns of both layouts to each other.
template <typename Format>
CLAE_KERNEL(32)
twice(CLAE_PARAMS(VectorParams) p) {
  constexpr int kRow = 24;
  SharedCursor cursor = dynamic_smem();
  std::uint16_t* tile = carve<std::uint16_t>(cursor, 32 * kRow);
  const int lane = lane_index();
  const int row = shuffle((lane + 29) % 32, (lane + 3) % 32);  // its own number, from another
  for (int i = 0; i < 16; ++i) tile[row * kRow + i] = narrow<Format>(p.x[row * 16 + i]);
  sync_warp();
  unsigned a[4], b[4];
  ldmatrix_x4(a, tile + lane % 16 * kRow + lane / 16 * 8);
  ldmatrix_x4_trans(b, tile + (16 + lane % 16) * kRow + lane / 16 * 8);
  float c[2][4] = {}, y[2][4] = {};
  for (int n = 0; n < 2; ++n) mma<Format>(c[n], a, b[2 * n], b[2 * n + 1]);
  for (int i = 0; i < 4; ++i) a[i] = pack<Format>(c[i / 2][i % 2 * 2], c[i / 2][i % 2 * 2 + 1]);
  for (int n = 0; n < 2; ++n) mma<Format>(y[n], a, b[2 * n], b[2 * n + 1]);
  for (int n = 0; n < 2; ++n)
    for (int i = 0; i < 4; ++i)
      p.y[(lane / 4 + i / 2 * 8) * 16 + n * 8 + lane % 4 * 2 + i % 2] = y[n][i];
}

// The work of a real kernel's size: p.n products by each warp, a barrier of the block now and then
// and one of the grid half-way.
template <int kThreads>
CLAE_KERNEL(kThreads)
busy(CLAE_PARAMS(VectorParams) p) {
  SharedCursor cursor = dynamic_smem();
  char* tile = carve<char>(cursor, 16 * kThreads);
  const unsigned one = pack<Bf16>(1.0f, 1.0f);
  store_shared(tile + 16 * thread_index(), {{one, one, one, one}});
  sync_block();
  float c[4] = {};
  unsigned a[4];
  for (int i = 0; i < p.n; ++i) {
    if (i % 4 == 0) ldmatrix_x4(a, tile + 16 * thread_index());
    mma<Bf16>(c, a, one, one);
    if (i % 16 == 15) sync_block();
    if (i == p.n / 2) sync_grid();
  }
  p.y[block_index() * kThreads + thread_index()] = c[0] + c[1] + c[2] + c[3];
}

}  // namespace gpu
}  // namespace clae_fast
