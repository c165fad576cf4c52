// Stored elements as numbers; included by the bodies that read half precision.

static inline float widen(float value) { return value; }
static inline double widen(double value) { return value; }
static inline float widen(BFloat16 value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
// Exponent and mantissa move into place and the bias is corrected by one multiplication, which is
// exact for subnormal numbers too; Inf and NaN keep the largest exponent.
static inline float widen(Float16 value) {
  const std::uint32_t magnitude = static_cast<std::uint32_t>(value.bits & 0x7fffu) << 13;
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  float wide;
  std::memcpy(&wide, &magnitude, sizeof wide);
  wide *= 0x1p112f;
  std::uint32_t bits;
  std::memcpy(&bits, &wide, sizeof bits);
  bits = (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : bits) | sign;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
