// What stands between the products, on panels [panel][feature][kPanel pixels]: layer norm, GELU, softmax over slots,
// the interaction penalty, and moving pixels between row-major arrays and panels.
#pragma once

#include "gemm.h"

namespace fastslots::FASTSLOTS_ISA {

// normed = (x − mean)·rstd over the D features of each pixel, x itself perhaps; rstd [panels][W], and `means` unless null.
template <typename T>
void normalise(const T* x, int64_t D, int64_t panels, T eps, T* normed, T* rstd, T* means = nullptr) {
  constexpr int W = kPanel<T>, V = kLanes<T>;
  const T per_feature = T(1) / T(D);
  for (int64_t p = 0; p < panels; ++p, x += D * W, normed += D * W, rstd += W) {
    for (int h = 0; h < W; h += V) {
      Vec<T> even = {}, odd = {};
      int64_t j = 0;
      for (; j + 1 < D; j += 2) even += load<T>(x + j * W + h), odd += load<T>(x + (j + 1) * W + h);
      if (j < D) even += load<T>(x + j * W + h);
      const Vec<T> mean = (even + odd) * per_feature;
      if (means) store<T>(means + p * W + h, mean);
      even = odd = Vec<T>{};
      for (j = 0; j + 1 < D; j += 2) {
        const Vec<T> a = load<T>(x + j * W + h) - mean, b = load<T>(x + (j + 1) * W + h) - mean;
        even += a * a;
        odd += b * b;
      }
      if (j < D) {
        const Vec<T> a = load<T>(x + j * W + h) - mean;
        even += a * a;
      }
      const Vec<T> scale = T(1) / square_root<T>((even + odd) * per_feature + eps);
      store<T>(rstd + h, scale);
      for (j = 0; j < D; ++j) store<T>(normed + j * W + h, (load<T>(x + j * W + h) - mean) * scale);
    }
  }
}

// dx (+)= rstd·(dn − mean(dn) − normed·mean(dn·normed)).
template <typename T>
void normalise_backward(const T* dn, const T* normed, const T* rstd, int64_t D, int64_t panels, bool add, T* dx) {
  constexpr int W = kPanel<T>, V = kLanes<T>;
  const T per_feature = T(1) / T(D);
  for (int64_t p = 0; p < panels; ++p, dn += D * W, normed += D * W, dx += D * W, rstd += W) {
    for (int h = 0; h < W; h += V) {
      Vec<T> sum = {}, dot = {};
      for (int64_t j = 0; j < D; ++j) {
        const Vec<T> d = load<T>(dn + j * W + h);
        sum += d;
        dot += d * load<T>(normed + j * W + h);
      }
      sum *= per_feature;
      dot *= per_feature;
      const Vec<T> scale = load<T>(rstd + h);
      for (int64_t j = 0; j < D; ++j) {
        const Vec<T> d = scale * (load<T>(dn + j * W + h) - sum - load<T>(normed + j * W + h) * dot);
        store<T>(dx + j * W + h, add ? load<T>(dx + j * W + h) + d : d);
      }
    }
  }
}

// x <- gelu(x) = x·Φ(x), slope <- Φ(x) + x·φ(x); slope may be null.
template <typename T>
void gelu(T* x, T* slope, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> v = load<T>(x + i);
    Vec<T> cdf, density;
    normal_distribution<T>(v, cdf, density);
    store<T>(x + i, v * cdf);
    if (slope) store<T>(slope + i, cdf + v * density);
  }
}

template <typename T>
void add_to(T* sum, const T* x, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<T>) store<T>(sum + i, load<T>(sum + i) + load<T>(x + i));
}

template <typename T>
void scale_by(T* x, const T* factor, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<T>) store<T>(x + i, load<T>(x + i) * load<T>(factor + i));
}

// scores [panels][H·K][W] <- softmax over the K slots of each head, weight 0 where keep[k] is 0 (all masked: all 0);
// map [panels][K][W] += share·Σ_h. keep may be null.
template <typename T>
void softmax(T* scores, int64_t H, int64_t K, int64_t panels, const uint8_t* keep, T share, T* map) {
  constexpr int W = kPanel<T>, V = kLanes<T>;
  for (int64_t p = 0; p < panels; ++p, map += K * W) {
    for (int64_t head = 0; head < H; ++head, scores += K * W) {
      for (int h = 0; h < W; h += V) {
        Vec<T> largest = broadcast<T>(-T(__builtin_inff())), total = {};
        for (int64_t k = 0; k < K; ++k) {
          if (!keep || keep[k]) largest = max_of<T>(load<T>(scores + k * W + h), largest);
        }
        for (int64_t k = 0; k < K; ++k) {
          T* at = scores + k * W + h;
          const Vec<T> e = !keep || keep[k] ? exponential<T>(load<T>(at) - largest) : Vec<T>{};
          total += e;
          store<T>(at, e);
        }
        bool any = !keep;
        for (int64_t k = 0; keep && k < K; ++k) any |= keep[k] != 0;
        const Vec<T> inverse = any ? T(1) / total : Vec<T>{};
        for (int64_t k = 0; k < K; ++k) {
          const Vec<T> a = load<T>(scores + k * W + h) * inverse;
          store<T>(scores + k * W + h, a);
          store<T>(map + k * W + h, load<T>(map + k * W + h) + a * share);
        }
      }
    }
  }
}

// da [panels][H·K][W] -> ds = a·(da' − Σ_k a·da') in place, da' = da + share·dmap [panels][K][W].
template <typename T>
void softmax_backward(const T* a, const T* dmap, T share, int64_t H, int64_t K, int64_t panels, T* da) {
  constexpr int W = kPanel<T>, V = kLanes<T>;
  for (int64_t p = 0; p < panels; ++p, dmap += K * W) {
    for (int64_t head = 0; head < H; ++head, a += K * W, da += K * W) {
      for (int h = 0; h < W; h += V) {
        Vec<T> dot = {};
        for (int64_t k = 0; k < K; ++k) {
          const Vec<T> d = load<T>(da + k * W + h) + load<T>(dmap + k * W + h) * share;
          dot += d * load<T>(a + k * W + h);
          store<T>(da + k * W + h, d);
        }
        for (int64_t k = 0; k < K; ++k) {
          const Vec<T> d = load<T>(da + k * W + h) - dot;
          store<T>(da + k * W + h, load<T>(a + k * W + h) * d);
        }
      }
    }
  }
}

// pairs [panels][W] = Σ_{j<k} w_j w_k of map [panels][K][W], each weight times the running sum of those before it: the
// difference of squares cancels near one-hot. dmap, unless null, <- factor [panels][W] times the sum of the others.
template <typename T>
void interaction(const T* map, int64_t K, int64_t panels, const T* factor, T* pairs, T* dmap) {
  constexpr int W = kPanel<T>, V = kLanes<T>;
  for (int64_t p = 0; p < panels; ++p, map += K * W, factor += W, pairs += W) {
    for (int h = 0; h < W; h += V) {
      Vec<T> before = {}, after = {}, total = {};
      for (int64_t k = K - 1; dmap && k >= 0; --k) {
        store<T>(dmap + k * W + h, after);
        after += load<T>(map + k * W + h);
      }
      const Vec<T> f = load<T>(factor + h);
      for (int64_t k = 0; k < K; ++k) {
        const Vec<T> w = load<T>(map + k * W + h);
        if (dmap) store<T>(dmap + k * W + h, (load<T>(dmap + k * W + h) + before) * f);
        total += w * before;
        before += w;
      }
      store<T>(pairs + h, total);
    }
    if (dmap) dmap += K * W;
  }
}

// Calls block(first feature, features, of them done before): whole vectors, the last one moved back over the one before
// it, so that no row is cut to a length known at run time. Fewer features than lanes are one short block.
template <typename T, typename Block>
FASTSLOTS_INLINE void feature_blocks(int64_t D, Block block) {
  constexpr int V = kLanes<T>;
  if (D < V) {
    if (D > 0) block(0, int(D), 0);
    return;
  }
  int64_t j = 0;
  for (; j + V <= D; j += V) block(j, V, 0);
  if (j < D) block(D - V, V, int(j - (D - V)));
}

template <typename T>
FASTSLOTS_INLINE Vec<T> load_part(const T* from, int width) {
  if (width == kLanes<T>) return load<T>(from);
  Vec<T> v = {};
  std::memcpy(&v, from, size_t(width) * sizeof(T));
  return v;
}

template <typename T>
FASTSLOTS_INLINE void store_part(T* to, Vec<T> v, int width) {
  if (width == kLanes<T>) return store<T>(to, v);
  std::memcpy(to, &v, size_t(width) * sizeof(T));
}

// panels [panels][D][W] <- `count` pixels from[pixel·stride + feature], zeros past them.
template <typename T>
void load_pixels(const T* from, int64_t stride, int64_t count, int64_t D, int64_t panels, T* to) {
  constexpr int W = kPanel<T>, V = kLanes<T>;
  for (int64_t pixel = 0; pixel < panels * W; pixel += V) {
    T* panel = to + pixel / W * D * W + pixel % W;
    const int rows = int(count - pixel < V ? (count > pixel ? count - pixel : 0) : V);
    feature_blocks<T>(D, [&](int64_t j, int width, int) {
      Vec<T> square[V];
      const T* row = from + pixel * stride + j;
      for (int i = 0; i < V; ++i) square[i] = i < rows ? load_part<T>(row + i * stride, width) : Vec<T>{};
      transpose_square<T>(square);
      for (int i = 0; i < width; ++i) store<T>(panel + (j + i) * W, square[i]);
    });
  }
}

// The way back: to[pixel·stride + feature] (+)= panels.
template <typename T>
void store_pixels(const T* from, int64_t stride, int64_t count, int64_t D, bool add, T* to) {
  constexpr int W = kPanel<T>, V = kLanes<T>;
  for (int64_t pixel = 0; pixel < count; pixel += V) {
    const T* panel = from + pixel / W * D * W + pixel % W;
    const int rows = int(count - pixel < V ? count - pixel : V);
    feature_blocks<T>(D, [&](int64_t j, int width, int done) {
      Vec<T> square[V];
      for (int i = 0; i < V; ++i) {
        square[i] = i < width && !(add && i < done) ? load<T>(panel + (j + i) * W) : Vec<T>{};
      }
      transpose_square<T>(square);
      T* row = to + pixel * stride + j;
      for (int i = 0; i < rows; ++i) {
        if (add) square[i] += load_part<T>(row + i * stride, width);
        store_part<T>(row + i * stride, square[i], width);
      }
    });
  }
}

}  // namespace fastslots::FASTSLOTS_ISA
