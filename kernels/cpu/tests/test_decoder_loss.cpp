// decoder_loss of every instruction set: the double build against long double (values, and gradients by central
// differences), the others against the double build, element by element; the same bits for any number of threads.
#include "reference.h"

using namespace fastslots;

template <typename T>
struct Run {
  double recon, interaction;
  std::vector<std::vector<T>> grads;
};

// skip: index of a gradient not asked for, or -1; forward_only asks for none.
template <typename T>
static Run<T> run(const Kernels<T>& kernels, const Problem& p, const Tensors& tensors, int threads,
                  bool forward_only = false, int64_t skip = -1) {
  DecoderLossArgs<T> args = {};
  const Inputs<T> inputs(p, tensors, threads, args);
  std::vector<std::vector<T>> grads;
  for (const Row& row : tensors) grads.emplace_back(row.size(), T(NAN));  // an element left unwritten shows
  const auto grad = [&](int64_t i) -> T* { return i == skip ? nullptr : grads[i].data(); };
  const int64_t head = p.head_first();
  std::vector<LayerArrays<T*>> layer_grads;
  for (int64_t i = 0; i < args.layer_count; ++i) layer_grads.push_back(layer_of<T*>(grad, p.layer_first() + 10 * i));
  auto query_grads = maps_of<T*>(grad, 0, p.query_rows.size());
  auto head_grads = maps_of<T*>(grad, head + 2, p.head_rows.size());
  const std::vector<T> target = as<T>(p.target), weight = as<T>(p.pixel_weight);
  args.target = target.data();
  args.pixel_weight = weight.empty() ? nullptr : weight.data();
  if (!forward_only) {
    if (query_grads.empty()) args.queries_grad = grad(0);
    args.query_map_grads = query_grads.empty() || skip == 0 ? nullptr : query_grads.data();
    args.layer_grads = layer_grads.data(), args.head_grads = head_grads.data();
    args.head_norm_weight_grad = grad(head), args.head_norm_bias_grad = grad(head + 1);
  }
  args.recon_weight = p.recon_weight, args.interaction_weight = p.interaction_weight;
  kernels.decoder_loss(args);
  return {args.recon, args.interaction, grads};
}

static Problem problem(std::string name, int64_t B, int64_t Bq, int64_t L, int64_t D, int64_t H, int64_t K,
                       std::vector<int64_t> ff, std::vector<int64_t> head, bool weighted, bool masked,
                       std::mt19937& random) {
  Problem p = {};
  p.name = name;
  p.batch = B, p.query_batch = Bq, p.pixels = L, p.width = D, p.heads = H, p.slots = K;
  p.ff_widths = ff, p.head_rows = head;
  p.target = as<double>(as<float>(normal(random, size_t(B * L * head.back()), 1)));
  if (weighted) p.pixel_weight = as<double>(as<float>(normal(random, size_t(B * L), 0.3, 1)));
  for (int64_t i = 0; masked && i < B * K; ++i) p.slot_mask.push_back(i < K ? 0 : random() % 3 != 0);  // image 0: none
  return p;
}

// The same with queries that an MLP makes of position codes, `query` the rows of its maps.
static Problem made(Problem p, int64_t code_width, std::vector<int64_t> query, std::mt19937& random) {
  p.name = "made queries: " + p.name;
  p.query_rows = query, p.code_width = code_width;
  p.code = as<double>(as<float>(normal(random, size_t(p.pixels * code_width), 1)));
  return p;
}

template <typename T>
static bool same_bits(const Run<T>& a, const Run<T>& b) {
  return a.recon == b.recon && a.interaction == b.interaction && a.grads == b.grads;
}

template <typename T>
static void test_repeats(const Kernels<T>& kernels, const Problem& p, const Tensors& tensors, const Run<T>& once) {
  for (int threads : {1, 2, 3, 8}) {
    check(same_bits(run(kernels, p, tensors, threads), once), p.name + ": bits with threads " + std::to_string(threads));
  }
  run(kernels, p, tensors, 3);  // another cut of the work: other bits, no crash
  const Run<T> forward = run(kernels, p, tensors, 1, true);
  check(forward.recon == once.recon && forward.interaction == once.interaction, p.name + ": forward alone");
  const Run<T> without = run(kernels, p, tensors, 1, false, 0);
  const size_t w1 = size_t(p.layer_first()) + 6;
  check(without.grads[w1] == once.grads[w1], p.name + ": without the gradient of the queries");
}

static void test(const Problem& p, std::mt19937& random) {
  Tensors tensors = random_tensors(p, random);
  const Loss exact = decoder_loss(p, tensors);
  const Run<double> truth = run(double_kernels(), p, tensors, 1);
  check_close(truth.recon, double(exact.recon), 1e-13, p.name + ": recon");
  check_close(truth.interaction, double(exact.interaction), 1e-13, p.name + ": interaction");
  const auto total = [&](const Tensors& at) {
    const Loss loss = decoder_loss(p, at);
    return p.recon_weight * loss.recon + p.interaction_weight * loss.interaction;
  };
  for (size_t i = 0; i < tensors.size(); ++i) {
    const std::vector<double> direction = normal(random, tensors[i].size(), 1 / std::sqrt(tensors[i].size() + 1.0));
    const double expected = double(directional(total, tensors, i, direction));
    check_close(dot(truth.grads[i], direction), expected, 1e-7, p.name + ": gradient " + std::to_string(i));
  }
  test_repeats(double_kernels(), p, tensors, truth);
  for (Isa isa : supported_isas()) {
    const Kernels<float>& kernels = float_kernels(isa);
    const Run<float> found = run(kernels, p, tensors, 1);
    const std::string name = p.name + " " + isa_name(isa);
    check_close(found.recon, double(exact.recon), 2e-6, name + ": recon");
    check_close(found.interaction, double(exact.interaction), 2e-6, name + ": interaction");
    double worst = 0;
    for (size_t i = 0; i < tensors.size(); ++i) worst = std::max(worst, relative_error(found.grads[i], truth.grads[i]));
    std::printf("%-42s largest gradient error %.1e\n", name.c_str(), worst);
    check(worst < 2e-5, name + ": gradients");
    test_repeats(kernels, p, tensors, found);
  }
}

// A NaN anywhere in the inputs gives a NaN loss.
static void test_nan(const Problem& p, std::mt19937& random) {
  const Tensors tensors = random_tensors(p, random);
  for (Isa isa : supported_isas()) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      Tensors poisoned = tensors;
      poisoned[i].back() = NAN;
      const Run<float> found = run(float_kernels(isa), p, poisoned, 1);
      check(std::isnan(found.recon), std::string(isa_name(isa)) + ": NaN in tensor " + std::to_string(i));
    }
  }
}

int main() {
  std::mt19937 random(1);
  const auto make = [&](auto... values) { return problem(values..., random); };
  using Widths = std::vector<int64_t>;
  const Problem small = make("small", 2, 1, 40, 20, 3, 4, Widths{24, 24}, Widths{20, 3}, false, false);
  for (const Problem& p : {
           make("clevr6", 1, 1, 7, 180, 12, 7, Widths{360, 360}, Widths{180, 180, 3}, false, false),
           make("sprites-mini", 4, 4, 9, 64, 8, 4, Widths{128, 128}, Widths{64, 64, 3}, true, false),
           small,
           make("tiles", 2, 1, 33, 20, 3, 4, Widths{24, 24}, Widths{20, 3}, true, true),
           make("tile - 1", 1, 1, 31, 20, 3, 4, Widths{24}, Widths{20, 3}, false, true),
           make("parts of the images", 9, 1, 5, 12, 2, 3, Widths{8}, Widths{3}, true, true),
           make("queries of each image", 5, 5, 130, 12, 2, 3, Widths{8}, Widths{3}, true, true),
           make("one pixel", 3, 1, 1, 5, 1, 1, Widths{7}, Widths{1}, false, false),
           make("sixteen slots", 2, 2, 18, 33, 3, 16, Widths{5, 9, 3}, Widths{9, 2}, false, true),
           make("width one", 2, 1, 6, 1, 1, 2, Widths{1}, Widths{3}, false, false),
           make("no pixels", 2, 1, 0, 8, 2, 3, Widths{8}, Widths{3}, false, false),
           make("no images", 0, 1, 5, 8, 2, 3, Widths{8}, Widths{3}, false, false),
           made(small, 6, Widths{30, 20}, random),
           made(make("blocks of tiles", 3, 1, 3500, 4, 1, 2, Widths{3}, Widths{2}, true, true), 3, Widths{5, 4}, random),
           made(make("parts of the images", 9, 1, 2, 12, 2, 3, Widths{8}, Widths{3}, false, true), 5, Widths{12}, random),
           made(make("no pixels", 2, 1, 0, 8, 2, 3, Widths{8}, Widths{3}, false, false), 4, Widths{8}, random),
       }) {
    test(p, random);
  }
  test_nan(small, random);
  test_nan(made(small, 6, Widths{30, 20}, random), random);
  return report("decoder_loss");
}
