// The kernels' arguments out of Python objects: what several bindings share.
#pragma once

#include "api.h"
#include "arrays.h"

namespace fastslots {

template <typename T>
const Kernels<T>& kernels_for(const std::string& isa) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return double_kernels();
  } else {
    for (Isa candidate : {Isa::portable, Isa::avx2, Isa::avx512}) {
      if (isa != isa_name(candidate)) continue;
      if (!isa_supported(candidate)) throw std::invalid_argument("this processor has no " + isa);
      return float_kernels(candidate);
    }
    throw std::invalid_argument("unknown instruction set " + isa);
  }
}

// Pointers to those of a layer's arrays that all images share, each by its name; P is `const T*` or `T*`. Without a
// feed-forward F is 0.
template <typename P, typename Get>
LayerArrays<P> shared_arrays(Get get, int64_t D, int64_t F) {
  LayerArrays<P> w = {};
  w.b = get("b", {D});
  if (F == 0) return w;
  w.norm_weight = get("norm_weight", {D});
  w.norm_bias = get("norm_bias", {D});
  w.w1 = get("w1", {F, D});
  w.b1 = get("b1", {F});
  w.w2 = get("w2", {D, F});
  w.b2 = get("b2", {D});
  return w;
}

// The same and those of the images.
template <typename P, typename Get>
LayerArrays<P> layer_arrays(Get get, int64_t B, int64_t D, int64_t H, int64_t K, int64_t F) {
  LayerArrays<P> w = shared_arrays<P>(get, D, F);
  w.G = get("G", {B, D, H, K});
  w.g = get("g", {B, H, K});
  w.U = get("U", {B, H, K, D});
  return w;
}

inline std::string numbered(const std::string& name, int64_t i) { return name + "." + std::to_string(i); }

// How many of name.0, name.1, ... there are.
inline int64_t count_of(const nb::dict& arrays, const std::string& before, const std::string& after = "") {
  int64_t count = 0;
  while (arrays.contains((numbered(before, count) + after).c_str())) ++count;
  if (count > kMostMaps) throw nb::value_error((before + ": more than " + std::to_string(kMostMaps)).c_str());
  return count;
}

// Linear maps one after the other: `name`.weights.0, `name`.biases.0 and so on.
template <typename T>
struct MapArrays {
  std::string name;
  std::vector<LinearArrays<const T*>> maps;
  std::vector<LinearArrays<T*>> grads;
  std::vector<int64_t> rows;

  void take(Arrays<T>& arrays, const nb::dict& from, int64_t columns) {
    const int64_t count = count_of(from, name + ".weights");
    if (count < 1) throw nb::value_error((name + ": no linear map").c_str());
    for (int64_t i = 0; i < count; ++i, columns = rows.back()) {
      const std::string weight = numbered(name + ".weights", i);
      rows.push_back(arrays.shape_of(member(from, weight), weight, 2)[0]);
      maps.push_back({arrays.input(from, weight, {rows.back(), columns}),
                      arrays.input(from, numbered(name + ".biases", i), {rows.back()})});
    }
  }

  void take_grads(Arrays<T>& arrays, const nb::dict& from, int64_t columns) {
    for (size_t i = 0; i < rows.size(); columns = rows[i++]) {
      grads.push_back({arrays.output_or_null(from, numbered(name + ".weights", i), {rows[i], columns}),
                       arrays.output_or_null(from, numbered(name + ".biases", i), {rows[i]})});
    }
  }

  bool any_grad() const {
    for (const auto& map : grads) {
      if (map.weight || map.bias) return true;
    }
    return false;
  }
};

// A decoder out of a dictionary, by the names of `flatten` in fastslots/records.py; query.code stands for the position
// codes of which an MLP makes the queries.
template <typename T>
struct DecoderArrays {
  MapArrays<T> query = {"query"}, head = {"head"};
  std::vector<LayerArrays<const T*>> layers;
  std::vector<int64_t> ff_widths;

  void take(Arrays<T>& arrays, const nb::dict& from, nb::handle slot_mask, DecoderArgs<T>& args) {
    args.layer_count = count_of(from, "layers", ".G");
    if (args.layer_count < 1) throw nb::value_error("decoder: no layer");
    const Shape G = arrays.shape_of(member(from, "layers.0.G"), "layers.0.G", 4);
    args.batch = G[0], args.width = G[1], args.heads = G[2], args.slots = G[3];
    if (from.contains("queries")) {
      const Shape queries = arrays.shape_of(member(from, "queries"), "queries", 3);
      args.query_batch = queries[0], args.pixels = queries[1];
      if (args.query_batch != args.batch && args.query_batch != 1) {
        throw nb::value_error("queries: batch must be 1 or that of G");
      }
      args.queries = arrays.input(from, "queries", {kAny, kAny, args.width});
    } else {
      const Shape codes = arrays.shape_of(member(from, "query.code"), "query.code", 2);
      args.query_batch = 1, args.pixels = codes[0], args.code_width = codes[1];
      args.code = arrays.input(from, "query.code", codes);
      query.take(arrays, from, args.code_width);
      if (query.rows.back() != args.width) throw nb::value_error("query.weights: the last must have the rows of G");
      args.query_map_count = int64_t(query.maps.size());
      args.query_maps = query.maps.data(), args.query_map_rows = query.rows.data();
    }
    for (int64_t i = 0; i < args.layer_count; ++i) {
      const std::string layer = numbered("layers", i) + ".", w1 = layer + "w1";
      ff_widths.push_back(arrays.shape_of(member(from, w1), w1, 2)[0]);
      const auto get = [&](const char* name, const Shape& shape) { return arrays.input(from, layer + name, shape); };
      layers.push_back(layer_arrays<const T*>(get, args.batch, args.width, args.heads, args.slots, ff_widths.back()));
    }
    args.head_norm_weight = arrays.input(from, "head.norm_weight", {args.width});
    args.head_norm_bias = arrays.input(from, "head.norm_bias", {args.width});
    head.take(arrays, from, args.width);
    args.head_count = int64_t(head.maps.size());
    args.slot_mask = arrays.mask(slot_mask, {args.batch, args.slots});
    args.ff_widths = ff_widths.data(), args.head_rows = head.rows.data();
    args.layers = layers.data(), args.head = head.maps.data();
  }
};

// An encoder out of its arrays: their shapes give its sizes. `strides`: of the convolutions; none where images are
// features. weights: see encoder.h. seed_columns: of the seed weight, where it has more columns than rows (0: as many).
template <typename T>
struct EncoderArrays {
  static constexpr int64_t kLayerWeights = 22;
  std::vector<int64_t> rows, kernels, strides, ff_widths;
  std::vector<Shape> shapes;  // of the weights
  std::vector<const T*> weights;

  void take(Arrays<T>& arrays, nb::handle images, nb::handle queries, nb::handle grid, nb::handle picks, nb::list inputs,
            const std::vector<int64_t>& conv_strides, int64_t heads, EncoderArgs<T>& args, int64_t seed_columns = 0) {
    strides = conv_strides;
    args.seeded = !picks.is_none() || seed_columns, args.seed_stride = seed_columns;
    const int64_t convs = int64_t(strides.size()), before = (convs ? 2 * convs + 2 : 0) + args.seeded;
    const int64_t rest = int64_t(inputs.size()) - before - 6;
    args.conv_count = convs, args.layer_count = rest / kLayerWeights;
    if (rest < 0 || (rest % kLayerWeights != 0 && rest % kLayerWeights != 2)) {
      throw nb::value_error("weights: expected those of convolutions, token MLP, layers, norm and perhaps an output");
    }
    if (convs > kMostMaps || args.layer_count > kMostMaps) throw nb::value_error("more than 16 layers");
    const Shape image = arrays.shape_of(images, "images", 4), query = arrays.shape_of(queries, "queries", 3);
    args.batch = image[0], args.channels = image[1], args.side = image[2];
    args.query_batch = query[0], args.slots = query[1], args.width = query[2], args.heads = heads;
    const int64_t S = args.width;
    if (image[3] != args.side) throw nb::value_error("images must be square");
    if (args.query_batch != args.batch && args.query_batch != 1) throw nb::value_error("queries: batch must be 1 or that of images");
    if (heads < 1 || S < 1 || S % heads) throw nb::value_error("heads must divide the width of queries");
    args.images = arrays.input(images, "images", image);
    args.queries = arrays.input(queries, "queries", query);
    int64_t channels = args.channels, side = args.side, at = 0;
    const auto next = [&](const char* name, const Shape& shape) {
      weights.push_back(arrays.input(nb::handle(inputs[at++]), name, shape));
      shapes.push_back(arrays.last_shape());
      return shapes.back();
    };
    const auto map = [&](const char* name, int64_t out, int64_t in) {
      const Shape shape = next(name, {out, in});
      next(name, {shape[0]});
      return shape[0];
    };
    for (int64_t i = 0; i < convs; ++i) {
      const Shape shape = next("convolution", {i + 1 < convs ? kAny : S, channels, kAny, kAny});
      next("convolution", {shape[0]});
      if (shape[2] != shape[3] || shape[2] % 2 == 0 || strides[i] < 1 || strides[i] > kMostStride) {
        throw nb::value_error("convolutions must have square kernels of odd size and strides from 1 to 4");
      }
      rows.push_back(channels = shape[0]), kernels.push_back(shape[2]);
      side = (side + strides[i] - 1) / strides[i];
    }
    if (convs) {
      map("position", S, 4);
      args.grid = arrays.input(grid, "grid", {side * side, 4});
    }
    args.token_hidden = map("token_mlp", kAny, channels);
    map("token_mlp", S, args.token_hidden);
    if (!picks.is_none()) args.picks = arrays.indices(picks, "picks", {args.batch, args.slots}, side * side);
    if (args.seeded) next("seed", {S, seed_columns ? seed_columns : S});
    const auto norm = [&] { next("norm", {S}), next("norm", {S}); };
    for (int64_t i = 0; i < args.layer_count; ++i) {
      norm(), norm();
      map("to_q", S, S), map("to_kv", 2 * S, S), map("to_out", S, S);
      norm(), map("to_qkv", 3 * S, S), map("to_out", S, S);
      norm();
      ff_widths.push_back(map("w1", kAny, S));
      map("w2", S, ff_widths.back());
    }
    norm();
    if (rest % kLayerWeights == 2) args.outputs = map("output", kAny, S);
    args.conv_rows = rows.data(), args.conv_kernels = kernels.data(), args.conv_strides = strides.data();
    args.ff_widths = ff_widths.data(), args.weights = weights.data();
  }
};

}  // namespace fastslots
