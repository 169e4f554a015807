// Into the packed form and back: folding a norm's affine part into the matrix behind it, packing for both directions,
// summing the partial gradients of the tasks in a fixed order, and unfolding them.
#pragma once

#include "api.h"
#include "parallel.h"
#include "tile.h"

namespace fastslots::FASTSLOTS_ISA {

// Memory that is freed with its scope.
template <typename T>
class Block {
 public:
  explicit Block(int64_t count) : data_(static_cast<T*>(allocate(size_t(count) * sizeof(T)))) {}
  ~Block() { release(data_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

// For one direction, y = W·x + bias. W[n][k] stands at weight[n·row_stride + k·column_stride].
template <typename T>
Linear<T> pack_forward(const T* weight, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
                       const T* bias, Carver<T>& carver) {
  T* packed = carver.take(rows * columns);
  const Piece<T> piece(carver, rows * columns);
  if (piece.fills()) pack_rows<T>(weight, rows, columns, row_stride, column_stride, packed);
  return {rows, columns, packed, nullptr, bias};
}

// For both directions.
template <typename T>
Linear<T> pack_linear(const T* weight, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
                      const T* bias, Carver<T>& carver) {
  const Piece<T> piece(carver, 2 * rows * columns);
  Linear<T> linear = pack_forward<T>(weight, rows, columns, row_stride, column_stride, bias, carver);
  linear.transposed = pack_forward<T>(weight, columns, rows, column_stride, row_stride, nullptr, carver).packed;
  return linear;
}

// weight [rows, columns] behind a norm with `gamma` and `beta`: W·diag(γ), and bias + W·β.
template <typename T>
Linear<T> pack_normed(const T* weight, int64_t rows, int64_t columns, const T* gamma, const T* beta, const T* bias,
                      Carver<T>& carver) {
  const Piece<T> piece(carver, 3 * rows * columns);
  T* folded = carver.take(rows * columns);
  T* offset = carver.take(rows);
  if (piece.fills()) {
    fetch(weight, rows * columns);
    for (int64_t i = 0; i < rows; ++i) {
      T sum = bias[i];
      for (int64_t j = 0; j < columns; ++j) {
        folded[i * columns + j] = weight[i * columns + j] * gamma[j];
        sum += weight[i * columns + j] * beta[j];
      }
      offset[i] = sum;
    }
  }
  return pack_linear<T>(folded, rows, columns, columns, 1, offset, carver);
}

// The projections of image b, of weights G [D, H·K] and U [H·K, D].
template <typename T>
void pack_projections(const LayerArrays<const T*>& w, int64_t b, int64_t D, int64_t HK, Carver<T>& carver,
                      Layer<T>& layer) {
  layer.scores = pack_linear<T>(w.G + b * D * HK, HK, D, 1, HK, w.g + b * HK, carver);
  layer.values = pack_linear<T>(w.U + b * D * HK, D, HK, 1, D, w.b, carver);
}

template <typename T>
void carve_sums(Carver<T>& carver, int64_t rows, int64_t columns, LinearSums<T>& sums) {
  sums.weight = carver.take(gradient_size<T>(rows, columns));
  sums.bias = carver.take(rows * kLanes<T>);
}

// What a group of tasks adds to: `size` elements of `total`, which earlier groups have added to unless this is the `first`.
template <typename T>
struct GroupTotal {
  T* total;
  int64_t size;
  bool first;
};

// Sums of groups, each over elements of its own, added up in the order of the groups: the first group adds into the total
// itself, and a thread has one buffer of `most` elements for the others that it takes, whatever their number.
template <typename T>
class GroupSums {
 public:
  GroupSums(int64_t most, int64_t workers) : most_(most), memory_(most * workers) {}

  // Calls body(sums), whose sums are cleared, for a group; in tasks that are handed out in order.
  template <typename Body>
  void add(int64_t group, int thread, const GroupTotal<T>& to, Body body) {
    T* const own = to.first ? to.total : memory_.get() + thread * most_;
    std::memset(own, 0, size_t(to.size) * sizeof(T));
    body(own);
    turns_.wait(group);
    if (!to.first) add_to<T>(to.total, own, to.size);
    turns_.done();
  }

 private:
  int64_t most_;
  Block<T> memory_;
  Turns turns_;
};

// The same sums in each of `count` equal partial buffers, `stride` elements apart.
struct Partials {
  int64_t count, stride;
};

// to[i·row_stride + j·column_stride] = Σ over partials of the product sums.
template <typename T>
void reduce_products(const T* sums, Partials partials, int64_t rows, int64_t columns, int64_t row_stride,
                     int64_t column_stride, T* to) {
  constexpr int W = kPanel<T>;
  if (partials.count == 1) fetch(sums, rows * columns);
  for (int64_t j = 0; j < columns; ++j) {
    const T* column = sums + j / W * W * rows + j % W;
    for (int64_t i = 0; i < rows; ++i) {
      T total = 0;
      for (int64_t part = 0; part < partials.count; ++part) total += column[part * partials.stride + i * W];
      to[i * row_stride + j * column_stride] = total;
    }
  }
}

template <typename T>
void reduce_rows(const T* sums, Partials partials, int64_t rows, T* to) {
  for (int64_t i = 0; i < rows; ++i) {
    T total = 0;
    for (int64_t part = 0; part < partials.count; ++part) {
      total += sum_of<T>(load<T>(sums + part * partials.stride + i * kLanes<T>));
    }
    to[i] = total;
  }
}

template <typename T>
void reduce_linear(const LinearSums<T>& sums, Partials partials, int64_t rows, int64_t columns, T* weight, T* bias) {
  if (weight) reduce_products<T>(sums.weight, partials, rows, columns, columns, 1, weight);
  if (bias) reduce_rows<T>(sums.bias, partials, rows, bias);
}

// Gradients of a matrix behind a norm. With R = ∂/∂(W·diag(γ)) and r = ∂/∂bias:
// ∂W = R·diag(γ) + r·βᵀ, ∂γ_j = Σ_i R_ij W_ij, ∂β_j = Σ_i r_i W_ij. Any result may be null.
template <typename T>
void reduce_normed(const LinearSums<T>& sums, Partials partials, int64_t rows, int64_t columns, const T* weight,
                   const T* gamma, const T* beta, T* weight_grad, T* bias_grad, T* gamma_grad, T* beta_grad) {
  Block<T> block(rows * columns + rows);
  T* const raw = block.get();
  T* const offset = raw + rows * columns;
  reduce_linear<T>(sums, partials, rows, columns, raw, offset);
  for (int64_t j = 0; j < columns; ++j) {
    T gamma_sum = 0, beta_sum = 0;
    for (int64_t i = 0; i < rows; ++i) {
      gamma_sum += raw[i * columns + j] * weight[i * columns + j];
      beta_sum += offset[i] * weight[i * columns + j];
    }
    if (gamma_grad) gamma_grad[j] = gamma_sum;
    if (beta_grad) beta_grad[j] = beta_sum;
  }
  for (int64_t i = 0; weight_grad && i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      weight_grad[i * columns + j] = raw[i * columns + j] * gamma[j] + offset[i] * beta[j];
    }
  }
  for (int64_t i = 0; bias_grad && i < rows; ++i) bias_grad[i] = offset[i];
}

// Gradients of one image's projections: G [D, H·K], g [H·K], U [H·K, D]. Any result may be null.
template <typename T>
void reduce_projections(const LayerSums<T>& sums, Partials partials, int64_t b, int64_t D, int64_t HK,
                        const LayerArrays<T*>& grads) {
  if (grads.G) reduce_products<T>(sums.scores.weight, partials, HK, D, 1, HK, grads.G + b * D * HK);
  if (grads.g) reduce_rows<T>(sums.scores.bias, partials, HK, grads.g + b * HK);
  if (grads.U) reduce_products<T>(sums.values, partials, HK, D, D, 1, grads.U + b * D * HK);
}

}  // namespace fastslots::FASTSLOTS_ISA
