// Muon's update of many matrices in one call, a matrix a task: momentum, Newton-Schulz, the step. Formulas and their
// source: fastslots/train/muon.py.
#pragma once

#include "api.h"
#include "parallel.h"
#include "row_maps.h"
#include "weights.h"

namespace fastslots::FASTSLOTS_ISA {

template <typename T>
class MuonUpdate {
 public:
  explicit MuonUpdate(const MuonArgs<T>& args) : a(args) {}

  // Elements of workspace that the largest matrix takes.
  int64_t workspace() const {
    int64_t size = 0;
    for (int64_t i = 0; i < a.count; ++i) {
      Workspace w;
      const int64_t needed = carve({nullptr}, a.rows[i], a.columns[i], w);
      size = needed > size ? needed : size;
    }
    return size;
  }

  void run() const {
    const int64_t size = workspace();
    const int64_t workers = a.threads > 1 ? (a.threads < a.count ? a.threads : a.count) : 1;
    Block<T> memory(workers * size);
    auto body = [&](int64_t i, int thread) { update(i, memory.get() + thread * size); };
    parallel_for(a.count, int(workers), body);
  }

  void update(int64_t index, T* memory) const {
    const int64_t rows = a.rows[index], columns = a.columns[index];
    const bool tall = rows > columns;
    const int64_t few = tall ? columns : rows, many = tall ? rows : columns, stride = whole_lanes<T>(many);
    T *const p = a.params[index], *const buffer = a.buffers[index];
    const T* const grad = a.grads[index];
    const T momentum = T(a.momentum), of_grad = T(a.grad_scale);
    Workspace w;
    carve({memory}, rows, columns, w);
    std::memset(w.x, 0, size_t(few * stride) * sizeof(T));
    double squares = 0;
    for (int64_t i = 0; i < rows; ++i) {
      T sum = 0;
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t at = i * columns + j;
        const T g = of_grad * grad[at];
        buffer[at] += (T(1) - momentum) * (g - buffer[at]);
        const T direction = g + momentum * (buffer[at] - g);
        sum += direction * direction;
        w.x[tall ? j * stride + i : i * stride + j] = direction;
      }
      squares += double(sum);
    }
    const double norm = std::sqrt(squares);
    const T scale = T(1 / (norm < 1e-7 ? 1e-7 : norm));
    for (int64_t i = 0; i < few * stride; i += kLanes<T>) store<T>(w.x + i, load<T>(w.x + i) * scale);
    for (int iteration = 0; iteration < a.iterations; ++iteration) iterate(few, many, w);
    const T step = T(a.lr * 0.2 * std::sqrt(double(many))), keep = T(1 - a.lr * a.weight_decay);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        T& value = p[i * columns + j];
        value = value * keep - step * w.x[tall ? j * stride + i : i * stride + j];
      }
    }
  }

 private:
  const MuonArgs<T>& a;

  struct Workspace {
    T *x, *next, *panels, *gram, *square;
  };

  // The matrix has `few` rows and `many` columns here, transposed if need be.
  static int64_t carve(Carver<T> c, int64_t rows, int64_t columns, Workspace& w) {
    const int64_t few = rows < columns ? rows : columns, many = rows < columns ? columns : rows;
    w.x = c.take(few * whole_lanes<T>(many)), w.next = c.take(few * whole_lanes<T>(many));
    w.panels = c.take(whole_lanes<T>(many) * whole_panels<T>(few));
    w.gram = c.take(few * whole_lanes<T>(few)), w.square = c.take(few * whole_lanes<T>(few));
    return c.used;
  }

  // x <- a·x + (b·G + c·G²)·x with G = x·xᵀ.
  void iterate(int64_t few, int64_t many, Workspace& w) const {
    const int64_t stride = whole_lanes<T>(many), side = whole_lanes<T>(few);
    const T first = T(a.coefficients[0]), second = T(a.coefficients[1]), third = T(a.coefficients[2]);
    load_pixels<T>(w.x, stride, few, stride, whole_panels<T>(few) / kPanel<T>, w.panels);
    product<T, false>({w.x, stride}, {w.panels, kPanel<T>, stride * kPanel<T>}, few, side, many, false, {w.gram, side});
    for (int64_t i = 0; i < few * side; i += kLanes<T>) store<T>(w.square + i, load<T>(w.gram + i) * (second / third));
    product<T, false>({w.gram, side}, {w.gram, side, kPanel<T>}, few, side, few, true, {w.square, side});
    for (int64_t i = 0; i < few * side; i += kLanes<T>) store<T>(w.square + i, load<T>(w.square + i) * third);
    for (int64_t i = 0; i < few * stride; i += kLanes<T>) store<T>(w.next + i, load<T>(w.x + i) * first);
    product<T, false>({w.square, side}, {w.x, stride, kPanel<T>}, few, stride, few, true, {w.next, stride});
    T* const swap = w.x;
    w.x = w.next, w.next = swap;
  }
};

template <typename T>
void muon(const MuonArgs<T>& args) {
  MuonUpdate<T>(args).run();
}

}  // namespace fastslots::FASTSLOTS_ISA
