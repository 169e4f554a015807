// The encoder: convolutions in both forms against a plain sum in double, the whole operator's gradients in the double
// build against differences, each instruction set against the double build, the same bits for any number of threads.
#define FASTSLOTS_ISA portable
#include "winograd.h"

#include <functional>

#include "check.h"

using namespace fastslots;

// ---- convolutions ---------------------------------------------------------------------------------------------------

template <typename T>
struct Memory {
  std::vector<T> values;
  portable::Picture<T> picture;
  Memory(int64_t side, int64_t border, int64_t stride)
      : values(size_t((side + 2 * border) * (side + 2 * border) * stride)), picture{values.data(), side, border, stride} {}
};

// RMS error relative to double of {out, din, dweight} of one form.
template <typename T, int R>
static std::vector<double> errors(bool winograd, int64_t in, int64_t out, int64_t side) {
  using namespace fastslots::portable;
  std::mt19937 random(4);
  const std::vector<double> weight = as<double>(as<float>(normal(random, size_t(in * out * R * R), 1)));
  const std::vector<double> x = as<double>(as<float>(normal(random, size_t(in * side * side), 1)));
  const std::vector<double> g = as<double>(as<float>(normal(random, size_t(out * side * side), 1)));
  const std::vector<T> weights = as<T>(weight), bias(size_t(out), T(0.5));
  const auto pack_all = [&](Packer<T> pack, Convolution<T>& c, const T*& forward, const T*& backward) {
    c = pack_convolution<T>(weights.data(), bias.data(), in, out, R, 1, false, pack);
    forward = pack_winograd<T, R>(weights.data(), in, out, false, pack.weights);
    backward = pack_winograd<T, R>(weights.data(), in, out, true, pack.weights);
    return pack;
  };
  Convolution<T> c;
  const T *forward, *backward;
  const Packer<T> sizes = pack_all({{nullptr}, {nullptr}, true, true}, c, forward, backward);
  std::vector<T> packed(size_t(sizes.weights.used)), sums(size_t(sizes.sums.used));
  pack_all({{packed.data()}, {nullptr}, true, true}, c, forward, backward);
  const int64_t in_l = whole_lanes<T>(in), out_l = whole_lanes<T>(out), most = in_l > out_l ? in_l : out_l;
  Memory<T> from(side, R / 2, in_l), to(side, 0, out_l), dout(side, R / 2, out_l), din(side, 1, in_l);
  for (int64_t i = 0; i < side * side; ++i) {
    for (int64_t k = 0; k < in; ++k) from.picture.at(i / side, i % side)[k] = T(x[size_t(k * side * side + i)]);
    for (int64_t k = 0; k < out; ++k) dout.picture.at(i / side, i % side)[k] = T(g[size_t(k * side * side + i)]);
  }
  if (winograd) {
    std::vector<T> u(size_t(kProducts * winograd_stride(most))), m(u.size());
    std::vector<T> s(size_t(kProducts * winograd_point(in_l * out_l)));
    winograd_convolve<T, R>(forward, c.bias, in, out, from.picture, to.picture, u.data(), m.data());
    winograd_convolve<T, R>(backward, nullptr, out, in, dout.picture, din.picture, u.data(), m.data());
    winograd_correlate<T, R>(from.picture, dout.picture, in, out, u.data(), m.data(), s.data());
    winograd_finish<T, R>(s.data(), in, out, sums.data() + c.weight_sum);
  } else {
    convolve<T>(c, from.picture, to.picture);
    convolve_backward<T>(c, dout.picture, din.picture);
    accumulate_convolution<T>(c, from.picture, dout.picture, sums.data());
  }
  const auto pixel = [&](const std::vector<double>& of, int64_t k, int64_t y, int64_t z) {
    return y < 0 || z < 0 || y >= side || z >= side ? 0.0 : of[size_t((k * side + y) * side + z)];
  };
  double wrong[3] = {}, whole[3] = {};
  const auto compare = [&](int which, double got, double expected) {
    wrong[which] += (got - expected) * (got - expected), whole[which] += expected * expected;
  };
  for (int64_t y = 0; y < side; ++y) {
    for (int64_t z = 0; z < side; ++z) {
      for (int64_t o = 0; o < out; ++o) {
        double sum = 0.5;
        for (int64_t k = 0; k < in; ++k) {
          for (int64_t t = 0; t < R * R; ++t) {
            sum += weight[size_t((o * in + k) * R * R + t)] * pixel(x, k, y + t / R - R / 2, z + t % R - R / 2);
          }
        }
        compare(0, double(to.picture.at(y, z)[o]), sum);
      }
      for (int64_t k = 0; k < in; ++k) {
        double sum = 0;
        for (int64_t o = 0; o < out; ++o) {
          for (int64_t t = 0; t < R * R; ++t) {
            sum += weight[size_t((o * in + k) * R * R + t)] * pixel(g, o, y - t / R + R / 2, z - t % R + R / 2);
          }
        }
        compare(1, double(din.picture.at(y, z)[k]), sum);
      }
    }
  }
  for (int64_t t = 0; t < R * R; ++t) {
    for (int64_t k = 0; k < in; ++k) {
      for (int64_t o = 0; o < out; ++o) {
        double sum = 0;
        for (int64_t i = 0; i < side * side; ++i) {
          sum += pixel(x, k, i / side + t / R - R / 2, i % side + t % R - R / 2) * pixel(g, o, i / side, i % side);
        }
        compare(2, double(sums[size_t(c.weight_sum + (t * in_l + k) * out_l + o)]), sum);
      }
    }
  }
  std::vector<double> result;
  for (int i = 0; i < 3; ++i) result.push_back(std::sqrt(wrong[i] / whole[i]));
  return result;
}

template <int R>
static void check_convolutions(int64_t in, int64_t out, int64_t side) {
  for (bool winograd : {false, true}) {
    const std::string name = std::to_string(R) + "x" + std::to_string(R) + " of " + std::to_string(in) + " to " +
                             std::to_string(out) + " channels at " + std::to_string(side) + (winograd ? ", Winograd" : "");
    const auto single = errors<float, R>(winograd, in, out, side), wide = errors<double, R>(winograd, in, out, side);
    std::printf("%-48s %.1e %.1e %.1e\n", name.c_str(), single[0], single[1], single[2]);
    for (int i = 0; i < 3; ++i) {
      check(single[size_t(i)] < (winograd ? 1e-5 : 1e-6), name + ": fp32, " + std::to_string(i));  // 80 and 8 roundoffs
      check(wide[size_t(i)] < 1e-13, name + ": double, " + std::to_string(i));
    }
  }
}

// ---- the operator ---------------------------------------------------------------------------------------------------

struct Case {
  int64_t B, channels, side, K, S, heads, queries;  // queries: their batch
  std::vector<int64_t> rows, kernels, strides;
  int64_t hidden, layers, ff, outputs;
  bool picks;
  std::string name;
};

// Sizes of images, queries, then of the weights.
static std::vector<int64_t> sizes_of(const Case& c) {
  std::vector<int64_t> sizes = {c.B * c.channels * c.side * c.side, c.queries * c.K * c.S};
  const auto add = [&](std::initializer_list<int64_t> list) { sizes.insert(sizes.end(), list); };
  int64_t channels = c.channels;
  for (size_t i = 0; i < c.rows.size(); channels = c.rows[i], ++i) {
    add({c.rows[i] * channels * c.kernels[i] * c.kernels[i], c.rows[i]});
  }
  if (!c.rows.empty()) add({c.S * 4, c.S});
  add({c.hidden * channels, c.hidden, c.S * c.hidden, c.S});
  if (c.picks) add({c.S * c.S});
  for (int64_t i = 0; i < c.layers; ++i) {
    add({c.S, c.S, c.S, c.S, c.S * c.S, c.S, 2 * c.S * c.S, 2 * c.S, c.S * c.S, c.S});
    add({c.S, c.S, 3 * c.S * c.S, 3 * c.S, c.S * c.S, c.S, c.S, c.S, c.ff * c.S, c.ff, c.S * c.ff, c.S});
  }
  add({c.S, c.S});
  if (c.outputs) add({c.outputs * c.S, c.outputs});
  return sizes;
}

static int64_t tokens_of(const Case& c) {
  int64_t side = c.side;
  for (int64_t stride : c.strides) side = (side + stride - 1) / stride;
  return side * side;
}

// out, then the gradients of queries and weights.
template <typename T>
static std::vector<std::vector<T>> run(const Kernels<T>& kernels, const Case& c, const std::vector<std::vector<double>>& in,
                                       const std::vector<double>& cotangent, bool keep, bool winograd, int threads) {
  std::vector<std::vector<T>> values, results;
  std::vector<const T*> weights;
  std::vector<T*> grads;
  for (const auto& array : in) values.push_back(as<T>(array)), values.back().push_back(0);
  results.emplace_back(size_t(c.B * c.K * (c.outputs ? c.outputs : c.S) + 1), T(NAN));
  for (size_t i = 1; i < in.size(); ++i) results.emplace_back(in[i].size() + 1, T(NAN));
  for (size_t i = 2; i < in.size(); ++i) weights.push_back(values[i].data()), grads.push_back(results[i].data());
  std::vector<T> grid, dout = as<T>(cotangent);
  dout.push_back(0);
  std::vector<int64_t> picks, ff(size_t(c.layers + 1), c.ff);
  for (int64_t t = 0; t < tokens_of(c); ++t) {
    for (double place : {0.1, 0.7, 0.3, 0.9}) grid.push_back(T(place * double(t) / double(tokens_of(c))));
  }
  for (int64_t i = 0; i < c.B * c.K; ++i) picks.push_back((7 * i) % tokens_of(c));
  EncoderArgs<T> args = {};
  args.batch = c.B, args.channels = c.channels, args.side = c.side, args.query_batch = c.queries;
  args.slots = c.K, args.width = c.S, args.heads = c.heads, args.conv_count = int64_t(c.rows.size());
  args.conv_rows = c.rows.data(), args.conv_kernels = c.kernels.data(), args.conv_strides = c.strides.data();
  args.token_hidden = c.hidden, args.layer_count = c.layers, args.outputs = c.outputs, args.ff_widths = ff.data();
  args.seeded = c.picks;
  args.images = values[0].data(), args.queries = values[1].data(), args.picks = c.picks ? picks.data() : nullptr;
  args.grid = grid.data(), args.weights = weights.data(), args.eps = 1e-5, args.winograd = winograd;
  args.threads = threads;
  std::vector<T> saved(size_t(c.B * kernels.encoder_saved_size(args) + 1), T(NAN));
  args.saved = keep ? saved.data() : nullptr;
  args.out = results[0].data();
  kernels.encoder(args);
  args.out = nullptr, args.out_grad = dout.data(), args.queries_grad = results[1].data(), args.grads = grads.data();
  kernels.encoder(args);
  for (auto& array : results) array.pop_back();
  return results;
}

static void check_operator(const Case& c) {
  std::mt19937 random(5);
  std::vector<std::vector<double>> in;
  for (int64_t size : sizes_of(c)) in.push_back(as<double>(as<float>(normal(random, size_t(size), 0.3, size < 99 ? 0.3 : 0))));
  const auto cotangent = normal(random, size_t(c.B * c.K * (c.outputs ? c.outputs : c.S)), 1);
  const auto truth = run(double_kernels(), c, in, cotangent, true, true, 1);
  const auto total = [&](size_t which, const std::vector<double>& direction, double step) {
    auto moved = in;
    for (size_t i = 0; i < direction.size(); ++i) moved[which][i] += step * direction[i];
    const auto out = run(double_kernels(), c, moved, cotangent, false, false, 1)[0];
    double sum = 0;
    for (size_t i = 0; i < out.size(); ++i) sum += out[i] * cotangent[i];
    return sum;
  };
  for (size_t which = 1; c.B && which < in.size(); ++which) {
    const auto direction = normal(random, in[which].size(), 1 / std::sqrt(double(in[which].size())));
    double expected = 0, got = 0;
    const double h = 1e-4;
    expected = (8 * (total(which, direction, h) - total(which, direction, -h)) - total(which, direction, 2 * h) +
                total(which, direction, -2 * h)) / (12 * h);
    for (size_t i = 0; i < direction.size(); ++i) got += truth[which][i] * direction[i];
    check_close(got, expected, 1e-6, c.name + ": gradient " + std::to_string(which));
  }
  for (Isa isa : supported_isas()) {
    const std::string name = c.name + " " + isa_name(isa);
    const auto first = run(float_kernels(isa), c, in, cotangent, true, true, 1);
    double worst = 0;
    for (size_t i = 0; i < first.size(); ++i) worst = std::max(worst, relative_error(first[i], truth[i]));
    std::printf("%-36s largest error %.1e\n", name.c_str(), worst);
    check(worst < 2e-4, name);
    for (int threads : {1, 2, 3, 8}) {
      check(run(float_kernels(isa), c, in, cotangent, threads % 2 == 0, true, threads) == first, name + ": bits");
    }
  }
}

int main() {
  check_convolutions<5>(18, 33, 12);
  check_convolutions<3>(18, 33, 12);
  check_convolutions<5>(5, 3, 9);
  check_convolutions<3>(4, 6, 7);
  check_operator({14, 3, 8, 3, 12, 4, 1, {6, 12}, {5, 5}, {2, 1}, 9, 2, 20, 7, false, "pixels"});
  check_operator({2, 3, 16, 2, 16, 2, 1, {16, 16, 16}, {3, 5, 3}, {1, 1, 1}, 16, 1, 16, 0, true, "Winograd and seeds"});
  check_operator({3, 21, 3, 4, 10, 5, 3, {}, {}, {}, 8, 1, 6, 0, false, "features, queries of each image"});
  check_operator({0, 3, 8, 3, 12, 4, 1, {6, 12}, {3, 3}, {4, 1}, 9, 1, 20, 7, false, "no images"});
  return report("encoder");
}
