// Products of row-major matrices without packing the tall one: out (+)= left · right, where a vector runs over columns
// of `right` and entries of `left` are broadcast. Both tokens [T, S] and weights [T, M] serve as they lie in memory:
//
//   scores  [t][m] = Σ_s tokens[t][s] · rows[m][s]       left: tokens         right: panels of rowsᵀ
//   sums    [m][s] = Σ_t weights[t][m] · tokens[t][s]    left: weightsᵀ       right: tokens
//   dtokens [t][s] = Σ_m weights[t][m] · rows[m][s]      left: weights        right: rows
#pragma once

#include "gemm.h"

namespace fastslots::FASTSLOTS_ISA {

// left[row][k] stands at data[row·stride + k], or, transposed, at data[k·stride + row].
template <typename T>
struct Left {
  const T* data;
  int64_t stride;
};

// right[k][column] stands at data[k·stride + column]; columns past a panel's width at data + panel.
// As packed panels [panel][k][W] (pack_columns): stride W, panel depth·W. Row-major: stride its width, panel W.
template <typename T>
struct Right {
  const T* data;
  int64_t stride, panel;
};

template <typename T>
struct Out {
  T* data;
  int64_t stride;
};

template <typename T, bool kTransposed, int N, int R>
void product_block(Left<T> left, const T* right, int64_t right_stride, int64_t depth, bool add, Out<T> out) {
  constexpr int V = kLanes<T>, kGroups = (R + 2) / 3;
  Vec<T> sum[R][N];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    for (int n = 0; n < N; ++n) sum[i][n] = add ? load<T>(out.data + i * out.stride + n * V) : Vec<T>{};
  }
  // Rows in threes share a pointer: an address holds one register times 1 or 2, so that twelve rows need four pointers.
  const T* rows[kGroups];
  for (int g = 0; g < kGroups; ++g) rows[g] = left.data + 3 * g * left.stride;
  for (int64_t k = 0; k < depth; ++k, right += right_stride) {
    Vec<T> x[N];
    for (int n = 0; n < N; ++n) x[n] = load<T>(right + n * V);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const Vec<T> w = broadcast<T>(kTransposed ? left.data[i] : rows[i / 3][i % 3 * left.stride]);
      for (int n = 0; n < N; ++n) sum[i][n] += w * x[n];
    }
    if (kTransposed) left.data += left.stride;
    for (int g = 0; g < kGroups; ++g) ++rows[g];
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    for (int n = 0; n < N; ++n) store<T>(out.data + i * out.stride + n * V, sum[i][n]);
  }
}

template <typename T, bool kTransposed, int N, int R = kBlockRows>
FASTSLOTS_INLINE void product_height(int height, Left<T> left, const T* right, int64_t right_stride, int64_t depth,
                                     bool add, Out<T> out) {
  if constexpr (R > 0) {
    if (height == R) return product_block<T, kTransposed, N, R>(left, right, right_stride, depth, add, out);
    product_height<T, kTransposed, N, R - 1>(height, left, right, right_stride, depth, add, out);
  }
}

// out [rows, columns] (+)= left [rows, depth] · right [depth, columns]; columns: a multiple of the lanes.
template <typename T, bool kTransposed>
void product(Left<T> left, Right<T> right, int64_t rows, int64_t columns, int64_t depth, bool add, Out<T> out) {
  constexpr int W = kPanel<T>;
  const RowBlocks blocks(rows);
  for (int64_t column = 0; column < columns; column += W, right.data += right.panel) {
    Left<T> at = left;
    Out<T> to = {out.data + column, out.stride};
    for (int64_t block = 0; block < blocks.count; ++block) {
      const int height = blocks.height(block);
      if (columns - column >= W) {
        product_height<T, kTransposed, 2>(height, at, right.data, right.stride, depth, add, to);
      } else {
        product_height<T, kTransposed, 1>(height, at, right.data, right.stride, depth, add, to);
      }
      at.data += kTransposed ? height : height * at.stride;
      to.data += height * to.stride;
    }
  }
}

// Panels [panel][k][W] of the transpose of from [columns, depth], zeros past the last column.
template <typename T>
void pack_columns(const T* from, int64_t columns, int64_t depth, T* to) {
  constexpr int W = kPanel<T>;
  for (int64_t first = 0; first < columns; first += W) {
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t i = first; i < first + W; ++i) *to++ = i < columns ? from[i * depth + k] : T(0);
    }
  }
}

}  // namespace fastslots::FASTSLOTS_ISA
