// Attention of pixels to slots with the slot map, per head and unfolded: out = softmax_k(scale·q·k)·v, map = Σ_h c_h A.
// On request the entropy −Σ_k A log A and the log-sum-exp of the scores S of each head and pixel, with
// ∂S_k += A_k·(∂lse − ∂entropy·(S_k − Σ_j A_j S_j)); a row without slots has zeros.
//
// A head is a layer with one head of its own (tile.h): scores [K, d] = scale·k, values [d, K] = vᵀ. Every tile of
// pixels takes all heads, so that the map is written once and no per-head weight leaves the tile. The backward computes
// the softmax again.
#pragma once

#include <cmath>

#include "plan.h"
#include "weights.h"

namespace fastslots::FASTSLOTS_ISA {

template <typename T>
class CrossAttention {
 public:
  explicit CrossAttention(const CrossAttentionArgs<T>& args)
      : a(args), d(args.head_width), K(args.slots), backward(args.out_grad != nullptr),
        plan(args.batch, args.pixels, backward ? 2 * args.heads * K * d : 0, 0, args.threads),
        head_sums((2 * gradient_size<T>(K, d) + kLanes<T> + 31) / 16 * 16),
        image_size(backward ? args.heads * head_sums : 0) {}

  void run() {
    const int64_t workspace_size = Workspace(*this, nullptr, nullptr).size;
    const int64_t images_of_a_task = (a.batch + plan.image_parts - 1) / plan.image_parts;
    Block<T> images(a.batch * image_size), workspaces(plan.workers * workspace_size);
    Block<Layer<T>> heads(plan.workers * a.heads);
    GroupSums<T> groups(images_of_a_task * image_size, plan.workers);
    auto body = [&](int64_t task, int thread) {
      Workspace workspace(*this, workspaces.get() + thread * workspace_size, heads.get() + thread * a.heads);
      if (!backward) return run_task(task, workspace, nullptr);
      const int64_t first = plan.first_image(task), count = plan.last_image(task) - first;
      const GroupTotal<T> to{images.get() + first * image_size, count * image_size, plan.pixel_part(task) == 0};
      groups.add(task, thread, to, [&](T* sums) { run_task(task, workspace, sums); });
    };
    parallel_for(plan.tasks(), a.threads, body);
    if (backward) reduce(images.get());
  }

 private:
  const CrossAttentionArgs<T>& a;
  const int64_t d, K;
  const bool backward;
  const Plan<T> plan;
  const int64_t head_sums, image_size;

  struct Workspace {
    T *x, *dy, *dx, *attention, *dscores, *map, *dmap, *scores, *rows, *scratch, *keys, *packs;
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
      scores = carver.take(pixels * o.K);
      rows = carver.take(2 * pixels);
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

  LayerSums<T> sums_of(T* image, int64_t h) const {
    LayerSums<T> sums = {};
    sums.scores.weight = image + h * head_sums;
    sums.values = sums.scores.weight + head_sums / 2;
    return sums;
  }

  T* head_weight_sums(T* image, int64_t h) const { return sums_of(image, h).values + head_sums / 2 - kLanes<T>; }

  bool any_slot(const TileShape<T>& s) const {
    bool any = !s.keep;
    for (int64_t k = 0; s.keep && k < K; ++k) any |= s.keep[k] != 0;
    return any;
  }

  static void load_row(const T* from, int64_t count, int64_t panels, T* to) {
    std::memset(to, 0, size_t(panels * kPanel<T>) * sizeof(T));
    std::memcpy(to, from, size_t(count) * sizeof(T));
  }

  // Of the scores [panels][K][W] of one head: log-sum-exp, and entropy = log Σ e^(s − m) − Σ A (s − m), m the largest.
  void statistics(const TileShape<T>& s, const T* scores, int64_t count, T* entropy, T* lse) const {
    constexpr int W = kPanel<T>, V = kLanes<T>;
    const bool any = any_slot(s);
    T largest_of[W], total_of[W], mean_of[W];
    for (int64_t p = 0; p < s.panels; ++p, scores += K * W) {
      for (int h = 0; h < W; h += V) {
        Vec<T> largest = broadcast<T>(-T(__builtin_inff())), total = {}, weighted = {};
        for (int64_t k = 0; k < K; ++k) {
          if (!s.keep || s.keep[k]) largest = max_of<T>(load<T>(scores + k * W + h), largest);
        }
        for (int64_t k = 0; k < K; ++k) {
          if (s.keep && !s.keep[k]) continue;
          const Vec<T> below = load<T>(scores + k * W + h) - largest, e = exponential<T>(below);
          total += e;
          weighted += e * below;
        }
        store<T>(largest_of + h, largest);
        store<T>(total_of + h, total);
        store<T>(mean_of + h, weighted / total);
      }
      for (int64_t lane = 0; lane < W && p * W + lane < count; ++lane) {
        const T log_total = any ? std::log(total_of[lane]) : T(0);
        entropy[p * W + lane] = any ? log_total - mean_of[lane] : T(0);
        lse[p * W + lane] = any ? largest_of[lane] + log_total : T(0);
      }
    }
  }

  // rows: the gradients of entropy [panels][W], then those of lse.
  void statistics_backward(const TileShape<T>& s, const T* scores, const T* attention, const T* rows,
                           T* dscores) const {
    constexpr int W = kPanel<T>, V = kLanes<T>;
    for (int64_t p = 0; p < s.panels; ++p, scores += K * W, attention += K * W, dscores += K * W) {
      for (int h = 0; h < W; h += V) {
        const Vec<T> dentropy = load<T>(rows + p * W + h), dlse = load<T>(rows + (s.panels + p) * W + h);
        Vec<T> mean = {};
        for (int64_t k = 0; k < K; ++k) {
          if (s.keep && !s.keep[k]) continue;  // 0 · NaN is NaN
          mean += load<T>(attention + k * W + h) * load<T>(scores + k * W + h);
        }
        for (int64_t k = 0; k < K; ++k) {
          if (s.keep && !s.keep[k]) continue;
          const Vec<T> d = dlse - dentropy * (load<T>(scores + k * W + h) - mean);
          store<T>(dscores + k * W + h, load<T>(dscores + k * W + h) + load<T>(attention + k * W + h) * d);
        }
      }
    }
  }

  // sums [lanes] += Σ A·dmap of a tile: the gradient of a head's weight.
  void add_head_weight(const TileShape<T>& s, const T* attention, const T* dmap, T* sums) const {
    constexpr int V = kLanes<T>;
    Vec<T> total = load<T>(sums);
    for (int64_t i = 0; i < s.panels * K * kPanel<T>; i += V) total += load<T>(attention + i) * load<T>(dmap + i);
    store<T>(sums, total);
  }

  // task_sums: cleared, an image after the other; null in the forward.
  void run_task(int64_t task, Workspace& ws, T* task_sums) const {
    plan.walk(
        task,
        [&](int64_t b) {
          for (int64_t h = 0; h < a.heads; ++h) pack_head(b, h, ws);
        },
        [&](int64_t b, int64_t start, int64_t count) {
          TileShape<T> s{(count + kPanel<T> - 1) / kPanel<T>, d, 1, K, T(0), T(1),
                               a.slot_mask ? a.slot_mask + b * K : nullptr};
          const int64_t row = b * a.pixels + start;
          std::memset(ws.map, 0, size_t(s.panels * kPanel<T> * K) * sizeof(T));
          if (backward) load_pixels<T>(a.slot_map_grad + row * K, K, count, K, s.panels, ws.dmap);
          for (int64_t h = 0; h < a.heads; ++h) {
            const Layer<T>& pack = ws.heads[h];
            const int64_t row_of_head = (b * a.heads + h) * a.pixels + start;
            if (a.head_weights) s.share = a.head_weights[h];
            const int64_t q = b * a.q_stride[0] + h * a.q_stride[1] + start * a.q_stride[2];
            const int64_t to = ((b * a.heads + h) * a.pixels + start) * d;
            load_pixels<T>(a.q + q, a.q_stride[2], count, d, s.panels, ws.x);
            apply(pack.scores, ws.x, s.panels, false, ws.attention);
            if (a.entropy) statistics(s, ws.attention, count, a.entropy + row_of_head, a.lse + row_of_head);
            if (a.entropy_grad) std::memcpy(ws.scores, ws.attention, size_t(s.panels * kPanel<T> * K) * sizeof(T));
            softmax<T>(ws.attention, 1, K, s.panels, s.keep, s.share, ws.map);
            if (!backward) {
              apply(pack.values, ws.attention, s.panels, false, ws.dx);
              store_pixels<T>(ws.dx, d, count, d, false, a.out + to);
              continue;
            }
            const int64_t dy = b * a.out_grad_stride[0] + h * a.out_grad_stride[1] + start * a.out_grad_stride[2];
            load_pixels<T>(a.out_grad + dy, a.out_grad_stride[2], count, d, s.panels, ws.dy);
            T* const image_sums = task_sums + (b - plan.first_image(task)) * image_size;
            const LayerSums<T> sums = sums_of(image_sums, h);
            if (a.head_weights_grad) add_head_weight(s, ws.attention, ws.dmap, head_weight_sums(image_sums, h));
            attention_backward(pack, sums, s, ws.attention, ws.dy, ws.dmap, ws.dscores, ws.scratch);
            if (a.entropy_grad) {
              load_row(a.entropy_grad + row_of_head, count, s.panels, ws.rows);
              load_row(a.lse_grad + row_of_head, count, s.panels, ws.rows + s.panels * kPanel<T>);
              statistics_backward(s, ws.scores, ws.attention, ws.rows, ws.dscores);
            }
            scores_backward(pack, sums, s, ws.x, ws.dscores, ws.scratch, ws.dx);
            store_pixels<T>(ws.dx, d, count, d, false, a.q_grad + to);
          }
          if (!backward) store_pixels<T>(ws.map, K, count, K, false, a.slot_map + row * K);
        });
  }

  void reduce(T* images) const {
    const Partials parts{1, 0};
    for (int64_t b = 0; b < a.batch; ++b) {
      for (int64_t h = 0; h < a.heads; ++h) {
        const LayerSums<T> sums = sums_of(images + b * image_size, h);
        const int64_t to = (b * a.heads + h) * K * d;
        reduce_products<T>(sums.scores.weight, parts, K, d, d, 1, a.k_grad + to);
        reduce_products<T>(sums.values, parts, K, d, d, 1, a.v_grad + to);
        for (int64_t i = 0; i < K * d; ++i) a.k_grad[to + i] *= T(a.scale);
      }
    }
    for (int64_t h = 0; a.head_weights_grad && h < a.heads; ++h) {
      a.head_weights_grad[h] = 0;
      for (int64_t b = 0; b < a.batch; ++b) {
        T of_image;
        reduce_rows<T>(head_weight_sums(images + b * image_size, h), parts, 1, &of_image);
        a.head_weights_grad[h] += of_image;
      }
    }
  }
};

template <typename T>
void cross_attention(const CrossAttentionArgs<T>& args) {
  CrossAttention<T>(args).run();
}

}  // namespace fastslots::FASTSLOTS_ISA
