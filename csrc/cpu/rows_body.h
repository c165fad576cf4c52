// Rows on their way in and out of a sweep; O(N D).

template <typename C, typename S>
static C squares_of(const S* x, std::int64_t width) {
  C sums[16] = {};
  std::int64_t d = 0;
  for (; d + 16 <= width; d += 16) {
    for (int i = 0; i < 16; ++i) {
      const C v = widen(x[d + i]);
      sums[i] += v * v;
    }
  }
  for (int i = 0; d < width; ++d, ++i) {
    const C v = widen(x[d]);
    sums[i] += v * v;
  }
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

// 0, or NaN where an element is not finite.
template <typename C, typename S>
static C alarm_of(const S* x, std::int64_t width) {
  C alarm = 0;
  for (std::int64_t d = 0; d < width; ++d) alarm += C(widen(x[d])) * C(0);
  return alarm;
}

// to[d][r] = from[r][d], 32 x 32.
static inline void transpose(const float* from, float* to, int rows_of_to) {
  typedef float Four __attribute__((vector_size(16)));
  for (int d = 0; d < rows_of_to; d += 4) {
    for (int r = 0; r < kPanel; r += 4) {
      Four in[4];
      for (int i = 0; i < 4; ++i) std::memcpy(&in[i], from + (r + i) * kPanel + d, sizeof(Four));
      const Four a = __builtin_shufflevector(in[0], in[1], 0, 4, 1, 5),
                 b = __builtin_shufflevector(in[2], in[3], 0, 4, 1, 5),
                 c = __builtin_shufflevector(in[0], in[1], 2, 6, 3, 7),
                 e = __builtin_shufflevector(in[2], in[3], 2, 6, 3, 7);
      const Four out[4] = {
          __builtin_shufflevector(a, b, 0, 1, 4, 5), __builtin_shufflevector(a, b, 2, 3, 6, 7),
          __builtin_shufflevector(c, e, 0, 1, 4, 5), __builtin_shufflevector(c, e, 2, 3, 6, 7)};
      for (int i = 0; i < 4 && d + i < rows_of_to; ++i) {
        std::memcpy(to + (d + i) * kPanel + r, &out[i], sizeof(Four));
      }
    }
  }
}
static inline void transpose(const double* from, double* to, int rows_of_to) {
  for (int d = 0; d < rows_of_to; ++d) {
    for (int r = 0; r < kPanel; ++r) to[d * kPanel + r] = from[r * kPanel + d];
  }
}

static inline void pack_halves(const BFloat16* const* rows, std::int64_t width, std::int64_t first,
                               const Packed<float>& out) {
  const auto bits = [&](int r, std::int64_t d) -> std::uint32_t {
    return rows[r] == nullptr || d >= width ? 0u : rows[r][d].bits;
  };
  const std::int64_t pairs = (width + 1) / 2;
  std::uint32_t* panel = out.half_panels + first * pairs;
  for (std::int64_t d = 0; d < pairs; ++d) {
    for (int r = 0; r < kPanel; ++r) {
      panel[d * kPanel + r] = bits(r, 2 * d) | bits(r, 2 * d + 1) << 16;
    }
  }
  for (std::int64_t block = 0; block * kPanel < width; ++block) {
    std::uint32_t* to = out.half_blocks + (block * out.padded + first) / 2 * kPanel;
    for (int r = 0; r < kPanel; r += 2) {
      for (int i = 0; i < kPanel; ++i) {
        const std::int64_t d = block * kPanel + i;
        to[r / 2 * kPanel + i] = bits(r, d) | bits(r + 1, d) << 16;
      }
    }
  }
}
static inline void pack_halves(const Float16* const*, std::int64_t, std::int64_t,
                               const Packed<float>&) {}

template <typename S, typename C>
static C pack_panel(const S* const* rows, std::int64_t width, bool normalize, std::int64_t first,
                    const Packed<C>& out, const Norms<C>& norms) {
  C alarm = 0;
  const std::int64_t blocks = (width + kPanel - 1) / kPanel;
  for (int r = 0; r < kPanel; ++r) {
    const S* x = rows[r];
    C inverse = 1;
    if (x != nullptr) {
      const C squares = squares_of<C>(x, width), norm = C(__builtin_sqrt(double(squares)));
      bool on_sphere = false;
      // Squares may overflow where no element is Inf.
      if (squares - squares != C(0)) alarm += alarm_of<C>(x, width);
      if (normalize) {
        const C tiny = C(1e-12);
        inverse = squares == C(0) ? C(0) : C(1.0 / double(norm < tiny ? tiny : norm));
        on_sphere = norm > tiny && norm - norm == C(0);
      }
      norms.inverse[first + r] = inverse;
      norms.on_sphere[first + r] = on_sphere;
      norms.length[first + r] = norm * inverse;
      if (!normalize) {  // a bound must not underflow where rows are tiny
        norms.length[first + r] = C(__builtin_sqrt(squares_of<double>(x, width)));
      }
    } else {
      norms.inverse[first + r] = 0;
    }
    for (std::int64_t block = 0; block < blocks; ++block) {
      C* to = out.blocks + (block * out.padded + first + r) * kPanel;
      const std::int64_t left = x == nullptr ? 0 : width - block * kPanel;
      if (left >= kPanel) {
        for (int i = 0; i < kPanel; ++i) to[i] = widen(x[block * kPanel + i]) * inverse;
      } else {
        for (int i = 0; i < kPanel; ++i) {
          to[i] = i < left ? widen(x[block * kPanel + i]) * inverse : C(0);
        }
      }
    }
  }
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t left = width - block * kPanel;
    transpose(out.blocks + (block * out.padded + first) * kPanel,
              out.panels + first * width + block * kPanel * kPanel,
              left < kPanel ? int(left) : kPanel);
  }
  if constexpr (sizeof(S) == sizeof(BFloat16)) {
    if (out.half_panels != nullptr) pack_halves(rows, width, first, out);
  }
  return alarm;
}

template <typename C>
static C packed_cosine(const C* a, std::int64_t block_of_a, const C* b, std::int64_t block_of_b,
                       std::int64_t width, bool on_sphere) {
  Vector<C> sums = {};
  for (std::int64_t block = 0; block * kPanel < width; ++block) {
    for (int i = 0; i < kPanel; i += kLanes<C>) {
      const Vector<C> x = at(a + block * block_of_a + i), y = at(b + block * block_of_b + i);
      sums += on_sphere ? (x - y) * (x - y) : x * y;
    }
  }
  const C sum = sum_of<C>(sums);
  return on_sphere ? C(1) - C(0.5) * sum : sum;
}

// g before the Jacobian, one vector of it.
template <typename C>
CLAE_FAST_INLINE void before_jacobian(const Back<C>& b, std::int64_t block, int i, Vector<C>& g) {
  g = Vector<C>{};
  if (b.dz != nullptr) g = b.gain * (b.weight * at(b.dz + block * b.block + i));
  if (b.partner == nullptr) return;
  Vector<C> pull = at(b.partner + block * b.block_of_partner + i);
  if (b.on_sphere) pull -= at(b.z + block * b.block + i);
  g -= b.share * pull;
}

template <typename C>
static C give_back(const Back<C>& b, std::int64_t width, C* out) {
  Vector<C> radial = {}, euler = {}, g;
  const std::int64_t blocks = (width + kPanel - 1) / kPanel;
  for (std::int64_t block = 0; block < blocks; ++block) {
    for (int i = 0; i < kPanel; i += kLanes<C>) {
      const Vector<C> z = at(b.z + block * b.block + i);
      if (b.dz != nullptr) euler += z * at(b.dz + block * b.block + i);
      before_jacobian(b, block, i, g);
      radial += z * g;
    }
  }
  const C along = b.on_sphere ? sum_of<C>(radial) : C(0);
  alignas(64) C row[kPanel];
  for (std::int64_t block = 0; out != nullptr && block < blocks; ++block) {
    for (int i = 0; i < kPanel; i += kLanes<C>) {
      before_jacobian(b, block, i, g);
      if (b.on_sphere) g -= along * at(b.z + block * b.block + i);
      at(row + i) = g * b.inverse;
    }
    const std::int64_t left = width - block * kPanel;
    std::memcpy(out + block * kPanel, row, (left < kPanel ? left : kPanel) * sizeof(C));
  }
  return sum_of<C>(euler);
}
