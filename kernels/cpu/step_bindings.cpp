// A training step's bindings: classes that take their arrays once and are called with a batch at a time.
#include "other_bindings.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

namespace fastslots {
namespace {

template <typename P, typename Get>
SlotFoldArrays<P> fold_arrays(Get get, int64_t D, int64_t I, int64_t slots) {
  SlotFoldArrays<P> w = {};
  w.norm_q_weight = get("norm_q_weight", {D}), w.norm_q_bias = get("norm_q_bias", {D});
  w.norm_slots_weight = get("norm_slots_weight", {slots}), w.norm_slots_bias = get("norm_slots_bias", {slots});
  w.q_weight = get("q_weight", {I, D}), w.q_bias = get("q_bias", {I});
  w.kv_weight = get("kv_weight", {2 * I, slots}), w.kv_bias = get("kv_bias", {2 * I});
  w.out_weight = get("out_weight", {D, I});
  return w;
}

// Weights are read and gradients written where they lie, at every call: the arrays must stay in their places.
template <typename T>
class Step {
 public:
  // encoder, decoder: dictionaries of arrays; in `encoder` weights and grads are lists (EncoderInputs.weights, the seed
  // weight whole). grads: of the decoder, by the same names.
  Step(const nb::dict& encoder, const nb::dict& decoder, const nb::dict& grads, const std::vector<int64_t>& strides,
       int64_t encoder_heads, int64_t heads, int64_t slots, double scale, double eps, bool variational,
       int64_t patch_side, int favours, nb::handle quantiles, bool winograd) {
    take_encoder(encoder, strides, encoder_heads, slots, patch_side);
    take_decoder(decoder, grads, heads, slots);
    args_.encoder.eps = args_.decoder.eps = eps, args_.encoder.winograd = winograd;
    args_.attention_scale = scale, args_.variational = variational, args_.favours = favours;
    args_.quantiles = tables_.input(quantiles, "quantiles", {1 << 16});
    const int64_t results = args_.encoder.outputs ? args_.encoder.outputs : args_.encoder.width;
    if (results != (variational ? 2 : 1) * args_.slot_dim) throw nb::value_error("the encoder gives another width");
  }

  // images [B, C, R, R]; noise [B, K, Z], pixels [B, P] int64 and pixel_weight [B, P], each None where it is drawn with
  // the keys, `count` pixels an image; picks [B, K] int64 and seen [B, K, C + 3], of seeds, None where the kernel chooses
  // them -> recon, kl, interaction, unweighted; gradients are written.
  std::tuple<double, double, double> run(nb::handle images, nb::handle noise, nb::handle pixels,
                                         nb::handle pixel_weight, nb::handle picks, nb::handle seen,
                                         std::tuple<uint64_t, uint64_t> keys,
                                         int64_t first_image, int64_t count, double recon_weight, double kl_weight,
                                         double interaction_weight, const std::string& isa, int threads) {
    const Kernels<T>& kernels = kernels_for<T>(isa);
    Arrays<T> arrays;
    TrainStepArgs<T> args = args_;
    auto& e = args.encoder;
    e.images = arrays.input(images, "images", {kAny, e.channels, e.side, e.side});
    const int64_t B = e.batch = args.decoder.batch = arrays.last_shape()[0];
    if (!noise.is_none()) args.noise = arrays.input(noise, "noise", {B, e.slots, args.slot_dim});
    const int64_t P = args.decoder.pixels = count;
    if (P < 1 || first_image < 0) throw nb::value_error("no pixels, or a place below 0");
    if (!pixels.is_none()) args.pixels = arrays.indices(pixels, "pixels", {B, P}, e.side * e.side);
    if (!pixel_weight.is_none()) args.pixel_weight = arrays.input(pixel_weight, "pixel_weight", {B, P});
    if (picks.is_none() != seen.is_none() || (!picks.is_none() && !args.patch_side)) {
      throw nb::value_error("picks and seen: both, of a model that is seeded, or neither");
    }
    if (!picks.is_none()) {
      args.picks = arrays.indices(picks, "picks", {B, e.slots}, tokens_);
      args.seen = arrays.input(seen, "seen", {B, e.slots, e.channels + 3});
    }
    args.noise_key = std::get<0>(keys), args.pixel_key = std::get<1>(keys), args.first_image = first_image;
    args.decoder.recon_weight = recon_weight, args.decoder.interaction_weight = interaction_weight;
    args.kl_weight = kl_weight;
    e.threads = args.decoder.threads = threads;
    {
      nb::gil_scoped_release release;
      kernels.train_step(args);
    }
    return {args.recon, args.kl, args.interaction};
  }

 private:
  Arrays<T> arrays_;
  Arrays<int32_t> tables_;
  EncoderArrays<T> encoder_;
  DecoderArrays<T> decoder_;
  std::vector<T*> encoder_grads_, mlp_grads_;
  std::vector<const T*> mlp_;
  std::vector<LayerArrays<T*>> layer_grads_;
  std::vector<SlotFoldArrays<const T*>> folds_;
  std::vector<SlotFoldArrays<T*>> fold_grads_;
  TrainStepArgs<T> args_ = {};
  int64_t tokens_ = 0;

  void take_encoder(const nb::dict& from, const std::vector<int64_t>& strides, int64_t heads, int64_t slots,
                    int64_t patch_side) {
    auto& e = args_.encoder;
    const nb::list weights = nb::cast<nb::list>(member(from, "weights"));
    const nb::list grads = nb::cast<nb::list>(member(from, "grads"));
    const nb::object queries = member(from, "queries"), images = member(from, "images");
    const Shape image = arrays_.shape_of(images, "images", 4), query = arrays_.shape_of(queries, "queries", 3);
    const int64_t seed_columns = patch_side ? query[2] + image[1] + 3 : 0;
    encoder_.take(arrays_, images, queries, member(from, "grid"), nb::none(), weights, strides, heads, e, seed_columns);
    if (query[0] != 1 || query[1] != (patch_side ? 1 : slots)) throw nb::value_error("queries: one, or one a slot");
    e.slots = slots;
    e.queries_grad = arrays_.output(member(from, "queries_grad"), "queries_grad", query);
    if (grads.size() != weights.size()) throw nb::value_error("grads: one for each weight");
    for (size_t i = 0; i < grads.size(); ++i) {
      encoder_grads_.push_back(arrays_.output(grads[i], "gradient of a weight", encoder_.shapes[i]));
    }
    e.grads = encoder_grads_.data();
    args_.patch_side = patch_side;
    if (!patch_side) return;
    if (e.side % patch_side) throw nb::value_error("patch_side must divide the side of the images");
    int64_t tokens = e.side;
    for (int64_t stride : strides) tokens = (tokens + stride - 1) / stride;
    args_.places = arrays_.input(member(from, "places"), "places", {patch_side * patch_side, 2});
    args_.token_of = arrays_.indices(member(from, "token_of"), "token_of", {patch_side * patch_side}, tokens_ = tokens * tokens);
  }

  void take_decoder(const nb::dict& from, const nb::dict& grads, int64_t heads, int64_t slots) {
    auto& d = args_.decoder;
    const int64_t area = args_.encoder.side * args_.encoder.side;
    d.heads = heads, d.slots = slots, d.query_batch = 1;
    d.layer_count = count_of(from, "layers", ".w1");
    if (d.layer_count < 1) throw nb::value_error("decoder: no layer");
    d.width = arrays_.shape_of(member(from, "layers.0.w1"), "layers.0.w1", 2)[1];
    d.code_width = arrays_.shape_of(member(from, "query.code"), "query.code", 2)[1];
    d.code = arrays_.input(from, "query.code", {area, d.code_width});
    decoder_.query.take(arrays_, from, d.code_width);
    decoder_.query.take_grads(arrays_, grads, d.code_width);
    if (decoder_.query.rows.back() != d.width) throw nb::value_error("query.weights: the last must be as wide as w1");
    d.query_map_count = int64_t(decoder_.query.maps.size());
    d.query_maps = decoder_.query.maps.data(), d.query_map_rows = decoder_.query.rows.data();
    d.query_map_grads = decoder_.query.grads.data();
    take_slot_mlp(from, grads);
    const int64_t D = d.width;
    args_.inner = arrays_.shape_of(member(from, "layers.0.q_weight"), "layers.0.q_weight", 2)[0];
    if (heads < 1 || args_.inner % heads) throw nb::value_error("heads must divide the inner width");
    for (int64_t i = 0; i < d.layer_count; ++i) take_layer(from, grads, numbered("layers", i) + ".");
    d.ff_widths = decoder_.ff_widths.data();
    d.layers = decoder_.layers.data(), d.layer_grads = layer_grads_.data();
    args_.folds = folds_.data(), args_.fold_grads = fold_grads_.data();
    d.head_norm_weight = arrays_.input(from, "head.norm_weight", {D});
    d.head_norm_bias = arrays_.input(from, "head.norm_bias", {D});
    d.head_norm_weight_grad = arrays_.output_or_null(grads, "head.norm_weight", {D});
    d.head_norm_bias_grad = arrays_.output_or_null(grads, "head.norm_bias", {D});
    decoder_.head.take(arrays_, from, D);
    decoder_.head.take_grads(arrays_, grads, D);
    if (decoder_.head.rows.back() != args_.encoder.channels) throw nb::value_error("head: as many rows as channels");
    d.head_count = int64_t(decoder_.head.maps.size());
    d.head_rows = decoder_.head.rows.data(), d.head = decoder_.head.maps.data();
    d.head_grads = decoder_.head.grads.data();
  }

  void take_slot_mlp(const nb::dict& from, const nb::dict& grads) {
    const Shape first = arrays_.shape_of(member(from, "slot.0"), "slot.0", 2);
    args_.slot_dim = first[1], args_.slot_hidden = first[0];
    args_.slot_width = arrays_.shape_of(member(from, "slot.2"), "slot.2", 2)[0];
    const Shape shapes[4] = {first, {first[0]}, {args_.slot_width, first[0]}, {args_.slot_width}};
    for (int64_t i = 0; i < 4; ++i) {
      mlp_.push_back(arrays_.input(from, numbered("slot", i), shapes[i]));
      mlp_grads_.push_back(arrays_.output(member(grads, numbered("slot", i)), numbered("slot", i), shapes[i]));
    }
    args_.slot_mlp = mlp_.data(), args_.slot_mlp_grads = mlp_grads_.data();
  }

  void take_layer(const nb::dict& from, const nb::dict& grads, const std::string& layer) {
    const auto& d = args_.decoder;
    const auto get = [&](const char* name, const Shape& shape) { return arrays_.input(from, layer + name, shape); };
    const auto grad = [&](const char* name, const Shape& shape) {
      return arrays_.output(member(grads, layer + name), layer + name, shape);
    };
    const int64_t D = d.width, F = arrays_.shape_of(member(from, layer + "w1"), layer + "w1", 2)[0];
    decoder_.ff_widths.push_back(F);
    decoder_.layers.push_back(shared_arrays<const T*>(get, D, F));
    layer_grads_.push_back(shared_arrays<T*>(grad, D, F));
    folds_.push_back(fold_arrays<const T*>(get, D, args_.inner, args_.slot_width));
    fold_grads_.push_back(fold_arrays<T*>(grad, D, args_.inner, args_.slot_width));
  }
};

// Updates the arrays that it was made with: matrices by Muon, (param, grad, momentum) each; the rest by AdamW, (param,
// grad, mean, square, step).
template <typename T>
class StepUpdate {
 public:
  StepUpdate(const std::vector<nb::object>& matrices, const std::vector<nb::object>& rest) {
    for (const nb::object& item : matrices) {
      const auto [param, grad, buffer] = nb::cast<std::tuple<nb::object, nb::object, nb::object>>(item);
      const Shape shape = arrays_.shape_of(param, "param", 2);
      rows_.push_back(shape[0]), columns_.push_back(shape[1]);
      matrices_.push_back(arrays_.output(param, "param", shape));
      matrix_grads_.push_back(arrays_.input(grad, "grad", shape));
      buffers_.push_back(arrays_.output(buffer, "buffer", shape));
    }
    for (const nb::object& item : rest) {
      const auto [param, grad, mean, square, step] =
          nb::cast<std::tuple<nb::object, nb::object, nb::object, nb::object, nb::object>>(item);
      const Shape shape = {int64_t(nb::len(param))};
      sizes_.push_back(shape[0]);
      params_.push_back(arrays_.output(param, "param", shape));
      grads_.push_back(arrays_.input(grad, "grad", shape));
      means_.push_back(arrays_.output(mean, "mean", shape));
      squares_.push_back(arrays_.output(square, "square", shape));
      steps_.push_back(counts_.output(step, "step", {1}));
    }
  }

  // muon: lr, momentum, weight_decay; adamw: lr, beta1, beta2, eps, weight_decay. -> the gradients' norm.
  double run(std::tuple<double, double, double> muon, std::tuple<double, double, double> coefficients, int iterations,
             std::tuple<double, double, double, double, double> adamw, double largest_norm, bool update,
             const std::string& isa, int threads) {
    const Kernels<T>& kernels = kernels_for<T>(isa);
    const auto [lr, momentum, weight_decay] = muon;
    const auto [a, b, c] = coefficients;
    const auto [rest_lr, beta1, beta2, eps, rest_decay] = adamw;
    UpdateArgs<T> args = {};
    args.muon = {int64_t(matrices_.size()), rows_.data(),     columns_.data(), matrices_.data(),
                 matrix_grads_.data(),      buffers_.data(),  momentum,        lr,
                 weight_decay,              {a, b, c},        iterations,      threads,
                 1};
    args.adamw = {int64_t(params_.size()), sizes_.data(), params_.data(), grads_.data(), means_.data(), squares_.data(),
                  steps_.data(),           rest_lr,       beta1,          beta2,         eps,           rest_decay,
                  1};
    args.largest_norm = largest_norm, args.update = update, args.threads = threads;
    {
      nb::gil_scoped_release release;
      kernels.update(args);
    }
    return args.norm;
  }

 private:
  Arrays<T> arrays_;
  Arrays<float> counts_;
  std::vector<int64_t> rows_, columns_, sizes_;
  std::vector<T*> matrices_, buffers_, params_, means_, squares_;
  std::vector<const T*> matrix_grads_, grads_;
  std::vector<float*> steps_;
};

template <typename T>
void bind(nb::module_& m, const std::string& suffix) {
  using nb::literals::operator""_a;
  nb::class_<Step<T>>(m, ("TrainStep_" + suffix).c_str())
      .def(nb::init<const nb::dict&, const nb::dict&, const nb::dict&, const std::vector<int64_t>&, int64_t, int64_t,
                    int64_t, double, double, bool, int64_t, int, nb::handle, bool>(),
           nb::kw_only(), "encoder"_a, "decoder"_a, "grads"_a, "strides"_a, "encoder_heads"_a, "heads"_a, "slots"_a,
           "scale"_a, "eps"_a, "variational"_a, "patch_side"_a, "favours"_a, "quantiles"_a, "winograd"_a)
      .def("run", &Step<T>::run, nb::kw_only(), "images"_a, "noise"_a.none(), "pixels"_a.none(),
           "pixel_weight"_a.none(), "picks"_a.none(), "seen"_a.none(), "keys"_a, "first_image"_a, "count"_a, "recon_weight"_a, "kl_weight"_a,
           "interaction_weight"_a, "isa"_a, "threads"_a);
  nb::class_<StepUpdate<T>>(m, ("StepUpdate_" + suffix).c_str())
      .def(nb::init<const std::vector<nb::object>&, const std::vector<nb::object>&>(), nb::kw_only(), "matrices"_a,
           "rest"_a)
      .def("run", &StepUpdate<T>::run, nb::kw_only(), "muon"_a, "coefficients"_a, "iterations"_a, "adamw"_a,
           "largest_norm"_a, "update"_a, "isa"_a, "threads"_a);
}

}  // namespace

void bind_steps(nb::module_& m) {
  bind<float>(m, "float32");
  bind<double>(m, "float64");
}

}  // namespace fastslots
