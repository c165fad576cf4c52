// The contrastive losses from raw embeddings, with the gradients of their sum, without torch.
//
//   loss_r = log(1 + e^(lse_r - s_r+)),   the positive + apart from the log-sum-exp
//   d(sum) = t sum_j (r_i e^(s_ij - lse_i) + r_j e^(s_ij - lse_j)) z_j - t r_+ (z_+ - z_i),
//   r = sigmoid(lse - s_+), r_+ its sum over the rows that share the positive
//
// Work in GEMMs g of all pairs (one is 2 N M D operations), one exponential per pair and sweep:
//
//   nt_xent             0.5 g sums + 1.5 g gradient; 1 g where the exponentials are kept
//   one_way, dq alone   2 g in one sweep
//   one_way, two_way    1 g sums + 1 to 2 g gradients; + 1 g where they are not kept
//
// Exponentials are kept of as many tiles as fit in 32 MB, or of all where 1.5 (N + M) D elements
// more are enough. Everything else is O(N D).
//
// A run is a number of steps: pack, first sweep, turn (log-sum-exps to weights), second sweep,
// finish. The caller may pause between two steps, or two tasks of what takes O(N M) time.
#pragma once

#include "contrast_parts.h"
#include "schedule.h"

namespace clae_fast {

template <typename C>
class Contrast {
 public:
  Contrast(Form form, const Matrix& q, const Matrix& k, const Matrix* negatives, std::int64_t width,
           double scale, bool normalize, const ContrastOutputs<C>& out)
      : form_(form),
        queue_(negatives != nullptr),
        normalize_(normalize),
        width_(width),
        batch_(q.rows),
        scale_(C(scale)),
        out_(out) {
    const bool dscale = out.dscale != nullptr, dq = out.dq != nullptr || dscale;
    const bool dk = out.dk != nullptr, dn = out.dnegatives != nullptr;
    a_.first = q;
    if (form == Form::kNtXent) {
      a_.second = k;
      want_a_ = dq || dk;
    } else {
      b_.first = queue_ ? *negatives : k;
      if (queue_) positive_.first = k;
      want_a_ = dq;
      want_b_ = queue_ ? dn : dk;
    }
    want_any_ = dq || dk || dn;
    mean_ = form == Form::kOneWay && want_a_ && !want_b_;
    plan();
  }

  void place(Arena& arena) {
    const std::int64_t N = rows(), of_tile = row_edge_ * col_edge_;
    const std::int64_t room = room_ / std::int64_t(sizeof(C));
    const bool all = all_tiles() * of_tile <= room + (N + columns()) * width_ * 3 / 2;
    stored_tiles_ = !two_phases() ? 0 : all ? all_tiles() : room / of_tile;
    all_stored_ = stored_tiles_ > 0 && all;
    const bool tight = all_stored_ && all_tiles() * of_tile > room;
    using Gradient = typename Operand<C>::Gradient;
    const auto where = [&](bool wanted) {
      return !wanted ? Gradient::kNone : tight ? Gradient::kInPanels : Gradient::kOwn;
    };
    sweep_.half = a_.first.kind == Kind::kBFloat16 && isa_ == Isa::kAvx512 && bf16_supported();
    a_.place(arena, width_, where(want_a_), sweep_.half);
    if (form_ != Form::kNtXent) b_.place(arena, width_, where(want_b_), sweep_.half);
    if (queue_) positive_.place(arena, width_, Gradient::kNone);
    cosine_ = arena.take<C>(batch_);
    losses_ = arena.take<C>(out_.reduced ? 2 * N : 0);
    row_share_ = arena.take<C>(N);
    col_share_ = arena.take<C>(form_ == Form::kTwoWay ? batch_ : 0);
    euler_ = arena.take<C>(out_.dscale == nullptr ? 0 : N);
    alarms_ = arena.take<C>(a_.panels() + b_.panels() + positive_.panels());
    stored_ = arena.take<C>(stored_tiles_ * of_tile);
    if (!all_stored_) return;
    row_parts_ = arena.take<double>(a_.x.padded * tiles(columns(), col_edge_));
    if (form_ == Form::kTwoWay) {
      col_parts_ = arena.take<double>(b_.x.padded * tiles(N, row_edge_));
    }
  }

  std::int64_t steps() const { return finish_step() + (want_any_ ? 1 : 0); }
  // Of all steps, in operations of a product, roughly.
  double work() const { return double(rows()) * work_of_row(); }

  // For tests: instruction sets and modes that the machine and the size would not choose.
  void use_isa(Isa isa) { isa_ = isa; }
  void use_room(std::int64_t bytes) { room_ = bytes; }
  int mode() const { return !all_stored_ ? 0 : a_.in_panels() || b_.in_panels() ? 1 : 2; }

  // After a pause, with another object and the same memory: what earlier steps left in the former.
  void resume(std::int64_t step) {
    if (step > 0) arrange();
    if (step > turn_step()) aim();
  }

  // The step from its task `first` on; returns the task to go on with, 0 when the step is done.
  //
  // parallel(n, work of one, f): f(0) ... f(n - 1), at once where it pays; f's second argument is
  // a buffer of kBuffer elements. parallel.some begins at `first` and may stop early.
  template <typename Parallel>
  std::int64_t run(std::int64_t step, std::int64_t first, const Parallel& parallel) {
    if (step == 0) {
      prepare(parallel);
    } else if (step < turn_step()) {
      return sweep(first_, mean_ ? Task::kMean : Task::kSums, step - 1, first, parallel);
    } else if (step == turn_step()) {
      turn(parallel);
      aim();
    } else if (step < finish_step()) {
      return sweep(second_, Task::kGradient, step - turn_step() - 1, first, parallel);
    } else {
      return finish(first, parallel);
    }
    return 0;
  }

 private:
  enum class Task { kSums, kMean, kGradient };

  std::int64_t rows() const { return a_.first.rows + a_.second.rows; }
  std::int64_t columns() const { return form_ == Form::kNtXent ? rows() : b_.first.rows; }
  std::int64_t turn_step() const { return 1 + first_.steps(); }
  std::int64_t finish_step() const { return turn_step() + 1 + second_.steps(); }
  bool two_phases() const { return want_any_ && !mean_ && (want_a_ || want_b_); }
  double work_of_row() const {
    const double sweeps = want_any_ ? 2 : 1;
    return double(columns()) * sweeps * (4.0 * double(width_) + kExponential<C>);
  }

  void plan() {
    const std::int64_t N = rows(), M = columns();
    const bool by_rows = form_ == Form::kOneWay;
    sweep_.symmetric = form_ == Form::kNtXent;
    sweep_.width = width_;
    sweep_.skip = sweep_.symmetric ? Skip::kTwins : queue_ ? Skip::kNone : Skip::kDiagonal;
    const bool owners = by_rows && !want_b_;
    row_edge_ = owners ? owner_edge(N, work_of_row()) : square_edge(N);
    col_edge_ = sweep_.symmetric ? row_edge_ : owners ? kEdge : square_edge(M);
    choose_visits();
  }

  // Where the exponentials of all tiles are kept, nothing is swept twice: each tile is a task of
  // the one step that makes them, and each tile of rows or columns one of the step that gathers
  // them.
  void choose_visits() {
    const bool by_rows = form_ == Form::kOneWay;
    if (kept_) {
      first_ = schedule(sweep_.symmetric ? Visit::kUpperTiles : Visit::kTiles);
      second_ = Schedule();
      return;
    }
    first_ = schedule(sweep_.symmetric ? Visit::kSymmetric
                      : by_rows        ? Visit::kRows
                                       : Visit::kRounds);
    if (!two_phases()) return;
    second_ = schedule(sweep_.symmetric     ? Visit::kSymmetric
                       : want_a_ && want_b_ ? Visit::kRounds
                       : want_a_            ? Visit::kRows
                                            : Visit::kColumns);
  }

  Schedule schedule(Visit visit) const {
    return {visit, tiles(rows(), row_edge_), tiles(columns(), col_edge_)};
  }

  std::int64_t all_tiles() const {
    const std::int64_t I = tiles(rows(), row_edge_), J = tiles(columns(), col_edge_);
    return sweep_.symmetric ? I * (I + 1) / 2 : I * J;
  }

  template <typename Parallel>
  void prepare(const Parallel& parallel) {
    const Operand<C>* operands[] = {&a_, &b_, &positive_};
    std::int64_t before = 0;
    for (const Operand<C>* operand : operands) {
      if (operand->x.rows == 0) continue;
      C* alarms = alarms_ + before;
      parallel(operand->panels(), 40.0 * kPanel * double(width_), [&](std::int64_t panel, C*) {
        alarms[panel] = operand->pack(isa_, panel, width_, normalize_);
      });
      before += operand->panels();
    }
    const Operand<C>& other = partner();
    const std::int64_t shift = form_ == Form::kNtXent ? batch_ : 0;
    parallel((batch_ + kPanel - 1) / kPanel, 4.0 * kPanel * double(width_),
             [&](std::int64_t panel, C*) {
               const std::int64_t end = std::min(batch_, (panel + 1) * kPanel);
               for (std::int64_t i = panel * kPanel; i < end; ++i) {
                 const bool sphere = a_.norms.on_sphere[i] && other.norms.on_sphere[i + shift];
                 cosine_[i] = packed_cosine(isa_, a_.z(i), a_.x.padded * kPanel, other.z(i + shift),
                                            other.x.padded * kPanel, width_, sphere);
               }
             });
    arrange();
  }

  // Whose row i (+ B in the stack) is the positive of row i.
  const Operand<C>& partner() const {
    return form_ == Form::kNtXent ? a_ : queue_ ? positive_ : b_;
  }

  void arrange() {
    alarm_ = 0;
    for (std::int64_t i = 0; i < a_.panels() + b_.panels() + positive_.panels(); ++i) {
      alarm_ += alarms_[i];
    }
    double bound = std::abs(double(scale_));
    if (!normalize_) bound *= a_.longest() * (form_ == Form::kNtXent ? a_ : b_).longest();
    const KnownMaximum<C> maximum(bound, std::max(rows(), columns()));
    sweep_.known = maximum.known && scale_ > 0;
    sweep_.scale = sweep_.known ? C(double(scale_) * kLog2E) : scale_;
    sweep_.shift = C(sweep_.known ? maximum.shift * kLog2E : 0.0);
    shift_ = double(sweep_.shift) / kLog2E;  // as it was rounded
    sweep_.stored = stored_;
    sweep_.stored_tiles = stored_tiles_;
    kept_ = sweep_.known && all_stored_;
    choose_visits();
    sweep_.row = a_.side(row_edge_);
    if (kept_) {
      sweep_.row.sum = row_parts_;
      sweep_.row_slot = a_.x.padded;
    }
    sweep_.col = sweep_.symmetric ? sweep_.row : b_.side(col_edge_);
    if (form_ == Form::kOneWay) sweep_.col.sum = nullptr;
    if (kept_) {
      sweep_.col_slot = sweep_.symmetric ? a_.x.padded : b_.x.padded;
      if (form_ == Form::kTwoWay) sweep_.col.sum = col_parts_;
    }
    if (mean_) sweep_.row.gradient = a_.gradient;
  }

  template <typename Parallel>
  std::int64_t sweep(const Schedule& schedule, Task task, std::int64_t step, std::int64_t first,
                     const Parallel& parallel) {
    const std::int64_t tiles = schedule.visit == Visit::kRows      ? schedule.col_tiles
                               : schedule.visit == Visit::kColumns ? schedule.row_tiles
                                                                   : 1;
    const double of_pair = 2.0 * double(width_) + kExponential<C>;
    const double of_tile = of_pair * double(row_edge_) * double(col_edge_);
    return parallel.some(
        schedule.tasks(step), of_tile * double(tiles) * (task == Task::kSums ? 1 : 3), first,
        [&](std::int64_t i, C* buffer) {
          schedule.run(step, i, [&](std::int64_t I, std::int64_t J) {
            if (task == Task::kSums) return sums_tile(isa_, sweep_, I, J, buffer);
            if (task == Task::kMean) return mean_tile(isa_, sweep_, I, J, buffer);
            const bool into_rows = sweep_.row.wants(I);
            const bool into_columns = sweep_.col.wants(J) && !(sweep_.symmetric && I == J);
            if (into_rows || into_columns) {
              gradient_tile(isa_, sweep_, I, J, into_rows, into_columns, buffer);
            }
          });
        });
  }

  C log_sum_of(const Operand<C>& operand, std::int64_t i) const {
    return log_sum<C>(operand.sum[i], sweep_.known ? shift_ : double(operand.top[i]));
  }

  // Runs whole: a pause inside would clear what was added up.
  template <typename Parallel>
  void turn(const Parallel& parallel) {
    for (const Operand<C>* operand : {&a_, &b_}) {
      if (kept_ || !operand->in_panels()) continue;
      parallel(operand->panels(), 0.25 * kPanel * double(width_),
               [&](std::int64_t panel, C*) { operand->clear(panel * kPanel, kPanel, width_); });
    }
    if (kept_) add_up(a_, row_parts_, first_.col_tiles);
    if (kept_ && form_ == Form::kTwoWay) add_up(b_, col_parts_, first_.row_tiles);
    const std::int64_t N = rows();
    const C alarm = normalize_ ? C(0) : alarm_;
    const std::int64_t apart = form_ == Form::kTwoWay ? 2 : 1;
    C* losses = out_.reduced ? losses_ : out_.loss;
    for (std::int64_t i = 0; i < N; ++i) {
      const C lse = log_sum_of(a_, i), x = lse - scale_ * cosine_[i < batch_ ? i : i - batch_];
      losses[i * apart] = softplus(x, row_share_[i]) + alarm;
      out_.lse_row[i] = lse;
      a_.weight[i] = weight_of(a_.sum[i], row_share_[i]);
    }
    for (std::int64_t i = 0; form_ == Form::kTwoWay && i < batch_; ++i) {
      const C lse = log_sum_of(b_, i), x = lse - scale_ * cosine_[i];
      losses[i * apart + 1] = softplus(x, col_share_[i]) + alarm;
      out_.lse_col[i] = lse;
      b_.weight[i] = weight_of(b_.sum[i], col_share_[i]);
    }
    if (!out_.reduced) return;
    double sum = 0;
    for (std::int64_t i = 0; i < N * apart; ++i) sum += double(losses[i]);
    *out_.loss = C(sum * double(out_.factor));
  }

  void aim() {
    if (mean_) return;
    const std::int64_t N = rows();
    sweep_.row.weight = a_.weight;
    sweep_.row.lse = a_.top;
    sweep_.row.gradient = a_.gradient;
    const bool both = out_.dscale != nullptr;
    sweep_.row.wanted_begin = form_ == Form::kNtXent && out_.dq == nullptr && !both ? batch_ : 0;
    sweep_.row.wanted_end = form_ == Form::kNtXent && out_.dk == nullptr && !both ? batch_ : N;
    if (sweep_.symmetric) {
      sweep_.col = sweep_.row;
      return;
    }
    sweep_.col.gradient = b_.gradient;
    sweep_.col.wanted_end = b_.x.rows;
    if (form_ == Form::kTwoWay) {
      sweep_.col.weight = b_.weight;
      sweep_.col.lse = b_.top;
    }
  }

  // What the rows that share the positive of pair i pull with.
  C share(std::int64_t i) const {
    const C other = form_ == Form::kNtXent   ? row_share_[batch_ + i]
                    : form_ == Form::kTwoWay ? col_share_[i]
                                             : C(0);
    return row_share_[i] + other;
  }

  template <typename Parallel>
  std::int64_t finish(std::int64_t first, const Parallel& parallel) {
    if (kept_) {
      if (const std::int64_t next = gather(first, parallel); next != 0) return next;
    } else {
      give(parallel, a_);
      give(parallel, b_);
    }
    if (queue_ && out_.dk != nullptr) give(parallel, positive_);
    if (out_.dscale == nullptr) return 0;
    const bool stacked = form_ == Form::kNtXent;
    double sum = 0;
    for (std::int64_t i = 0; i < rows(); ++i) sum += (stacked ? 0.5 : 1.0) * double(euler_[i]);
    for (std::int64_t i = 0; i < batch_; ++i) sum -= double(share(i)) * double(cosine_[i]);
    *out_.dscale = C(sum) * out_.factor;
    return 0;
  }

  // One task per tile of rows, or of columns, from the kept exponentials to the caller's rows.
  template <typename Parallel>
  std::int64_t gather(std::int64_t first, const Parallel& parallel) {
    const std::int64_t I_tiles = first_.row_tiles, J_tiles = first_.col_tiles;
    const std::int64_t of_columns = sweep_.symmetric ? 0 : J_tiles;
    const double work = 2.0 * double(row_edge_) * double(columns()) * double(width_);
    return parallel.some(I_tiles + of_columns, work, first, [&](std::int64_t task, C* buffer) {
      if (task >= I_tiles) {
        const std::int64_t J = task - I_tiles;
        if (!sweep_.col.wants(J)) return;
        if (b_.in_panels()) b_.clear(sweep_.col.begin(J), sweep_.col.size(J), width_);
        for (std::int64_t I = 0; I < I_tiles; ++I) {
          gradient_tile(isa_, sweep_, I, J, false, true, buffer);
        }
        return give_rows(b_, sweep_.col.begin(J), sweep_.col.size(J));
      }
      if (!sweep_.row.wants(task)) return;
      if (a_.in_panels()) a_.clear(sweep_.row.begin(task), sweep_.row.size(task), width_);
      for (std::int64_t J = 0; J < J_tiles; ++J) {
        if (sweep_.symmetric && J < task) {
          gradient_tile(isa_, sweep_, J, task, false, true, buffer);
        } else {
          gradient_tile(isa_, sweep_, task, J, true, false, buffer);
        }
      }
      give_rows(a_, sweep_.row.begin(task), sweep_.row.size(task));
    });
  }

  template <typename Parallel>
  void give(const Parallel& parallel, const Operand<C>& mine) {
    parallel(mine.panels(), 12.0 * kPanel * double(width_), [&](std::int64_t panel, C*) {
      give_rows(mine, panel * kPanel, std::min<std::int64_t>(kPanel, mine.x.rows - panel * kPanel));
    });
  }

  void give_rows(const Operand<C>& mine, std::int64_t begin, std::int64_t count) {
    for (std::int64_t row = begin; row < begin + count; ++row) {
      const bool first = &mine == &a_, stacked = form_ == Form::kNtXent;
      const bool key = stacked ? row >= batch_ : !first;
      const bool negative = queue_ && &mine == &b_;
      C* out = negative ? out_.dnegatives : key ? out_.dk : out_.dq;
      if (out == nullptr && !(first && out_.dscale != nullptr)) continue;
      const std::int64_t i = stacked && key ? row - batch_ : row;
      Back<C> back{};
      back.block = mine.x.padded * kPanel;
      back.z = mine.z(row);
      back.dz = mine.gradient == nullptr ? nullptr : mine.gradient + row * kPanel;
      back.weight = mean_ ? a_.weight[row] : C(1);
      back.gain = scale_;
      back.inverse = mine.norms.inverse[row] * out_.factor;
      back.on_sphere = mine.norms.on_sphere[row];
      if (!negative) {
        const Operand<C>& others = key ? a_ : partner();
        back.partner = others.z(stacked && !key ? i + batch_ : i);
        back.block_of_partner = others.x.padded * kPanel;
        back.share = scale_ * share(i);
      }
      const C euler = give_back(isa_, back, width_, out == nullptr ? nullptr : out + i * width_);
      if (first && out_.dscale != nullptr) euler_[row] = mean_ ? euler * a_.weight[row] : euler;
    }
  }

  Form form_;
  bool queue_, normalize_, want_a_ = false, want_b_ = false, want_any_ = false, mean_ = false,
                           all_stored_ = false, kept_ = false;
  std::int64_t width_, batch_, row_edge_ = 0, col_edge_ = 0, stored_tiles_ = 0,
                               room_ = std::int64_t(32) << 20;
  C scale_, alarm_ = 0;
  double shift_ = 0;
  ContrastOutputs<C> out_;
  Operand<C> a_, b_, positive_;
  Schedule first_, second_;
  Sweep<C> sweep_;
  double *row_parts_ = nullptr, *col_parts_ = nullptr;
  C *cosine_ = nullptr, *row_share_ = nullptr, *col_share_ = nullptr, *euler_ = nullptr,
    *alarms_ = nullptr, *stored_ = nullptr, *losses_ = nullptr;
  Isa isa_ = best_isa();
};

}  // namespace clae_fast
