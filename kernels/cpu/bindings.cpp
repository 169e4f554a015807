// The Python module fastslots._cpu: with arrays.h all that knows Python. The GIL is released while kernels run.
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "api.h"
#include "arrays.h"

using namespace fastslots;

namespace {

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

// Pointers to a layer's arrays, from `objects` in the order of LayerArrays; P is `const T*` or `T*`.
template <typename P, typename Get>
LayerArrays<P> layer_arrays(Get get, int64_t B, int64_t D, int64_t H, int64_t K, int64_t F) {
  LayerArrays<P> w;
  w.G = get("G", {B, D, H, K});
  w.g = get("g", {B, H, K});
  w.U = get("U", {B, H, K, D});
  w.b = get("b", {D});
  w.norm_weight = get("norm_weight", {D});
  w.norm_bias = get("norm_bias", {D});
  w.w1 = get("w1", {F, D});
  w.b1 = get("b1", {F});
  w.w2 = get("w2", {D, F});
  w.b2 = get("b2", {D});
  return w;
}

constexpr int64_t kLayerArrays = 10;

// Weights, then biases, of linear maps from `columns` on: arrays first .. first + 2·count of `inputs`. Moves `first` on.
template <typename T>
struct MapArrays {
  std::vector<LinearArrays<const T*>> maps;
  std::vector<int64_t> rows;

  void take(Arrays<T>& arrays, nb::list inputs, int64_t& first, int64_t count, int64_t columns, const std::string& name) {
    const std::string weights = name + ".weights", biases = name + ".biases";
    for (int64_t i = 0; i < count; ++i, columns = rows.back()) {
      rows.push_back(arrays.shape_of(inputs[first + i], weights.c_str(), 2)[0]);
      maps.push_back({arrays.input(inputs[first + i], weights.c_str(), {rows.back(), columns}),
                      arrays.input(inputs[first + count + i], biases.c_str(), {rows.back()})});
    }
    first += 2 * count;
  }
};

// A decoder out of a list: the queries (or, where `code` is given, weights and biases of the MLP that makes them of it),
// ten arrays a layer, head norm weight and bias, head weights, head biases.
template <typename T>
struct DecoderArrays {
  MapArrays<T> query, head;
  std::vector<LayerArrays<const T*>> layers;
  std::vector<int64_t> ff_widths;

  void take(Arrays<T>& arrays, nb::list inputs, int64_t layer_count, nb::handle code, int64_t query_maps,
            nb::handle slot_mask, DecoderArgs<T>& args) {
    const bool given = code.is_none();
    const int64_t total = int64_t(inputs.size()), before = given ? 1 : 2 * query_maps;
    args.layer_count = layer_count;
    args.head_count = (total - before - layer_count * kLayerArrays - 2) / 2;
    if (layer_count < 1 || args.head_count < 1 || query_maps < (given ? 0 : 1) ||
        total != before + layer_count * kLayerArrays + 2 + 2 * args.head_count) {
      throw nb::value_error("inputs: expected queries, ten arrays a layer, and a norm and linear maps of the head");
    }
    if (layer_count > kMostMaps || args.head_count > kMostMaps || query_maps > kMostMaps) {
      throw nb::value_error("more than 16 layers");
    }
    const Shape G = arrays.shape_of(inputs[before], "G", 4);
    args.batch = G[0], args.width = G[1], args.heads = G[2], args.slots = G[3];
    int64_t at = 0;
    if (given) {
      const Shape queries = arrays.shape_of(inputs[0], "queries", 3);
      args.query_batch = queries[0], args.pixels = queries[1];
      if (args.query_batch != args.batch && args.query_batch != 1) {
        throw nb::value_error("queries: batch must be 1 or that of G");
      }
      args.queries = arrays.input(inputs[at++], "queries", {kAny, kAny, args.width});
    } else {
      const Shape codes = arrays.shape_of(code, "code", 2);
      args.query_batch = 1, args.pixels = codes[0], args.code_width = codes[1];
      args.code = arrays.input(code, "code", codes);
      query.take(arrays, inputs, at, query_maps, args.code_width, "query");
      if (query.rows.back() != args.width) throw nb::value_error("query.weights: the last must have the rows of G");
      args.query_map_count = query_maps;
      args.query_maps = query.maps.data(), args.query_map_rows = query.rows.data();
    }
    const auto next = [&](const char* name, const Shape& shape) { return arrays.input(inputs[at++], name, shape); };
    for (int64_t i = 0; i < layer_count; ++i) {
      ff_widths.push_back(arrays.shape_of(inputs[at + 6], "w1", 2)[0]);
      layers.push_back(layer_arrays<const T*>(next, args.batch, args.width, args.heads, args.slots, ff_widths.back()));
    }
    args.head_norm_weight = next("head.norm_weight", {args.width});
    args.head_norm_bias = next("head.norm_bias", {args.width});
    head.take(arrays, inputs, at, args.head_count, args.width, "head");
    args.slot_mask = arrays.mask(slot_mask, {args.batch, args.slots});
    args.ff_widths = ff_widths.data(), args.head_rows = head.rows.data();
    args.layers = layers.data(), args.head = head.maps.data();
  }
};

// inputs, code, query_maps: see DecoderArrays. grads is None for the forward alone, or holds an array or None for each
// input. Returns recon and interaction, unweighted.
template <typename T>
std::tuple<double, double> decoder_loss(const std::string& isa, nb::list inputs, nb::object grads, int64_t layer_count,
                                        nb::handle code, int64_t query_maps, nb::handle target, nb::handle pixel_weight,
                                        nb::handle slot_mask, double recon_weight, double interaction_weight,
                                        double eps, int threads) {
  const Kernels<T>& kernels = kernels_for<T>(isa);
  Arrays<T> arrays;
  DecoderLossArgs<T> args = {};
  DecoderArrays<T> decoder;
  decoder.take(arrays, inputs, layer_count, code, query_maps, slot_mask, args);
  const int64_t B = args.batch, L = args.pixels, D = args.width;
  std::vector<LayerArrays<T*>> layer_grads;
  std::vector<LinearArrays<T*>> query_grads, head_grads;
  if (!grads.is_none()) {
    nb::list outputs = nb::cast<nb::list>(grads);
    if (outputs.size() != inputs.size()) throw nb::value_error("grads: one entry for each input");
    int64_t at = 0;
    const auto next = [&](const char* name, const Shape& shape) { return arrays.output(outputs[at++], name, shape); };
    const auto of_maps = [&](const MapArrays<T>& of, int64_t columns, std::vector<LinearArrays<T*>>& to) {
      for (int64_t rows : of.rows) {
        to.push_back({next("weights", {rows, columns}), nullptr});
        columns = rows;
      }
      for (auto& map : to) map.bias = next("biases", {of.rows[&map - to.data()]});
    };
    if (args.code) {
      of_maps(decoder.query, args.code_width, query_grads);
      bool any = false;
      for (const auto& map : query_grads) any |= map.weight || map.bias;
      args.query_map_grads = any ? query_grads.data() : nullptr;
    } else {
      args.queries_grad = next("queries", {args.query_batch, L, D});
    }
    for (int64_t F : decoder.ff_widths) layer_grads.push_back(layer_arrays<T*>(next, B, D, args.heads, args.slots, F));
    args.head_norm_weight_grad = next("head.norm_weight", {D});
    args.head_norm_bias_grad = next("head.norm_bias", {D});
    of_maps(decoder.head, D, head_grads);
    args.layer_grads = layer_grads.data(), args.head_grads = head_grads.data();
  }
  args.target = arrays.input(target, "target", {B, L, decoder.head.rows.back()});
  args.pixel_weight = pixel_weight.is_none() ? nullptr : arrays.input(pixel_weight, "pixel_weight", {B, L});
  args.recon_weight = recon_weight;
  args.interaction_weight = interaction_weight;
  args.eps = eps;
  args.threads = threads;
  {
    nb::gil_scoped_release release;
    kernels.decoder_loss(args);
  }
  return {args.recon, args.interaction};
}

// inputs: see DecoderArrays. tangents: the seven arrays of TangentArrays a layer. jacobian [B, K, L] is written.
template <typename T>
void slot_jacobian(const std::string& isa, nb::list inputs, nb::list tangents, nb::handle jacobian, nb::handle slot_mask,
                   double eps, int threads) {
  constexpr int64_t kTangentArrays = 7;
  const Kernels<T>& kernels = kernels_for<T>(isa);
  Arrays<T> arrays;
  SlotJacobianArgs<T> args = {};
  DecoderArrays<T> decoder;
  const int64_t layer_count = int64_t(tangents.size()) / kTangentArrays;
  if (int64_t(tangents.size()) != layer_count * kTangentArrays) throw nb::value_error("tangents: seven arrays a layer");
  decoder.take(arrays, inputs, layer_count, nb::none(), 0, slot_mask, args);
  const int64_t B = args.batch, K = args.slots, D = args.width;
  const Shape keys = arrays.shape_of(tangents[5], "keys", 4);
  const int64_t Z = args.slot_width = keys[2], I = args.inner_width = keys[3];
  if (I % args.heads) throw nb::value_error("keys: the last axis must be a multiple of the heads");
  std::vector<TangentArrays<T>> layers;
  int64_t at = 0;
  const auto next = [&](const char* name, const Shape& shape) { return arrays.input(tangents[at++], name, shape); };
  for (int64_t i = 0; i < layer_count; ++i) {
    TangentArrays<T> layer;
    layer.query_weight = next("query_weight", {I, D});
    layer.query_bias = next("query_bias", {I});
    layer.query_norm_weight = next("query_norm_weight", {D});
    layer.query_norm_bias = next("query_norm_bias", {D});
    layer.out_weight = next("out_weight", {D, I});
    layer.keys = next("keys", {B, K, Z, I});
    layer.values = next("values", {B, K, Z, I});
    layers.push_back(layer);
  }
  args.tangents = layers.data();
  args.jacobian = arrays.output(jacobian, "jacobian", {B, K, args.pixels});
  if (!args.jacobian) throw nb::value_error("jacobian: it is written");
  args.eps = eps;
  args.threads = threads;
  nb::gil_scoped_release release;
  kernels.slot_jacobian(args);
}

// weights: G, g, U, b and, for a whole layer, the six arrays of its feed-forward. Forward: outputs are y and slot_map.
// Backward (y_grad given): outputs are the gradients of x and of each weight, or None.
template <typename T>
void layer(const std::string& isa, nb::handle x, nb::list weights, nb::list outputs, nb::handle y_grad,
           nb::handle slot_map_grad, nb::handle slot_mask, double eps, int threads) {
  const Kernels<T>& kernels = kernels_for<T>(isa);
  Arrays<T> arrays;
  LayerArgs<T> args = {};
  const bool whole = weights.size() == size_t(kLayerArrays), backward = !y_grad.is_none();
  if (!whole && weights.size() != 4) throw nb::value_error("weights: expected G, g, U, b or a layer's ten arrays");
  if (outputs.size() != (backward ? weights.size() + 1 : 2)) throw nb::value_error("outputs: wrong number of arrays");
  const Shape G = arrays.shape_of(weights[0], "G", 4), pixels = arrays.shape_of(x, "x", 3);
  const int64_t B = args.batch = G[0], D = args.width = G[1], H = args.heads = G[2], K = args.slots = G[3];
  const int64_t L = args.pixels = pixels[1];
  args.x_batch = pixels[0];
  if (args.x_batch != B && args.x_batch != 1) throw nb::value_error("x: batch must be 1 or that of G");
  args.x = arrays.input(x, "x", {kAny, kAny, D});
  args.ff_width = whole ? arrays.shape_of(weights[6], "w1", 2)[0] : 0;
  size_t at = 0;
  const size_t given = weights.size();
  args.weights = layer_arrays<const T*>(
      [&](const char* name, const Shape& shape) {
        return at < given ? arrays.input(weights[at++], name, shape) : nullptr;
      },
      B, D, H, K, args.ff_width);
  args.slot_mask = arrays.mask(slot_mask, {B, K});
  if (backward) {
    args.y_grad = arrays.input(y_grad, "y_grad", {B, L, D});
    args.slot_map_grad = arrays.input(slot_map_grad, "slot_map_grad", {B, L, K});
    args.x_grad = arrays.output(outputs[0], "x_grad", pixels);
    at = 0;
    args.grads = layer_arrays<T*>(
        [&](const char* name, const Shape& shape) {
          return at < given ? arrays.output(outputs[++at], name, shape) : nullptr;
        },
        B, D, H, K, args.ff_width);
  } else {
    args.y = arrays.output(outputs[0], "y", {B, L, D});
    args.slot_map = arrays.output(outputs[1], "slot_map", {B, L, K});
    if (!args.y || !args.slot_map) throw nb::value_error("outputs: y and slot_map are both written");
  }
  args.eps = eps;
  args.threads = threads;
  nb::gil_scoped_release release;
  kernels.layer(args);
}

// Forward: outputs are out [B,H,L,d] and slot_map. Backward (out_grad given): the gradients of q, k and v.
template <typename T>
void cross_attention(const std::string& isa, nb::handle q, nb::handle k, nb::handle v, nb::list outputs,
                     nb::handle out_grad, nb::handle slot_map_grad, nb::handle slot_mask, double scale, int threads) {
  const Kernels<T>& kernels = kernels_for<T>(isa);
  Arrays<T> arrays;
  CrossAttentionArgs<T> args = {};
  const Shape any(4, kAny);
  args.q = arrays.strided(q, "q", any, args.q_stride);
  const Shape pixels = arrays.last_shape();
  args.k = arrays.strided(k, "k", {pixels[0], pixels[1], kAny, pixels[3]}, args.k_stride);
  const Shape slots = arrays.last_shape();
  args.v = arrays.strided(v, "v", slots, args.v_stride);
  args.batch = pixels[0], args.heads = pixels[1], args.pixels = pixels[2], args.head_width = pixels[3];
  args.slots = slots[2];
  args.slot_mask = arrays.mask(slot_mask, {args.batch, args.slots});
  const Shape map = {args.batch, args.pixels, args.slots};
  const bool backward = !out_grad.is_none();
  if (outputs.size() != (backward ? 3u : 2u)) throw nb::value_error("outputs: wrong number of arrays");
  if (backward) {
    args.out_grad = arrays.strided(out_grad, "out_grad", pixels, args.out_grad_stride);
    args.slot_map_grad = arrays.input(slot_map_grad, "slot_map_grad", map);
    args.q_grad = arrays.output(outputs[0], "q_grad", pixels);
    args.k_grad = arrays.output(outputs[1], "k_grad", slots);
    args.v_grad = arrays.output(outputs[2], "v_grad", slots);
    if (!args.q_grad || !args.k_grad || !args.v_grad) throw nb::value_error("outputs: all three are written");
  } else {
    args.out = arrays.output(outputs[0], "out", pixels);
    args.slot_map = arrays.output(outputs[1], "slot_map", map);
    if (!args.out || !args.slot_map) throw nb::value_error("outputs: out and slot_map are both written");
  }
  args.scale = scale;
  args.threads = threads;
  nb::gil_scoped_release release;
  kernels.cross_attention(args);
}

// Forward (updates_grad is None): outputs are updates [B,H,K,d], totals [B,H,K], map [B,L,K] or None. Backward: saved
// are updates and totals, outputs the gradients of q, k and v.
template <typename T>
void slot_attention(const std::string& isa, nb::handle q, nb::handle k, nb::handle v, nb::list outputs,
                    nb::handle updates_grad, nb::handle map_grad, nb::list saved, nb::handle slot_mask, double scale,
                    double eps, int threads) {
  const Kernels<T>& kernels = kernels_for<T>(isa);
  Arrays<T> arrays;
  SlotAttentionArgs<T> args = {};
  args.q = arrays.strided(q, "q", Shape(4, kAny), args.q_stride);
  const Shape slots = arrays.last_shape();
  args.k = arrays.strided(k, "k", {slots[0], slots[1], kAny, slots[3]}, args.k_stride);
  const Shape tokens = arrays.last_shape();
  args.v = arrays.strided(v, "v", tokens, args.v_stride);
  args.batch = slots[0], args.heads = slots[1], args.slots = slots[2], args.head_width = slots[3];
  args.tokens = tokens[2];
  args.slot_mask = arrays.mask(slot_mask, {args.batch, args.slots});
  const Shape map = {args.batch, args.tokens, args.slots}, totals = {slots[0], slots[1], slots[2]};
  const bool backward = !updates_grad.is_none();
  if (outputs.size() != 3 || saved.size() != (backward ? 2u : 0u)) throw nb::value_error("outputs or saved: wrong number");
  if (backward) {
    args.updates_grad = arrays.input(updates_grad, "updates_grad", slots);
    if (!map_grad.is_none()) args.map_grad = arrays.input(map_grad, "map_grad", map);
    args.saved_updates = arrays.input(saved[0], "updates", slots);
    args.saved_totals = arrays.input(saved[1], "totals", totals);
    args.q_grad = arrays.output(outputs[0], "q_grad", slots);
    args.k_grad = arrays.output(outputs[1], "k_grad", tokens);
    args.v_grad = arrays.output(outputs[2], "v_grad", tokens);
    if (!args.q_grad || !args.k_grad || !args.v_grad) throw nb::value_error("outputs: all three are written");
  } else {
    args.updates = arrays.output(outputs[0], "updates", slots);
    args.totals = arrays.output(outputs[1], "totals", totals);
    args.map = arrays.output(outputs[2], "map", map);
    if (!args.updates || !args.totals) throw nb::value_error("outputs: updates and totals are both written");
  }
  args.scale = scale, args.eps = eps, args.threads = threads;
  nb::gil_scoped_release release;
  kernels.slot_attention(args);
}

// Forward (saved is None): outputs are gathered [B,M,S] and lse [B,M]. Backward: saved are dgathered, gathered and lse,
// outputs the gradients of rows and tokens, or None.
template <typename T>
void token_attention(const std::string& isa, nb::handle rows, nb::handle tokens, nb::list outputs, nb::object saved,
                     int threads) {
  const Kernels<T>& kernels = kernels_for<T>(isa);
  Arrays<T> arrays;
  TokenAttentionArgs<T> args = {};
  const Shape few = arrays.shape_of(rows, "rows", 3);
  const Shape many = {few[0], arrays.shape_of(tokens, "tokens", 3)[1], few[2]};
  args.batch = few[0], args.rows = few[1], args.tokens = many[1], args.width = few[2];
  args.query_rows = arrays.input(rows, "rows", few);
  args.token_rows = arrays.input(tokens, "tokens", many);
  if (outputs.size() != 2) throw nb::value_error("outputs: expected two arrays");
  if (saved.is_none()) {
    args.gathered = arrays.output(outputs[0], "gathered", few);
    args.lse = arrays.output(outputs[1], "lse", {few[0], few[1]});
    if (!args.gathered || !args.lse) throw nb::value_error("outputs: gathered and lse are both written");
  } else {
    const nb::list given = nb::cast<nb::list>(saved);
    if (given.size() != 3) throw nb::value_error("saved: expected dgathered, gathered and lse");
    args.gathered_grad = arrays.input(given[0], "dgathered", few);
    args.saved_gathered = arrays.input(given[1], "gathered", few);
    args.saved_lse = arrays.input(given[2], "lse", {few[0], few[1]});
    args.rows_grad = arrays.output(outputs[0], "drows", few);
    args.tokens_grad = arrays.output(outputs[1], "dtokens", many);
  }
  args.threads = threads;
  nb::gil_scoped_release release;
  kernels.token_attention(args);
}

// An encoder out of its arrays: their shapes give its sizes. `strides`: of the convolutions; none where images are
// features. weights: see encoder.h.
template <typename T>
struct EncoderArrays {
  static constexpr int64_t kLayerWeights = 22;
  std::vector<int64_t> rows, kernels, strides, ff_widths;
  std::vector<Shape> shapes;  // of the weights
  std::vector<const T*> weights;

  void take(Arrays<T>& arrays, nb::handle images, nb::handle queries, nb::handle grid, nb::handle picks, nb::list inputs,
            const std::vector<int64_t>& conv_strides, int64_t heads, EncoderArgs<T>& args) {
    strides = conv_strides;
    const int64_t convs = int64_t(strides.size()), before = (convs ? 2 * convs + 2 : 0) + !picks.is_none();
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
      weights.push_back(arrays.input(inputs[at++], name, shape));
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
    if (!picks.is_none()) {
      args.picks = arrays.indices(picks, "picks", {args.batch, args.slots}, side * side);
      next("seed", {S, S});
    }
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

// Forward: results are out [B, K, outputs] and, unless None, what the backward reads, [B, encoder_saved_size]. Backward:
// out_grad is given, results are the gradients of queries and weights, each an array or None.
template <typename T>
void encoder(const std::string& isa, nb::handle images, nb::handle queries, nb::handle grid, nb::handle picks,
             nb::list weights, const std::vector<int64_t>& strides, int64_t heads, nb::object saved, nb::object out_grad, nb::list results,
             double eps, int threads) {
  const Kernels<T>& kernels = kernels_for<T>(isa);
  Arrays<T> arrays;
  EncoderArgs<T> args = {};
  EncoderArrays<T> encoder;
  encoder.take(arrays, images, queries, grid, picks, weights, strides, heads, args);
  const Shape out = {args.batch, args.slots, args.outputs ? args.outputs : args.width};
  args.eps = eps, args.threads = threads;
  if (!saved.is_none()) args.saved = arrays.output(saved, "saved", {args.batch, kernels.encoder_saved_size(args)});
  std::vector<T*> grads;
  if (out_grad.is_none()) {
    if (results.size() != 1 || results[0].is_none()) throw nb::value_error("results: expected out alone");
    args.out = arrays.output(results[0], "out", out);
  } else {
    args.out_grad = arrays.input(out_grad, "out_grad", out);
    if (results.size() != weights.size() + 1) throw nb::value_error("results: queries' gradient and one for each weight");
    args.queries_grad = arrays.output(results[0], "dqueries", {args.query_batch, args.slots, args.width});
    for (size_t i = 0; i < weights.size(); ++i) {
      grads.push_back(arrays.output(results[i + 1], "gradient of a weight", encoder.shapes[i]));
    }
    args.grads = grads.data();
  }
  nb::gil_scoped_release release;
  kernels.encoder(args);
}

template <typename T>
int64_t encoder_saved_size(const std::string& isa, nb::handle images, nb::handle queries, nb::handle grid,
                           nb::handle picks, nb::list weights, const std::vector<int64_t>& strides, int64_t heads) {
  Arrays<T> arrays;
  EncoderArgs<T> args = {};
  EncoderArrays<T> encoder;
  encoder.take(arrays, images, queries, grid, picks, weights, strides, heads, args);
  return kernels_for<T>(isa).encoder_saved_size(args);
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (Isa isa : {Isa::avx512, Isa::avx2, Isa::portable}) {
    if (isa_supported(isa)) names.push_back(isa_name(isa));
  }
  return names;
}

template <typename T>
void bind(nb::module_& m, const std::string& suffix) {
  m.def(("decoder_loss_" + suffix).c_str(), &decoder_loss<T>, nb::arg("isa"), nb::arg("inputs"),
        nb::arg("grads").none(), nb::arg("layers"), nb::arg("code").none(), nb::arg("query_maps"), nb::arg("target"),
        nb::arg("pixel_weight").none(), nb::arg("slot_mask").none(), nb::arg("recon_weight"),
        nb::arg("interaction_weight"), nb::arg("eps"), nb::arg("threads"));
  m.def(("slot_jacobian_" + suffix).c_str(), &slot_jacobian<T>, nb::arg("isa"), nb::arg("inputs"), nb::arg("tangents"),
        nb::arg("jacobian"), nb::arg("slot_mask").none(), nb::arg("eps"), nb::arg("threads"));
  m.def(("layer_" + suffix).c_str(), &layer<T>, nb::arg("isa"), nb::arg("x"), nb::arg("weights"), nb::arg("outputs"),
        nb::arg("y_grad").none(), nb::arg("slot_map_grad").none(), nb::arg("slot_mask").none(), nb::arg("eps"),
        nb::arg("threads"));
  m.def(("cross_attention_" + suffix).c_str(), &cross_attention<T>, nb::arg("isa"), nb::arg("q"), nb::arg("k"),
        nb::arg("v"), nb::arg("outputs"), nb::arg("out_grad").none(), nb::arg("slot_map_grad").none(),
        nb::arg("slot_mask").none(), nb::arg("scale"), nb::arg("threads"));
  m.def(("token_attention_" + suffix).c_str(), &token_attention<T>, nb::arg("isa"), nb::arg("rows"), nb::arg("tokens"),
        nb::arg("outputs"), nb::arg("saved").none(), nb::arg("threads"));
  m.def(("slot_attention_" + suffix).c_str(), &slot_attention<T>, nb::arg("isa"), nb::arg("q"), nb::arg("k"),
        nb::arg("v"), nb::arg("outputs"), nb::arg("updates_grad").none(), nb::arg("map_grad").none(), nb::arg("saved"),
        nb::arg("slot_mask").none(), nb::arg("scale"), nb::arg("eps"), nb::arg("threads"));
  m.def(("encoder_" + suffix).c_str(), &encoder<T>, nb::arg("isa"), nb::arg("images"), nb::arg("queries"),
        nb::arg("grid").none(), nb::arg("picks").none(), nb::arg("weights"), nb::arg("strides"), nb::arg("heads"), nb::arg("saved").none(),
        nb::arg("out_grad").none(), nb::arg("results"), nb::arg("eps"), nb::arg("threads"));
  m.def(("encoder_saved_size_" + suffix).c_str(), &encoder_saved_size<T>, nb::arg("isa"), nb::arg("images"),
        nb::arg("queries"), nb::arg("grid").none(), nb::arg("picks").none(), nb::arg("weights"), nb::arg("strides"),
        nb::arg("heads"));
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.doc() = "fastslots' C++ kernels. Import torch first: they share its OpenMP threads.";
  m.def("instruction_sets", &instruction_sets, "Those that this processor serves, the best first.");
  bind<float>(m, "float32");
  bind<double>(m, "float64");
}
