// Which tiles are visited in which step, and by which task of it.
//
// Tasks of a step run at once and write different rows; steps follow one another. The order in
// which a row meets its tiles follows from the sizes alone. The caller may pause between two tasks.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pairs.h"

namespace clae_fast {

enum class Visit {
  kRows,        // a task owns a tile of rows and passes over all columns
  kColumns,     // the other way round
  kRounds,      // a task owns one tile of rows and one of columns: a Latin square of tiles
  kSymmetric,   // likewise for I <= J of one operand: the rounds of a tournament
  kTiles,       // every tile is a task of one step; nothing that two of them write
  kUpperTiles,  // likewise for I <= J
};

struct Schedule {
  Visit visit = Visit::kRows;
  std::int64_t row_tiles = 0, col_tiles = 0;

  std::int64_t steps() const {
    switch (visit) {
      case Visit::kRows:
        return row_tiles == 0 ? 0 : 1;
      case Visit::kColumns:
        return col_tiles == 0 ? 0 : 1;
      case Visit::kRounds:
        return row_tiles == 0 || col_tiles == 0 ? 0 : std::max(row_tiles, col_tiles);
      case Visit::kSymmetric:  // the diagonal, then everyone against everyone
        return row_tiles == 0 ? 0 : row_tiles + row_tiles % 2;
      case Visit::kTiles:
      case Visit::kUpperTiles:
        return 1;
    }
    return 0;
  }

  std::int64_t tasks(std::int64_t step) const {
    switch (visit) {
      case Visit::kRows:
        return row_tiles;
      case Visit::kColumns:
        return col_tiles;
      case Visit::kRounds:
        return std::min(row_tiles, col_tiles);
      case Visit::kSymmetric:
        return step == 0 ? row_tiles : (row_tiles + 1) / 2;
      case Visit::kTiles:
        return row_tiles * col_tiles;
      case Visit::kUpperTiles:
        return row_tiles * (row_tiles + 1) / 2;
    }
    return 0;
  }

  // tile(I, J) for every tile of the task.
  template <typename F>
  void run(std::int64_t step, std::int64_t task, const F& tile) const {
    switch (visit) {
      case Visit::kRows:
        for (std::int64_t J = 0; J < col_tiles; ++J) tile(task, J);
        return;
      case Visit::kColumns:
        for (std::int64_t I = 0; I < row_tiles; ++I) tile(I, task);
        return;
      case Visit::kRounds:
        if (row_tiles <= col_tiles) return tile(task, (task + step) % col_tiles);
        return tile((task + step) % row_tiles, task);
      case Visit::kSymmetric:
        return pair(step, task, tile);
      case Visit::kTiles:
        return tile(task / col_tiles, task % col_tiles);
      case Visit::kUpperTiles:
        std::int64_t I = 0;
        for (std::int64_t left = row_tiles; task >= left; --left, ++I) task -= left;
        return tile(I, I + task);
    }
  }

 private:
  // The circle method: one player stays, the others move on by one a round; an odd player pauses.
  template <typename F>
  void pair(std::int64_t step, std::int64_t task, const F& tile) const {
    if (step == 0) return tile(task, task);
    const std::int64_t others = row_tiles + row_tiles % 2 - 1, round = step - 1;
    std::int64_t first = others, second = round;
    if (task > 0) {
      first = (round + task) % others;
      second = (round + others - task) % others;
    }
    if (first >= row_tiles || second >= row_tiles) return;
    tile(std::min(first, second), std::max(first, second));
  }
};

// What an exponential costs, in operations of a product.
template <typename C>
constexpr double kExponential = sizeof(C) == sizeof(float) ? 40 : 2000;

// Rows of a tile whose owner passes over all columns. Few rows are cut finer, so that every thread
// has some, and so are costly ones, so that a pause is never far.
inline std::int64_t owner_edge(std::int64_t rows, double work_of_row) {
  std::int64_t edge = rows >= 1024 ? kEdge : rows >= 256 ? 64 : kPanel;
  while (edge > kPanel && double(edge) * work_of_row > 2e10) edge /= 2;
  return edge;
}

inline std::int64_t tiles(std::int64_t rows, std::int64_t edge) { return (rows + edge - 1) / edge; }

// Edge of square tiles.
inline std::int64_t square_edge(std::int64_t rows) {
  return rows >= 2048 ? kEdge : rows >= 128 ? 64 : kPanel;
}

}  // namespace clae_fast
