// Which slot acts on which pixel, exactly: jacobian[b,k,l] = Σ_c Σ_j |∂x̂[b,c,l]/∂z[b,k,j]|, in one backward pass of a
// tile for each channel. Slot k enters a layer through its keys and values alone (fastslots/models/decoder_jacobian.py):
//
//   ∂x̂_c/∂z[k,j] = Σ_layers Σ_h  ∂x̂_c/∂S[h,k] · (keys[k,j,h] · q_h)  +  A[h,k] · (values[k,j,h] · (Woᵀ ∂x̂_c/∂y)_h)
//
// The sum over heads of the second part is one product I = H·d deep, its right side weighted with A first; in the first
// part keys·q is the same for all channels. Nothing but the result spans all pixels.
#pragma once

#include "decoder.h"
#include "plan.h"

namespace fastslots::FASTSLOTS_ISA {

constexpr int64_t kChannelBlock = 4;  // channels whose gradients are held at once: an image's, few of a feature map's
constexpr int64_t kJacobianPixels = 32;  // of a tile: C·K·Z numbers a pixel wait for the next layer

template <typename T>
class SlotJacobian {
 public:
  explicit SlotJacobian(const SlotJacobianArgs<T>& args)
      : a(args), decoder(args), D(args.width), H(args.heads), K(args.slots), Z(args.slot_width), I(args.inner_width),
        d(I / H), channels(decoder.head().outputs()), block(channels < kChannelBlock ? channels : kChannelBlock),
        plan(args.batch, args.pixels, 0, 0, args.threads, kJacobianPixels), packed(pack(nullptr)) {
    pack(packed.get());
  }

  void run() {
    const int64_t workspace_size = Workspace(*this, nullptr).size;
    Block<T> workspaces(plan.workers * workspace_size);
    auto body = [&](int64_t task, int thread) {
      Workspace ws(*this, workspaces.get() + thread * workspace_size);
      plan.walk(
          task, [&](int64_t b) { begin_image(b, ws); },
          [&](int64_t b, int64_t start, int64_t count) { tile(b, start, count, ws); });
    };
    parallel_for(plan.tasks(), a.threads, body);
  }

 private:
  const SlotJacobianArgs<T>& a;
  const PackedDecoder<T> decoder;
  const int64_t D, H, K, Z, I, d, channels, block;
  const Plan<T> plan;
  Linear<T> queries[kMostMaps], outs[kMostMaps];  // to_q behind its norm, Woᵀ
  Block<T> packed;

  struct Workspace : PackedDecoder<T>::Tile {
    const T *keys[kMostMaps], *values[kMostMaps];  // packed, [K][H][Z x d] and [K][Z x I]
    T *tangents, *no_map, *q, *by_key, *weighted, *sums;
    T *dx[kChannelBlock], *dscores[kChannelBlock], *dout[kChannelBlock], *total[kChannelBlock];
    int64_t size;
    Workspace(const SlotJacobian& o, T* base) {
      Carver<T> carver{base};
      const int64_t pixels = o.plan.tile_pixels();
      o.decoder.carve(carver, o.plan.panels, *this);
      tangents = carver.take(o.a.layer_count * 2 * (o.K * o.Z * o.I + 16));
      no_map = carver.take(pixels * o.K);
      q = carver.take(pixels * o.I);
      by_key = carver.take(o.Z * kPanel<T>);
      weighted = carver.take(o.I * kPanel<T>);
      sums = carver.take(pixels * o.K);
      for (int64_t c = 0; c < o.block; ++c) {
        dx[c] = carver.take(pixels * o.D);
        dscores[c] = carver.take(pixels * o.H * o.K);
        dout[c] = carver.take(pixels * o.I);
        total[c] = carver.take(pixels * o.K * o.Z);
      }
      size = carver.used;
    }
  };

  // What all images share -> elements used; with a null base only these.
  int64_t pack(T* base) {
    Carver<T> carver{base};
    for (int64_t i = 0; i < a.layer_count; ++i) {
      const auto& w = a.tangents[i];
      queries[i] = pack_normed<T>(w.query_weight, I, D, w.query_norm_weight, w.query_norm_bias, w.query_bias, carver);
      outs[i] = pack_forward<T>(w.out_weight, I, D, 1, I, nullptr, carver);
    }
    return carver.used;
  }

  void begin_image(int64_t b, Workspace& ws) const {
    decoder.begin_image(b, ws);
    std::memset(ws.no_map, 0, size_t(plan.tile_pixels() * K) * sizeof(T));
    Carver<T> carver{ws.tangents};
    for (int64_t i = 0; i < a.layer_count; ++i) {
      T* const keys = carver.take(K * Z * I);
      T* const values = carver.take(K * Z * I);
      for (int64_t k = 0; k < K; ++k) {
        const int64_t slot = (b * K + k) * Z * I;
        for (int64_t h = 0; h < H; ++h) {
          pack_rows<T>(a.tangents[i].keys + slot + h * d, Z, d, I, 1, keys + (k * H + h) * Z * d);
        }
        pack_rows<T>(a.tangents[i].values + slot, Z, I, I, 1, values + k * Z * I);
      }
      ws.keys[i] = keys, ws.values[i] = values;
    }
  }

  void tile(int64_t b, int64_t start, int64_t count, Workspace& ws) const {
    constexpr int W = kPanel<T>;
    const TileShape<T> s = decoder.shape(b, count);
    decoder.load_queries(b, start, count, s.panels, ws);
    decoder.forward(s, ws);
    std::memset(ws.sums, 0, size_t(s.panels * W * K) * sizeof(T));
    for (int64_t first = 0; first < channels; first += block) {
      const int64_t some = channels - first < block ? channels - first : block;
      for (int64_t c = 0; c < some; ++c) {
        one_channel(first + c, s.panels, ws.wide);
        decoder.backward_head(s, nullptr, ws, ws.dx[c]);
        std::memset(ws.total[c], 0, size_t(s.panels * W * K * Z) * sizeof(T));
      }
      for (int64_t i = a.layer_count - 1; i >= 0; --i) backward(i, s, some, ws);
      for (int64_t c = 0; c < some; ++c) add_magnitudes(ws.total[c], s.panels, ws.sums);
    }
    store_pixels_last(ws.sums, s.panels, count, a.jacobian + b * K * a.pixels + start);
  }

  // The gradient of channel c's sum over pixels.
  void one_channel(int64_t c, int64_t panels, T* gradient) const {
    constexpr int W = kPanel<T>;
    std::memset(gradient, 0, size_t(panels * channels * W) * sizeof(T));
    for (int64_t p = 0; p < panels; ++p) {
      for (int w = 0; w < W; ++w) gradient[(p * channels + c) * W + w] = T(1);
    }
  }

  // Layer i of `some` channels: from the gradients of its output to those of its input, adding its part to the totals.
  void backward(int64_t i, const TileShape<T>& s, int64_t some, Workspace& ws) const {
    const LayerSums<T> none = {};
    const Layer<T>& layer = ws.layers[i];
    const LayerState<T>& state = ws.states[i];
    apply(queries[i], state.normed1, s.panels, false, ws.q);
    for (int64_t c = 0; c < some; ++c) {
      feed_forward_backward(layer, none, s, state, ws.dx[c], ws.wide, ws.narrow, ws.scratch);
      apply(outs[i], ws.dx[c], s.panels, false, ws.dout[c]);
      T* const dnormed = i > 0 ? ws.narrow : nullptr;  // nothing before layer 0 depends on the slots
      attend_backward(layer, none, s, state.normed1, state.attention, ws.dx[c], ws.no_map, ws.dscores[c], ws.scratch,
                      dnormed);
      if (dnormed) normalise_backward<T>(dnormed, state.normed1, state.rstd1, D, s.panels, true, ws.dx[c]);
    }
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t p = 0; p < s.panels; ++p) {
        add_values(i, k, p, state.attention, some, ws);
        add_keys(i, k, p, some, ws);
      }
    }
  }

  // total += values · (A ∘ Woᵀ dy) of slot k and panel p.
  void add_values(int64_t i, int64_t k, int64_t p, const T* attention, int64_t some, Workspace& ws) const {
    constexpr int W = kPanel<T>, V = kLanes<T>;
    for (int64_t c = 0; c < some; ++c) {
      const T* from = ws.dout[c] + p * I * W;
      T* to = ws.weighted;
      for (int64_t h = 0; h < H; ++h) {
        const T* weight = attention + (p * H * K + h * K + k) * W;
        const Vec<T> a0 = load<T>(weight), a1 = load<T>(weight + V);
        for (int64_t j = 0; j < d; ++j, from += W, to += W) {
          store<T>(to, a0 * load<T>(from));
          store<T>(to + V, a1 * load<T>(from + V));
        }
      }
      multiply<T>(ws.values[i] + k * Z * I, Z, I, nullptr, ws.weighted, 1, true, ws.total[c] + (p * K + k) * Z * W);
    }
  }

  // total += Σ_h dS · (keys · q) of slot k and panel p.
  void add_keys(int64_t i, int64_t k, int64_t p, int64_t some, Workspace& ws) const {
    constexpr int W = kPanel<T>, V = kLanes<T>;
    for (int64_t h = 0; h < H; ++h) {
      multiply<T>(ws.keys[i] + (k * H + h) * Z * d, Z, d, nullptr, ws.q + (p * I + h * d) * W, 1, false, ws.by_key);
      for (int64_t c = 0; c < some; ++c) {
        const T* dscore = ws.dscores[c] + (p * H * K + h * K + k) * W;
        const Vec<T> d0 = load<T>(dscore), d1 = load<T>(dscore + V);
        const T* from = ws.by_key;
        T* to = ws.total[c] + (p * K + k) * Z * W;
        for (int64_t j = 0; j < Z; ++j, from += W, to += W) {
          store<T>(to, load<T>(to) + d0 * load<T>(from));
          store<T>(to + V, load<T>(to + V) + d1 * load<T>(from + V));
        }
      }
    }
  }

  // sums [panels][K][W] += Σ_j |total [panels][K][Z][W]|.
  void add_magnitudes(const T* total, int64_t panels, T* sums) const {
    constexpr int W = kPanel<T>, V = kLanes<T>;
    for (int64_t slot = 0; slot < panels * K; ++slot, sums += W) {
      Vec<T> s0 = load<T>(sums), s1 = load<T>(sums + V);
      for (int64_t j = 0; j < Z; ++j, total += W) {
        s0 += magnitude<T>(load<T>(total));
        s1 += magnitude<T>(load<T>(total + V));
      }
      store<T>(sums, s0);
      store<T>(sums + V, s1);
    }
  }

  // to[k·L + pixel] <- panels [panels][K][W].
  void store_pixels_last(const T* from, int64_t panels, int64_t count, T* to) const {
    constexpr int W = kPanel<T>;
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t width = count - p * W < W ? count - p * W : W;
      for (int64_t k = 0; k < K; ++k) {
        std::memcpy(to + k * a.pixels + p * W, from + (p * K + k) * W, size_t(width) * sizeof(T));
      }
    }
  }
};

template <typename T>
void slot_jacobian(const SlotJacobianArgs<T>& args) {
  SlotJacobian<T>(args).run();
}

}  // namespace fastslots::FASTSLOTS_ISA
