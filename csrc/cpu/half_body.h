// bfloat16 inputs on the processor's bfloat16 units, with float32 sums. The rows go in as they are,
// so the products of <a, b> are exact, and their inverse norms are multiplied in afterwards; the
// weights of a gradient are rounded to bfloat16.
#if CLAE_FAST_BF16

CLAE_FAST_INLINE VectorFloat pair_dot(const VectorFloat& sum, std::uint32_t a,
                                      const std::uint32_t* b) {
  const __m512i x = _mm512_set1_epi32(int(a)), y = _mm512_load_si512(b);
  return (VectorFloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
}

// c[r][0 .. 32) (+)= sum_k <a[r * kRowStride + k * kStepStride], b[k * 32 + ..]>, pairs of
// bfloat16.
template <int kRowStride, int kStepStride, bool kAdd>
CLAE_FAST_INLINE void half_product(const std::uint32_t* a, const std::uint32_t* b,
                                   std::int64_t steps, VectorFloat (&sums)[kRows][2],
                                   const float* c) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < 2; ++v) {
      sums[r][v] = kAdd ? at(c + r * kPanel + v * kLanes<float>) : VectorFloat{};
    }
  }
  for (std::int64_t k = 0; k < steps; ++k) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const std::uint32_t x = a[r * kRowStride + k * kStepStride];
      sums[r][0] = pair_dot(sums[r][0], x, b + k * kPanel);
      sums[r][1] = pair_dot(sums[r][1], x, b + k * kPanel + kLanes<float>);
    }
  }
}

static void half_dot_tile(const Sweep<float>& s, std::int64_t I, std::int64_t J, float* tile) {
  const std::int64_t rows = s.row.size(I), cols = s.col.size(J), width = (s.width + 1) / 2;
  const std::int64_t i0 = s.row.begin(I), j0 = s.col.begin(J);
  const std::uint32_t* a = s.row.x.half_panels + i0 * width;
  const std::uint32_t* b = s.col.x.half_panels + j0 * width;
  VectorFloat sums[kRows][2];
  for (std::int64_t j = 0; j < cols; j += kPanel) {
    for (std::int64_t i = 0; i < rows; i += kRows) {
      half_product<1, kPanel, false>(a + i / kPanel * kPanel * width + i % kPanel, b + j * width,
                                     width, sums, nullptr);
      for (int r = 0; r < kRows; ++r) {
        const float inverse = s.row.inverse[i0 + i + r];
        for (int v = 0; v < 2; ++v) {
          const std::int64_t column = j + v * kLanes<float>;
          at(tile + (i + r) * kEdge + column) =
              sums[r][v] * (at(s.col.inverse + j0 + column) * inverse);
        }
      }
    }
  }
}

CLAE_FAST_INLINE __m256i rounded(const VectorFloat& g) {
  return (__m256i)_mm512_cvtneps_pbh((__m512)g);
}

// gradient += half * x, x the rows as they are.
template <int kRowStride, int kStepStride>
static void half_accumulate(const std::uint32_t* half, std::int64_t rows, std::int64_t steps,
                            const Packed<float>& x, std::int64_t x_begin, float* gradient,
                            std::int64_t padded, std::int64_t begin, std::int64_t width_blocks) {
  VectorFloat sums[kRows][2];
  for (std::int64_t d = 0; d < width_blocks; ++d) {
    const std::uint32_t* b = x.half_blocks + (d * x.padded + x_begin) / 2 * kPanel;
    for (std::int64_t i = 0; i < rows; i += kRows) {
      float* c = gradient + (d * padded + begin + i) * kPanel;
      half_product<kRowStride, kStepStride, true>(half + i * kRowStride, b, steps, sums, c);
      for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < 2; ++v) at(c + r * kPanel + v * kLanes<float>) = sums[r][v];
      }
    }
  }
}

// The weights as bfloat16, behind the tile; the inverse norms that the rows lack are multiplied in.
static inline std::uint32_t* behind(float* tile) {
  return reinterpret_cast<std::uint32_t*>(tile + kEdge * kEdge);
}

static void half_rows(const Sweep<float>& s, std::int64_t I, std::int64_t J, float* tile) {
  const std::int64_t rows = (s.row.size(I) + kRows - 1) / kRows * kRows;
  const std::int64_t cols = padded_columns(s.col, J), j0 = s.col.begin(J);
  std::uint32_t* half = behind(tile);
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < cols; j += kLanes<float>) {
      const VectorFloat g = at(tile + i * kEdge + j) * at(s.col.inverse + j0 + j);
      _mm256_store_si256(reinterpret_cast<__m256i*>(half + (i * kEdge + j) / 2), rounded(g));
    }
  }
  half_accumulate<kEdge / 2, 1>(half, rows, (s.col.size(J) + 1) / 2, s.col.x, j0, s.row.gradient,
                                s.row.x.padded, s.row.begin(I), s.width_blocks());
}

static void half_columns(const Sweep<float>& s, std::int64_t I, std::int64_t J, float* tile) {
  const std::int64_t rows = (s.row.size(I) + 1) / 2, cols = padded_columns(s.col, J);
  const std::int64_t i0 = s.row.begin(I);
  std::uint32_t* half = behind(tile);
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < cols; j += kLanes<float>) {
      const float *low = tile + 2 * i * kEdge + j, *high = low + kEdge;
      const __m512i a =
          _mm512_maskz_cvtepu16_epi32(0xffff, rounded(at(low) * s.row.inverse[i0 + 2 * i]));
      const __m512i b =
          _mm512_maskz_cvtepu16_epi32(0xffff, rounded(at(high) * s.row.inverse[i0 + 2 * i + 1]));
      _mm512_store_si512(half + i * kEdge + j,
                         _mm512_or_si512(a, _mm512_maskz_slli_epi32(0xffff, b, 16)));
    }
  }
  half_accumulate<1, kEdge>(half, s.col.size(J), rows, s.row.x, i0, s.col.gradient, s.col.x.padded,
                            s.col.begin(J), s.width_blocks());
}
#endif
