// The operands of a sweep in memory: where they come from, packed, and what belongs to their rows.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "pairs.h"

namespace clae_fast {

enum class Kind { kFloat, kDouble, kBFloat16, kFloat16 };

// Rows as the caller has them; elements of a row lie side by side.
struct Matrix {
  const void* data = nullptr;
  std::int64_t rows = 0, stride = 0;
  Kind kind = Kind::kFloat;

  template <typename S>
  const S* row(std::int64_t i) const {
    return static_cast<const S*>(data) + i * stride;
  }
};

// Hands out aligned parts of one block of memory; without one it counts what is needed. Under
// AddressSanitizer what lies between two parts may not be touched, as if each were its own block.
class Arena {
 public:
  explicit Arena(void* memory = nullptr) : base_(static_cast<char*>(memory)) {}

  template <typename T>
  T* take(std::int64_t count) {
    const std::size_t bytes = std::size_t(count) * sizeof(T);
    const std::size_t whole = (bytes + 63) / 64 * 64 + kGap;
    T* part = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += whole;
#if defined(__SANITIZE_ADDRESS__)
    if (part != nullptr) {
      ASAN_UNPOISON_MEMORY_REGION(part, bytes);
      ASAN_POISON_MEMORY_REGION(base_ + used_ - whole + bytes, whole - bytes);
    }
#endif
    return part;
  }
  std::size_t used() const { return used_; }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr std::size_t kGap = 64;
#else
  static constexpr std::size_t kGap = 0;
#endif
  char* base_;
  std::size_t used_ = 0;
};

constexpr std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

constexpr double kLog2E = 1.4426950408889634;

// Whether |s| <= bound serves as the maximum of all rows and columns, and the shift c of e^(s - c):
// single terms stay above e^-high, sums of n of them and their inverses within the type's range.
template <typename C>
struct KnownMaximum {
  KnownMaximum(double bound, std::int64_t n) {
    constexpr bool kSingle = sizeof(C) == sizeof(float);
    constexpr double kHigh = kSingle ? 80 : 600, kRange = kSingle ? 140 : 1200;
    known = 2 * bound + std::log(double(std::max<std::int64_t>(n, 1))) <= kRange;
    shift = bound - std::max(0.0, 2 * bound - kHigh);
  }
  bool known;
  double shift;
};

// One packed operand; a stack of two matrices counts as one.
template <typename C>
struct Operand {
  Matrix first, second;
  Packed<C> x{};
  Norms<C> norms{};
  C *gradient = nullptr, *top = nullptr, *weight = nullptr;
  double* sum = nullptr;

  // What the gradient is added up in. A sweep whose second phase needs no dot products has the
  // memory of the panels for it, and clears it at the turn: from then on nobody may multiply them.
  enum class Gradient { kNone, kOwn, kInPanels };

  void place(Arena& arena, std::int64_t width, Gradient where, bool half = false) {
    const std::int64_t rows = first.rows + second.rows, padded = round_up(rows, kPanel);
    x.rows = rows;
    x.padded = padded;
    const std::int64_t whole = padded * round_up(width, kPanel);
    x.panels = arena.take<C>(where == Gradient::kInPanels ? whole : padded * width);
    x.blocks = arena.take<C>(whole);
    if (half) {
      x.half_panels = arena.take<std::uint32_t>(padded * ((width + 1) / 2));
      x.half_blocks = arena.take<std::uint32_t>(padded / 2 * round_up(width, kPanel));
    }
    norms.inverse = arena.take<C>(padded);
    norms.length = arena.take<C>(padded);
    norms.on_sphere = arena.take<std::uint8_t>(padded);
    sum = arena.take<double>(padded);
    top = arena.take<C>(padded);
    weight = arena.take<C>(padded);
    gradient = where == Gradient::kNone       ? nullptr
               : where == Gradient::kInPanels ? x.panels
                                              : arena.take<C>(whole);
  }

  // Packs 32 rows and clears what will be summed over them. Returns 0, or NaN where an element is
  // not finite.
  C pack(Isa isa, std::int64_t panel, std::int64_t width, bool normalize) const {
    const std::int64_t begin = panel * kPanel;
    for (std::int64_t i = begin; i < begin + kPanel; ++i) {
      sum[i] = 0;
      top[i] = -C(INFINITY);
    }
    if (gradient != nullptr && !in_panels()) clear(begin, kPanel, width);
    if constexpr (sizeof(C) == sizeof(double)) {
      return pack_as<double>(isa, begin, width, normalize);
    } else {
      if (first.kind == Kind::kBFloat16) return pack_as<BFloat16>(isa, begin, width, normalize);
      if (first.kind == Kind::kFloat16) return pack_as<Float16>(isa, begin, width, normalize);
      return pack_as<float>(isa, begin, width, normalize);
    }
  }

  bool in_panels() const { return gradient != nullptr && gradient == x.panels; }

  // Nothing is added up yet over these rows.
  void clear(std::int64_t begin, std::int64_t count, std::int64_t width) const {
    for (std::int64_t block = 0; block * kPanel < width; ++block) {
      std::memset(gradient + (block * x.padded + begin) * kPanel, 0, count * kPanel * sizeof(C));
    }
  }

  // The longest row. A NaN stays, and refuses every bound made of it.
  double longest() const {
    double most = 0;
    for (std::int64_t i = 0; i < x.rows; ++i) {
      const double length = double(norms.length[i]);
      if (!(length <= most)) most = length;
    }
    return most;
  }

  std::int64_t panels() const { return x.padded / kPanel; }
  const C* z(std::int64_t row) const { return x.blocks + row * kPanel; }
  Side<C> side(std::int64_t edge) const {
    Side<C> side{x, edge};
    side.sum = sum;
    side.top = top;
    side.inverse = norms.inverse;
    return side;
  }

 private:
  template <typename S>
  C pack_as(Isa isa, std::int64_t begin, std::int64_t width, bool normalize) const {
    const S* rows[kPanel];
    for (int r = 0; r < kPanel; ++r) {
      const std::int64_t i = begin + r;
      rows[r] = i < first.rows ? first.row<S>(i)
                : i < x.rows   ? second.row<S>(i - first.rows)
                               : nullptr;
    }
    return pack_panel(isa, rows, width, normalize, begin, x, norms);
  }
};

}  // namespace clae_fast
