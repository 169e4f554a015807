// token_attention: the double build against long double (values, and gradients by central differences of
// Σ gathered·cotangent), each instruction set against the double build, and the same bits for every number of threads.
#include "reference.h"

using namespace fastslots;

struct Case {
  int64_t B, M, T, S;
  double ramp;  // added to the scores along the tokens: the largest comes last
  std::string name;
};

template <typename T>
using Arrays = std::vector<std::vector<T>>;  // never empty ones, whose address is null: one element more

template <typename T>
static std::vector<T> padded(const Row& row) {
  std::vector<T> values = as<T>(row);
  values.push_back(0);
  return values;
}

static Tensors reference(const Case& c, const Tensors& in) {
  Tensors out = {{}, {}};
  for (int64_t b = 0; b < c.B; ++b) {
    for (int64_t m = 0; m < c.M; ++m) {
      const Real* const row = &in[0][(b * c.M + m) * c.S];
      Row scores(c.T, 0), gathered(c.S, 0);
      for (int64_t t = 0; t < c.T; ++t) {
        for (int64_t j = 0; j < c.S; ++j) scores[t] += row[j] * in[1][(b * c.T + t) * c.S + j];
      }
      const Row a = slot_softmax(scores, nullptr);
      for (int64_t t = 0; t < c.T; ++t) {
        for (int64_t j = 0; j < c.S; ++j) gathered[j] += a[t] * in[1][(b * c.T + t) * c.S + j];
      }
      out[0].insert(out[0].end(), gathered.begin(), gathered.end());
      out[1].push_back(c.T ? scores[0] - std::log(a[0]) : -INFINITY);
    }
  }
  return out;
}

// gathered, lse, drows, dtokens.
template <typename T>
static Arrays<T> run(const Kernels<T>& kernels, const Case& c, const Tensors& in, const Row& cotangent, int threads) {
  const std::vector<T> rows = padded<T>(in[0]), tokens = padded<T>(in[1]), grad = padded<T>(cotangent);
  Arrays<T> out;
  for (int64_t size : {c.B * c.M * c.S, c.B * c.M, c.B * c.M * c.S, c.B * c.T * c.S}) {
    out.emplace_back(size_t(size + 1), T(NAN));
  }
  TokenAttentionArgs<T> args = {};
  args.batch = c.B, args.rows = c.M, args.tokens = c.T, args.width = c.S, args.threads = threads;
  args.query_rows = rows.data(), args.token_rows = tokens.data();
  args.gathered = out[0].data(), args.lse = out[1].data();
  kernels.token_attention(args);
  args.gathered_grad = grad.data(), args.saved_gathered = out[0].data(), args.saved_lse = out[1].data();
  args.rows_grad = out[2].data(), args.tokens_grad = out[3].data();
  kernels.token_attention(args);
  for (auto& array : out) array.pop_back();
  return out;
}

int main() {
  std::mt19937 random(3);
  for (const Case& c : {
           Case{1, 28, 211, 128, 0, "clevr6"},
           Case{5, 20, 33, 64, 0, "images in parts"},
           Case{2, 3, 97, 10, 3, "growing scores, odd width"},
           Case{1, 1, 2, 1, 0, "two tokens"},
           Case{3, 2, 1, 5, 0, "one token"},
           Case{1, 70, 40, 33, 0, "more rows than tokens"},
           Case{0, 2, 4, 8, 0, "no images"},
           Case{2, 2, 0, 8, 0, "no tokens"},
       }) {
    Tensors in;
    for (int64_t rows : {c.M, c.T}) {
      in.push_back(as<Real>(as<float>(normal(random, size_t(c.B * rows * c.S), rows == c.M ? 2 / std::sqrt(c.S) : 1))));
    }
    for (size_t i = 0; i < in[0].size(); ++i) in[0][i] += c.ramp;
    for (size_t i = 0; i < in[1].size(); ++i) in[1][i] += Real(float(c.ramp * double(i / c.S % c.T) / double(c.T)));
    const Row cotangent = as<Real>(as<float>(normal(random, in[0].size(), 1)));
    const Tensors exact = reference(c, in);
    const Arrays<double> truth = run(double_kernels(), c, in, cotangent, 1);
    check(relative_error(truth[0], exact[0]) < 1e-13, c.name + ": gathered");
    check(c.T == 0 || relative_error(truth[1], exact[1]) < 1e-13, c.name + ": lse");
    const auto total = [&](const Tensors& at) {
      const Row gathered = reference(c, at)[0];
      Real sum = 0;
      for (size_t j = 0; j < gathered.size(); ++j) sum += gathered[j] * cotangent[j];
      return sum;
    };
    for (size_t i : {0, 1}) {
      const std::vector<double> direction = normal(random, in[i].size(), 1 / std::sqrt(in[i].size() + 1.0));
      const double expected = double(directional(total, in, i, direction));
      check_close(dot(truth[2 + i], direction), expected, 1e-7, c.name + ": gradient " + std::to_string(i));
    }
    for (Isa isa : supported_isas()) {
      const std::string name = c.name + " " + isa_name(isa);
      const auto found = run(float_kernels(isa), c, in, cotangent, 1);
      double worst = 0;
      for (size_t i : {0, 1, 3}) worst = std::max(worst, c.T ? relative_error(found[i], truth[i]) : 0);
      if (c.T > 1) worst = std::max(worst, relative_error(found[2], truth[2]));  // of one token: 0, and its rounding
      std::printf("%-36s largest error %.1e\n", name.c_str(), worst);
      check(worst < 2e-5, name);
      for (int threads : {2, 3, 8}) {
        check(run(float_kernels(isa), c, in, cotangent, threads) == found, name + ": bits");
      }
    }
  }
  return report("tokens");
}
