// UEL, a few rows at a time against all columns, whose scores stay in L2; see reference/pair_uel.py
// for the equations. Passes over the scores: maximum and sum; probabilities and what is summed over
// them; weights. Only the largest negative can have p > 1/2, where 1 - p cancels: it is taken out
// of the sums and its complement is summed from the others.

template <typename C>
static inline C log_of_sum(C a, C b) {
  const C top = a > b ? a : b, low = a > b ? b : a;
  return top == C(-__builtin_inf()) ? top
                                    : top + C(__builtin_log1p(__builtin_exp(double(low - top))));
}

template <typename C>
static inline C softplus_of(C x) {
  return (x > 0 ? x : C(0)) + C(__builtin_log1p(__builtin_exp(-__builtin_fabs(double(x)))));
}

// scores[r][j] = t <q_r, k_j>, -inf for the row itself, its positive, equal ids and padding.
template <typename C>
static void uel_scores(const Uel<C>& u, std::int64_t begin, std::int64_t rows, std::int64_t padded,
                       C* scores) {
  const std::int64_t M = u.col.x.rows, half = M / 2;
  const C* a = u.row.x.panels + begin / kPanel * kPanel * u.width + begin % kPanel;
  for (std::int64_t j = 0; j < padded; j += kPanel) {
    for (int sub = 0; sub < kPanel; sub += 2 * kLanes<C>) {
      for (int r = 0; r < kUelRows; r += kRows) {
        block_product<C, 1, kPanel, false>(a + r, u.col.x.panels + j * u.width + sub, u.width,
                                           scores + r * padded + j + sub, padded);
      }
    }
  }
  const C out = -__builtin_inf();
  for (std::int64_t r = 0; r < rows; ++r) {
    C* x = scores + r * padded;
    for (std::int64_t j = 0; j < padded; j += kLanes<C>) at(x + j) *= u.scale;
    const std::int64_t own = begin + r + u.offset;
    for (std::int64_t j = M; j < padded; ++j) x[j] = out;
    if (own < M) x[own] = out;
    if (M > 0) x[(own + half) % M] = out;
    if (u.row.ids != nullptr && u.col.ids != nullptr) {
      for (std::int64_t j = 0; j < M; ++j) x[j] = u.col.ids[j] == u.row.ids[begin + r] ? out : x[j];
    }
  }
}

template <typename C>
static C largest_in(const C* x, std::int64_t padded) {
  Vector<C> tops = at(x);
  for (std::int64_t j = kLanes<C>; j < padded; j += kLanes<C>) {
    tops = at(x + j) > tops ? at(x + j) : tops;
  }
  return largest_of<C>(tops);
}

// One row: writes its loss and turns its scores into the weights g of the keys. Returns the weight
// of the positive key.
template <typename C>
static C uel_row(const Uel<C>& u, std::int64_t row, C s_pos, std::int64_t padded, C* x) {
  const C log2e = C(1.4426950408889634), none = -__builtin_inf(), m = C(u.m);
  const C log_m = C(__builtin_log(u.m)), log_m1 = u.m > 1 ? C(__builtin_log(u.m - 1)) : none;
  const C highest = largest_in(x, padded);
  std::int64_t top = 0;
  for (std::int64_t j = padded - 1; j >= 0; --j) top = x[j] == highest ? j : top;
  const C s_top = x[top];
  x[top] = none;
  // Of the others the sum has a maximum of its own: next to the largest it may be 0.
  const C zero = finite_or_zero(largest_in(x, padded));
  Vector<C> sums = {};
  for (std::int64_t j = 0; j < padded; j += kLanes<C>) {
    Vector<C> e = (at(x + j) - zero) * log2e;
    exp2_of(e);
    sums += e;
  }
  const double sum = double(sum_of<C>(sums));
  const C others = sum == 0 ? none : C(__builtin_log(sum)) + zero;
  const C lse = log_of_sum(s_top, others);
  const C margin = lse + log_m - s_pos, log_p_pos = -softplus_of(margin);
  const C log_z = s_pos - log_p_pos;
  const C x_top = s_top - log_z;
  // log(1 - p) and p / (1 - p), summed over all but the largest
  Vector<C> small = {}, below_sums = {};
  for (std::int64_t j = 0; j < padded; j += kLanes<C>) {
    Vector<C> p = (at(x + j) - log_z) * log2e;
    exp2_of(p);
    below_sums += p / (C(1) - p);
    p = -p;
    log1p_of(p);
    small += p;
  }
  C log_rest = C(__builtin_log1p(-__builtin_exp(double(x_top))));
  if (x_top > C(-0.6931471805599453) || x_top != x_top) {
    log_rest = log_of_sum(log_of_sum(log_p_pos, others - log_z + log_m), x_top + log_m1);
  }
  u.loss[row] = -log_p_pos - m * (sum_of<C>(small) + log_rest);
  if (!u.need_dq) return 0;
  const C below = sum_of<C>(below_sums);
  const C log_odds_top = s_top == none ? none : x_top - log_rest;
  for (std::int64_t j = 0; j < padded; j += kLanes<C>) {
    Vector<C> p = (at(x + j) - log_z) * log2e, of_top = (at(x + j) - log_z + log_odds_top) * log2e;
    exp2_of(p);
    exp2_of(of_top);
    const Vector<C> odds = p / (C(1) - p);
    at(x + j) = m * (p * (C(2) - (m - C(1)) * odds - m * (below - odds)) - m * of_top);
  }
  const double p_top = s_top == none ? 0.0 : __builtin_exp(double(x_top));
  double g_top = p_top * (2 - u.m * double(below));
  if (u.m > 1 && s_top != none) g_top -= (u.m - 1) * __builtin_exp(double(x_top + log_odds_top));
  x[top] = C(u.m * g_top);
  const double p_pos = __builtin_exp(double(log_p_pos));
  const double sigmoid = -__builtin_expm1(double(log_p_pos));
  return C(sigmoid +
           u.m * (double(below) * p_pos + __builtin_exp(double(log_p_pos) + double(log_odds_top))));
}

template <typename C>
static void uel_rows(const Uel<C>& u, std::int64_t begin, C* scores, C* buffer) {
  const std::int64_t M = u.col.x.rows, padded = (M + kPanel - 1) / kPanel * kPanel;
  const std::int64_t left = u.row.x.rows - begin, rows = left < kUelRows ? left : kUelRows;
  const std::int64_t apart = u.col.x.padded * kPanel, own_apart = u.row.x.padded * kPanel;
  const std::int64_t blocks = (u.width + kPanel - 1) / kPanel;
  uel_scores(u, begin, rows, padded, scores);
  C pull[kUelRows] = {};
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t positive = (begin + r + u.offset + M / 2) % M;
    const C s_pos =
        u.scale * packed_cosine(u.row.x.blocks + (begin + r) * kPanel, own_apart,
                                u.col.x.blocks + positive * kPanel, apart, u.width, false);
    pull[r] = uel_row(u, begin + r, s_pos, padded, scores + r * padded);
  }
  if (!u.need_dq) return;
  for (std::int64_t r = rows; r < kUelRows; ++r) {
    for (std::int64_t j = 0; j < padded; ++j) scores[r * padded + j] = C(0);
  }
  for (std::int64_t j = 0; j < M; j += kEdge) {
    const std::int64_t n = M - j < kEdge ? M - j : kEdge;
    for (int r = 0; r < kUelRows; ++r) {
      std::memcpy(buffer + r * kEdge, scores + r * padded + j, n * sizeof(C));
    }
    accumulate<C, false>(buffer, kUelRows, n, u.col.x.blocks + j * kPanel, apart,
                         u.row.gradient + begin * kPanel, own_apart, blocks);
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t positive = (begin + r + u.offset + M / 2) % M;
    const C weight = u.row_weight == nullptr ? C(1) : u.row_weight[begin + r];
    for (std::int64_t block = 0; block < blocks; ++block) {
      C* dq = u.row.gradient + (block * u.row.x.padded + begin + r) * kPanel;
      const C* key = u.col.x.blocks + (block * u.col.x.padded + positive) * kPanel;
      for (int i = 0; i < kPanel; ++i) dq[i] = (dq[i] - pull[r] * key[i]) * weight;
    }
  }
}
