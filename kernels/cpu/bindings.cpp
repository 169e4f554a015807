// The Python module fastslots._cpu: with arrays.h all that knows Python. The GIL is released while kernels run.
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <tuple>

#include "other_bindings.h"

using namespace fastslots;

namespace {

// grads holds an array for each name whose gradient is needed; without any, only the forward runs. Returns recon and
// interaction, unweighted.
template <typename T>
std::tuple<double, double> decoder_loss(const nb::dict& from, const nb::dict& grads, nb::handle target,
                                        nb::handle pixel_weight, nb::handle slot_mask, double recon_weight,
                                        double interaction_weight, double eps, const std::string& isa, int threads) {
  const Kernels<T>& kernels = kernels_for<T>(isa);
  Arrays<T> arrays;
  DecoderLossArgs<T> args = {};
  DecoderArrays<T> decoder;
  decoder.take(arrays, from, slot_mask, args);
  const int64_t B = args.batch, L = args.pixels, D = args.width;
  std::vector<LayerArrays<T*>> layer_grads;
  if (grads.size() > 0) {
    if (args.code) {
      decoder.query.take_grads(arrays, grads, args.code_width);
      args.query_map_grads = decoder.query.any_grad() ? decoder.query.grads.data() : nullptr;
    } else {
      args.queries_grad = arrays.output_or_null(grads, "queries", {args.query_batch, L, D});
    }
    for (int64_t i = 0; i < args.layer_count; ++i) {
      const auto get = [&](const char* name, const Shape& shape) {
        return arrays.output_or_null(grads, numbered("layers", i) + "." + name, shape);
      };
      layer_grads.push_back(layer_arrays<T*>(get, B, D, args.heads, args.slots, decoder.ff_widths[i]));
    }
    args.head_norm_weight_grad = arrays.output_or_null(grads, "head.norm_weight", {D});
    args.head_norm_bias_grad = arrays.output_or_null(grads, "head.norm_bias", {D});
    decoder.head.take_grads(arrays, grads, D);
    args.layer_grads = layer_grads.data(), args.head_grads = decoder.head.grads.data();
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

// tangents: a dictionary of each layer's, by the names of `Tangents`. jacobian [B, K, L] is written.
template <typename T>
void slot_jacobian(const nb::dict& from, nb::list tangents, nb::handle slot_mask, double eps, nb::handle jacobian,
                   const std::string& isa, int threads) {
  const Kernels<T>& kernels = kernels_for<T>(isa);
  Arrays<T> arrays;
  SlotJacobianArgs<T> args = {};
  DecoderArrays<T> decoder;
  decoder.take(arrays, from, slot_mask, args);
  if (args.code) throw nb::value_error("decoder: its queries must be made already");
  if (int64_t(tangents.size()) != args.layer_count) throw nb::value_error("tangents: expected one of each layer");
  const int64_t B = args.batch, K = args.slots, D = args.width;
  std::vector<TangentArrays<T>> layers;
  for (nb::handle item : tangents) {
    const nb::dict of_layer = nb::cast<nb::dict>(item);
    const Shape keys = arrays.shape_of(member(of_layer, "keys"), "keys", 4);
    if (layers.empty()) args.slot_width = keys[2], args.inner_width = keys[3];
    const int64_t Z = args.slot_width, I = args.inner_width;
    if (!args.heads || I % args.heads) throw nb::value_error("keys: the last axis must be a multiple of the heads");
    TangentArrays<T> layer;
    layer.query_weight = arrays.input(of_layer, "query_weight", {I, D});
    layer.query_bias = arrays.input(of_layer, "query_bias", {I});
    layer.query_norm_weight = arrays.input(of_layer, "query_norm_weight", {D});
    layer.query_norm_bias = arrays.input(of_layer, "query_norm_bias", {D});
    layer.out_weight = arrays.input(of_layer, "out_weight", {D, I});
    layer.keys = arrays.input(of_layer, "keys", {B, K, Z, I});
    layer.values = arrays.input(of_layer, "values", {B, K, Z, I});
    layers.push_back(layer);
  }
  args.tangents = layers.data();
  args.jacobian = arrays.output(jacobian, "jacobian", {B, K, args.pixels});
  args.eps = eps;
  args.threads = threads;
  nb::gil_scoped_release release;
  kernels.slot_jacobian(args);
}

// What both directions of a layer take. weights: G, g, U, b and, for a whole layer, the six arrays of its feed-forward.
template <typename T>
LayerArgs<T> layer_args(Arrays<T>& arrays, nb::handle x, const nb::dict& weights, nb::handle slot_mask, double eps,
                        int threads) {
  LayerArgs<T> args = {};
  const Shape G = arrays.shape_of(member(weights, "G"), "G", 4), pixels = arrays.shape_of(x, "x", 3);
  args.batch = G[0], args.width = G[1], args.heads = G[2], args.slots = G[3];
  args.x_batch = pixels[0], args.pixels = pixels[1];
  if (args.x_batch != args.batch && args.x_batch != 1) throw nb::value_error("x: batch must be 1 or that of G");
  args.x = arrays.input(x, "x", {kAny, kAny, args.width});
  args.ff_width = weights.contains("w1") ? arrays.shape_of(weights["w1"], "w1", 2)[0] : 0;
  args.weights = layer_arrays<const T*>(
      [&](const char* name, const Shape& shape) { return arrays.input(weights, name, shape); }, args.batch, args.width,
      args.heads, args.slots, args.ff_width);
  args.slot_mask = arrays.mask(slot_mask, {args.batch, args.slots});
  args.eps = eps;
  args.threads = threads;
  return args;
}

template <typename T>
void layer_fwd(nb::handle x, const nb::dict& weights, nb::handle slot_mask, double eps, nb::handle y,
               nb::handle slot_map, const std::string& isa, int threads) {
  const Kernels<T>& kernels = kernels_for<T>(isa);
  Arrays<T> arrays;
  LayerArgs<T> args = layer_args<T>(arrays, x, weights, slot_mask, eps, threads);
  args.y = arrays.output(y, "y", {args.batch, args.pixels, args.width});
  args.slot_map = arrays.output(slot_map, "slot_map", {args.batch, args.pixels, args.slots});
  nb::gil_scoped_release release;
  kernels.layer(args);
}

// grads holds an array for the name of each weight; x_grad may be None.
template <typename T>
void layer_bwd(nb::handle x, const nb::dict& weights, nb::handle slot_mask, double eps, nb::handle y_grad,
               nb::handle slot_map_grad, nb::handle x_grad, const nb::dict& grads, const std::string& isa,
               int threads) {
  const Kernels<T>& kernels = kernels_for<T>(isa);
  Arrays<T> arrays;
  LayerArgs<T> args = layer_args<T>(arrays, x, weights, slot_mask, eps, threads);
  args.y_grad = arrays.input(y_grad, "y_grad", {args.batch, args.pixels, args.width});
  args.slot_map_grad = arrays.input(slot_map_grad, "slot_map_grad", {args.batch, args.pixels, args.slots});
  const Shape pixels = {args.x_batch, args.pixels, args.width};
  args.x_grad = x_grad.is_none() ? nullptr : arrays.output(x_grad, "x_grad", pixels);
  args.grads = layer_arrays<T*>(
      [&](const char* name, const Shape& shape) { return arrays.output_or_null(grads, name, shape); }, args.batch,
      args.width, args.heads, args.slots, args.ff_width);
  nb::gil_scoped_release release;
  kernels.layer(args);
}

// What both directions of cross_attention take.
template <typename T>
CrossAttentionArgs<T> cross_attention_args(Arrays<T>& arrays, nb::handle q, nb::handle k, nb::handle v,
                                           nb::handle slot_mask, double scale, int threads) {
  CrossAttentionArgs<T> args = {};
  args.q = arrays.strided(q, "q", Shape(4, kAny), args.q_stride);
  const Shape pixels = arrays.last_shape();
  args.k = arrays.strided(k, "k", {pixels[0], pixels[1], kAny, pixels[3]}, args.k_stride);
  const Shape slots = arrays.last_shape();
  args.v = arrays.strided(v, "v", slots, args.v_stride);
  args.batch = pixels[0], args.heads = pixels[1], args.pixels = pixels[2], args.head_width = pixels[3];
  args.slots = slots[2];
  args.slot_mask = arrays.mask(slot_mask, {args.batch, args.slots});
  args.scale = scale;
  args.threads = threads;
  return args;
}

// head_weights, entropy and lse may be None, as may their gradients.
template <typename T>
void cross_attention_fwd(nb::handle q, nb::handle k, nb::handle v, nb::handle slot_mask, nb::handle head_weights,
                         double scale, nb::handle out, nb::handle slot_map, nb::handle entropy, nb::handle lse,
                         const std::string& isa, int threads) {
  const Kernels<T>& kernels = kernels_for<T>(isa);
  Arrays<T> arrays;
  CrossAttentionArgs<T> args = cross_attention_args<T>(arrays, q, k, v, slot_mask, scale, threads);
  args.out = arrays.output(out, "out", {args.batch, args.heads, args.pixels, args.head_width});
  args.slot_map = arrays.output(slot_map, "slot_map", {args.batch, args.pixels, args.slots});
  if (!head_weights.is_none()) args.head_weights = arrays.input(head_weights, "head_weights", {args.heads});
  if (!entropy.is_none()) {
    args.entropy = arrays.output(entropy, "entropy", {args.batch, args.heads, args.pixels});
    args.lse = arrays.output(lse, "lse", {args.batch, args.heads, args.pixels});
  }
  nb::gil_scoped_release release;
  kernels.cross_attention(args);
}

template <typename T>
void cross_attention_bwd(nb::handle q, nb::handle k, nb::handle v, nb::handle slot_mask, nb::handle head_weights,
                         double scale, nb::handle out_grad, nb::handle slot_map_grad, nb::handle entropy_grad,
                         nb::handle lse_grad, nb::handle q_grad, nb::handle k_grad, nb::handle v_grad,
                         nb::handle head_weights_grad, const std::string& isa, int threads) {
  const Kernels<T>& kernels = kernels_for<T>(isa);
  Arrays<T> arrays;
  CrossAttentionArgs<T> args = cross_attention_args<T>(arrays, q, k, v, slot_mask, scale, threads);
  const Shape pixels = {args.batch, args.heads, args.pixels, args.head_width};
  const Shape slots = {args.batch, args.heads, args.slots, args.head_width};
  args.out_grad = arrays.strided(out_grad, "out_grad", pixels, args.out_grad_stride);
  args.slot_map_grad = arrays.input(slot_map_grad, "slot_map_grad", {args.batch, args.pixels, args.slots});
  args.q_grad = arrays.output(q_grad, "q_grad", pixels);
  args.k_grad = arrays.output(k_grad, "k_grad", slots);
  args.v_grad = arrays.output(v_grad, "v_grad", slots);
  if (!head_weights.is_none()) args.head_weights = arrays.input(head_weights, "head_weights", {args.heads});
  if (!head_weights_grad.is_none()) {
    args.head_weights_grad = arrays.output(head_weights_grad, "head_weights_grad", {args.heads});
  }
  if (!entropy_grad.is_none()) {
    const Shape rows = {args.batch, args.heads, args.pixels};
    args.entropy_grad = arrays.input(entropy_grad, "entropy_grad", rows);
    args.lse_grad = arrays.input(lse_grad, "lse_grad", rows);
  }
  nb::gil_scoped_release release;
  kernels.cross_attention(args);
}

// What both directions of token_attention take.
template <typename T>
TokenAttentionArgs<T> token_attention_args(Arrays<T>& arrays, nb::handle rows, nb::handle tokens, int threads) {
  TokenAttentionArgs<T> args = {};
  const Shape few = arrays.shape_of(rows, "rows", 3);
  args.batch = few[0], args.rows = few[1], args.width = few[2];
  args.tokens = arrays.shape_of(tokens, "tokens", 3)[1];
  args.query_rows = arrays.input(rows, "rows", few);
  args.token_rows = arrays.input(tokens, "tokens", {args.batch, args.tokens, args.width});
  args.threads = threads;
  return args;
}

template <typename T>
void token_attention_fwd(nb::handle rows, nb::handle tokens, nb::handle gathered, nb::handle lse,
                         const std::string& isa, int threads) {
  const Kernels<T>& kernels = kernels_for<T>(isa);
  Arrays<T> arrays;
  TokenAttentionArgs<T> args = token_attention_args<T>(arrays, rows, tokens, threads);
  args.gathered = arrays.output(gathered, "gathered", {args.batch, args.rows, args.width});
  args.lse = arrays.output(lse, "lse", {args.batch, args.rows});
  nb::gil_scoped_release release;
  kernels.token_attention(args);
}

// rows_grad and tokens_grad may be None.
template <typename T>
void token_attention_bwd(nb::handle rows, nb::handle tokens, nb::handle gathered, nb::handle lse,
                         nb::handle gathered_grad, nb::handle rows_grad, nb::handle tokens_grad,
                         const std::string& isa, int threads) {
  const Kernels<T>& kernels = kernels_for<T>(isa);
  Arrays<T> arrays;
  TokenAttentionArgs<T> args = token_attention_args<T>(arrays, rows, tokens, threads);
  const Shape few = {args.batch, args.rows, args.width}, many = {args.batch, args.tokens, args.width};
  args.gathered_grad = arrays.input(gathered_grad, "gathered_grad", few);
  args.saved_gathered = arrays.input(gathered, "gathered", few);
  args.saved_lse = arrays.input(lse, "lse", {args.batch, args.rows});
  args.rows_grad = rows_grad.is_none() ? nullptr : arrays.output(rows_grad, "rows_grad", few);
  args.tokens_grad = tokens_grad.is_none() ? nullptr : arrays.output(tokens_grad, "tokens_grad", many);
  nb::gil_scoped_release release;
  kernels.token_attention(args);
}

// saved may be None; otherwise what the backward reads is written there, [B, encoder_saved_size].
template <typename T>
void encoder_fwd(nb::handle images, nb::handle queries, nb::handle grid, nb::handle picks, nb::list weights,
                 const std::vector<int64_t>& strides, int64_t heads, double eps, bool winograd, nb::handle saved,
                 nb::handle out, const std::string& isa, int threads) {
  const Kernels<T>& kernels = kernels_for<T>(isa);
  Arrays<T> arrays;
  EncoderArgs<T> args = {};
  EncoderArrays<T> encoder;
  encoder.take(arrays, images, queries, grid, picks, weights, strides, heads, args);
  args.eps = eps, args.winograd = winograd, args.threads = threads;
  if (!saved.is_none()) args.saved = arrays.output(saved, "saved", {args.batch, kernels.encoder_saved_size(args)});
  args.out = arrays.output(out, "out", {args.batch, args.slots, args.outputs ? args.outputs : args.width});
  nb::gil_scoped_release release;
  kernels.encoder(args);
}

// saved may be None: the forward runs again. grads: an array or None for each weight, in their order.
template <typename T>
void encoder_bwd(nb::handle images, nb::handle queries, nb::handle grid, nb::handle picks, nb::list weights,
                 const std::vector<int64_t>& strides, int64_t heads, double eps, bool winograd, nb::handle saved,
                 nb::handle out_grad, nb::handle queries_grad, nb::list grads, const std::string& isa, int threads) {
  const Kernels<T>& kernels = kernels_for<T>(isa);
  Arrays<T> arrays;
  EncoderArgs<T> args = {};
  EncoderArrays<T> encoder;
  encoder.take(arrays, images, queries, grid, picks, weights, strides, heads, args);
  args.eps = eps, args.winograd = winograd, args.threads = threads;
  if (!saved.is_none()) args.saved = arrays.output(saved, "saved", {args.batch, kernels.encoder_saved_size(args)});
  args.out_grad =
      arrays.input(out_grad, "out_grad", {args.batch, args.slots, args.outputs ? args.outputs : args.width});
  const Shape of_queries = {args.query_batch, args.slots, args.width};
  if (!queries_grad.is_none()) args.queries_grad = arrays.output(queries_grad, "queries_grad", of_queries);
  if (grads.size() != weights.size()) throw nb::value_error("grads: one entry for each weight");
  std::vector<T*> pointers;
  for (size_t i = 0; i < grads.size(); ++i) {
    const nb::object grad = grads[i];
    pointers.push_back(grad.is_none() ? nullptr : arrays.output(grad, "gradient of a weight", encoder.shapes[i]));
  }
  args.grads = pointers.data();
  nb::gil_scoped_release release;
  kernels.encoder(args);
}

template <typename T>
int64_t encoder_saved_size(nb::handle images, nb::handle queries, nb::handle grid, nb::handle picks, nb::list weights,
                           const std::vector<int64_t>& strides, int64_t heads, const std::string& isa) {
  Arrays<T> arrays;
  EncoderArgs<T> args = {};
  EncoderArrays<T> encoder;
  encoder.take(arrays, images, queries, grid, picks, weights, strides, heads, args);
  return kernels_for<T>(isa).encoder_saved_size(args);
}

// Lists of matrices of equal length; params and buffers are changed in place.
template <typename T>
void muon(nb::list params, nb::list grads, nb::list buffers, double momentum, double lr, double weight_decay,
          std::tuple<double, double, double> coefficients, int iterations, const std::string& isa, int threads) {
  const Kernels<T>& kernels = kernels_for<T>(isa);
  Arrays<T> arrays;
  std::vector<int64_t> rows, columns;
  std::vector<T*> to, state;
  std::vector<const T*> from;
  if (grads.size() != params.size() || buffers.size() != params.size()) throw nb::value_error("lists differ in length");
  for (size_t i = 0; i < params.size(); ++i) {
    const nb::object param = params[i], grad = grads[i], buffer = buffers[i];
    const Shape shape = arrays.shape_of(param, "param", 2);
    rows.push_back(shape[0]), columns.push_back(shape[1]);
    to.push_back(arrays.output(param, "param", shape));
    from.push_back(arrays.input(grad, "grad", shape));
    state.push_back(arrays.output(buffer, "buffer", shape));
  }
  const auto [a, b, c] = coefficients;
  const MuonArgs<T> args = {int64_t(to.size()), rows.data(),  columns.data(), to.data(), from.data(),
                            state.data(),       momentum,     lr,             weight_decay, {a, b, c},
                            iterations,         threads,      1};
  nb::gil_scoped_release release;
  kernels.muon(args);
}

// Euclidean norm of all arrays together, added in double in their order.
template <typename T>
double norm(nb::list inputs) {
  double total = 0;
  for (nb::handle object : inputs) {
    nb::ndarray<const T, nb::c_contig, nb::device::cpu> array;
    if (!nb::try_cast(object, array, false)) throw nb::type_error("norm takes C-contiguous arrays on the CPU");
    const T* const values = array.data();
    double sums[8] = {};
    const int64_t count = int64_t(array.size());
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
      for (int64_t j = 0; j < 8; ++j) sums[j] += double(values[i + j]) * double(values[i + j]);
    }
    for (; i < count; ++i) sums[0] += double(values[i]) * double(values[i]);
    for (double sum : sums) total += sum;
  }
  return std::sqrt(total);
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (Isa isa : {Isa::avx512, Isa::avx2, Isa::portable}) {
    if (isa_supported(isa)) names.push_back(isa_name(isa));
  }
  return names;
}

// Every argument has a name, and is passed by it: arrays by theirs (None where one may be left out), then the scalars.
template <typename T>
void bind(nb::module_& m, const std::string& suffix) {
  using nb::literals::operator""_a;
  const auto name = [&](const char* op) { return std::string(op) + "_" + suffix; };
  m.def(name("decoder_loss").c_str(), &decoder_loss<T>, nb::kw_only(), "decoder"_a, "grads"_a, "target"_a,
        "pixel_weight"_a.none(), "slot_mask"_a.none(), "recon_weight"_a, "interaction_weight"_a, "eps"_a, "isa"_a,
        "threads"_a);
  m.def(name("slot_jacobian").c_str(), &slot_jacobian<T>, nb::kw_only(), "decoder"_a, "tangents"_a,
        "slot_mask"_a.none(), "eps"_a, "jacobian"_a, "isa"_a, "threads"_a);
  m.def(name("layer_fwd").c_str(), &layer_fwd<T>, nb::kw_only(), "x"_a, "weights"_a, "slot_mask"_a.none(), "eps"_a,
        "y"_a, "slot_map"_a, "isa"_a, "threads"_a);
  m.def(name("layer_bwd").c_str(), &layer_bwd<T>, nb::kw_only(), "x"_a, "weights"_a, "slot_mask"_a.none(), "eps"_a,
        "y_grad"_a, "slot_map_grad"_a, "x_grad"_a.none(), "grads"_a, "isa"_a, "threads"_a);
  m.def(name("cross_attention_fwd").c_str(), &cross_attention_fwd<T>, nb::kw_only(), "q"_a, "k"_a, "v"_a,
        "slot_mask"_a.none(), "head_weights"_a.none(), "scale"_a, "out"_a, "slot_map"_a, "entropy"_a.none(),
        "lse"_a.none(), "isa"_a, "threads"_a);
  m.def(name("cross_attention_bwd").c_str(), &cross_attention_bwd<T>, nb::kw_only(), "q"_a, "k"_a, "v"_a,
        "slot_mask"_a.none(), "head_weights"_a.none(), "scale"_a, "out_grad"_a, "slot_map_grad"_a,
        "entropy_grad"_a.none(), "lse_grad"_a.none(), "q_grad"_a, "k_grad"_a, "v_grad"_a,
        "head_weights_grad"_a.none(), "isa"_a, "threads"_a);
  m.def(name("token_attention_fwd").c_str(), &token_attention_fwd<T>, nb::kw_only(), "rows"_a, "tokens"_a,
        "gathered"_a, "lse"_a, "isa"_a, "threads"_a);
  m.def(name("token_attention_bwd").c_str(), &token_attention_bwd<T>, nb::kw_only(), "rows"_a, "tokens"_a,
        "gathered"_a, "lse"_a, "gathered_grad"_a, "rows_grad"_a.none(), "tokens_grad"_a.none(), "isa"_a, "threads"_a);
  m.def(name("encoder_fwd").c_str(), &encoder_fwd<T>, nb::kw_only(), "images"_a, "queries"_a, "grid"_a.none(),
        "picks"_a.none(), "weights"_a, "strides"_a, "heads"_a, "eps"_a, "winograd"_a, "saved"_a.none(), "out"_a,
        "isa"_a, "threads"_a);
  m.def(name("encoder_bwd").c_str(), &encoder_bwd<T>, nb::kw_only(), "images"_a, "queries"_a, "grid"_a.none(),
        "picks"_a.none(), "weights"_a, "strides"_a, "heads"_a, "eps"_a, "winograd"_a, "saved"_a.none(),
        "out_grad"_a, "queries_grad"_a.none(), "grads"_a, "isa"_a, "threads"_a);
  m.def(name("encoder_saved_size").c_str(), &encoder_saved_size<T>, nb::kw_only(), "images"_a, "queries"_a,
        "grid"_a.none(), "picks"_a.none(), "weights"_a, "strides"_a, "heads"_a, "isa"_a);
  m.def(name("muon").c_str(), &muon<T>, nb::kw_only(), "params"_a, "grads"_a, "buffers"_a, "momentum"_a, "lr"_a,
        "weight_decay"_a, "coefficients"_a, "iterations"_a, "isa"_a, "threads"_a);
  m.def(name("norm").c_str(), &norm<T>, nb::kw_only(), "arrays"_a);
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.doc() = "fastslots' C++ kernels. Import torch first: they share its OpenMP threads.";
  m.attr("most_maps") = kMostMaps;
  m.def("instruction_sets", &instruction_sets, "Those that this processor serves, the best first.");
  bind<float>(m, "float32");
  bind<double>(m, "float64");
  bind_slot_attention(m);
  bind_steps(m);
}
