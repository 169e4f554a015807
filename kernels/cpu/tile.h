// One tile of pixels through the decoder: layers and output head, forward and backward, in a core's cache.
//
//   layer:  n1 = norm(x)   A = softmax_k(n1·G + g)   x += A·U + b
//           n2 = norm(x)   h = gelu(W1·n2 + b1)      x += W2·h + b2
//
// The affine part of a norm is folded into the matrix that follows (W1 <- W1·diag(γ), b1 <- b1 + W1·β), so a tile sees
// plain norms; unfolding the gradients is one pass over the matrix at the end of a call (weights.h).
#pragma once

#include "pointwise.h"

namespace fastslots::FASTSLOTS_ISA {

// A thread's share of packing a block: each thread walks over the whole of it, names all parts, and fills those that fall
// to it, which are as much work as those of the others. All walks come to the same sharing.
struct PackShare {
  static constexpr int kMost = 8;  // shares of a block
  int index = 0, count = 1;
  int64_t work[kMost] = {};
  bool within = false, fills = true;  // whether a piece is being packed, and by this share

  void begin(int64_t amount) {
    int least = 0;
    for (int i = 1; i < count; ++i) least = work[i] < work[least] ? i : least;
    work[least] += amount;
    within = true, fills = least == index;
  }
};

// Hands out consecutive parts of a block; with a null base it only measures.
template <typename T>
struct Carver {
  T* base;
  int64_t used = 0;
  bool pack = true;            // false: the parts were packed before, or will be, and are only named
  PackShare* share = nullptr;  // null: all of it
  T* take(int64_t count) {
    T* part = base ? base + used : nullptr;
    used += (count + 15) / 16 * 16;
    return part;
  }
};

// What is packed by one thread, about `work` elements: pieces inside a piece go with it, and may read what it wrote.
template <typename T>
class Piece {
 public:
  Piece(const Carver<T>& carver, int64_t work)
      : outer_(carver.share && !carver.share->within ? carver.share : nullptr) {
    if (outer_) outer_->begin(work);
    fills_ = carver.base && carver.pack && (!carver.share || carver.share->fills);
  }
  ~Piece() {
    if (outer_) outer_->within = false;
  }
  Piece(const Piece&) = delete;
  Piece& operator=(const Piece&) = delete;
  bool fills() const { return fills_; }

 private:
  PackShare* outer_;
  bool fills_;
};

// Asks for all lines of an array that a loop will stride through. Another core may have written it, and the loop would
// wait for one line after the other.
template <typename T>
FASTSLOTS_INLINE void fetch(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + i, 0, 2);
}

// A linear map y = W·x + bias; `transposed` is null where no backward needs it.
template <typename T>
struct Linear {
  int64_t rows = 0, columns = 0;
  const T* packed = nullptr;      // W
  const T* transposed = nullptr;  // Wᵀ
  const T* bias = nullptr;
};

// Where the gradients of one add up.
template <typename T>
struct LinearSums {
  T* weight = nullptr;  // gradient_size(rows, columns)
  T* bias = nullptr;    // [rows][lanes]; null where nobody asks
};

template <typename T>
struct Layer {
  Linear<T> scores;  // [H·K, D], of this image
  Linear<T> values;  // [D, H·K]: Uᵀ and b
  Linear<T> widen;   // [F, D]: W1 and b1, the norm folded in
  Linear<T> narrow;  // [D, F]: W2 and b2
};

template <typename T>
struct LayerSums {
  LinearSums<T> scores;
  T* values;       // gradient_size(H·K, D): of U, not of its transpose
  T* values_bias;  // [D][lanes]
  LinearSums<T> widen, narrow;
};

// Activations of a layer that its backward reads.
template <typename T>
struct LayerState {
  T *normed1, *rstd1, *attention, *normed2, *rstd2, *hidden, *slope;
  void carve(Carver<T>& carver, int64_t panels, int64_t D, int64_t HK, int64_t F) {
    const int64_t pixels = panels * kPanel<T>;
    normed1 = carver.take(pixels * D);
    rstd1 = carver.take(pixels);
    attention = carver.take(pixels * HK);
    normed2 = carver.take(F ? pixels * D : 0);
    rstd2 = carver.take(pixels);
    hidden = carver.take(pixels * F);
    slope = carver.take(pixels * F);
  }
};

// Sizes of the tile at hand, and the settings that every layer shares.
template <typename T>
struct TileShape {
  int64_t panels, D, H, K;
  T eps, share;         // share: of a layer in the slot map, 1/N
  const uint8_t* keep;  // [K] of this image, or null
};

template <typename T>
FASTSLOTS_INLINE void apply(const Linear<T>& map, const T* x, int64_t panels, bool add, T* y) {
  multiply<T>(map.packed, map.rows, map.columns, map.bias, x, panels, add, y);
}

template <typename T>
FASTSLOTS_INLINE void apply_transposed(const Linear<T>& map, const T* dy, int64_t panels, T* dx) {
  multiply<T>(map.transposed, map.columns, map.rows, nullptr, dy, panels, false, dx);
}

template <typename T>
FASTSLOTS_INLINE void accumulate(const Linear<T>& map, const T* dy, const T* x, int64_t panels, T* scratch,
                                 const LinearSums<T>& sums) {
  if (sums.weight) accumulate_products<T>(dy, map.rows, x, map.columns, panels, scratch, sums.weight);
  if (sums.bias) accumulate_rows<T>(dy, map.rows, panels, sums.bias);
}

// scores and softmax of already normed pixels; adds to map.
template <typename T>
void attend(const Layer<T>& layer, const TileShape<T>& s, const T* normed, T* attention, T* map) {
  apply(layer.scores, normed, s.panels, false, attention);
  softmax<T>(attention, s.H, s.K, s.panels, s.keep, s.share, map);
}

template <typename T>
void forward_layer(const Layer<T>& layer, const TileShape<T>& s, LayerState<T>& state, T* x, T* map) {
  normalise<T>(x, s.D, s.panels, s.eps, state.normed1, state.rstd1);
  attend(layer, s, state.normed1, state.attention, map);
  apply(layer.values, state.attention, s.panels, true, x);
  normalise<T>(x, s.D, s.panels, s.eps, state.normed2, state.rstd2);
  apply(layer.widen, state.normed2, s.panels, false, state.hidden);
  gelu<T>(state.hidden, state.slope, s.panels * layer.widen.rows * kPanel<T>);
  apply(layer.narrow, state.hidden, s.panels, true, x);
}

// dy (of A·U + b) -> gradients of U, b and the scores.
template <typename T>
void attention_backward(const Layer<T>& layer, const LayerSums<T>& sums, const TileShape<T>& s, const T* attention,
                        const T* dy, const T* dmap, T* dscores, T* scratch) {
  apply_transposed(layer.values, dy, s.panels, dscores);
  if (sums.values) accumulate_products<T>(attention, s.H * s.K, dy, s.D, s.panels, scratch, sums.values);
  if (sums.values_bias) accumulate_rows<T>(dy, s.D, s.panels, sums.values_bias);
  softmax_backward<T>(attention, dmap, s.share, s.H, s.K, s.panels, dscores);
}

// dscores -> gradients of G, g, and, unless dnormed is null, of the normed pixels.
template <typename T>
void scores_backward(const Layer<T>& layer, const LayerSums<T>& sums, const TileShape<T>& s, const T* normed,
                     const T* dscores, T* scratch, T* dnormed) {
  accumulate(layer.scores, dscores, normed, s.panels, scratch, sums.scores);
  if (dnormed) apply_transposed(layer.scores, dscores, s.panels, dnormed);
}

// Both, one behind the other.
template <typename T>
void attend_backward(const Layer<T>& layer, const LayerSums<T>& sums, const TileShape<T>& s, const T* normed,
                     const T* attention, const T* dy, const T* dmap, T* dscores, T* scratch, T* dnormed) {
  attention_backward(layer, sums, s, attention, dy, dmap, dscores, scratch);
  scores_backward(layer, sums, s, normed, dscores, scratch, dnormed);
}

// The feed-forward half. dx: gradient of the layer's output, replaced by that of the attention's.
// wide [panels][F][W] and narrow [panels][D][W] are workspace.
template <typename T>
void feed_forward_backward(const Layer<T>& layer, const LayerSums<T>& sums, const TileShape<T>& s,
                           const LayerState<T>& state, T* dx, T* wide, T* narrow, T* scratch) {
  apply_transposed(layer.narrow, dx, s.panels, wide);
  accumulate(layer.narrow, dx, state.hidden, s.panels, scratch, sums.narrow);
  scale_by<T>(wide, state.slope, s.panels * layer.widen.rows * kPanel<T>);
  accumulate(layer.widen, wide, state.normed2, s.panels, scratch, sums.widen);
  apply_transposed(layer.widen, wide, s.panels, narrow);
  normalise_backward<T>(narrow, state.normed2, state.rstd2, s.D, s.panels, true, dx);
}

// dx: gradient of the layer's output, replaced by that of its input (left half done where `input` is false: nobody
// asks for it). wide [panels][max(F, H·K)][W] and narrow [panels][D][W] are workspace.
template <typename T>
void backward_layer(const Layer<T>& layer, const LayerSums<T>& sums, const TileShape<T>& s, const LayerState<T>& state,
                    const T* dmap, bool input, T* dx, T* wide, T* narrow, T* scratch) {
  feed_forward_backward(layer, sums, s, state, dx, wide, narrow, scratch);
  attend_backward(layer, sums, s, state.normed1, state.attention, dx, dmap, wide, scratch, input ? narrow : nullptr);
  if (input) normalise_backward<T>(narrow, state.normed1, state.rstd1, s.D, s.panels, true, dx);
}

}  // namespace fastslots::FASTSLOTS_ISA
