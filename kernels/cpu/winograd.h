// Convolutions of stride 1 by Winograd's minimal filtering (Lavin and Gray, 2016), on tiles of 8x8 pixels.
//
//   Y = Aᵀ [ (G g Gᵀ) ∘ (Bᵀ d B) ] A        with points 0, ±1, ±2, ±1/2, ∞
//
// A kernel of R x R gives (9 − R)² pixels a tile: F(4x4, 5x5) takes 64 products where the direct form takes 400. The
// input's gradient is the same with the kernel turned round; the weight's is F(R, 9 − R) of the same input tiles, summed
// over tiles before it is transformed back. The 64 products of a tile are matrix products over channels, one for each
// point and as high as the tiles of a batch. Tiles may hang over the picture's edge: they read zeros there.
//
// Transforms cost accuracy: RMS error of a convolution relative to float64 about 4e-6 in fp32 for 5x5 (direct 2e-7);
// tests/test_encoder.cpp bounds it. FASTSLOTS_WINOGRAD=0 turns this form off.
#pragma once

#include <type_traits>

#include "convolution.h"

namespace fastslots::FASTSLOTS_ISA {

constexpr int kSide = 8, kProducts = kSide * kSide;
constexpr int64_t kBatchTiles = 32;
constexpr double kWinogradNodes[3] = {1, 2, 0.5};           // and their opposites, 0 and infinity
constexpr double kWinogradScales[3] = {-4.5, 90, 1.40625};  // Π over the other finite points of (point − other)

// u = Bᵀ d: the polynomials that vanish at all points but one. Opposite points share their even and odd parts.
template <typename T>
FASTSLOTS_INLINE void winograd_input(const Vec<T>* d, int step, Vec<T>* u, int to) {
  const Vec<T> d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step];
  const Vec<T> d4 = d[4 * step], d5 = d[5 * step], d6 = d[6 * step], d7 = d[7 * step];
  u[0] = (d6 - d0) + T(5.25) * (d2 - d4);
  const Vec<T> odd1 = d2 - T(4.25) * d4 + d6, even1 = d1 - T(4.25) * d3 + d5;
  u[to] = odd1 + even1, u[2 * to] = odd1 - even1;
  const Vec<T> odd2 = T(0.25) * d2 - T(1.25) * d4 + d6, even2 = T(0.5) * d1 - T(2.5) * d3 + T(2) * d5;
  u[3 * to] = odd2 + even2, u[4 * to] = odd2 - even2;
  const Vec<T> odd3 = T(4) * d2 - T(5) * d4 + d6, even3 = T(2) * d1 - T(2.5) * d3 + T(0.5) * d5;
  u[5 * to] = odd3 + even3, u[6 * to] = odd3 - even3;
  u[7 * to] = (d7 - d1) + T(5.25) * (d3 - d5);
}

// v = G g of R taps.
template <typename T, int R>
FASTSLOTS_INLINE void winograd_kernel(const Vec<T>* g, int step, Vec<T>* v, int to) {
  v[0] = -g[0];
#pragma GCC unroll 3
  for (int p = 0; p < 3; ++p) {
    double power = 1 / kWinogradScales[p];
    Vec<T> even = {}, odd = {};
#pragma GCC unroll 8
    for (int k = 0; k < R; ++k, power *= kWinogradNodes[p]) (k % 2 ? odd : even) += T(power) * g[k * step];
    v[(2 * p + 1) * to] = even + odd, v[(2 * p + 2) * to] = even - odd;
  }
  v[7 * to] = g[(R - 1) * step];
}

// y = Aᵀ m, M values.
template <typename T, int M>
FASTSLOTS_INLINE void winograd_output(const Vec<T>* m, int step, Vec<T>* y, int to) {
  Vec<T> sum[3], difference[3];
#pragma GCC unroll 3
  for (int p = 0; p < 3; ++p) {
    sum[p] = m[(2 * p + 1) * step] + m[(2 * p + 2) * step];
    difference[p] = m[(2 * p + 1) * step] - m[(2 * p + 2) * step];
  }
  double power[3] = {1, 1, 1};
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
    Vec<T> value = i % 2 ? difference[0] : sum[0];
#pragma GCC unroll 2
    for (int p = 1; p < 3; ++p) value += T(power[p]) * (i % 2 ? difference[p] : sum[p]);
    for (int p = 1; p < 3; ++p) power[p] *= kWinogradNodes[p];
    if (i == 0) value += m[0];
    if (i == M - 1) value += m[7 * step];
    y[i * to] = value;
  }
}

// Elements of one point's matrix: a line more than it has, so that the points do not fall on the same lines of the cache.
constexpr int64_t winograd_point(int64_t size) { return size + 16; }
constexpr int64_t winograd_stride(int64_t channels) { return winograd_point(kBatchTiles * channels); }

// [point][panel of out][in][W], points winograd_point apart, of weight [out, in, R, R], or, turned round, of its transpose
// for the input's gradient.
template <typename T, int R>
const T* pack_winograd(const T* weight, int64_t in, int64_t out, bool turned, Carver<T>& carver) {
  constexpr int V = kLanes<T>, W = kPanel<T>;
  const int64_t from = turned ? out : in, to = turned ? in : out;  // channels of the picture read, and of that written
  const int64_t depth = whole_lanes<T>(from), point = winograd_point(depth * whole_panels<T>(to));
  T* const packed = carver.take(kProducts * point);
  const Piece<T> piece(carver, kProducts * depth * to);
  if (!piece.fills()) return packed;
  fetch(weight, in * out * R * R);
  for (int64_t first = 0; first < whole_panels<T>(to); first += V) {
    for (int64_t i = 0; i < depth; ++i) {
      Vec<T> g[R * R] = {}, half[kSide * R], v[kProducts];
      for (int lane = 0; i < from && lane < V && first + lane < to; ++lane) {
        const int64_t o = first + lane;
        const T* const kernel = weight + (turned ? i * in + o : o * in + i) * R * R;
        for (int tap = 0; tap < R * R; ++tap) g[tap][lane] = kernel[turned ? R * R - 1 - tap : tap];
      }
      for (int x = 0; x < R; ++x) winograd_kernel<T, R>(g + x, R, half + x, R);
      for (int y = 0; y < kSide; ++y) winograd_kernel<T, R>(half + y * R, 1, v + y * kSide, 1);
      for (int p = 0; p < kProducts; ++p) store<T>(packed + p * point + first / W * depth * W + i * W + first % W, v[p]);
    }
  }
  return packed;
}

struct TileAt {
  int64_t y, x;  // its first pixel of the picture written
};

// Bᵀ d B of `count` tiles: [point][tile][channel].
template <typename T, int R, typename Place>
void winograd_tiles(const Picture<T>& in, int64_t channels, int64_t count, Place place, T* u) {
  constexpr int V = kLanes<T>;
  const int64_t stride = winograd_stride(channels);
  for (int64_t t = 0; t < count; ++t) {
    const TileAt at = place(t);
    const int64_t last = in.side + in.border - 1;
    const bool inside = at.y - R / 2 + kSide - 1 <= last && at.x - R / 2 + kSide - 1 <= last;
    const T* const corner = in.at(at.y - R / 2, at.x - R / 2);
    for (int64_t c = 0; c < channels; c += V) {
      Vec<T> half[kProducts];
      for (int y = 0; y < kSide; ++y) {
        Vec<T> d[kSide];
        for (int x = 0; x < kSide; ++x) {
          const bool there = inside || (at.y - R / 2 + y <= last && at.x - R / 2 + x <= last);
          d[x] = there ? load<T>(corner + y * in.row() + x * in.stride + c) : Vec<T>{};
        }
        winograd_input<T>(d, 1, half + y * kSide, 1);
      }
      for (int x = 0; x < kSide; ++x) {
        Vec<T> column[kSide];
        winograd_input<T>(half + x, kSide, column, 1);
        for (int y = 0; y < kSide; ++y) store<T>(u + (y * kSide + x) * stride + t * channels + c, column[y]);
      }
    }
  }
}

// Calls body(count, place) for batches of the tiles of a picture; place(t) is where tile t of the batch begins.
template <int R, typename Body>
FASTSLOTS_INLINE void winograd_batches(int64_t side, Body body) {
  constexpr int M = kSide + 1 - R;
  const int64_t across = (side + M - 1) / M, tiles = across * across;
  for (int64_t first = 0; first < tiles; first += kBatchTiles) {
    body(tiles - first < kBatchTiles ? tiles - first : kBatchTiles,
         [=](int64_t t) { return TileAt{(first + t) / across * M, (first + t) % across * M}; });
  }
}

// out = bias + the convolution of `in`; bias may be null. u and m: winograd_stride · 64 elements of either's channels.
template <typename T, int R>
void winograd_convolve(const T* weights, const T* bias, int64_t in_channels, int64_t out_channels, const Picture<T>& in,
                       const Picture<T>& out, T* u, T* m) {
  constexpr int M = kSide + 1 - R, V = kLanes<T>, W = kPanel<T>;
  const int64_t depth = whole_lanes<T>(in_channels), channels = whole_lanes<T>(out_channels);
  const int64_t left = winograd_stride(depth), stride = winograd_stride(channels);
  const int64_t point = winograd_point(depth * whole_panels<T>(out_channels));
  winograd_batches<R>(out.side, [&](int64_t count, auto place) {
    winograd_tiles<T, R>(in, depth, count, place, u);
    for (int p = 0; p < kProducts; ++p) {
      product<T, false>({u + p * left, depth}, {weights + p * point, W, depth * W}, count, channels, depth, false,
                        {m + p * stride, channels});
    }
    for (int64_t t = 0; t < count; ++t) {
      const TileAt at = place(t);
      const int64_t rows = out.side - at.y < M ? out.side - at.y : M, columns = out.side - at.x < M ? out.side - at.x : M;
      for (int64_t c = 0; c < channels; c += V) {
        Vec<T> half[M * kSide];
        for (int x = 0; x < kSide; ++x) {
          Vec<T> column[kSide];
          for (int y = 0; y < kSide; ++y) column[y] = load<T>(m + (y * kSide + x) * stride + t * channels + c);
          winograd_output<T, M>(column, 1, half + x, kSide);
        }
        const Vec<T> offset = bias ? load<T>(bias + c) : Vec<T>{};
        for (int64_t y = 0; y < rows; ++y) {
          Vec<T> row[M];
          winograd_output<T, M>(half + y * kSide, 1, row, 1);
          T* const to = out.at(at.y + y, at.x) + c;
          for (int64_t x = 0; x < columns; ++x) store<T>(to + x * out.stride, row[x] + offset);
        }
      }
    }
  });
}

// sums [point][in][out], points winograd_point apart, += Σ over tiles: the weight's gradient before its transform. dout
// comes with any border.
template <typename T, int R>
void winograd_correlate(const Picture<T>& in, const Picture<T>& dout, int64_t in_channels, int64_t out_channels, T* u,
                        T* v, T* sums) {
  constexpr int M = kSide + 1 - R, V = kLanes<T>;
  const int64_t depth = whole_lanes<T>(in_channels), channels = whole_lanes<T>(out_channels);
  const int64_t left = winograd_stride(depth), stride = winograd_stride(channels);
  const int64_t point = winograd_point(depth * channels);
  winograd_batches<R>(dout.side, [&](int64_t count, auto place) {
    winograd_tiles<T, R>(in, depth, count, place, u);
    for (int64_t t = 0; t < count; ++t) {
      const TileAt at = place(t);
      for (int64_t c = 0; c < channels; c += V) {
        Vec<T> half[kSide * M], g[M * M];
        for (int y = 0; y < M; ++y) {
          for (int x = 0; x < M; ++x) {
            const bool there = at.y + y < dout.side && at.x + x < dout.side;
            g[y * M + x] = there ? load<T>(dout.at(at.y + y, at.x + x) + c) : Vec<T>{};
          }
        }
        for (int x = 0; x < M; ++x) winograd_kernel<T, M>(g + x, M, half + x, M);
        for (int y = 0; y < kSide; ++y) {
          Vec<T> row[kSide];
          winograd_kernel<T, M>(half + y * M, 1, row, 1);
          for (int x = 0; x < kSide; ++x) store<T>(v + (y * kSide + x) * stride + t * channels + c, row[x]);
        }
      }
    }
    for (int p = 0; p < kProducts; ++p) {
      product<T, true>({u + p * left, depth}, {v + p * stride, channels, kPanel<T>}, depth, channels, count, true,
                       {sums + p * point, channels});
    }
  });
}

// to [tap][in][out] += the gradient of the weight out of `sums`.
template <typename T, int R>
void winograd_finish(const T* sums, int64_t in_channels, int64_t out_channels, T* to) {
  const int64_t size = whole_lanes<T>(in_channels) * whole_lanes<T>(out_channels);
  for (int64_t i = 0; i < size; i += kLanes<T>) {
    Vec<T> half[R * kSide];
    for (int x = 0; x < kSide; ++x) {
      Vec<T> column[kSide];
      for (int y = 0; y < kSide; ++y) column[y] = load<T>(sums + (y * kSide + x) * winograd_point(size) + i);
      winograd_output<T, R>(column, 1, half + x, kSide);
    }
    for (int y = 0; y < R; ++y) {
      Vec<T> row[R];
      winograd_output<T, R>(half + y * kSide, 1, row, 1);
      for (int x = 0; x < R; ++x) {
        T* const at = to + (y * R + x) * size + i;
        store<T>(at, load<T>(at) + row[x]);
      }
    }
  }
}

// A layer of kernel 3 or 5 in this form: calls body with the kernel's side as a constant.
template <typename Body>
FASTSLOTS_INLINE auto with_kernel(int64_t kernel, Body body) {
  return kernel == 3 ? body(std::integral_constant<int, 3>()) : body(std::integral_constant<int, 5>());
}

// Whether a layer is faster in this form: enough channels to pay for the transforms, and few pixels of the last tiles
// past the edge.
inline bool winograd_pays(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t side) {
  if (stride != 1 || (kernel != 3 && kernel != 5) || in < 16 || out < 16) return false;
  const int64_t pixels = kSide + 1 - kernel, across = (side + pixels - 1) / pixels;
  return 3 * across * across * kProducts < 2 * side * side * kernel * kernel;
}

constexpr int64_t kWinogradGradientSide = 16;  // of smaller pictures the sums for 64 products cost more than they save

}  // namespace fastslots::FASTSLOTS_ISA
