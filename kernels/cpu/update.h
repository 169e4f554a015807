// A step's whole update in two parallel regions: the gradients' norm, then Muon's matrices and AdamW's arrays, each a task.
#pragma once

#include "muon.h"

namespace fastslots::FASTSLOTS_ISA {

template <typename T>
class Update {
 public:
  explicit Update(UpdateArgs<T>& args) : a(args) {}

  void run() {
    a.norm = norm();
    if (!a.update || !std::isfinite(a.norm)) return;
    const double scale = a.largest_norm > 0 && a.norm > a.largest_norm ? a.largest_norm / (a.norm + 1e-6) : 1;
    a.muon.grad_scale = a.adamw.grad_scale = scale;
    const MuonUpdate<T> muon(a.muon);
    const int64_t size = muon.workspace(), workers = a.threads > 1 ? a.threads : 1;
    Block<T> memory(workers * size);
    auto body = [&](int64_t i, int thread) {
      if (i < a.muon.count) return muon.update(i, memory.get() + thread * size);
      adamw(i - a.muon.count);
    };
    parallel_for(a.muon.count + a.adamw.count, int(workers), body);
  }

 private:
  UpdateArgs<T>& a;

  // Of all gradients together: each array's squares are added in double, and the arrays' sums in their order.
  double norm() const {
    const int64_t count = a.muon.count + a.adamw.count;
    Block<double> sums(count);
    auto body = [&](int64_t i, int) {
      const bool matrix = i < a.muon.count;
      const int64_t j = matrix ? i : i - a.muon.count;
      sums.get()[i] = squares(matrix ? a.muon.grads[j] : a.adamw.grads[j],
                              matrix ? a.muon.rows[j] * a.muon.columns[j] : a.adamw.sizes[j]);
    };
    parallel_for(count, a.threads, body);
    double total = 0;
    for (int64_t i = 0; i < count; ++i) total += sums.get()[i];
    return std::sqrt(total);
  }

  static double squares(const T* values, int64_t count) {
    constexpr int64_t kSums = 16;
    double sums[kSums] = {}, total = 0;
    int64_t i = 0;
    for (; i + kSums <= count; i += kSums) {
      for (int64_t j = 0; j < kSums; ++j) sums[j] += double(values[i + j]) * double(values[i + j]);
    }
    for (; i < count; ++i) sums[0] += double(values[i]) * double(values[i]);
    for (double sum : sums) total += sum;
    return total;
  }

  void adamw(int64_t index) const {
    const AdamwArgs<T>& w = a.adamw;
    T *const p = w.params[index], *const mean = w.means[index], *const square = w.squares[index];
    const T* const grad = w.grads[index];
    const double step = double(*w.steps[index] += 1);
    const T size = T(w.lr / (1 - std::pow(w.beta1, step))), root = T(1 / std::sqrt(1 - std::pow(w.beta2, step)));
    const T first = T(1 - w.beta1), second = T(1 - w.beta2), keep = T(1 - w.lr * w.weight_decay), eps = T(w.eps);
    const T scale = T(w.grad_scale);
    for (int64_t i = 0; i < w.sizes[index]; ++i) {
      const T g = scale * grad[i];
      mean[i] += first * (g - mean[i]);
      square[i] += second * (g * g - square[i]);
      p[i] = p[i] * keep - size * mean[i] / (std::sqrt(square[i]) * root + eps);
    }
  }
};

template <typename T>
void update(UpdateArgs<T>& args) {
  Update<T>(args).run();
}

}  // namespace fastslots::FASTSLOTS_ISA
