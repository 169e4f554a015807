// folded_slot_attention: the double build against long double (values, and gradients by central differences of
// Σ gathered·cotangent + Σ map·cotangent), each instruction set against the double build, a gradient added to what is
// there, and the same bits for every number of threads.
#include "reference.h"

using namespace fastslots;

struct Case {
  int64_t B, K, L, S;
  double norm_eps;  // below 0: tokens as they are
  bool masked;
  std::string name;
};

constexpr double kEps = 1e-3;

template <typename T>
using Arrays = std::vector<std::vector<T>>;

// in: rows [B,K,S], offsets [B,K], tokens [B,L,S] -> gathered, map.
static Tensors reference(const Case& c, const Tensors& in, const std::vector<uint8_t>& mask) {
  Tensors out = {{}, {}};
  for (int64_t b = 0; b < c.B; ++b) {
    const uint8_t* const keep = mask.empty() ? nullptr : &mask[b * c.K];
    Tensors sums(c.K, Row(c.S, 0));
    Row totals(c.K, 0);
    for (int64_t t = 0; t < c.L; ++t) {
      const auto first = in[2].begin() + (b * c.L + t) * c.S;
      const Row x(first, first + c.S), n = c.norm_eps < 0 ? x : normalised(x, c.norm_eps);
      Row scores(in[1].begin() + b * c.K, in[1].begin() + (b + 1) * c.K);
      for (int64_t k = 0; k < c.K; ++k) {
        for (int64_t j = 0; j < c.S; ++j) scores[k] += in[0][(b * c.K + k) * c.S + j] * n[j];
      }
      const Row a = slot_softmax(scores, keep);
      for (int64_t k = 0; k < c.K; ++k) {
        out[1].push_back(a[k]);
        const Real weight = !keep || keep[k] ? a[k] + kEps : 0;
        totals[k] += weight;
        for (int64_t j = 0; j < c.S; ++j) sums[k][j] += weight * n[j];
      }
    }
    for (int64_t k = 0; k < c.K; ++k) {
      for (int64_t j = 0; j < c.S; ++j) out[0].push_back(totals[k] == 0 ? 0 : sums[k][j] / totals[k]);
    }
  }
  return out;
}

// gathered, map, then the gradients of rows, offsets and tokens; of arrays as long as they are, so that a sanitizer sees
// what is read or written beside them. before: what the tokens' gradient is added to.
template <typename T>
static Arrays<T> run(const Kernels<T>& kernels, const Case& c, const Tensors& in, const std::vector<uint8_t>& mask,
                     const Tensors& cotangents, int threads, const Row& before = {}) {
  const std::vector<T> rows = as<T>(in[0]), offsets = as<T>(in[1]), tokens = as<T>(in[2]);
  const std::vector<T> dgathered = as<T>(cotangents[0]), dmap = as<T>(cotangents[1]);
  const size_t of_slots = rows.size(), of_tokens = tokens.size();
  Arrays<T> out;
  for (size_t size : {of_slots, size_t(c.B * c.L * c.K), of_slots, offsets.size(), of_tokens}) out.emplace_back(size, T(NAN));
  std::vector<T> totals(offsets.size(), T(NAN));
  FoldedSlotAttentionArgs<T> args = {};
  args.batch = c.B, args.slots = c.K, args.tokens = c.L, args.width = c.S, args.threads = threads;
  args.slot_rows = rows.data(), args.offsets = offsets.data(), args.token_rows = tokens.data();
  args.eps = kEps, args.norm_eps = c.norm_eps, args.slot_mask = mask.empty() ? nullptr : mask.data();
  args.gathered = out[0].data(), args.totals = totals.data(), args.map = out[1].data();
  kernels.folded_slot_attention(args);
  args.gathered = nullptr, args.totals = nullptr, args.map = nullptr;
  args.gathered_grad = dgathered.data(), args.map_grad = dmap.data();
  args.saved_gathered = out[0].data(), args.saved_totals = totals.data();
  args.rows_grad = out[2].data(), args.offsets_grad = out[3].data(), args.tokens_grad = out[4].data();
  args.add = !before.empty();
  if (args.add) out[4] = as<T>(before), args.tokens_grad = out[4].data();
  kernels.folded_slot_attention(args);
  return out;
}

int main() {
  std::mt19937 random(5);
  for (const Case& c : {
           Case{3, 7, 211, 64, 1e-5, false, "minis"},
           Case{26, 3, 33, 24, 1e-5, true, "images in parts"},
           Case{2, 5, 97, 10, 1e-5, true, "odd width"},
           Case{1, 4, 40, 3, 1e-5, false, "narrower than a vector"},
           Case{2, 5, 65, 17, -1, true, "tokens as they are"},
           Case{1, 4, 33, 32, -1, false, "tokens as they are, whole vectors"},
           Case{1, 70, 40, 33, 1e-5, false, "many slots"},
           Case{2, 3, 1, 8, 1e-5, false, "one token"},
       }) {
    Tensors in = {as<Real>(as<float>(normal(random, size_t(c.B * c.K * c.S), 2 / std::sqrt(c.S)))),
                  as<Real>(as<float>(normal(random, size_t(c.B * c.K), 1))),
                  as<Real>(as<float>(normal(random, size_t(c.B * c.L * c.S), 2, 1)))};
    std::vector<uint8_t> mask;
    for (int64_t i = 0; c.masked && i < c.B * c.K; ++i) mask.push_back(i % c.K == 0 || random() % 3 > 0);
    const Tensors cotangents = {as<Real>(as<float>(normal(random, in[0].size(), 1))),
                                as<Real>(as<float>(normal(random, size_t(c.B * c.L * c.K), 1)))};
    const Tensors exact = reference(c, in, mask);
    const Arrays<double> truth = run(double_kernels(), c, in, mask, cotangents, 1);
    for (size_t i : {0, 1}) check(relative_error(truth[i], exact[i]) < 1e-12, c.name + ": result " + std::to_string(i));
    const auto total = [&](const Tensors& at) {
      const Tensors of = reference(c, at, mask);
      Real sum = 0;
      for (size_t i : {0, 1}) {
        for (size_t j = 0; j < of[i].size(); ++j) sum += of[i][j] * cotangents[i][j];
      }
      return sum;
    };
    for (size_t i : {0, 1, 2}) {
      const std::vector<double> direction = normal(random, in[i].size(), 1 / std::sqrt(in[i].size()));
      check_close(dot(truth[2 + i], direction), double(directional(total, in, i, direction)), 1e-7,
                  c.name + ": gradient " + std::to_string(i));
    }
    const Row before = as<Real>(as<float>(normal(random, in[2].size(), 1)));
    for (Isa isa : supported_isas()) {
      const std::string name = c.name + " " + isa_name(isa);
      const auto found = run(float_kernels(isa), c, in, mask, cotangents, 1);
      double worst = 0;
      for (size_t i = 0; i < 5; ++i) {
        // Of one token the terms of the first gradients cancel: what is left is their rounding.
        if (c.L > 1 || i < 2) worst = std::max(worst, relative_error(found[i], truth[i]));
      }
      std::printf("%-44s largest error %.1e\n", name.c_str(), worst);
      check(worst < 2e-5, name);
      const auto added = run(float_kernels(isa), c, in, mask, cotangents, 1, before);
      Row sum = as<Real>(truth[4]);
      for (size_t j = 0; j < sum.size(); ++j) sum[j] += before[j];
      check(relative_error(added[4], sum) < 2e-5, name + ": added to another gradient");
      for (int threads : {2, 3, 8}) {
        check(run(float_kernels(isa), c, in, mask, cotangents, threads) == found, name + ": bits");
      }
    }
  }
  return report("slots");
}
