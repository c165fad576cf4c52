// One element of a linf attack's step, for the CPU's loops and the GPU's kernel: included inside a
// namespace, once for each instruction set. See cpu/sign_step.h.
//
// step * sign is exact, so that contracting it into an FMA changes no bit. Comparisons drop a NaN
// on one side; `nan` brings back each one that max and min of PyTorch would keep.
template <typename C>
CLAE_FAST_EVERYWHERE static inline C move(C x, C grad, C x0, C step, C eps, C low, C high) {
  const C zero = 0, one = 1;
  const C sign = (grad > zero ? one : zero) - (grad < zero ? one : zero);
  C v = x + step * (grad != grad ? grad : sign);
  const C ball_low = x0 - eps, ball_high = x0 + eps;
  const bool nan =
      (v != v) | (ball_low != ball_low) | (ball_high != ball_high) | (low != low) | (high != high);
  v = v > ball_low ? v : ball_low;
  v = v < ball_high ? v : ball_high;
  v = v > low ? v : low;
  v = v < high ? v : high;
  return nan ? C(__builtin_nanf("")) : v;
}
