// A whole decoder, packed, and one tile of pixels through it and back: what the loss and the slot Jacobian share.
#pragma once

#include <initializer_list>

#include "weights.h"

namespace fastslots::FASTSLOTS_ISA {

template <typename T>
class PackedDecoder {
 public:
  const DecoderArgs<T>& a;
  const int64_t D, HK;

  explicit PackedDecoder(const DecoderArgs<T>& args)
      : a(args), D(args.width), HK(args.heads * args.slots), packed_(measure()) {
    Carver<T> carver{packed_.get()};
    pack(carver);
  }

  const Linear<T>& head(int64_t i) const { return head_[i]; }
  int64_t channels() const { return head_[a.head_count - 1].rows; }
  int64_t widest() const { return widest_; }

  // One thread's tile: the weights that come of the image at hand, and the activations that its backward reads.
  struct Tile {
    Layer<T> layers[kMostMaps];
    LayerState<T> states[kMostMaps];
    T *hidden[kMostMaps], *slope[kMostMaps];  // of the head
    T *x, *map, *normed, *rstd;               // residual stream, slot map, and the head's norm
    T *wide, *wide2, *narrow, *scratch;       // workspace
    T* projections;
  };

  void carve(Carver<T>& carver, int64_t panels, Tile& tile) const {
    const int64_t pixels = panels * kPanel<T>;
    for (int64_t i = 0; i < a.layer_count; ++i) tile.states[i].carve(carver, panels, D, HK, a.ff_widths[i]);
    for (int64_t i = 0; i < a.head_count; ++i) {
      tile.hidden[i] = carver.take(pixels * head_[i].rows);
      tile.slope[i] = carver.take(pixels * head_[i].rows);
    }
    for (T** part : {&tile.x, &tile.narrow, &tile.normed}) *part = carver.take(pixels * D);
    for (T** part : {&tile.wide, &tile.wide2}) *part = carver.take(pixels * (widest_ > D ? widest_ : D));
    tile.map = carver.take(pixels * a.slots);
    tile.rstd = carver.take(pixels);
    tile.scratch = carver.take(pixels * kPanel<T>);
    tile.projections = carver.take(a.layer_count * 4 * (D * HK + 16));
  }

  void begin_image(int64_t b, Tile& tile) const {
    Carver<T> carver{tile.projections};
    for (int64_t i = 0; i < a.layer_count; ++i) {
      tile.layers[i] = layers_[i];
      pack_projections<T>(a.layers[i], b, D, HK, carver, tile.layers[i]);
    }
  }

  TileShape<T> shape(int64_t b, int64_t count) const {
    return {(count + kPanel<T> - 1) / kPanel<T>, D, a.heads, a.slots, T(a.eps), T(1) / T(a.layer_count),
            a.slot_mask ? a.slot_mask + b * a.slots : nullptr};
  }

  int64_t query_row(int64_t b, int64_t start) const { return (a.query_batch == 1 ? 0 : b) * a.pixels + start; }

  // -> the pixels [panels][C][W]; their slot map in tile.map.
  const T* forward(const TileShape<T>& s, int64_t b, int64_t start, int64_t count, Tile& tile) const {
    load_pixels<T>(a.queries + query_row(b, start) * D, D, count, D, s.panels, tile.x);
    std::memset(tile.map, 0, size_t(s.panels * kPanel<T> * a.slots) * sizeof(T));
    for (int64_t i = 0; i < a.layer_count; ++i) forward_layer(tile.layers[i], s, tile.states[i], tile.x, tile.map);
    normalise<T>(tile.x, D, s.panels, s.eps, tile.normed, tile.rstd);
    const T* in = tile.normed;
    for (int64_t i = 0; i < a.head_count; in = tile.hidden[i], ++i) {
      apply(head_[i], in, s.panels, false, tile.hidden[i]);
      if (i + 1 < a.head_count) gelu<T>(tile.hidden[i], tile.slope[i], s.panels * head_[i].rows * kPanel<T>);
    }
    return in;
  }

  // From the gradient of the pixels in tile.wide to that of the last layer's output, dx. sums: [head_count], or null.
  void backward_head(const TileShape<T>& s, const LinearSums<T>* sums, Tile& tile, T* dx) const {
    T *dy = tile.wide, *dinput = tile.wide2;
    for (int64_t i = a.head_count - 1; i >= 0; --i) {
      if (sums) accumulate(head_[i], dy, i ? tile.hidden[i - 1] : tile.normed, s.panels, tile.scratch, sums[i]);
      apply_transposed(head_[i], dy, s.panels, dinput);
      if (i) scale_by<T>(dinput, tile.slope[i - 1], s.panels * head_[i].columns * kPanel<T>);
      T* const swap = dy;
      dy = dinput, dinput = swap;
    }
    normalise_backward<T>(dy, tile.normed, tile.rstd, D, s.panels, false, dx);
  }

 private:
  int64_t widest_ = 1;
  Layer<T> layers_[kMostMaps];  // what all images share: the feed-forwards
  Linear<T> head_[kMostMaps];
  Block<T> packed_;

  int64_t measure() {
    Carver<T> carver{nullptr};
    pack(carver);
    return carver.used;
  }

  void pack(Carver<T>& carver) {
    widest_ = HK;
    for (int64_t i = 0; i < a.layer_count; ++i) {
      const auto& w = a.layers[i];
      const int64_t F = a.ff_widths[i];
      widest_ = F > widest_ ? F : widest_;
      layers_[i].widen = pack_normed<T>(w.w1, F, D, w.norm_weight, w.norm_bias, w.b1, carver);
      layers_[i].narrow = pack_linear<T>(w.w2, D, F, F, 1, w.b2, carver);
    }
    int64_t columns = D;
    for (int64_t i = 0; i < a.head_count; columns = a.head_rows[i], ++i) {
      const auto& w = a.head[i];
      head_[i] = i == 0 ? pack_normed<T>(w.weight, a.head_rows[i], columns, a.head_norm_weight, a.head_norm_bias,
                                         w.bias, carver)
                        : pack_linear<T>(w.weight, a.head_rows[i], columns, columns, 1, w.bias, carver);
      widest_ = a.head_rows[i] > widest_ ? a.head_rows[i] : widest_;
    }
  }
};

}  // namespace fastslots::FASTSLOTS_ISA
