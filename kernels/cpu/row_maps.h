// Linear maps, norms and GELU of row-major matrices whose rows are whole vectors: zeros fill a row past its width.
//
// For what has few rows (the encoder's queries) or comes as rows (tokens): a vector runs over a row's columns, so that no
// row count wastes lanes. Weights are packed once a call, both ways; gradients add into an arena at offsets that the maps
// know, in the packed layout.
#pragma once

#include "pointwise.h"
#include "rows_gemm.h"
#include "tile.h"

namespace fastslots::FASTSLOTS_ISA {

constexpr int64_t kRowTile = 128;  // rows that go through a map before the next ones, so that they stay in cache

template <typename T>
constexpr int64_t whole_lanes(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <typename T>
constexpr int64_t whole_panels(int64_t n) {
  return (n + kPanel<T> - 1) / kPanel<T> * kPanel<T>;
}

// Panels [panel][k][W] of a matrix whose entry (k, column) stands at from[k·row_stride + column·column_stride]; zeros
// past its `rows` and `columns`, up to `depth` rows.
template <typename T>
const T* pack_panels(const T* from, int64_t rows, int64_t columns, int64_t depth, int64_t row_stride,
                     int64_t column_stride, Carver<T>& carver) {
  constexpr int W = kPanel<T>;
  T* const packed = carver.take(depth * whole_panels<T>(columns));
  const Piece<T> piece(carver, rows * columns);
  if (!piece.fills()) return packed;
  T* to = packed;
  for (int64_t first = 0; first < columns; first += W) {
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t i = first; i < first + W; ++i) {
        *to++ = k < rows && i < columns ? from[k * row_stride + i * column_stride] : T(0);
      }
    }
  }
  return packed;
}

// Where weights are packed to, for the directions that a call needs, and offsets in the arena of their gradients' sums.
template <typename T>
struct Packer {
  Carver<T> weights, sums;
  bool forward, backward;
  int64_t sum(int64_t count) {
    const int64_t offset = sums.used;
    sums.take(count);
    return offset;
  }
};

template <typename T>
const T* pack_vector(const T* from, int64_t count, Carver<T>& carver) {
  T* const packed = carver.take(whole_lanes<T>(count));
  const Piece<T> piece(carver, count);
  for (int64_t i = 0; piece.fills() && i < whole_lanes<T>(count); ++i) packed[i] = i < count && from ? from[i] : T(0);
  return packed;
}

// y = x·Wᵀ + bias with W [out, in] as torch keeps it, its rows `stride` apart (0: in).
template <typename T>
struct RowMap {
  int64_t in = 0, out = 0;              // widths; in memory rows have whole_lanes of them
  const T *forward = nullptr, *backward = nullptr, *bias = nullptr;
  int64_t weight_sum = 0, bias_sum = 0;  // offsets of the gradients' sums: [whole in][whole out], [whole out]
};

template <typename T>
RowMap<T> pack_row_map(const T* weight, const T* bias, int64_t in, int64_t out, Packer<T>& pack, int64_t stride = 0) {
  RowMap<T> map;
  map.in = in, map.out = out;
  const int64_t in_l = whole_lanes<T>(in), out_l = whole_lanes<T>(out), rows = stride ? stride : in;
  const Piece<T> piece(pack.weights, (pack.forward + pack.backward) * in * out);
  if (piece.fills()) fetch(weight, out * rows);
  if (pack.forward) map.forward = pack_panels<T>(weight, in, out, in_l, 1, rows, pack.weights);
  if (pack.backward) map.backward = pack_panels<T>(weight, out, in, out_l, rows, 1, pack.weights);
  map.bias = pack_vector<T>(bias, out, pack.weights);
  map.weight_sum = pack.sum(in_l * out_l);
  map.bias_sum = pack.sum(out_l);
  return map;
}

// Calls body(first row, rows) for tiles of rows.
template <typename Body>
FASTSLOTS_INLINE void row_tiles(int64_t rows, Body body) {
  for (int64_t first = 0; first < rows; first += kRowTile) {
    body(first, rows - first < kRowTile ? rows - first : kRowTile);
  }
}

// y (+)= x·Wᵀ + bias.
template <typename T>
void apply_rows(const RowMap<T>& map, const T* x, int64_t rows, bool add, T* y) {
  const int64_t in = whole_lanes<T>(map.in), out = whole_lanes<T>(map.out);
  for (int64_t i = 0; i < rows; ++i) {
    T* const row = y + i * out;
    for (int64_t j = 0; j < out; j += kLanes<T>) {
      store<T>(row + j, add ? load<T>(row + j) + load<T>(map.bias + j) : load<T>(map.bias + j));
    }
  }
  product<T, false>({x, in}, {map.forward, kPanel<T>, in * kPanel<T>}, rows, out, in, true, {y, out});
}

// dx (+)= dy·W.
template <typename T>
void apply_rows_transposed(const RowMap<T>& map, const T* dy, int64_t rows, bool add, T* dx) {
  const int64_t in = whole_lanes<T>(map.in), out = whole_lanes<T>(map.out);
  product<T, false>({dy, out}, {map.backward, kPanel<T>, out * kPanel<T>}, rows, in, out, add, {dx, in});
}

// sums [columns] += Σ over rows.
template <typename T>
void add_columns(const T* x, int64_t rows, int64_t columns, T* sums) {
  for (int64_t j = 0; j < columns; j += kLanes<T>) {
    Vec<T> sum = load<T>(sums + j);
    for (int64_t i = 0; i < rows; ++i) sum += load<T>(x + i * columns + j);
    store<T>(sums + j, sum);
  }
}

// Adds the gradients of the weight and the bias to the arena.
template <typename T>
void accumulate_row_map(const RowMap<T>& map, const T* x, const T* dy, int64_t rows, T* sums) {
  const int64_t in = whole_lanes<T>(map.in), out = whole_lanes<T>(map.out);
  product<T, true>({x, in}, {dy, out, kPanel<T>}, in, out, rows, true, {sums + map.weight_sum, out});
  add_columns<T>(dy, rows, out, sums + map.bias_sum);
}

// Out of the arena, to arrays as torch keeps them; null where nobody asks.

template <typename T>
void write_vector(const T* from, int64_t count, T* to) {
  if (to) std::memcpy(to, from, size_t(count) * sizeof(T));
}

// to [rows][columns] = the first columns of from [rows][stride].
template <typename T>
void write_rows(const T* from, int64_t rows, int64_t columns, int64_t stride, T* to) {
  for (int64_t i = 0; to && i < rows; ++i) std::memcpy(to + i * columns, from + i * stride, size_t(columns) * sizeof(T));
}

// to [rows][columns], its rows to_stride apart, = the transpose of from [columns][stride].
template <typename T>
void write_transposed(const T* from, int64_t rows, int64_t columns, int64_t stride, int64_t to_stride, T* to) {
  if (to) fetch(from, columns * stride);
  for (int64_t i = 0; to && i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[i * to_stride + j] = from[j * stride + i];
  }
}

template <typename T>
void write_row_map(const RowMap<T>& map, const T* sums, T* weight, T* bias) {
  write_transposed(sums + map.weight_sum, map.out, map.in, whole_lanes<T>(map.out), map.in, weight);
  write_vector(sums + map.bias_sum, map.out, bias);
}

// 1 in the lanes of a row's last vector that belong to its width, 0 past it.
template <typename T>
FASTSLOTS_INLINE Vec<T> last_lanes(int64_t width) {
  Vec<T> mask;
  const int64_t within = width - (whole_lanes<T>(width) - kLanes<T>);
  for (int i = 0; i < kLanes<T>; ++i) mask[i] = i < within ? T(1) : T(0);
  return mask;
}

// An affine norm over rows of `width`.
template <typename T>
struct RowNorm {
  int64_t width = 0;
  const T *gamma = nullptr, *beta = nullptr;
  int64_t gamma_sum = 0, beta_sum = 0;
};

template <typename T>
RowNorm<T> pack_row_norm(const T* gamma, const T* beta, int64_t width, Packer<T>& pack) {
  RowNorm<T> norm;
  norm.width = width;
  norm.gamma = pack_vector<T>(gamma, width, pack.weights);
  norm.beta = pack_vector<T>(beta, width, pack.weights);
  norm.gamma_sum = pack.sum(whole_lanes<T>(width));
  norm.beta_sum = pack.sum(whole_lanes<T>(width));
  return norm;
}

// normed = (x − mean)·rstd over each row; rstd [rows].
template <typename T>
void normalise_rows(const T* x, int64_t rows, int64_t width, T eps, T* normed, T* rstd) {
  const int64_t L = whole_lanes<T>(width), last = L - kLanes<T>;
  const Vec<T> mask = last_lanes<T>(width);
  for (int64_t i = 0; i < rows; ++i, x += L, normed += L) {
    Vec<T> sum = {};
    for (int64_t j = 0; j < L; j += kLanes<T>) sum += load<T>(x + j);
    const T mean = sum_of<T>(sum) / T(width);
    Vec<T> squares = {};
    for (int64_t j = 0; j < L; j += kLanes<T>) {
      Vec<T> d = load<T>(x + j) - mean;
      if (j == last) d *= mask;
      squares += d * d;
      store<T>(normed + j, d);
    }
    const T scale = T(1) / std::sqrt(sum_of<T>(squares) / T(width) + eps);
    rstd[i] = scale;
    for (int64_t j = 0; j < L; j += kLanes<T>) store<T>(normed + j, load<T>(normed + j) * scale);
  }
}

// dx (+)= rstd·(dn − mean(dn) − normed·mean(dn·normed)).
template <typename T>
void normalise_rows_backward(const T* dn, const T* normed, const T* rstd, int64_t rows, int64_t width, bool add, T* dx) {
  const int64_t L = whole_lanes<T>(width), last = L - kLanes<T>;
  const Vec<T> mask = last_lanes<T>(width);
  for (int64_t i = 0; i < rows; ++i, dn += L, normed += L, dx += L) {
    Vec<T> sum = {}, dot = {};
    for (int64_t j = 0; j < L; j += kLanes<T>) {
      sum += load<T>(dn + j);
      dot += load<T>(dn + j) * load<T>(normed + j);
    }
    const T mean = sum_of<T>(sum) / T(width), along = sum_of<T>(dot) / T(width), scale = rstd[i];
    for (int64_t j = 0; j < L; j += kLanes<T>) {
      Vec<T> d = scale * (load<T>(dn + j) - mean - load<T>(normed + j) * along);
      if (j == last) d *= mask;
      store<T>(dx + j, add ? load<T>(dx + j) + d : d);
    }
  }
}

// out = normed·γ + β.
template <typename T>
void scale_rows(const RowNorm<T>& norm, const T* normed, int64_t rows, T* out) {
  const int64_t L = whole_lanes<T>(norm.width);
  for (int64_t i = 0; i < rows; ++i, normed += L, out += L) {
    for (int64_t j = 0; j < L; j += kLanes<T>) {
      store<T>(out + j, load<T>(normed + j) * load<T>(norm.gamma + j) + load<T>(norm.beta + j));
    }
  }
}

// The gradient of `scale_rows`: adds those of γ and β, and turns d into that of `normed`.
template <typename T>
void scale_rows_backward(const RowNorm<T>& norm, const T* normed, int64_t rows, T* sums, T* d) {
  const int64_t L = whole_lanes<T>(norm.width);
  for (int64_t j = 0; j < L; j += kLanes<T>) {
    const Vec<T> gamma = load<T>(norm.gamma + j);
    Vec<T> dgamma = load<T>(sums + norm.gamma_sum + j), dbeta = load<T>(sums + norm.beta_sum + j);
    for (int64_t i = 0; i < rows; ++i) {
      const Vec<T> g = load<T>(d + i * L + j);
      dgamma += g * load<T>(normed + i * L + j);
      dbeta += g;
      store<T>(d + i * L + j, g * gamma);
    }
    store<T>(sums + norm.gamma_sum + j, dgamma);
    store<T>(sums + norm.beta_sum + j, dbeta);
  }
}

// A norm over all rows and columns together, in place; returns 1/σ. Sums of the rows are added in double.
template <typename T>
T normalise_all(T* x, int64_t rows, int64_t width, double eps) {
  const int64_t L = whole_lanes<T>(width), last = L - kLanes<T>;
  const Vec<T> mask = last_lanes<T>(width);
  double sum = 0, squares = 0;
  for (int64_t t = 0; t < rows; ++t) {
    Vec<T> row = {};
    for (int64_t j = 0; j < L; j += kLanes<T>) row += load<T>(x + t * L + j);
    sum += double(sum_of<T>(row));
  }
  const double count = double(rows) * double(width);
  const T mean = T(sum / count);
  for (int64_t t = 0; t < rows; ++t) {
    Vec<T> row = {};
    for (int64_t j = 0; j < L; j += kLanes<T>) {
      Vec<T> d = load<T>(x + t * L + j) - mean;
      if (j == last) d *= mask;
      row += d * d;
      store<T>(x + t * L + j, d);
    }
    squares += double(sum_of<T>(row));
  }
  const T scale = T(1 / std::sqrt(squares / count + eps));
  for (int64_t i = 0; i < rows * L; i += kLanes<T>) store<T>(x + i, load<T>(x + i) * scale);
  return scale;
}

// d: the gradient of the normed, replaced by that of what was normed.
template <typename T>
void normalise_all_backward(const T* normed, T scale, int64_t rows, int64_t width, T* d) {
  const int64_t L = whole_lanes<T>(width), last = L - kLanes<T>;
  const Vec<T> mask = last_lanes<T>(width);
  double sum = 0, dot = 0;
  for (int64_t t = 0; t < rows; ++t) {
    Vec<T> row = {}, along = {};
    for (int64_t j = t * L; j < (t + 1) * L; j += kLanes<T>) {
      row += load<T>(d + j);
      along += load<T>(d + j) * load<T>(normed + j);
    }
    sum += double(sum_of<T>(row)), dot += double(sum_of<T>(along));
  }
  const double count = double(rows) * double(width);
  const T mean = T(sum / count), along = T(dot / count);
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t j = 0; j < L; j += kLanes<T>) {
      T* const at = d + t * L + j;
      Vec<T> value = scale * (load<T>(at) - mean - load<T>(normed + t * L + j) * along);
      if (j == last) value *= mask;
      store<T>(at, value);
    }
  }
}

}  // namespace fastslots::FASTSLOTS_ISA
