// The decoder in plain loops and long double: what the kernels are held against. One pixel at a time, no folding of
// norms, no tiles. Gradients need no code of their own: central differences of this, along random directions.
#pragma once

#include <cmath>
#include <vector>

#include "check.h"

using Real = long double;
using Row = std::vector<Real>;
using Tensors = std::vector<Row>;  // in the order of fastslots.ops.decoder_loss: queries (or their MLP), ten a layer, head

struct Problem {
  int64_t batch, query_batch, pixels, width, heads, slots;
  std::vector<int64_t> ff_widths, head_rows, query_rows;  // query_rows: of the MLP's maps; empty where queries are given
  int64_t code_width = 0;
  std::vector<double> code;                  // [pixels, code_width]
  std::vector<double> target, pixel_weight;  // pixel_weight may be empty
  std::vector<uint8_t> slot_mask;            // may be empty
  double recon_weight = 1.3, interaction_weight = 0.7, eps = 1e-5;
  std::string name;
  int64_t layer_first() const { return query_rows.empty() ? 1 : 2 * int64_t(query_rows.size()); }
  int64_t head_first() const { return layer_first() + 10 * int64_t(ff_widths.size()); }
};

inline Row normalised(const Row& x, Real eps) {
  Real mean = 0, variance = 0;
  for (Real v : x) mean += v / Real(x.size());
  for (Real v : x) variance += (v - mean) * (v - mean) / Real(x.size());
  Row out;
  for (Real v : x) out.push_back((v - mean) / std::sqrt(variance + eps));
  return out;
}

inline Row affine(Row x, const Row& weight, const Row& bias) {
  for (size_t i = 0; i < x.size(); ++i) x[i] = x[i] * weight[i] + bias[i];
  return x;
}

inline Row linear(const Row& weight, const Row& bias, const Row& x) {
  Row out = bias;
  for (size_t i = 0; i < out.size(); ++i) {
    for (size_t j = 0; j < x.size(); ++j) out[i] += weight[i * x.size() + j] * x[j];
  }
  return out;
}

inline Real gelu(Real x) { return x * std::erfc(-x / std::sqrt(Real(2))) / 2; }

// Softmax of `scores`, weight 0 where keep is 0.
inline Row slot_softmax(const Row& scores, const uint8_t* keep) {
  Real largest = -INFINITY, total = 0;
  for (size_t k = 0; k < scores.size(); ++k) {
    if (!keep || keep[k]) largest = std::max(largest, scores[k]);
  }
  Row out;
  for (size_t k = 0; k < scores.size(); ++k) out.push_back(!keep || keep[k] ? std::exp(scores[k] - largest) : 0);
  for (Real v : out) total += v;
  for (Real& v : out) v = total > 0 ? v / total : 0;
  return out;
}

// y = A·U + b of one pixel; weights: G, g, U, b. Adds share·Σ_h A to map.
inline Row attention(const Row& x, const Row* weights, int64_t b, int64_t H, int64_t K, const uint8_t* keep, Real share,
                     Row& map) {
  const int64_t D = int64_t(x.size());
  Row y = weights[3];
  for (int64_t h = 0; h < H; ++h) {
    Row scores;
    for (int64_t k = 0; k < K; ++k) {
      Real s = weights[1][(b * H + h) * K + k];
      for (int64_t j = 0; j < D; ++j) s += x[j] * weights[0][((b * D + j) * H + h) * K + k];
      scores.push_back(s);
    }
    const Row a = slot_softmax(scores, keep);
    for (int64_t k = 0; k < K; ++k) {
      map[k] += share * a[k];
      for (int64_t j = 0; j < D; ++j) y[j] += a[k] * weights[2][((b * H + h) * K + k) * D + j];
    }
  }
  return y;
}

// One whole layer of one pixel; weights: its ten arrays.
inline Row decoder_layer(Row x, const Row* weights, int64_t b, int64_t H, int64_t K, const uint8_t* keep, Real share,
                         Real eps, Row& map) {
  const Row y = attention(normalised(x, eps), weights, b, H, K, keep, share, map);
  for (size_t j = 0; j < x.size(); ++j) x[j] += y[j];
  Row hidden = linear(weights[6], weights[7], affine(normalised(x, eps), weights[4], weights[5]));
  for (Real& v : hidden) v = gelu(v);
  const Row z = linear(weights[8], weights[9], hidden);
  for (size_t j = 0; j < x.size(); ++j) x[j] += z[j];
  return x;
}

// Linear maps with GELU between them: `count` weights from tensors[first] on, then as many biases.
inline Row mlp(const Tensors& tensors, int64_t first, int64_t count, Row x) {
  for (int64_t i = 0; i < count; ++i) {
    for (Real& v : x) v = i ? gelu(v) : v;
    x = linear(tensors[first + i], tensors[first + count + i], x);
  }
  return x;
}

inline Row query(const Problem& p, const Tensors& tensors, int64_t b, int64_t l) {
  if (!p.query_rows.empty()) {
    const auto code = p.code.begin() + l * p.code_width;
    return mlp(tensors, 0, int64_t(p.query_rows.size()), Row(code, code + p.code_width));
  }
  const auto given = tensors[0].begin() + ((p.query_batch == 1 ? 0 : b) * p.pixels + l) * p.width;
  return Row(given, given + p.width);
}

// Pixel l of image b, C channels; adds the mean over layers of the weights to map.
inline Row decode(const Problem& p, const Tensors& tensors, int64_t b, int64_t l, Row& map) {
  const int64_t N = int64_t(p.ff_widths.size()), head = p.head_first();
  const uint8_t* keep = p.slot_mask.empty() ? nullptr : &p.slot_mask[b * p.slots];
  Row x = query(p, tensors, b, l);
  for (int64_t i = 0; i < N; ++i) {
    x = decoder_layer(x, &tensors[p.layer_first() + 10 * i], b, p.heads, p.slots, keep, Real(1) / N, p.eps, map);
  }
  x = affine(normalised(x, p.eps), tensors[head], tensors[head + 1]);
  return mlp(tensors, head + 2, int64_t(p.head_rows.size()), x);
}

struct Loss {
  Real recon = 0, interaction = 0;
};

inline Loss decoder_loss(const Problem& p, const Tensors& tensors) {
  Loss loss;
  const int64_t C = p.head_rows.back();
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t l = 0; l < p.pixels; ++l) {
      Row map(p.slots, 0);
      const Row x = decode(p, tensors, b, l, map);
      const Real weight = p.pixel_weight.empty() ? 1 : p.pixel_weight[b * p.pixels + l];
      for (int64_t c = 0; c < C; ++c) {
        const Real error = x[c] - p.target[(b * p.pixels + l) * C + c];
        loss.recon += weight * error * error / p.batch;
      }
      for (int64_t j = 0; j < p.slots; ++j) {
        for (int64_t k = 0; k < j; ++k) loss.interaction += weight * map[j] * map[k] / Real(p.batch * p.pixels);
      }
    }
  }
  return loss;
}

// ∂f/∂(tensor along direction), by central differences: truncation 1e-10, rounding 1e-14.
template <typename F>
Real directional(F f, Tensors& tensors, size_t which, const std::vector<double>& direction) {
  const Real step = 1e-5;
  const Row saved = tensors[which];
  for (size_t i = 0; i < saved.size(); ++i) tensors[which][i] = saved[i] + step * direction[i];
  const Real up = f(tensors);
  for (size_t i = 0; i < saved.size(); ++i) tensors[which][i] = saved[i] - step * direction[i];
  const Real down = f(tensors);
  tensors[which] = saved;
  return (up - down) / (2 * step);
}

template <typename T>
double dot(const std::vector<T>& a, const std::vector<double>& b) {
  double total = 0;
  for (size_t i = 0; i < a.size(); ++i) total += double(a[i]) * b[i];
  return total;
}

// Sizes of a problem's tensors, and seeded values: norms near 1, matrices of unit gain.
inline Tensors random_tensors(const Problem& p, std::mt19937& random) {
  const int64_t B = p.batch, D = p.width, HK = p.heads * p.slots;
  Tensors tensors;
  const auto add = [&](int64_t count, double scale, double mean = 0) {
    tensors.push_back(as<Real>(as<float>(normal(random, size_t(count), scale, mean))));  // exact in fp32
  };
  const auto add_maps = [&](const std::vector<int64_t>& maps, int64_t columns) {
    for (int64_t rows : maps) {
      add(rows * columns, 1 / std::sqrt(double(columns)));
      columns = rows;
    }
    for (int64_t rows : maps) add(rows, 0.1);
  };
  if (p.query_rows.empty()) add(p.query_batch * p.pixels * D, 1);
  add_maps(p.query_rows, p.code_width);
  for (int64_t F : p.ff_widths) {
    add(B * D * HK, 1 / std::sqrt(double(D)));
    add(B * HK, 0.5);
    add(B * HK * D, 0.3);
    add(D, 0.1);
    add(D, 0.1, 1);
    add(D, 0.1);
    add(F * D, 1 / std::sqrt(double(D)));
    add(F, 0.1);
    add(D * F, 1 / std::sqrt(double(F)));
    add(D, 0.1);
  }
  add(D, 0.1, 1);
  add(D, 0.1);
  add_maps(p.head_rows, D);
  return tensors;
}

template <typename P, typename Tensor>
fastslots::LayerArrays<P> layer_of(Tensor at, int64_t first) {
  return {at(first), at(first + 1), at(first + 2), at(first + 3), at(first + 4),
          at(first + 5), at(first + 6), at(first + 7), at(first + 8), at(first + 9)};
}

// `count` weights from `first` on, then as many biases.
template <typename P, typename Tensor>
std::vector<fastslots::LinearArrays<P>> maps_of(Tensor at, int64_t first, size_t count) {
  std::vector<fastslots::LinearArrays<P>> maps;
  for (int64_t i = first; i < first + int64_t(count); ++i) maps.push_back({at(i), at(i + int64_t(count))});
  return maps;
}

// A problem's tensors as a kernel takes them.
template <typename T>
struct Inputs {
  std::vector<std::vector<T>> tensors;
  std::vector<T> code;
  std::vector<fastslots::LayerArrays<const T*>> layers;
  std::vector<fastslots::LinearArrays<const T*>> query, head;

  Inputs(const Problem& p, const Tensors& given, int threads, fastslots::DecoderArgs<T>& args) {
    for (const Row& row : given) tensors.push_back(as<T>(row));
    const auto at = [&](int64_t i) -> const T* { return tensors[i].data(); };
    const int64_t N = int64_t(p.ff_widths.size()), head_at = p.head_first();
    for (int64_t i = 0; i < N; ++i) layers.push_back(layer_of<const T*>(at, p.layer_first() + 10 * i));
    query = maps_of<const T*>(at, 0, p.query_rows.size());
    head = maps_of<const T*>(at, head_at + 2, p.head_rows.size());
    code = as<T>(p.code);
    args.batch = p.batch, args.query_batch = p.query_batch, args.pixels = p.pixels;
    args.width = p.width, args.heads = p.heads, args.slots = p.slots;
    args.layer_count = N, args.head_count = int64_t(head.size());
    args.ff_widths = p.ff_widths.data(), args.head_rows = p.head_rows.data();
    args.layers = layers.data();
    args.head_norm_weight = at(head_at), args.head_norm_bias = at(head_at + 1), args.head = head.data();
    if (query.empty()) {
      args.queries = at(0);
    } else {
      args.code = code.data(), args.code_width = p.code_width, args.query_map_count = int64_t(query.size());
      args.query_map_rows = p.query_rows.data(), args.query_maps = query.data();
    }
    args.slot_mask = p.slot_mask.empty() ? nullptr : p.slot_mask.data();
    args.eps = p.eps, args.threads = threads;
  }
};
