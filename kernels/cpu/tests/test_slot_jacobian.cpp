// slot_jacobian of every instruction set. Slots are linear here, k = k0 + Σ_j z_j keys_j and v likewise, so that G, g and
// U follow a change of z exactly: the double build is held against central differences of the decoder in long double,
// the others against the double build; the same bits for any number of threads.
#include "reference.h"

using namespace fastslots;

struct Tangents {
  Row query_weight, query_bias, norm_weight, norm_bias, out_weight, k0, v0, keys, values;  // k0, v0: [B, K, I]
};

struct Case {
  Problem p;
  int64_t slot_width, head_width;
  std::vector<Tangents> layers;
  int64_t inner() const { return p.heads * head_width; }
};

static Tangents random_tangents(const Case& c, std::mt19937& random) {
  const int64_t D = c.p.width, I = c.inner(), rows = c.p.batch * c.p.slots;
  const auto draw = [&](int64_t count, double scale, double mean = 0) {
    return as<Real>(as<float>(normal(random, size_t(count), scale, mean)));
  };
  return {draw(I * D, 1 / std::sqrt(double(D))), draw(I, 0.3), draw(D, 0.2, 1), draw(D, 0.3),
          draw(D * I, 1 / std::sqrt(double(I))), draw(rows * I, 1), draw(rows * I, 1),
          draw(rows * c.slot_width * I, 0.4), draw(rows * c.slot_width * I, 0.4)};
}

// Sets G, g and U of layer i, the slots' numbers at 0 but for number j of slot k of image b, which is z.
static void fold(const Case& c, int64_t i, int64_t b, int64_t k, int64_t j, Real z, Tensors& tensors) {
  const Tangents& t = c.layers[i];
  const int64_t D = c.p.width, H = c.p.heads, K = c.p.slots, d = c.head_width, I = c.inner(), row = b * K + k;
  Row &G = tensors[1 + 10 * i], &g = tensors[2 + 10 * i], &U = tensors[3 + 10 * i];
  for (int64_t h = 0; h < H; ++h) {
    Real& offset = g[(b * H + h) * K + k] = 0;
    for (int64_t n = 0; n < D; ++n) G[((b * D + n) * H + h) * K + k] = U[((b * H + h) * K + k) * D + n] = 0;
    for (int64_t m = h * d; m < (h + 1) * d; ++m) {
      const int64_t tangent = (row * c.slot_width + j) * I + m;
      const Real key = t.k0[row * I + m] + z * t.keys[tangent], value = t.v0[row * I + m] + z * t.values[tangent];
      offset += t.query_bias[m] * key;
      for (int64_t n = 0; n < D; ++n) {
        const Real weight = t.query_weight[m * D + n];
        G[((b * D + n) * H + h) * K + k] += t.norm_weight[n] * weight * key;
        offset += t.norm_bias[n] * weight * key;
        U[((b * H + h) * K + k) * D + n] += t.out_weight[n * I + m] * value;
      }
    }
  }
}

// The decoder with slots at 0, G, g and U folded.
static Tensors folded(const Case& c, std::mt19937& random) {
  Tensors tensors = random_tensors(c.p, random);
  for (size_t i = 0; i < c.layers.size(); ++i) {
    for (int64_t b = 0; b < c.p.batch; ++b) {
      for (int64_t k = 0; k < c.p.slots; ++k) fold(c, int64_t(i), b, k, 0, 0, tensors);
    }
  }
  return tensors;
}

static Row by_differences(const Case& c, Tensors tensors) {
  const Problem& p = c.p;
  const Real step = 1e-5;
  Row jacobian(p.batch * p.slots * p.pixels, 0);
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t k = 0; k < p.slots; ++k) {
      for (int64_t j = 0; j < c.slot_width; ++j) {
        const auto move = [&](Real z) {
          for (size_t i = 0; i < c.layers.size(); ++i) fold(c, int64_t(i), b, k, j, z, tensors);
        };
        const auto at = [&](Real z, int64_t l) {
          move(z);
          Row map(p.slots, 0);
          return decode(p, tensors, b, l, map);
        };
        for (int64_t l = 0; l < p.pixels; ++l) {
          const Row up = at(step, l), down = at(-step, l);
          for (size_t n = 0; n < up.size(); ++n) {
            jacobian[(b * p.slots + k) * p.pixels + l] += std::abs(up[n] - down[n]) / (2 * step);
          }
        }
        move(0);
      }
    }
  }
  return jacobian;
}

template <typename T>
static std::vector<T> run(const Kernels<T>& kernels, const Case& c, const Tensors& tensors, int threads) {
  SlotJacobianArgs<T> args = {};
  const Inputs<T> inputs(c.p, tensors, threads, args);
  std::vector<std::vector<T>> held;
  const auto hold = [&](const Row& row) -> const T* {
    held.push_back(as<T>(row));
    return held.back().data();
  };
  std::vector<TangentArrays<T>> tangents;
  for (const Tangents& t : c.layers) {
    tangents.push_back({hold(t.query_weight), hold(t.query_bias), hold(t.norm_weight), hold(t.norm_bias),
                        hold(t.out_weight), hold(t.keys), hold(t.values)});
  }
  std::vector<T> jacobian(c.p.batch * c.p.slots * c.p.pixels, T(NAN));
  args.slot_width = c.slot_width, args.inner_width = c.inner();
  args.tangents = tangents.data(), args.jacobian = jacobian.data();
  kernels.slot_jacobian(args);
  return jacobian;
}

template <typename T>
static void test_repeats(const Kernels<T>& kernels, const Case& c, const Tensors& tensors, const std::vector<T>& once) {
  for (int threads : {1, 2, 3, 4}) {
    check(run(kernels, c, tensors, threads) == once, c.p.name + ": bits with threads " + std::to_string(threads));
  }
}

static void test(const Case& c, std::mt19937& random) {
  const Tensors tensors = folded(c, random);
  const std::vector<double> truth = run(double_kernels(), c, tensors, 1);
  const double error = relative_error(truth, by_differences(c, tensors));
  check(error < 1e-7, c.p.name + ": off central differences by " + std::to_string(error));
  test_repeats(double_kernels(), c, tensors, truth);
  for (Isa isa : supported_isas()) {
    const std::vector<float> found = run(float_kernels(isa), c, tensors, 1);
    const std::string name = c.p.name + " " + isa_name(isa);
    const double own = relative_error(found, truth);
    std::printf("%-32s largest error %.1e\n", name.c_str(), own);
    check(own < 2e-5, name);
    test_repeats(float_kernels(isa), c, tensors, found);
  }
}

int main() {
  std::mt19937 random(2);
  using Widths = std::vector<int64_t>;
  const auto make = [&](std::string name, int64_t B, int64_t Bq, int64_t L, int64_t D, int64_t H, int64_t d, int64_t K,
                        int64_t Z, Widths ff, Widths head, bool masked) {
    Case c = {};
    c.p.name = name;
    c.p.batch = B, c.p.query_batch = Bq, c.p.pixels = L, c.p.width = D, c.p.heads = H, c.p.slots = K;
    c.p.ff_widths = ff, c.p.head_rows = head;
    for (int64_t i = 0; masked && i < B * K; ++i) c.p.slot_mask.push_back(i < K ? 0 : random() % 3 != 0);
    c.slot_width = Z, c.head_width = d;
    for (size_t i = 0; i < ff.size(); ++i) c.layers.push_back(random_tangents(c, random));
    return c;
  };
  for (const Case& c : {
           make("small", 2, 1, 40, 20, 3, 5, 4, 6, Widths{24, 24}, Widths{20, 3}, false),
           make("masked, queries of each image", 3, 3, 9, 12, 2, 3, 3, 4, Widths{8, 9}, Widths{7, 3}, true),
           make("one layer, one channel", 2, 1, 33, 10, 1, 7, 2, 3, Widths{5}, Widths{1}, false),
           make("three layers, ten channels", 1, 1, 5, 12, 2, 4, 3, 2, Widths{6, 7, 8}, Widths{10}, false),
           make("parts of the images", 9, 1, 3, 8, 2, 3, 2, 2, Widths{8}, Widths{3}, false),
           make("width one", 1, 1, 2, 1, 1, 1, 1, 1, Widths{1}, Widths{2}, false),
           make("no pixels", 2, 1, 0, 8, 2, 3, 2, 2, Widths{8}, Widths{3}, false),
           make("no images", 0, 1, 5, 8, 2, 3, 2, 2, Widths{8}, Widths{3}, false),
       }) {
    test(c, random);
  }
  return report("slot_jacobian");
}
