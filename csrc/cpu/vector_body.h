// Vectors of one register, 2^x, and the product of two small blocks that stays in registers.
// Included by other bodies, once per instruction set.

#define CLAE_FAST_INLINE static inline __attribute__((always_inline))

typedef float VectorFloat __attribute__((vector_size(CLAE_FAST_VECTOR_BYTES)));
typedef double VectorDouble __attribute__((vector_size(CLAE_FAST_VECTOR_BYTES)));
typedef std::uint32_t VectorBits __attribute__((vector_size(CLAE_FAST_VECTOR_BYTES)));

template <typename C>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = VectorFloat;
};
template <>
struct VectorOf<double> {
  using type = VectorDouble;
};
template <typename C>
using Vector = typename VectorOf<C>::type;

template <typename C>
constexpr int kLanes = CLAE_FAST_VECTOR_BYTES / int(sizeof(C));
// Rows of a block in registers, two vectors wide: 16 accumulators of 32 registers, or 8 of 16.
// Either covers the latency of a multiply-add.
constexpr int kRows = CLAE_FAST_VECTOR_BYTES == 64 ? 8 : 4;

template <typename C>
CLAE_FAST_INLINE Vector<C>& at(C* p) {
  return *reinterpret_cast<Vector<C>*>(p);
}
template <typename C>
CLAE_FAST_INLINE const Vector<C>& at(const C* p) {
  return *reinterpret_cast<const Vector<C>*>(p);
}

// (reference parameters: a vector by value has another calling convention per instruction set)
template <typename C>
CLAE_FAST_INLINE C sum_of(const Vector<C>& v) {
  alignas(CLAE_FAST_VECTOR_BYTES) C parts[kLanes<C>];
  at(parts) = v;
  for (int half = kLanes<C> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  }
  return parts[0];
}
template <typename C>
CLAE_FAST_INLINE C largest_of(const Vector<C>& v) {
  C top = v[0];
  for (int i = 1; i < kLanes<C>; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

// 2^y in y's place. y = n + f with |f| <= 1/2; 2^f by a polynomial of degree 6 (largest relative
// error 8e-8 with its rounding), 2^n into the exponent. 2^-inf is 0, what overflows is Inf
// (of +Inf itself AVX-512 makes NaN), NaN stays. Results below the smallest normal number are 0.
CLAE_FAST_INLINE void exp2_of(VectorFloat& y) {
  const VectorFloat zero = {};
#if CLAE_FAST_VECTOR_BYTES == 64 && defined(__GNUC__)
  // The operand order of the maximum keeps a NaN of y. (Masks: GCC 12 warns of the plain forms.)
  const __mmask16 kAll = 0xffff;
  const __m512 x = _mm512_maskz_max_ps(kAll, _mm512_set1_ps(-150.0f), (__m512)y);
  const __m512 n = _mm512_maskz_roundscale_ps(kAll, x, 8);
  const VectorFloat f = (VectorFloat)(x - n);
#else
  const VectorFloat magic = zero + 12582912.0f;  // 1.5 * 2^23: n lands in the lowest bits
  const VectorFloat shifted = y + magic;
  const VectorFloat f = y - (shifted - magic);
#endif
  VectorFloat p = zero + 1.5353362e-4f;
  p = p * f + 1.3398875e-3f;
  p = p * f + 9.6184369e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022648e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
#if CLAE_FAST_VECTOR_BYTES == 64 && defined(__GNUC__)
  y = (VectorFloat)_mm512_maskz_scalef_ps(kAll, (__m512)p, n);
#else
  const VectorFloat scaled = (VectorFloat)((VectorBits)p + ((VectorBits)shifted << 23));
  const VectorFloat result = y < -126.0f ? zero : y >= 128.0f ? zero + __builtin_inff() : scaled;
  y = y == y ? result : y;
#endif
}
CLAE_FAST_INLINE void exp2_of(VectorDouble& y) {
  for (int i = 0; i < kLanes<double>; ++i) y[i] = __builtin_exp2(y[i]);
}

// log(1 + u) for u in [-1/2, 1], in u's place: 2 artanh(w), w = u / (2 + u). Relative error 2e-7.
CLAE_FAST_INLINE void log1p_of(VectorFloat& u) {
  const VectorFloat zero = {};
  const VectorFloat w = u / (u + 2.0f), x = w * w;
  VectorFloat p = zero + 0.14005993f;
  p = p * x + 0.14000903f;
  p = p * x + 0.20010764f;
  p = p * x + 0.33333208f;
  u = (w + w) * (p * x + 1.0f);
}
CLAE_FAST_INLINE void log1p_of(VectorDouble& u) {
  for (int i = 0; i < kLanes<double>; ++i) u[i] = __builtin_log1p(u[i]);
}

// c[r][0 .. 2 lanes) (+)= sum_k a[r * kRowStride + k * kStepStride] * b[k * 32 + ..], r < kRows.
template <typename C, int kRowStride, int kStepStride, bool kAdd>
CLAE_FAST_INLINE void block_product(const C* a, const C* b, std::int64_t steps, C* c,
                                    std::int64_t row_of_c) {
  Vector<C> sums[kRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < 2; ++v) {
      sums[r][v] = kAdd ? at(c + r * row_of_c + v * kLanes<C>) : Vector<C>{};
    }
  }
  for (std::int64_t k = 0; k < steps; ++k) {
    const Vector<C> b0 = at(b + k * kPanel), b1 = at(b + k * kPanel + kLanes<C>);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const C x = a[r * kRowStride + k * kStepStride];
      sums[r][0] += x * b0;
      sums[r][1] += x * b1;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < 2; ++v) at(c + r * row_of_c + v * kLanes<C>) = sums[r][v];
  }
}
