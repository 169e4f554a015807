// Attention of pixels to slots with the slot map, per head and unfolded: out = softmax_k(scale·q·k)·v, map = Σ_h A.
//
// A head is a layer with one head of its own (tile.h): scores [K, d] = scale·k, values [d, K] = vᵀ. Every tile of
// pixels takes all heads, so that the map is written once and no per-head weight leaves the tile. The backward computes
// the softmax again.
#pragma once

#include "plan.h"
#include "weights.h"

namespace fastslots::FASTSLOTS_ISA {

template <typename T>
class CrossAttention {
 public:
  explicit CrossAttention(const CrossAttentionArgs<T>& args)
      : a(args), d(args.head_width), K(args.slots), backward(args.out_grad != nullptr),
        plan(args.batch, args.pixels, backward ? 2 * args.heads * K * d : 0, 0, args.threads),
        head_sums((2 * gradient_size<T>(K, d) + 31) / 16 * 16), image_size(backward ? args.heads * head_sums : 0) {}

  void run() {
    const int64_t workspace_size = Workspace(*this, nullptr, nullptr).size;
    Block<T> images(plan.pixel_parts * a.batch * image_size), workspaces(plan.workers * workspace_size);
    Block<Layer<T>> heads(plan.workers * a.heads);
    image_base = images.get();
    auto body = [&](int64_t task, int thread) {
      Workspace workspace(*this, workspaces.get() + thread * workspace_size, heads.get() + thread * a.heads);
      run_task(task, workspace);
    };
    parallel_for(plan.tasks(), a.threads, body);
    if (backward) reduce();
  }

 private:
  const CrossAttentionArgs<T>& a;
  const int64_t d, K;
  const bool backward;
  const Plan<T> plan;
  const int64_t head_sums, image_size;
  T* image_base = nullptr;

  struct Workspace {
    T *x, *dy, *dx, *attention, *dscores, *map, *dmap, *scratch, *keys, *packs;
    Layer<T>* heads;  // [H], of the image at hand
    int64_t size, pack_size;
    Workspace(const CrossAttention& o, T* base, Layer<T>* head_packs) : heads(head_packs) {
      Carver<T> carver{base};
      const int64_t pixels = o.plan.tile_pixels();
      x = carver.take(pixels * o.d);
      dy = carver.take(pixels * o.d);
      dx = carver.take(pixels * o.d);
      attention = carver.take(pixels * o.K);
      dscores = carver.take(pixels * o.K);
      map = carver.take(pixels * o.K);
      dmap = carver.take(pixels * o.K);
      scratch = carver.take(pixels * kPanel<T>);
      keys = carver.take(o.K * o.d);
      pack_size = 4 * (o.K * o.d + 16);
      packs = carver.take(o.a.heads * pack_size);
      size = carver.used;
    }
  };

  void pack_head(int64_t b, int64_t h, Workspace& ws) const {
    const T* const k = a.k + b * a.k_stride[0] + h * a.k_stride[1];
    const T* const v = a.v + b * a.v_stride[0] + h * a.v_stride[1];
    for (int64_t i = 0; i < K; ++i) {
      for (int64_t j = 0; j < d; ++j) ws.keys[i * d + j] = T(a.scale) * k[i * a.k_stride[2] + j];
    }
    Carver<T> carver{ws.packs + h * ws.pack_size};
    ws.heads[h].scores = pack_linear<T>(ws.keys, K, d, d, 1, nullptr, carver);
    ws.heads[h].values = pack_linear<T>(v, d, K, 1, a.v_stride[2], nullptr, carver);
  }

  LayerSums<T> sums_of(int64_t part, int64_t b, int64_t h) const {
    LayerSums<T> sums = {};
    sums.scores.weight = image_base + (part * a.batch + b) * image_size + h * head_sums;
    sums.values = sums.scores.weight + head_sums / 2;
    return sums;
  }

  void run_task(int64_t task, Workspace& ws) {
    const int64_t part = plan.pixel_part(task);
    plan.walk(
        task,
        [&](int64_t b) {
          for (int64_t h = 0; h < a.heads; ++h) pack_head(b, h, ws);
          std::memset(image_base + (part * a.batch + b) * image_size, 0, size_t(image_size) * sizeof(T));
        },
        [&](int64_t b, int64_t start, int64_t count) {
          const TileShape<T> s{(count + kPanel<T> - 1) / kPanel<T>, d, 1, K, T(0), T(1),
                               a.slot_mask ? a.slot_mask + b * K : nullptr};
          const int64_t row = b * a.pixels + start;
          std::memset(ws.map, 0, size_t(s.panels * kPanel<T> * K) * sizeof(T));
          if (backward) load_pixels<T>(a.slot_map_grad + row * K, K, count, K, s.panels, ws.dmap);
          for (int64_t h = 0; h < a.heads; ++h) {
            const Layer<T>& pack = ws.heads[h];
            const int64_t q = b * a.q_stride[0] + h * a.q_stride[1] + start * a.q_stride[2];
            const int64_t to = ((b * a.heads + h) * a.pixels + start) * d;
            load_pixels<T>(a.q + q, a.q_stride[2], count, d, s.panels, ws.x);
            attend(pack, s, ws.x, ws.attention, ws.map);
            if (!backward) {
              apply(pack.values, ws.attention, s.panels, false, ws.dx);
              store_pixels<T>(ws.dx, d, count, d, false, a.out + to);
              continue;
            }
            const int64_t dy = b * a.out_grad_stride[0] + h * a.out_grad_stride[1] + start * a.out_grad_stride[2];
            load_pixels<T>(a.out_grad + dy, a.out_grad_stride[2], count, d, s.panels, ws.dy);
            attend_backward(pack, sums_of(part, b, h), s, ws.x, ws.attention, ws.dy, ws.dmap, ws.dscores, ws.scratch,
                            ws.dx);
            store_pixels<T>(ws.dx, d, count, d, false, a.q_grad + to);
          }
          if (!backward) store_pixels<T>(ws.map, K, count, K, false, a.slot_map + row * K);
        });
  }

  void reduce() const {
    const Partials parts{plan.pixel_parts, a.batch * image_size};
    for (int64_t b = 0; b < a.batch; ++b) {
      for (int64_t h = 0; h < a.heads; ++h) {
        const LayerSums<T> sums = sums_of(0, b, h);
        const int64_t to = (b * a.heads + h) * K * d;
        reduce_products<T>(sums.scores.weight, parts, K, d, d, 1, a.k_grad + to);
        reduce_products<T>(sums.values, parts, K, d, d, 1, a.v_grad + to);
        for (int64_t i = 0; i < K * d; ++i) a.k_grad[to + i] *= T(a.scale);
      }
    }
  }
};

template <typename T>
void cross_attention(const CrossAttentionArgs<T>& args) {
  CrossAttention<T>(args).run();
}

}  // namespace fastslots::FASTSLOTS_ISA
