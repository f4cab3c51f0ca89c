// Matrices cut into panels of PANEL columns, each contiguous, and the register tile that
// multiplies them.

#pragma once

#include <cstdint>

#include "vectors.h"

namespace fastperturb {

// A register tile holds ROWS x VECS vectors of sums: 16 of AVX-512's 32 registers, 8 of AVX2's 16.
constexpr int VECS = 2;
constexpr int ROWS = LANES == 16 ? 8 : 4;
constexpr int PANEL = VECS * LANES;

// A [rows, columns] matrix as panels [panel][row][PANEL], padded with zeros to whole panels and to
// a multiple of ROWS rows. Two matrices interleave: a panel holds LANES columns of each.
class Panels {
 public:
  Panels(int64_t rows, int64_t columns, int matrices)
      : rows_(round_up(rows, ROWS)),
        width_(PANEL / matrices),
        count_(divide_up(columns, width_)),
        data_(rows_ * count_ * PANEL) {}

  void copy_in(const float* matrix, int64_t rows, int64_t columns, int which = 0) {
    visit(rows, columns, which, [&](float* panel, int64_t offset, int64_t size) {
      std::memcpy(panel, matrix + offset, size * sizeof(float));
    });
  }

  void copy_out(float* matrix, int64_t rows, int64_t columns, int which = 0) const {
    visit(rows, columns, which, [&](const float* panel, int64_t offset, int64_t size) {
      std::memcpy(matrix + offset, panel, size * sizeof(float));
    });
  }

  void add(const Panels& other) {
#pragma omp simd
    for (int64_t i = 0; i < size(); ++i) data_[i] += other.data_[i];
  }

  int64_t rows() const { return rows_; }
  int64_t width() const { return width_; }  // columns of one matrix in a panel
  int64_t count() const { return count_; }
  int64_t size() const { return rows_ * count_ * PANEL; }
  float* panel(int64_t index) const { return data_ + index * rows_ * PANEL; }

 private:
  template <class Visit>
  void visit(int64_t rows, int64_t columns, int which, const Visit& piece) const {
    for (int64_t index = 0; index < count_; ++index) {
      const int64_t start = index * width_;
      const int64_t size = columns - start < width_ ? columns - start : width_;
      for (int64_t row = 0; row < rows; ++row) {
        piece(panel(index) + row * PANEL + which * width_, row * columns + start, size);
      }
    }
  }

  const int64_t rows_, width_, count_;
  Buffer data_;
};

using Tile = Vec[ROWS][VECS];

// tile += coefficients [ROWS][stride] times a panel [depth][PANEL].
inline void multiply(Tile& tile, const float* coefficients, int64_t stride, const float* panel,
                     int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) {
    const float* columns = panel + k * PANEL;
    for (int row = 0; row < ROWS; ++row) {
      const float coefficient = coefficients[row * stride + k];
      for (int v = 0; v < VECS; ++v) tile[row][v] += coefficient * load(columns + v * LANES);
    }
  }
}

// tile += (coefficients [count][stride], ROWS columns of them) transposed times values
// [count][V LANES]: a sum of outer products.
template <int V>
inline void add_outer(Vec (&tile)[ROWS][V], const float* coefficients, int64_t stride,
                      const float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    Vec value[V];
    for (int v = 0; v < V; ++v) value[v] = load(values + (i * V + v) * LANES);
    for (int row = 0; row < ROWS; ++row) {
      const float coefficient = coefficients[i * stride + row];
      for (int v = 0; v < V; ++v) tile[row][v] += coefficient * value[v];
    }
  }
}

// to += value, LANES floats.
inline void accumulate(float* to, Vec value) { store(to, load(to) + value); }

}  // namespace fastperturb
