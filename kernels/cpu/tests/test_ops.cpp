// decoder_layer, folded cross-attention and per-head cross-attention: the double build against long double (values,
// and gradients by central differences of Σ y·dy + Σ map·dmap), each instruction set against the double build.
#include "reference.h"

using namespace fastslots;

struct Case {
  int64_t B, x_batch, L, D, H, K, F;  // F = 0: folded cross-attention alone
  bool masked;
  std::string name;
};

// Outputs (forward: y, map) or gradients (backward: of every tensor), in order.
template <typename T>
using Arrays = std::vector<std::vector<T>>;

template <typename T>
static Arrays<T> run_layer(const Kernels<T>& kernels, const Case& c, const Tensors& tensors,
                           const std::vector<uint8_t>& mask, const Row* cotangents, int threads) {
  Arrays<T> inputs, grads;
  for (const Row& row : tensors) {
    inputs.push_back(as<T>(row));
    grads.emplace_back(row.size() + 1, T(NAN));  // never an empty vector, whose address is null
  }
  Arrays<T> outputs = {std::vector<T>(size_t(c.B * c.L * c.D + 1), T(NAN)),
                       std::vector<T>(size_t(c.B * c.L * c.K + 1), T(NAN))};
  const auto input = [&](size_t i) -> const T* { return i < inputs.size() ? inputs[i].data() : nullptr; };
  const auto grad = [&](size_t i) -> T* { return i < grads.size() ? grads[i].data() : nullptr; };
  LayerArgs<T> args = {};
  args.batch = c.B, args.x_batch = c.x_batch, args.pixels = c.L, args.width = c.D;
  args.heads = c.H, args.slots = c.K, args.ff_width = c.F;
  args.x = input(0);
  args.weights = {input(1), input(2), input(3), input(4), input(5), input(6), input(7), input(8), input(9), input(10)};
  args.slot_mask = mask.empty() ? nullptr : mask.data();
  std::vector<T> dy, dmap;
  if (cotangents) {
    dy = as<T>(cotangents[0]), dmap = as<T>(cotangents[1]);
    dy.push_back(0), dmap.push_back(0);
    args.y_grad = dy.data(), args.slot_map_grad = dmap.data(), args.x_grad = grad(0);
    args.grads = {grad(1), grad(2), grad(3), grad(4), grad(5), grad(6), grad(7), grad(8), grad(9), grad(10)};
  } else {
    args.y = outputs[0].data(), args.slot_map = outputs[1].data();
  }
  args.eps = 1e-5;
  args.threads = threads;
  kernels.layer(args);
  Arrays<T>& written = cotangents ? grads : outputs;
  for (auto& array : written) array.pop_back();
  return written;
}

static Tensors layer_reference(const Case& c, const Tensors& tensors, const std::vector<uint8_t>& mask) {
  Tensors out(2);
  for (int64_t b = 0; b < c.B; ++b) {
    for (int64_t l = 0; l < c.L; ++l) {
      const auto first = tensors[0].begin() + ((c.x_batch == 1 ? 0 : b) * c.L + l) * c.D;
      const Row x(first, first + c.D);
      Row map(c.K, 0);
      const uint8_t* keep = mask.empty() ? nullptr : &mask[b * c.K];
      const Row y = c.F ? decoder_layer(x, &tensors[1], b, c.H, c.K, keep, 1, 1e-5, map)
                        : attention(x, &tensors[1], b, c.H, c.K, keep, 1, map);
      out[0].insert(out[0].end(), y.begin(), y.end());
      out[1].insert(out[1].end(), map.begin(), map.end());
    }
  }
  return out;
}

// q, k and v in the layout [B, L or K, H, d], as a projection leaves them: strided heads.
template <typename T>
static Arrays<T> run_attention(const Kernels<T>& kernels, const Case& c, const Tensors& tensors,
                               const std::vector<uint8_t>& mask, const Row* cotangents, int threads) {
  const Arrays<T> in = {as<T>(tensors[0]), as<T>(tensors[1]), as<T>(tensors[2])};
  Arrays<T> grads, outputs = {std::vector<T>(size_t(c.B * c.H * c.L * c.D), T(NAN)),
                              std::vector<T>(size_t(c.B * c.L * c.K), T(NAN))};
  for (const auto& array : in) grads.emplace_back(array.size(), T(NAN));
  CrossAttentionArgs<T> args = {};
  args.batch = c.B, args.heads = c.H, args.pixels = c.L, args.slots = c.K, args.head_width = c.D;
  args.q = in[0].data(), args.k = in[1].data(), args.v = in[2].data();
  const auto strides = [&](int64_t* to, int64_t rows) { to[0] = rows * c.H * c.D, to[1] = c.D, to[2] = c.H * c.D; };
  strides(args.q_stride, c.L), strides(args.k_stride, c.K), strides(args.v_stride, c.K);
  strides(args.out_grad_stride, c.L);
  args.scale = 0.37;
  args.slot_mask = mask.empty() ? nullptr : mask.data();
  std::vector<T> dout, dmap;
  if (cotangents) {
    dout = as<T>(cotangents[0]), dmap = as<T>(cotangents[1]);
    args.out_grad = dout.data(), args.slot_map_grad = dmap.data();
    args.q_grad = grads[0].data(), args.k_grad = grads[1].data(), args.v_grad = grads[2].data();
  } else {
    args.out = outputs[0].data(), args.slot_map = outputs[1].data();
  }
  args.threads = threads;
  kernels.cross_attention(args);
  // Results are [B, H, rows, d]; bring them to the layout of the inputs.
  Arrays<T> written = cotangents ? grads : outputs;
  for (size_t i = 0; i < written.size(); ++i) {
    if (!cotangents && i == 1) continue;
    const int64_t rows = i == 0 ? c.L : c.K;
    const std::vector<T> from = written[i];
    for (int64_t b = 0; b < c.B; ++b) {
      for (int64_t h = 0; h < c.H; ++h) {
        for (int64_t at = 0; at < rows * c.D; ++at) {
          written[i][((b * rows + at / c.D) * c.H + h) * c.D + at % c.D] = from[(b * c.H + h) * rows * c.D + at];
        }
      }
    }
  }
  return written;
}

static Tensors attention_reference(const Case& c, const Tensors& t, const std::vector<uint8_t>& mask) {
  Tensors out = {Row(size_t(c.B * c.L * c.H * c.D), 0), Row(size_t(c.B * c.L * c.K), 0)};
  for (int64_t b = 0; b < c.B; ++b) {
    for (int64_t l = 0; l < c.L; ++l) {
      for (int64_t h = 0; h < c.H; ++h) {
        const int64_t q = ((b * c.L + l) * c.H + h) * c.D;
        Row scores(c.K, 0);
        for (int64_t k = 0; k < c.K; ++k) {
          for (int64_t j = 0; j < c.D; ++j) scores[k] += 0.37 * t[0][q + j] * t[1][((b * c.K + k) * c.H + h) * c.D + j];
        }
        const Row a = slot_softmax(scores, mask.empty() ? nullptr : &mask[b * c.K]);
        for (int64_t k = 0; k < c.K; ++k) {
          out[1][(b * c.L + l) * c.K + k] += a[k];
          for (int64_t j = 0; j < c.D; ++j) out[0][q + j] += a[k] * t[2][((b * c.K + k) * c.H + h) * c.D + j];
        }
      }
    }
  }
  return out;
}

template <typename RunDouble, typename RunFloat, typename Reference>
static void compare(const Case& c, Tensors tensors, RunDouble run_double, RunFloat run_float, Reference reference,
                    const std::vector<uint8_t>& mask, std::mt19937& random) {
  const Tensors exact = reference(c, tensors, mask);
  const Row cotangents[2] = {as<Real>(as<float>(normal(random, exact[0].size(), 1))),
                             as<Real>(as<float>(normal(random, exact[1].size(), 1)))};
  const auto outputs = run_double(double_kernels(), c, tensors, mask, nullptr, 1);
  const auto truth = run_double(double_kernels(), c, tensors, mask, cotangents, 1);
  for (int i : {0, 1}) check(relative_error(outputs[i], exact[i]) < 1e-13, c.name + ": output " + std::to_string(i));
  const auto total = [&](const Tensors& at) {
    const Tensors out = reference(c, at, mask);
    Real sum = 0;
    for (int i : {0, 1}) {
      for (size_t j = 0; j < out[i].size(); ++j) sum += out[i][j] * cotangents[i][j];
    }
    return sum;
  };
  for (size_t i = 0; i < tensors.size(); ++i) {
    const std::vector<double> direction = normal(random, tensors[i].size(), 1 / std::sqrt(tensors[i].size() + 1.0));
    const double expected = double(directional(total, tensors, i, direction));
    check_close(dot(truth[i], direction), expected, 1e-7, c.name + ": gradient " + std::to_string(i));
  }
  for (Isa isa : supported_isas()) {
    const std::string name = c.name + " " + isa_name(isa);
    const auto out = run_float(float_kernels(isa), c, tensors, mask, nullptr, 1);
    const auto grads = run_float(float_kernels(isa), c, tensors, mask, cotangents, 1);
    double worst = 0;
    for (int i : {0, 1}) worst = std::max(worst, relative_error(out[i], exact[i]));
    for (size_t i = 0; i < grads.size(); ++i) worst = std::max(worst, relative_error(grads[i], truth[i]));
    std::printf("%-36s largest error %.1e\n", name.c_str(), worst);
    check(worst < 2e-5, name);
    for (int threads : {1, 2, 3, 8}) {
      check(run_float(float_kernels(isa), c, tensors, mask, nullptr, threads) == out, name + ": bits of the forward");
      check(run_float(float_kernels(isa), c, tensors, mask, cotangents, threads) == grads, name + ": bits");
    }
  }
}

int main() {
  std::mt19937 random(2);
  for (const Case& c : {
           Case{1, 1, 9, 180, 12, 7, 360, false, "clevr6"},
           Case{3, 1, 33, 20, 3, 4, 24, true, "shared pixels"},
           Case{5, 5, 31, 33, 2, 16, 7, true, "pixels of each image"},
           Case{6, 1, 2, 5, 1, 1, 3, false, "parts of the images"},
           Case{2, 1, 1, 1, 1, 1, 1, false, "ones"},
           Case{2, 1, 130, 8, 2, 9, 4, false, "more columns than width"},
           Case{0, 1, 4, 8, 2, 3, 4, false, "no images"},
           Case{2, 1, 0, 8, 2, 3, 4, false, "no pixels"},
       }) {
    std::vector<uint8_t> mask;
    for (int64_t i = 0; c.masked && i < c.B * c.K; ++i) mask.push_back(i < c.K ? 0 : random() % 3 != 0);
    Problem p = {};
    p.batch = c.B, p.query_batch = c.x_batch, p.pixels = c.L, p.width = c.D, p.heads = c.H, p.slots = c.K;
    p.ff_widths = {c.F}, p.head_rows = {1};
    Tensors tensors = random_tensors(p, random);
    tensors.resize(11);
    const auto layer_double = run_layer<double>;
    compare(c, tensors, layer_double, run_layer<float>, layer_reference, mask, random);
    Case folded = c;
    folded.F = 0, folded.name += " folded";
    tensors.resize(5);
    compare(folded, tensors, layer_double, run_layer<float>, layer_reference, mask, random);
    Case heads = c;
    heads.name += " heads";
    Tensors qkv;
    for (int64_t rows : {c.L, c.K, c.K}) {
      qkv.push_back(as<Real>(as<float>(normal(random, size_t(c.B * rows * c.H * c.D), 1))));
    }
    if (c.B && c.L) compare(heads, qkv, run_attention<double>, run_attention<float>, attention_reference, mask, random);
  }
  return report("ops");
}
