// A convolution of one image with its gradients, channels last, in direct form.
//
// An image is padded with zeros, [H + 2P][W + 2P][channels], so that the taps of one kernel row lie side by side: the
// product over (kx, channel) of an output row is one matrix product whose left rows overlap in memory, and nothing is
// copied. Channels come in whole vectors, zeros past their number; the first layer's, which are 3, as they are.
//
//   out[y][x]  = bias + Σ_ky Σ_(kx,c) in[s·y + ky][s·x + kx][c] · W[ky][(kx,c)][:]
//   dW[ky]    += Σ_(y,x) in[s·y + ky][s·x + ..]ᵀ · dout[y][x]
//   din, stride s: s² phases, each a stride-1 convolution of dout with the taps that reach it
#pragma once

#include "api.h"
#include "row_maps.h"

namespace fastslots::FASTSLOTS_ISA {

constexpr int64_t kBandPixels = 128;  // output pixels between which a kernel row's weights stay in the nearest cache

// An image with a border: `data` is the first pixel of the border, `stride` elements a pixel.
template <typename T>
struct Picture {
  T* data = nullptr;
  int64_t side = 0, border = 0, stride = 0;
  int64_t row() const { return (side + 2 * border) * stride; }
  int64_t size() const { return (side + 2 * border) * row(); }
  T* at(int64_t y, int64_t x) const { return data + (y + border) * row() + (x + border) * stride; }
};

// The taps of one axis that reach pixels of one phase: `count` of them, dout's pixel from `first` on (relative to the
// phase's own), tap `tap` first and `step` less each further one.
struct Phase {
  int64_t count, first, tap, step;
};

inline Phase phase_of(int64_t phase, int64_t kernel, int64_t stride) {
  Phase p = {0, 0, 0, stride};
  const int64_t pad = kernel / 2;
  for (int64_t tap = kernel - 1; tap >= 0; --tap) {
    if ((phase + pad - tap) % stride) continue;
    if (!p.count) p.first = (phase + pad - tap) / stride, p.tap = tap;  // exact: the remainder is 0
    ++p.count;
  }
  return p;
}

template <typename T>
struct Convolution {
  int64_t in = 0, out = 0, kernel = 0, stride = 1;
  int64_t in_stride = 0;  // elements of an input pixel
  const T *forward = nullptr, *bias = nullptr;
  const T* backward[kMostStride * kMostStride] = {};
  int64_t weight_sum = 0, bias_sum = 0;  // [ky][(kx, c)][whole out], [whole out]
  int64_t depth() const { return kernel * in_stride; }
};

// weight [out, in, kernel, kernel]; `first`: the layer of the image itself, whose gradient nobody asks for.
template <typename T>
Convolution<T> pack_convolution(const T* weight, const T* bias, int64_t in, int64_t out, int64_t kernel, int64_t stride,
                                bool first, Packer<T>& pack) {
  constexpr int W = kPanel<T>;
  Carver<T>& carver = pack.weights;
  Convolution<T> c;
  c.in = in, c.out = out, c.kernel = kernel, c.stride = stride;
  c.in_stride = first ? in : whole_lanes<T>(in);
  const int64_t area = kernel * kernel, out_l = whole_lanes<T>(out);
  const Piece<T> piece(carver, (pack.forward + pack.backward) * in * out * area);
  if (piece.fills() && (pack.forward || pack.backward)) fetch(weight, in * out * area);
  T* to = pack.forward ? carver.take(kernel * c.depth() * whole_panels<T>(out)) : nullptr;
  c.forward = to;
  for (int64_t panel = 0; to && piece.fills() && panel < out; panel += W) {
    for (int64_t tap = 0; tap < area; ++tap) {
      for (int64_t i = 0; i < c.in_stride; ++i) {
        for (int64_t o = panel; o < panel + W; ++o) *to++ = i < in && o < out ? weight[(o * in + i) * area + tap] : T(0);
      }
    }
  }
  c.bias = pack_vector<T>(bias, out, carver);
  for (int64_t phase = 0; pack.backward && !first && phase < stride * stride; ++phase) {
    const Phase y = phase_of(phase / stride, kernel, stride), x = phase_of(phase % stride, kernel, stride);
    to = carver.take(y.count * x.count * out_l * whole_panels<T>(in));
    c.backward[phase] = to;
    for (int64_t panel = 0; piece.fills() && panel < in; panel += W) {
      for (int64_t ty = 0; ty < y.count; ++ty) {
        for (int64_t tx = 0; tx < x.count; ++tx) {
          const int64_t tap = (y.tap - ty * y.step) * kernel + x.tap - tx * x.step;
          for (int64_t o = 0; o < out_l; ++o) {
            for (int64_t i = panel; i < panel + W; ++i) {
              *to++ = i < in && o < out ? weight[(o * in + i) * area + tap] : T(0);
            }
          }
        }
      }
    }
  }
  c.weight_sum = pack.sum(kernel * c.depth() * out_l);
  c.bias_sum = pack.sum(out_l);
  return c;
}

// out[y][x] (+)= Σ over rows of taps of left(y, tap row) · weights: `rows` x `columns` pixels, a band of them at a time so
// that the weights of a row of taps are read from the nearest cache.
template <typename T, typename LeftRow, typename OutRow>
void sum_taps(const T* weights, int64_t taps, int64_t depth, int64_t channels, int64_t rows, int64_t columns,
              int64_t left_stride, int64_t out_stride, bool add, LeftRow left, OutRow out) {
  constexpr int W = kPanel<T>;
  const int64_t band = columns < kBandPixels && columns > 0 ? kBandPixels / columns : 1;
  for (int64_t first = 0; first < rows; first += band) {
    const int64_t last = first + band < rows ? first + band : rows;
    for (int64_t panel = 0; panel < channels; panel += W) {
      const int64_t width = channels - panel < W ? channels - panel : W;
      for (int64_t tap = 0; tap < taps; ++tap) {
        const T* const right = weights + (panel / W * taps + tap) * depth * W;
        for (int64_t y = first; y < last; ++y) {
          product<T, false>({left(y, tap), left_stride}, {right, W, 0}, columns, width, depth, add || tap > 0,
                            {out(y) + panel, out_stride});
        }
      }
    }
  }
}

template <typename T>
void clear_border(const Picture<T>& p) {
  const size_t pixel = size_t(p.stride) * sizeof(T);
  if (!p.border) return;
  std::memset(p.data, 0, size_t(p.border * p.row()) * sizeof(T));
  for (int64_t y = 0; y < p.side; ++y) {
    std::memset(p.at(y, -p.border), 0, pixel * size_t(p.border));
    std::memset(p.at(y, p.side), 0, pixel * size_t(p.border));
  }
  std::memset(p.at(p.side, -p.border), 0, size_t(p.border * p.row()) * sizeof(T));
}

template <typename T>
void convolve(const Convolution<T>& c, const Picture<T>& in, const Picture<T>& out) {
  const int64_t channels = whole_lanes<T>(c.out), pad = c.kernel / 2;
  for (int64_t y = 0; y < out.side; ++y) {
    for (int64_t x = 0; x < out.side; ++x) std::memcpy(out.at(y, x), c.bias, size_t(channels) * sizeof(T));
  }
  sum_taps<T>(
      c.forward, c.kernel, c.depth(), channels, out.side, out.side, c.stride * c.in_stride, out.stride, true,
      [&](int64_t y, int64_t tap) { return in.at(c.stride * y + tap - pad, -pad); },
      [&](int64_t y) { return out.at(y, 0); });
}

// din = the gradient of the input, its border left as it is.
template <typename T>
void convolve_backward(const Convolution<T>& c, const Picture<T>& dout, const Picture<T>& din) {
  const int64_t s = c.stride;
  for (int64_t phase = 0; phase < s * s; ++phase) {
    const int64_t py = phase / s, px = phase % s;
    const Phase y = phase_of(py, c.kernel, s), x = phase_of(px, c.kernel, s);
    const int64_t rows = (din.side - py + s - 1) / s, columns = (din.side - px + s - 1) / s;
    if (!y.count || !x.count) {  // a kernel narrower than its stride
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          std::memset(din.at(s * i + py, s * j + px), 0, size_t(din.stride) * sizeof(T));
        }
      }
      continue;
    }
    sum_taps<T>(
        c.backward[phase], y.count, x.count * dout.stride, din.stride, rows, columns, dout.stride, s * din.stride, false,
        [&](int64_t i, int64_t tap) { return dout.at(i + y.first + tap, x.first); },
        [&](int64_t i) { return din.at(s * i + py, px); });
  }
}

// sums [R][N vectors] += Σ_(y,x) of R neighbouring elements of left(y, x) times the vectors of right(y, x).
template <typename T, int N, int R>
void correlate_block(const T* left, int64_t left_row, int64_t left_stride, const T* right, int64_t right_row,
                     int64_t right_stride, int64_t rows, int64_t columns, T* sums, int64_t sums_stride) {
  constexpr int V = kLanes<T>;
  Vec<T> sum[R][N];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    for (int n = 0; n < N; ++n) sum[i][n] = load<T>(sums + i * sums_stride + n * V);
  }
  for (int64_t y = 0; y < rows; ++y, left += left_row, right += right_row) {
    const T *l = left, *r = right;
    for (int64_t x = 0; x < columns; ++x, l += left_stride, r += right_stride) {
      Vec<T> v[N];
      for (int n = 0; n < N; ++n) v[n] = load<T>(r + n * V);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const Vec<T> w = broadcast<T>(l[i]);
        for (int n = 0; n < N; ++n) sum[i][n] += w * v[n];
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    for (int n = 0; n < N; ++n) store<T>(sums + i * sums_stride + n * V, sum[i][n]);
  }
}

template <typename T, int N, int R = kBlockRows, typename... Rest>
FASTSLOTS_INLINE void correlate_height(int height, Rest... rest) {
  if constexpr (R > 0) {
    if (height == R) return correlate_block<T, N, R>(rest...);
    correlate_height<T, N, R - 1>(height, rest...);
  }
}

template <typename T>
void accumulate_bias(const Convolution<T>& c, const Picture<T>& dout, T* sums) {
  const int64_t channels = whole_lanes<T>(c.out);
  for (int64_t y = 0; y < dout.side; ++y) add_columns<T>(dout.at(y, 0), dout.side, channels, sums + c.bias_sum);
}

// Adds the gradients of the weight and the bias to the arena.
template <typename T>
void accumulate_convolution(const Convolution<T>& c, const Picture<T>& in, const Picture<T>& dout, T* sums) {
  constexpr int W = kPanel<T>;
  const int64_t channels = whole_lanes<T>(c.out), pad = c.kernel / 2, depth = c.depth();
  const RowBlocks blocks(depth);
  // Bands of rows that stay in cache while all the blocks of the gradient take their turns.
  const int64_t band = dout.side < kBandPixels && dout.side > 0 ? kBandPixels / dout.side : 1;
  for (int64_t first = 0; first < dout.side; first += band) {
    const int64_t rows = first + band < dout.side ? band : dout.side - first;
    for (int64_t panel = 0; panel < channels; panel += W) {
      for (int64_t tap = 0; tap < c.kernel; ++tap) {
        T* to = sums + c.weight_sum + tap * depth * channels + panel;
        const T* left = in.at(c.stride * first + tap - pad, -pad);
        for (int64_t block = 0; block < blocks.count; ++block) {
          const int height = blocks.height(block);
          const int64_t left_row = c.stride * in.row(), left_stride = c.stride * in.stride;
          const T* const right = dout.at(first, 0) + panel;
          if (channels - panel >= W) {
            correlate_height<T, 2>(height, left, left_row, left_stride, right, dout.row(), dout.stride, rows,
                                   dout.side, to, channels);
          } else {
            correlate_height<T, 1>(height, left, left_row, left_stride, right, dout.row(), dout.stride, rows,
                                   dout.side, to, channels);
          }
          left += height, to += height * channels;
        }
      }
    }
  }
  accumulate_bias<T>(c, dout, sums);
}

}  // namespace fastslots::FASTSLOTS_ISA
