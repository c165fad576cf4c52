// pair_lse, pair_grad, pair_mean, pair_sigmoid and pair_uel without torch: pack, one sweep over the
// tiles, hand back. Rows are used as they are.
//
// A task owns rows and passes over all columns, except where both dq and dk are wanted: then it
// owns one tile of each (schedule.h). O(N D) memory, but for the kUelRows rows of scores per
// thread.
#pragma once

#include <limits>
#include <memory>

#include "operand.h"
#include "schedule.h"

namespace clae_fast {

enum class PairOp { kLse, kGrad, kMean, kSigmoid, kUel };

template <typename C>
struct PairArguments {
  PairOp op;
  Matrix q, k;
  std::int64_t width = 0;
  double scale = 1, bias = 0, negative_weight = 1;
  Skip skip = Skip::kNone;
  std::int64_t offset = 0;
  const std::int32_t *row_ids = nullptr, *col_ids = nullptr;
  const C *row_lse = nullptr, *row_weight = nullptr, *col_lse = nullptr, *col_weight = nullptr;
  C* rows = nullptr;               // lse or loss
  double* lse = nullptr;           // in the place of rows, not rounded
  C* slope = nullptr;              // of pair_sigmoid
  C *dq = nullptr, *dk = nullptr;  // dq, or the mean of pair_mean
};

template <typename C>
class PairSweep {
 public:
  explicit PairSweep(const PairArguments<C>& a) : arg_(a) {
    q_.first = a.q;
    k_.first = a.k;
    const std::int64_t N = a.q.rows, M = a.k.rows;
    const bool both = a.dk != nullptr;
    row_edge_ = both ? square_edge(N) : owner_edge(N, work_of_row());
    col_edge_ = both ? square_edge(M) : kEdge;
    if (a.op == PairOp::kUel) row_edge_ = kUelRows;
    schedule_ = {both ? Visit::kRounds : Visit::kRows, (N + row_edge_ - 1) / row_edge_,
                 (M + col_edge_ - 1) / col_edge_};
  }

  void place(Arena& arena) {
    using Gradient = typename Operand<C>::Gradient;
    q_.place(arena, arg_.width, arg_.dq != nullptr ? Gradient::kOwn : Gradient::kNone);
    k_.place(arena, arg_.width, arg_.dk != nullptr ? Gradient::kOwn : Gradient::kNone);
    slope_ = arena.take<double>(arg_.op == PairOp::kSigmoid ? arg_.q.rows : 0);
    alarms_ = arena.take<C>(q_.panels() + k_.panels());
  }
  std::int64_t steps() const { return schedule_.steps() + 2; }
  double work() const { return double(arg_.q.rows) * work_of_row(); }
  void use_isa(Isa isa) { isa_ = isa; }
  void resume(std::int64_t step) {
    if (step > 0) arrange();
  }

  // As Contrast::run.
  template <typename Parallel>
  std::int64_t run(std::int64_t step, std::int64_t first, const Parallel& parallel) {
    if (step == 0) {
      prepare(parallel);
      arrange();
      return 0;
    }
    if (step == steps() - 1) {
      finish(parallel);
      return 0;
    }
    const double work =
        schedule_.visit == Visit::kRows
            ? double(row_edge_) * work_of_row()
            : (6.0 * double(arg_.width) + kExponential<C>)*double(row_edge_) * double(col_edge_);
    return parallel.some(schedule_.tasks(step - 1), work, first, [&](std::int64_t i, C* buffer) {
      if (arg_.op == PairOp::kUel) return uel(i, buffer);
      schedule_.run(step - 1, i, [&](std::int64_t I, std::int64_t J) { tile(I, J, buffer); });
    });
  }

 private:
  double work_of_row() const {
    const double exponentials = (arg_.op == PairOp::kUel ? 4 : 2) * kExponential<C>;
    return double(arg_.k.rows) * (6.0 * double(arg_.width) + exponentials);
  }

  template <typename Parallel>
  void prepare(const Parallel& parallel) {
    C* alarms = alarms_;
    for (const Operand<C>* operand : {&q_, &k_}) {
      parallel(operand->panels(), 40.0 * kPanel * double(arg_.width), [&](std::int64_t panel, C*) {
        alarms[panel] = operand->pack(isa_, panel, arg_.width, false);
      });
      alarms += operand->panels();
    }
    for (std::int64_t i = 0; arg_.op == PairOp::kSigmoid && i < arg_.q.rows; ++i) slope_[i] = 0;
  }

  void arrange() {
    alarm_ = 0;
    for (std::int64_t i = 0; i < q_.panels() + k_.panels(); ++i) alarm_ += alarms_[i];
    sweep_.width = arg_.width;
    sweep_.skip = arg_.skip;
    sweep_.offset = arg_.offset;
    sweep_.row = q_.side(row_edge_);
    sweep_.col = k_.side(col_edge_);
    sweep_.col.sum = nullptr;
    sweep_.row.ids = arg_.row_ids;
    sweep_.col.ids = arg_.col_ids;
    sweep_.row.gradient = q_.gradient;
    sweep_.row.wanted_end = arg_.q.rows;
    sweep_.col.gradient = k_.gradient;
    sweep_.col.wanted_end = arg_.k.rows;
    sweep_.row.lse = arg_.row_lse;
    sweep_.row.weight = arg_.row_weight;
    sweep_.col.lse = arg_.col_lse;
    sweep_.col.weight = arg_.col_weight;
    sweep_.slope = slope_;
    if (arg_.op == PairOp::kSigmoid || arg_.op == PairOp::kUel) {
      sweep_.scale = C(arg_.scale);
      sweep_.bias = C(arg_.bias);
    } else {
      known_maximum();
    }
  }

  void known_maximum() {
    const double bound = std::abs(arg_.scale) * q_.longest() * k_.longest();
    const KnownMaximum<C> maximum(bound, std::max(arg_.q.rows, arg_.k.rows));
    sweep_.known =
        maximum.known && arg_.scale > 0 && arg_.op != PairOp::kGrad;  // it is given log-sum-exps
    sweep_.scale = C(sweep_.known ? arg_.scale * kLog2E : arg_.scale);
    sweep_.shift = C(sweep_.known ? maximum.shift * kLog2E : 0.0);
    shift_ = double(sweep_.shift) / kLog2E;  // as it was rounded
    // t log2(e) was rounded too, by which all s are off alike, and with them the log-sum-exp. The
    // weights that pair_grad makes of it, with t as it is, are to sum to 1.
    as_given_ = sweep_.known ? double(C(arg_.scale)) * kLog2E / double(sweep_.scale) : 1.0;
  }

  void tile(std::int64_t I, std::int64_t J, C* buffer) const {
    switch (arg_.op) {
      case PairOp::kLse:
        return sums_tile(isa_, sweep_, I, J, buffer);
      case PairOp::kGrad:
        return gradient_tile(isa_, sweep_, I, J, true, false, buffer);
      case PairOp::kMean:
        return mean_tile(isa_, sweep_, I, J, buffer);
      default:
        return sigmoid_tile(isa_, sweep_, I, J, buffer);
    }
  }

  void uel(std::int64_t task, C* buffer) const {
    struct alignas(64) Line {
      C of[64 / sizeof(C)];
    };
    const std::size_t lines = std::size_t(kUelRows) * std::size_t(k_.x.padded) * sizeof(C) / 64;
    const std::unique_ptr<Line[]> scores(new Line[lines]);
    const Uel<C> u{sweep_.row,   sweep_.col,           arg_.width,
                   sweep_.scale, arg_.negative_weight, arg_.row_weight,
                   arg_.rows,    arg_.offset,          arg_.dq != nullptr};
    uel_rows(isa_, u, task * kUelRows, scores[0].of, buffer);
  }

  template <typename Parallel>
  void finish(const Parallel& parallel) {
    for (std::int64_t i = 0; i < arg_.q.rows; ++i) {
      if (arg_.op == PairOp::kLse || arg_.op == PairOp::kMean) {
        const double sum = q_.sum[i];
        const double zero = sweep_.known ? shift_ : double(q_.top[i]);
        const double lse = sum == 0 ? -std::numeric_limits<double>::infinity()
                                    : (std::log(sum) + zero) * as_given_;
        if (arg_.lse != nullptr) {
          arg_.lse[i] = lse;
        } else {
          arg_.rows[i] = C(lse);
        }
      } else if (arg_.op == PairOp::kSigmoid) {
        arg_.rows[i] = C(q_.sum[i]) + alarm_;
        arg_.slope[i] = C(slope_[i]);
      } else if (arg_.op == PairOp::kUel) {
        arg_.rows[i] += alarm_;
      }
    }
    if (arg_.dq != nullptr) give(parallel, q_, arg_.dq);
    if (arg_.dk != nullptr) give(parallel, k_, arg_.dk);
  }

  template <typename Parallel>
  void give(const Parallel& parallel, const Operand<C>& mine, C* out) {
    parallel(mine.panels(), 12.0 * kPanel * double(arg_.width), [&](std::int64_t panel, C*) {
      const std::int64_t end = std::min(mine.x.rows, (panel + 1) * kPanel);
      for (std::int64_t i = panel * kPanel; i < end; ++i) {
        Back<C> back{};
        back.dz = mine.gradient + i * kPanel;
        back.z = mine.z(i);
        back.block = mine.x.padded * kPanel;
        back.weight = arg_.op != PairOp::kMean ? C(1)
                      : mine.sum[i] == 0       ? C(0)
                                               : C(1 / mine.sum[i]);
        back.gain = arg_.op != PairOp::kMean ? C(arg_.scale) : C(1);
        back.inverse = C(1);
        give_back(isa_, back, arg_.width, out + i * arg_.width);
      }
    });
  }

  PairArguments<C> arg_;
  Operand<C> q_, k_;
  Schedule schedule_;
  Sweep<C> sweep_;
  std::int64_t row_edge_ = 0, col_edge_ = 0;
  double shift_ = 0, as_given_ = 1;
  double* slope_ = nullptr;
  C *alarms_ = nullptr, alarm_ = 0;
  Isa isa_ = best_isa();
};

}  // namespace clae_fast
