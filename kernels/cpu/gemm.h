// Small matrix products on panels of pixels.
//
// A tile of pixels is stored as panels: [panel][feature][kPanel pixels], so that every step that is not a product is
// plain vertical arithmetic without remainders, whatever the widths, and a panel is one contiguous stream.
//
//   multiply             out[n][pixels]  = bias[n] + Σ_k W[n][k] x[k][pixels]       forward, and dx with Wᵀ
//   accumulate_products  grad[n][k]     += Σ_pixels dy[n][pixels] x[k][pixels]      weight gradients
//
// W is packed once a call into blocks of rows [block][k][rows], which the kernels broadcast. Accumulators: up to
// kBlockRows x 2 vectors.
#pragma once

#include "simd.h"

namespace fastslots::FASTSLOTS_ISA {

// Rows are cut into blocks of nearly equal size, so that no block is left with one or two rows.
struct RowBlocks {
  int64_t rows, count, size, larger;  // the first `larger` blocks hold size + 1 rows
  explicit RowBlocks(int64_t n)
      : rows(n), count((n + kBlockRows - 1) / kBlockRows), size(count ? n / count : 0), larger(count ? n % count : 0) {}
  int height(int64_t block) const { return int(size + (block < larger)); }
};

// W[n][k] stands at from[n·row_stride + k·column_stride].
template <typename T>
void pack_rows(const T* from, int64_t n, int64_t k, int64_t row_stride, int64_t column_stride, T* to) {
  const RowBlocks blocks(n);
  for (int64_t block = 0, row = 0; block < blocks.count; row += blocks.height(block), ++block) {
    const int height = blocks.height(block);
    for (int64_t j = 0; j < k; ++j) {
      for (int i = 0; i < height; ++i) *to++ = from[(row + i) * row_stride + j * column_stride];
    }
  }
}

template <typename T, int R>
void multiply_block(const T* packed, int64_t k, const T* x, const T* bias, bool add, T* out) {
  constexpr int W = kPanel<T>, V = kLanes<T>;
  Vec<T> sum[R][2];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    sum[i][0] = sum[i][1] = bias ? broadcast<T>(bias[i]) : Vec<T>{};
    if (add) {
      sum[i][0] += load<T>(out + i * W);
      sum[i][1] += load<T>(out + i * W + V);
    }
  }
  for (int64_t j = 0; j < k; ++j, x += W, packed += R) {
    const Vec<T> x0 = load<T>(x), x1 = load<T>(x + V);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const Vec<T> w = broadcast<T>(packed[i]);
      sum[i][0] += w * x0;
      sum[i][1] += w * x1;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    store<T>(out + i * W, sum[i][0]);
    store<T>(out + i * W + V, sum[i][1]);
  }
}

// grad [R][W] += Σ over `panels` panels of dy (rows of W pixels, panel_stride apart) times xt [pixels][W].
template <typename T, int R>
void accumulate_block(const T* dy, int64_t panel_stride, int64_t panels, const T* xt, T* grad) {
  constexpr int W = kPanel<T>, V = kLanes<T>;
  Vec<T> sum[R][2];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    sum[i][0] = load<T>(grad + i * W);
    sum[i][1] = load<T>(grad + i * W + V);
  }
  for (int64_t p = 0; p < panels; ++p, dy += panel_stride) {
    for (int t = 0; t < W; ++t, xt += W) {
      const Vec<T> x0 = load<T>(xt), x1 = load<T>(xt + V);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const Vec<T> w = broadcast<T>(dy[i * W + t]);
        sum[i][0] += w * x0;
        sum[i][1] += w * x1;
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    store<T>(grad + i * W, sum[i][0]);
    store<T>(grad + i * W + V, sum[i][1]);
  }
}

// Calls Kernel<T, height>: every height from 1 to kBlockRows is compiled.
template <typename T, int R = kBlockRows>
FASTSLOTS_INLINE void multiply_height(int height, const T* packed, int64_t k, const T* x, const T* bias, bool add,
                                      T* out) {
  if constexpr (R > 0) {
    if (height == R) return multiply_block<T, R>(packed, k, x, bias, add, out);
    multiply_height<T, R - 1>(height, packed, k, x, bias, add, out);
  }
}

template <typename T, int R = kBlockRows>
FASTSLOTS_INLINE void accumulate_height(int height, const T* dy, int64_t stride, int64_t panels, const T* xt, T* grad) {
  if constexpr (R > 0) {
    if (height == R) return accumulate_block<T, R>(dy, stride, panels, xt, grad);
    accumulate_height<T, R - 1>(height, dy, stride, panels, xt, grad);
  }
}

// out [panels][n][W] = bias + W·x, x [panels][k][W]; `add` adds to what out holds. bias may be null.
template <typename T>
void multiply(const T* packed, int64_t n, int64_t k, const T* bias, const T* x, int64_t panels, bool add, T* out) {
  constexpr int W = kPanel<T>;
  const RowBlocks blocks(n);
  for (int64_t p = 0; p < panels; ++p, x += k * W) {
    const T* rows = packed;
    const T* b = bias;
    for (int64_t block = 0; block < blocks.count; ++block) {
      const int height = blocks.height(block);
      multiply_height<T>(height, rows, k, x, b, add, out);
      rows += height * k;
      if (b) b += height;
      out += height * W;
    }
  }
}

// to [pixels][W] = the transpose of `count` <= W features of panels [panels][features][W], from feature `first` on.
template <typename T>
void transpose_features(const T* x, int64_t features, int64_t panels, int64_t first, int count, T* to) {
  constexpr int W = kPanel<T>, V = kLanes<T>;
  for (int64_t p = 0; p < panels; ++p) {
    const T* panel = x + (p * features + first) * W;
    for (int column = 0; column < W; column += V) {
      for (int row = 0; row < W; row += V) {
        Vec<T> square[V];
#pragma GCC unroll 16
        for (int i = 0; i < V; ++i) square[i] = row + i < count ? load<T>(panel + (row + i) * W + column) : Vec<T>{};
        transpose_square<T>(square);
#pragma GCC unroll 16
        for (int i = 0; i < V; ++i) store<T>(to + (p * W + column + i) * W + row, square[i]);
      }
    }
  }
}

template <typename T>
constexpr int64_t gradient_size(int64_t n, int64_t k) {
  return (k + kPanel<T> - 1) / kPanel<T> * kPanel<T> * n;
}

// grad += dy·xᵀ, as blocks of columns [block][n][W] (columns past k hold zeros). `scratch`: [panels·W][W].
template <typename T>
void accumulate_products(const T* dy, int64_t n, const T* x, int64_t k, int64_t panels, T* scratch, T* grad) {
  constexpr int W = kPanel<T>;
  const RowBlocks blocks(n);
  for (int64_t first = 0; first < k; first += W) {
    transpose_features<T>(x, k, panels, first, int(k - first < W ? k - first : W), scratch);
    const T* rows = dy;
    for (int64_t block = 0; block < blocks.count; ++block) {
      const int height = blocks.height(block);
      accumulate_height<T>(height, rows, n * W, panels, scratch, grad);
      rows += height * W;
      grad += height * W;
    }
  }
}

// sums [n][lanes] += dy over panels and the two vectors of each: bias gradients, added across lanes at the end.
template <typename T>
void accumulate_rows(const T* dy, int64_t n, int64_t panels, T* sums) {
  constexpr int W = kPanel<T>, V = kLanes<T>;
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t i = 0; i < n; ++i, dy += W) {
      store<T>(sums + i * V, load<T>(sums + i * V) + (load<T>(dy) + load<T>(dy + V)));
    }
  }
}

}  // namespace fastslots::FASTSLOTS_ISA
