// Products with one block of a matrix a head: H heads, K rows each. A matrix [H·d, width] has a block [d, width] a head;
// the narrow side keeps the heads of a row side by side, [K][stride], the wide one those of a head, [H·K][whole width].
#pragma once

#include "row_maps.h"

namespace fastslots::FASTSLOTS_ISA {

template <typename T>
struct Heads {
  int64_t K, H, d, width, stride;

  int64_t lanes() const { return whole_lanes<T>(width); }
  int64_t scratch_size() const { return K * whole_lanes<T>(d); }

  // The matrix for `widen`, [H·d][whole width]; entry (i, j) stands at from[i·row_stride + j·column_stride].
  const T* pack(const T* from, int64_t row_stride, int64_t column_stride, Carver<T>& c) const {
    T* const to = c.take(H * d * lanes());
    const Piece<T> piece(c, H * d * width);
    if (piece.fills()) fetch(from, H * d * width);
    for (int64_t i = 0; piece.fills() && i < H * d; ++i) {
      for (int64_t j = 0; j < lanes(); ++j) {
        to[i * lanes() + j] = j < width ? from[i * row_stride + j * column_stride] : T(0);
      }
    }
    return to;
  }

  // For `narrow`: of each head the panels of its block's transpose, [H][panel][whole width][W].
  const T* pack_transposed(const T* from, int64_t row_stride, int64_t column_stride, Carver<T>& c) const {
    const T* const first = c.base ? c.base + c.used : nullptr;
    const Piece<T> piece(c, H * d * width);
    if (piece.fills()) fetch(from, H * d * width);
    for (int64_t h = 0; h < H; ++h) {
      pack_panels<T>(from + h * d * row_stride, width, d, lanes(), column_stride, row_stride, c);
    }
    return first;
  }

  // rows_h [K][width] = x_h [K][d] · the head's block.
  void widen(const T* x, const T* matrix, T* rows) const {
    for (int64_t h = 0; h < H; ++h) {
      product<T, false>({x + h * d, stride}, {matrix + h * d * lanes(), lanes(), kPanel<T>}, K, lanes(), d, false,
                        {rows + h * K * lanes(), lanes()});
    }
  }

  // x_h [K][d] = rows_h [K][width] · the transpose of the head's block.
  void narrow(const T* rows, const T* transposed, T* x, T* scratch) const {
    const int64_t lanes_d = whole_lanes<T>(d), head = (lanes() * whole_panels<T>(d) + 15) / 16 * 16;  // as a Carver takes
    for (int64_t h = 0; h < H; ++h) {
      product<T, false>({rows + h * K * lanes(), lanes()}, {transposed + h * head, kPanel<T>, lanes() * kPanel<T>}, K,
                        lanes_d, width, false, {scratch, lanes_d});
      for (int64_t k = 0; k < K; ++k) {
        std::memcpy(x + k * stride + h * d, scratch + k * lanes_d, size_t(d) * sizeof(T));
      }
    }
  }

  // sums_h [d][width] += x_hᵀ · rows_h.
  void accumulate(const T* x, const T* rows, T* sums) const {
    for (int64_t h = 0; h < H; ++h) {
      product<T, true>({x + h * d, stride}, {rows + h * K * lanes(), lanes(), kPanel<T>}, d, lanes(), K, true,
                       {sums + h * d * lanes(), lanes()});
    }
  }
};

}  // namespace fastslots::FASTSLOTS_ISA
