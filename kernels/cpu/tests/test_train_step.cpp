// A whole training step: gradients in the double build against differences, each instruction set against the double
// build, the same bits for any number of threads; what it draws; and the update.
#include <functional>

#include "check.h"

using namespace fastslots;

struct Case {
  int64_t B, side, K, S, heads, Z, D, decoder_heads, inner, slot_width, P, patches;
  bool variational, given;  // given: noise and pixels come from the caller
  int favours;
  std::string name;
};

constexpr int64_t kChannels = 3, kConvRows = 6, kHidden = 9, kFf = 11, kCode = 5, kSlotHidden = 13, kQueryHidden = 7;

// Sizes of every weight in order: learned queries, the encoder's, slot MLP, query MLP, head norm, head, then per layer of
// the decoder those of the folding and the shared ones. One convolution, one encoder layer, two decoder layers.
static std::vector<int64_t> sizes_of(const Case& c) {
  const int64_t S = c.S, D = c.D, I = c.inner, W = c.slot_width, out = (c.variational ? 2 : 1) * c.Z;
  std::vector<int64_t> sizes = {(c.patches ? 1 : c.K) * S};
  const auto add = [&](std::initializer_list<int64_t> list) { sizes.insert(sizes.end(), list); };
  add({kConvRows * kChannels * 9, kConvRows, S * kConvRows * 9, S, S * 4, S, kHidden * S, kHidden, S * kHidden, S});
  if (c.patches) add({S * (S + kChannels + 3)});
  add({S, S, S, S, S * S, S, 2 * S * S, 2 * S, S * S, S, S, S, 3 * S * S, 3 * S, S * S, S, S, S, kFf * S, kFf, S * kFf, S});
  add({S, S, out * S, out});
  add({kSlotHidden * c.Z, kSlotHidden, W * kSlotHidden, W});
  add({kQueryHidden * kCode, kQueryHidden, D * kQueryHidden, D});
  add({D, D, kChannels * D, kChannels});
  for (int layer = 0; layer < 2; ++layer) {
    add({D, D, W, W, I * D, I, 2 * I * W, 2 * I, D * I});
    add({D, D, D, kFf * D, kFf, D * kFf, D});
  }
  return sizes;
}

struct Inputs {
  std::vector<std::vector<double>> weights;
  std::vector<double> images, code, grid, places, noise, pixel_weight;
  std::vector<int64_t> pixels, token_of;
  std::vector<int32_t> quantiles;
};

// {recon, kl, interaction}, then the gradients.
template <typename T>
static std::vector<std::vector<T>> run(const Kernels<T>& kernels, const Case& c, const Inputs& in, int threads) {
  std::vector<std::vector<T>> values, results;
  results.emplace_back(3);
  for (const auto& array : in.weights) {
    values.push_back(as<T>(array)), values.back().push_back(0);
    results.emplace_back(array.size() + 1, T(NAN));
  }
  size_t at = 0;
  std::vector<const T*> weights;
  std::vector<T*> grads;
  const auto next = [&](const T*& weight, T*& grad) { weight = values[at].data(), grad = results[++at].data(); };
  const auto take = [&](size_t count) {
    for (size_t i = 0; i < count; ++i) weights.push_back(values[at].data()), grads.push_back(results[++at].data());
  };
  const int64_t rows[2] = {kConvRows, c.S}, kernel[2] = {3, 3}, strides[2] = {2, 1}, ff[2] = {kFf, kFf};
  const int64_t query_rows[2] = {kQueryHidden, c.D}, head_rows[1] = {kChannels};
  TrainStepArgs<T> args = {};
  const T* queries = nullptr;
  next(queries, args.encoder.queries_grad);
  take(10 + (c.patches ? 1 : 0) + 22 + 4);
  auto& e = args.encoder;
  e.batch = c.B, e.channels = kChannels, e.side = c.side, e.query_batch = 1, e.slots = c.K, e.width = c.S;
  e.heads = c.heads, e.conv_count = 2, e.conv_rows = rows, e.conv_kernels = kernel, e.conv_strides = strides;
  e.token_hidden = kHidden, e.layer_count = 1, e.outputs = (c.variational ? 2 : 1) * c.Z, e.ff_widths = ff;
  const std::vector<T> images = as<T>(in.images), code = as<T>(in.code), grid = as<T>(in.grid), places = as<T>(in.places);
  const std::vector<T> noise = as<T>(in.noise), pixel_weight = as<T>(in.pixel_weight);
  e.images = images.data(), e.queries = queries, e.grid = grid.data(), e.seeded = c.patches > 0;
  e.seed_stride = c.patches ? c.S + kChannels + 3 : 0;
  const std::vector<const T*> encoder_weights = weights;
  const std::vector<T*> encoder_grads = grads;
  e.weights = encoder_weights.data(), e.grads = encoder_grads.data(), e.eps = 1e-5, e.winograd = true;
  e.threads = threads;
  weights.clear(), grads.clear();
  take(4);
  const std::vector<const T*> mlp = weights;
  const std::vector<T*> mlp_grads = grads;
  args.slot_mlp = mlp.data(), args.slot_mlp_grads = mlp_grads.data();
  LinearArrays<const T*> query[2], head[1];
  LinearArrays<T*> query_grads[2], head_grads[1];
  for (int i = 0; i < 2; ++i) next(query[i].weight, query_grads[i].weight), next(query[i].bias, query_grads[i].bias);
  auto& d = args.decoder;
  next(d.head_norm_weight, d.head_norm_weight_grad), next(d.head_norm_bias, d.head_norm_bias_grad);
  next(head[0].weight, head_grads[0].weight), next(head[0].bias, head_grads[0].bias);
  LayerArrays<const T*> layers[2] = {};
  LayerArrays<T*> layer_grads[2] = {};
  SlotFoldArrays<const T*> folds[2];
  SlotFoldArrays<T*> fold_grads[2];
  for (int i = 0; i < 2; ++i) {
    auto &f = folds[i];
    auto &g = fold_grads[i];
    next(f.norm_q_weight, g.norm_q_weight), next(f.norm_q_bias, g.norm_q_bias);
    next(f.norm_slots_weight, g.norm_slots_weight), next(f.norm_slots_bias, g.norm_slots_bias);
    next(f.q_weight, g.q_weight), next(f.q_bias, g.q_bias), next(f.kv_weight, g.kv_weight);
    next(f.kv_bias, g.kv_bias), next(f.out_weight, g.out_weight);
    auto &l = layers[i];
    auto &to = layer_grads[i];
    next(l.b, to.b), next(l.norm_weight, to.norm_weight), next(l.norm_bias, to.norm_bias);
    next(l.w1, to.w1), next(l.b1, to.b1), next(l.w2, to.w2), next(l.b2, to.b2);
  }
  d.batch = c.B, d.query_batch = 1, d.pixels = c.P, d.width = c.D, d.heads = c.decoder_heads, d.slots = c.K;
  d.layer_count = 2, d.head_count = 1, d.ff_widths = ff, d.head_rows = head_rows, d.code = code.data();
  d.code_width = kCode, d.query_map_count = 2, d.query_map_rows = query_rows, d.query_maps = query, d.layers = layers;
  d.head = head, d.eps = 1e-5, d.threads = threads, d.query_map_grads = query_grads, d.layer_grads = layer_grads;
  d.head_grads = head_grads, d.recon_weight = 0.7, d.interaction_weight = 1.3;
  args.slot_dim = c.Z, args.slot_hidden = kSlotHidden, args.slot_width = c.slot_width, args.inner = c.inner;
  args.attention_scale = 0.4, args.folds = folds, args.fold_grads = fold_grads, args.variational = c.variational;
  args.patch_side = c.patches, args.places = places.data(), args.token_of = in.token_of.data();
  args.noise = c.given ? noise.data() : nullptr, args.pixels = c.given ? in.pixels.data() : nullptr;
  args.pixel_weight = c.given ? pixel_weight.data() : nullptr;
  args.noise_key = 3, args.pixel_key = 5, args.first_image = 2, args.quantiles = in.quantiles.data();
  args.favours = c.favours, args.kl_weight = 0.2;
  kernels.train_step(args);
  results[0] = {T(args.recon), T(args.kl), T(args.interaction)};
  for (size_t i = 1; i < results.size(); ++i) results[i].pop_back();
  return results;
}

static Inputs inputs_of(const Case& c) {
  std::mt19937 random(7);
  Inputs in;
  const auto numbers = [&](int64_t count, double scale, double mean = 0) {
    return as<double>(as<float>(normal(random, size_t(count), scale, mean)));
  };
  for (int64_t size : sizes_of(c)) in.weights.push_back(numbers(size, 0.3, size < 40 ? 0.3 : 0));
  const int64_t area = c.side * c.side, tokens = (c.side + 1) / 2;
  in.images = numbers(c.B * kChannels * area, 0.3, 0.5);
  in.code = numbers(area * kCode, 1), in.grid = numbers(tokens * tokens * 4, 0.5);
  in.noise = numbers(c.B * c.K * c.Z, 1), in.pixel_weight = numbers(c.B * c.P, 0.1, 1);
  for (int64_t i = 0; i < c.B * c.P; ++i) in.pixels.push_back(int64_t(random() % uint64_t(area)));
  for (int64_t p = 0; p < c.patches * c.patches; ++p) {
    in.places.push_back(double(p / c.patches) / double(c.patches)), in.places.push_back(double(p % c.patches) / double(c.patches));
    in.token_of.push_back(p % (tokens * tokens));
  }
  in.places.push_back(0), in.token_of.push_back(0);
  for (int i = 0; i < 1 << 16; ++i) in.quantiles.push_back((i - (1 << 15)) * 512 + 256);
  return in;
}

static void check_step(const Case& c) {
  const Inputs in = inputs_of(c);
  const auto truth = run(double_kernels(), c, in, 1);
  const auto total = [&](size_t which, const std::vector<double>& direction, double step) {
    Inputs moved = in;
    for (size_t i = 0; i < direction.size(); ++i) moved.weights[which][i] += step * direction[i];
    const auto terms = run(double_kernels(), c, moved, 1)[0];
    return 0.7 * terms[0] + 0.2 * terms[1] + 1.3 * terms[2];
  };
  std::mt19937 random(9);
  for (size_t which = 0; which < in.weights.size(); ++which) {
    const auto direction = normal(random, in.weights[which].size(), 1 / std::sqrt(double(in.weights[which].size())));
    const double h = 1e-4;
    const double expected = (8 * (total(which, direction, h) - total(which, direction, -h)) -
                             total(which, direction, 2 * h) + total(which, direction, -2 * h)) / (12 * h);
    double got = 0;
    for (size_t i = 0; i < direction.size(); ++i) got += truth[which + 1][i] * direction[i];
    check_close(got, expected, 1e-6, c.name + ": gradient " + std::to_string(which));
  }
  for (Isa isa : supported_isas()) {
    const std::string name = c.name + " " + isa_name(isa);
    const auto first = run(float_kernels(isa), c, in, 1);
    double worst = 0;
    for (size_t i = 0; i < first.size(); ++i) worst = std::max(worst, relative_error(first[i], truth[i]));
    std::printf("%-36s largest error %.1e\n", name.c_str(), worst);
    check(worst < 2e-4, name);
    for (int threads : {1, 2, 3, 8}) check(run(float_kernels(isa), c, in, threads) == first, name + ": bits");
  }
}

// ---- the update ------------------------------------------------------------------------------------------------------

template <typename T>
static std::vector<std::vector<T>> updated(const Kernels<T>& kernels, double largest, bool finite, int threads) {
  std::mt19937 random(3);
  const std::vector<int64_t> rows = {5, 17, 8}, columns = {9, 4, 8}, sizes = {3, 100};
  std::vector<std::vector<T>> values;
  for (int64_t size : {45, 68, 64}) {
    for (int i = 0; i < 3; ++i) values.push_back(as<T>(as<float>(normal(random, size_t(size), 1))));
  }
  for (int64_t size : sizes) {
    for (int i = 0; i < 4; ++i) values.push_back(as<T>(as<float>(normal(random, size_t(size), 1))));
    for (T& square : values.back()) square *= square;
  }
  if (!finite) values[1][3] = T(NAN);
  std::vector<float> steps = {0, 6};
  std::vector<T*> params, buffers, rest, means, squares;
  std::vector<const T*> grads, rest_grads;
  std::vector<float*> counts = {&steps[0], &steps[1]};
  for (size_t i = 0; i < 9; i += 3) {
    params.push_back(values[i].data()), grads.push_back(values[i + 1].data()), buffers.push_back(values[i + 2].data());
  }
  for (size_t i = 9; i < 17; i += 4) {
    rest.push_back(values[i].data()), rest_grads.push_back(values[i + 1].data());
    means.push_back(values[i + 2].data()), squares.push_back(values[i + 3].data());
  }
  UpdateArgs<T> args = {};
  args.muon = {3, rows.data(), columns.data(), params.data(), grads.data(), buffers.data(), 0.95, 0.01, 0.1,
               {3.4445, -4.775, 2.0315}, 5, threads, 1};
  args.adamw = {2, sizes.data(), rest.data(), rest_grads.data(), means.data(), squares.data(), counts.data(),
                0.003, 0.9, 0.99, 1e-8, 0.1, 1};
  args.largest_norm = largest, args.update = true, args.threads = threads;
  kernels.update(args);
  values.push_back({T(args.norm)});
  values.push_back(as<T>(steps));
  return values;
}

static void check_update() {
  const auto truth = updated(double_kernels(), 1, true, 1), before = updated(double_kernels(), 1, false, 1);
  check(truth[0] != before[0] && truth.back()[1] == 7, "an update");
  check(before.back()[1] == 6, "no update of a norm that is NaN");
  for (Isa isa : supported_isas()) {
    const auto first = updated(float_kernels(isa), 1, true, 1);
    for (size_t i = 0; i < truth.size(); ++i) check(relative_error(first[i], truth[i]) < 1e-4, "update " + std::to_string(i));
    for (int threads : {2, 3, 8}) check(updated(float_kernels(isa), 1, true, threads) == first, "update: bits");
  }
}

int main() {
  check_step({14, 8, 3, 12, 4, 4, 10, 2, 6, 9, 45, 0, true, true, 0, "learned queries"});
  check_step({2, 8, 2, 8, 2, 3, 16, 4, 16, 16, 130, 4, false, true, 0, "seeds, no posterior"});
  check_step({5, 12, 3, 12, 3, 4, 10, 2, 6, 9, 7, 4, true, false, 2, "drawn over edges"});
  check_step({1, 12, 3, 12, 3, 4, 10, 2, 6, 9, 7, 6, true, false, 1, "drawn over the foreground"});
  check_step({3, 8, 3, 12, 4, 4, 10, 1, 7, 9, 33, 0, true, false, 0, "drawn uniformly"});
  check_update();
  return report("train_step");
}
