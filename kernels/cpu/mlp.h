// Linear maps with GELU between them, on panels of pixels: the output head, and the MLP that makes the queries.
#pragma once

#include "tile.h"

namespace fastslots::FASTSLOTS_ISA {

template <typename T>
struct Mlp {
  Linear<T> maps[kMostMaps];
  int64_t count = 0;

  // Activations that backward reads: what each map gives, GELU applied to all but the last, and that GELU's slope.
  struct State {
    T *out[kMostMaps], *slope[kMostMaps];
  };

  void carve(Carver<T>& carver, int64_t pixels, State& state) const {
    for (int64_t i = 0; i < count; ++i) {
      state.out[i] = carver.take(pixels * maps[i].rows);
      state.slope[i] = carver.take(i + 1 < count ? pixels * maps[i].rows : 0);
    }
  }

  int64_t outputs() const { return maps[count - 1].rows; }

  int64_t widest() const {
    int64_t most = 0;
    for (int64_t i = 0; i < count; ++i) most = maps[i].rows > most ? maps[i].rows : most;
    return most;
  }

  // x [panels][columns][W] -> the result, in `state`.
  const T* forward(const T* x, int64_t panels, State& state) const {
    for (int64_t i = 0; i < count; x = state.out[i], ++i) {
      apply(maps[i], x, panels, false, state.out[i]);
      if (i + 1 < count) gelu<T>(state.out[i], state.slope[i], panels * maps[i].rows * kPanel<T>);
    }
    return x;
  }

  // dy: gradient of the result. Adds to sums ([count], or null: nobody asks) and gives the gradient of x, or null where
  // `input` is false. dy and `other` are overwritten and hold the widest map.
  T* backward(const T* x, int64_t panels, const State& state, const LinearSums<T>* sums, bool input, T* dy, T* other,
              T* scratch) const {
    for (int64_t i = count - 1; i >= 0; --i) {
      if (sums) accumulate(maps[i], dy, i ? state.out[i - 1] : x, panels, scratch, sums[i]);
      if (i == 0 && !input) return nullptr;
      apply_transposed(maps[i], dy, panels, other);
      if (i) scale_by<T>(other, state.slope[i - 1], panels * maps[i].columns * kPanel<T>);
      T* const swap = dy;
      dy = other, other = swap;
    }
    return dy;
  }
};

}  // namespace fastslots::FASTSLOTS_ISA
