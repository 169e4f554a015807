// A whole decoder, packed, and one tile of pixels through it and back: what the loss and the slot Jacobian share.
#pragma once

#include "mlp.h"
#include "weights.h"

namespace fastslots::FASTSLOTS_ISA {

template <typename T>
class PackedDecoder {
 public:
  const DecoderArgs<T>& a;
  const int64_t D, HK;

  // filled: what all images share is packed at once, or by `fill`.
  explicit PackedDecoder(const DecoderArgs<T>& args, bool filled = true)
      : a(args), D(args.width), HK(args.heads * args.slots), packed_(pack({nullptr})),
        projection_size_(args.layers[0].G ? project(0, nullptr) : 0), projections_(args.batch * projection_size_) {
    pack({packed_.get(), 0, filled});
    if (!a.layers[0].G) return;  // the caller projects the slots of an image itself (pack_image)
    auto body = [&](int64_t b, int) { project(b, projections_.get() + b * projection_size_); };
    parallel_for(a.batch, a.threads, body);
  }

  // A share of the packing, all of which must be done before anything else is called.
  void fill(PackShare& share) const { PackedDecoder(a, nullptr).pack({packed_.get(), 0, true, &share}); }

  const Mlp<T>& head() const { return head_; }
  const Mlp<T>& query_mlp() const { return query_mlp_; }
  bool makes_queries() const { return a.query_map_count > 0; }  // from position codes, the same for all images

  // One thread's tile: the weights that come of the image at hand, and the activations that its backward reads.
  struct Tile {
    Layer<T> layers[kMostMaps];
    LayerState<T> states[kMostMaps];
    typename Mlp<T>::State head, query;
    T *x, *map, *normed, *rstd;          // residual stream, slot map, and the head's norm
    T *code;                             // position codes
    T *wide, *wide2, *narrow, *scratch;  // workspace
  };

  void carve(Carver<T>& carver, int64_t panels, Tile& tile) const {
    const int64_t pixels = panels * kPanel<T>;
    for (int64_t i = 0; i < a.layer_count; ++i) tile.states[i].carve(carver, panels, D, HK, a.ff_widths[i]);
    head_.carve(carver, pixels, tile.head);
    query_mlp_.carve(carver, pixels, tile.query);
    tile.x = carver.take(pixels * D);
    tile.narrow = carver.take(pixels * D);
    tile.normed = carver.take(pixels * D);
    int64_t widest = HK > D ? HK : D;
    const auto widen = [&](int64_t width) { widest = width > widest ? width : widest; };
    for (int64_t i = 0; i < a.layer_count; ++i) widen(a.ff_widths[i]);
    widen(head_.widest());
    widen(query_mlp_.widest());
    tile.wide = carver.take(pixels * widest);
    tile.wide2 = carver.take(pixels * widest);
    tile.map = carver.take(pixels * a.slots);
    tile.rstd = carver.take(pixels);
    tile.code = carver.take(pixels * a.code_width);
    tile.scratch = carver.take(pixels * kPanel<T>);
  }

  void begin_image(int64_t b, Tile& tile) const {
    Carver<T> carver{projections_.get() + b * projection_size_, 0, false};
    for (int64_t i = 0; i < a.layer_count; ++i) {
      tile.layers[i] = layers_[i];
      pack_projections<T>(a.layers[i], b, D, HK, carver, tile.layers[i]);
    }
  }

  // The same from G and U as rows [HK][whole D] (columns past D are not read), packed into the carver's memory.
  template <typename Folded>
  void pack_image(const Folded* folded, Carver<T>& carver, Tile& tile) const {
    const int64_t stride = (D + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    for (int64_t i = 0; i < a.layer_count; ++i) {
      tile.layers[i] = layers_[i];
      tile.layers[i].scores = pack_linear<T>(folded[i].G, HK, D, stride, 1, folded[i].g, carver);
      tile.layers[i].values = pack_linear<T>(folded[i].U, D, HK, 1, stride, a.layers[i].b, carver);
    }
  }

  TileShape<T> shape(int64_t b, int64_t count) const {
    return {(count + kPanel<T> - 1) / kPanel<T>, D, a.heads, a.slots, T(a.eps), T(1) / T(a.layer_count),
            a.slot_mask ? a.slot_mask + b * a.slots : nullptr};
  }

  int64_t query_row(int64_t b, int64_t start) const { return (a.query_batch == 1 ? 0 : b) * a.pixels + start; }

  // The queries given for a tile of image b, into tile.x.
  void load_queries(int64_t b, int64_t start, int64_t count, int64_t panels, Tile& tile) const {
    load_pixels<T>(a.queries + query_row(b, start) * D, D, count, D, panels, tile.x);
  }

  // The queries of a tile, made: [panels][D][W].
  const T* make_queries(int64_t start, int64_t count, int64_t panels, Tile& tile) const {
    return make_queries_of(a.code + start * a.code_width, count, panels, tile);
  }

  // Of any codes [count][code_width].
  const T* make_queries_of(const T* codes, int64_t count, int64_t panels, Tile& tile) const {
    load_pixels<T>(codes, a.code_width, count, a.code_width, panels, tile.code);
    return query_mlp_.forward(tile.code, panels, tile.query);
  }

  // From the queries in tile.x to the pixels [panels][C][W]; their slot map in tile.map.
  const T* forward(const TileShape<T>& s, Tile& tile) const {
    std::memset(tile.map, 0, size_t(s.panels * kPanel<T> * a.slots) * sizeof(T));
    for (int64_t i = 0; i < a.layer_count; ++i) forward_layer(tile.layers[i], s, tile.states[i], tile.x, tile.map);
    normalise<T>(tile.x, D, s.panels, s.eps, tile.normed, tile.rstd);
    return head_.forward(tile.normed, s.panels, tile.head);
  }

  // From the gradient of the pixels in tile.wide to that of the last layer's output, dx. sums: of the head, or null.
  void backward_head(const TileShape<T>& s, const LinearSums<T>* sums, Tile& tile, T* dx) const {
    const T* dnormed =
        head_.backward(tile.normed, s.panels, tile.head, sums, true, tile.wide, tile.wide2, tile.scratch);
    normalise_backward<T>(dnormed, tile.normed, tile.rstd, D, s.panels, false, dx);
  }

 private:
  Layer<T> layers_[kMostMaps];  // what all images share: the feed-forwards
  Mlp<T> head_, query_mlp_;
  Block<T> packed_;
  int64_t projection_size_;
  Block<T> projections_;  // of each image

  // One without memory of its own, to be packed.
  PackedDecoder(const DecoderArgs<T>& args, std::nullptr_t)
      : a(args), D(args.width), HK(args.heads * args.slots), packed_(0), projection_size_(0), projections_(0) {}

  // -> elements used; with a null base only these.
  int64_t pack(Carver<T> carver) {
    const auto linear = [&](const T* weight, int64_t rows, int64_t columns, const T* bias) {
      const Piece<T> piece(carver, 2 * rows * columns);
      if (piece.fills()) fetch(weight, rows * columns);
      return pack_linear<T>(weight, rows, columns, columns, 1, bias, carver);
    };
    for (int64_t i = 0; i < a.layer_count; ++i) {
      const auto& w = a.layers[i];
      const int64_t F = a.ff_widths[i];
      layers_[i].widen = pack_normed<T>(w.w1, F, D, w.norm_weight, w.norm_bias, w.b1, carver);
      layers_[i].narrow = linear(w.w2, D, F, w.b2);
    }
    head_.count = a.head_count;
    int64_t columns = D;
    for (int64_t i = 0; i < a.head_count; columns = a.head_rows[i], ++i) {
      const auto& w = a.head[i];
      head_.maps[i] = i == 0 ? pack_normed<T>(w.weight, a.head_rows[i], columns, a.head_norm_weight, a.head_norm_bias,
                                              w.bias, carver)
                             : linear(w.weight, a.head_rows[i], columns, w.bias);
    }
    query_mlp_.count = a.query_map_count;
    columns = a.code_width;
    for (int64_t i = 0; i < a.query_map_count; columns = a.query_map_rows[i], ++i) {
      const auto& w = a.query_maps[i];
      query_mlp_.maps[i] = linear(w.weight, a.query_map_rows[i], columns, w.bias);
    }
    return carver.used;
  }

  int64_t project(int64_t b, T* base) const {
    Carver<T> carver{base};
    Layer<T> layer;
    for (int64_t i = 0; i < a.layer_count; ++i) pack_projections<T>(a.layers[i], b, D, HK, carver, layer);
    return carver.used;
  }
};

}  // namespace fastslots::FASTSLOTS_ISA
