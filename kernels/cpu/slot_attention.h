// One iteration of slot attention (Locatello et al. 2020): slots compete for tokens, and each takes their weighted mean.
//
//   A[l,:] = softmax_k(scale·k_l·q_k)    w[l,k] = A[l,k] + ε    n_k = Σ_l w[l,k]    u_k = Σ_l w[l,k] v_l / n_k
//
// and with u' the gradient of u, g_k = u'_k / n_k and h_k = −u'_k·u_k / n_k, that of the map added to ∂A:
//
//   ∂A[l,k] = g_k·v_l + h_k    ∂S = A·(∂A − Σ_k A·∂A)    ∂q_k = scale·Σ_l ∂S[l,k] k_l    ∂k_l = scale·Σ_k ∂S[l,k] q_k
//   ∂v_l = Σ_k w[l,k] g_k
//
// So keys and values are read once a direction. A tile of tokens takes all heads; the backward computes the softmax
// again, and nothing of size [L, K] is stored but the map, where it is asked for. A slot that is masked out has no
// weight at any token, and its update is zero.
#pragma once

#include "plan.h"
#include "weights.h"

namespace fastslots::FASTSLOTS_ISA {

template <typename T>
class SlotAttention {
 public:
  explicit SlotAttention(const SlotAttentionArgs<T>& args)
      : a(args), d(args.head_width), K(args.slots), backward(args.updates_grad != nullptr),
        plan(args.batch, args.tokens, args.heads * K * d, 0, args.threads),
        head_sums(gradient_size<T>(K, d) + K * kLanes<T>), image_size(args.heads * head_sums) {}

  void run() {
    const int64_t workspace_size = Workspace(*this, nullptr, nullptr).size;
    Block<T> images(plan.pixel_parts * a.batch * image_size), workspaces(plan.workers * workspace_size);
    Block<Head> heads(plan.workers * a.heads);
    image_base = images.get();
    auto body = [&](int64_t task, int thread) {
      Workspace workspace(*this, workspaces.get() + thread * workspace_size, heads.get() + thread * a.heads);
      run_task(task, workspace);
    };
    parallel_for(plan.tasks(), a.threads, body);
    reduce();
  }

 private:
  const SlotAttentionArgs<T>& a;
  const int64_t d, K;
  const bool backward;
  const Plan<T> plan;
  const int64_t head_sums, image_size;
  T* image_base = nullptr;

  struct Head {
    Layer<T> scores;     // of this image: [K, d]
    Linear<T> gradient;  // g [K, d], with h as its bias
  };

  struct Workspace {
    T *keys, *values, *attention, *dattention, *map, *dmap, *out, *scratch, *rows, *packs;
    Head* heads;
    int64_t size, pack_size;
    Workspace(const SlotAttention& o, T* base, Head* of_heads) : heads(of_heads) {
      Carver<T> carver{base};
      const int64_t tokens = o.plan.tile_pixels();
      keys = carver.take(tokens * o.d);
      values = carver.take(tokens * o.d);
      out = carver.take(tokens * o.d);
      attention = carver.take(tokens * o.K);
      dattention = carver.take(tokens * o.K);
      map = carver.take(tokens * o.K);
      dmap = carver.take(tokens * o.K);
      scratch = carver.take(tokens * kPanel<T>);
      rows = carver.take(2 * (o.K * o.d + 16));
      pack_size = 4 * (o.K * o.d + 16) + o.K + 16;
      packs = carver.take(o.a.heads * pack_size);
      size = carver.used;
    }
  };

  T* products_of(int64_t part, int64_t b, int64_t h) const {
    return image_base + (part * a.batch + b) * image_size + h * head_sums;
  }
  T* totals_of(int64_t part, int64_t b, int64_t h) const {
    return products_of(part, b, h) + gradient_size<T>(K, d);
  }
  bool kept(int64_t b, int64_t k) const { return !a.slot_mask || a.slot_mask[b * K + k]; }

  void pack_head(int64_t b, int64_t h, Workspace& ws) const {
    const T* const q = a.q + b * a.q_stride[0] + h * a.q_stride[1];
    for (int64_t i = 0; i < K; ++i) {
      for (int64_t j = 0; j < d; ++j) ws.rows[i * d + j] = T(a.scale) * q[i * a.q_stride[2] + j];
    }
    Carver<T> carver{ws.packs + h * ws.pack_size};
    ws.heads[h].scores.scores = pack_linear<T>(ws.rows, K, d, d, 1, nullptr, carver);
    if (!backward) return;
    T* const share = ws.rows + K * d;
    T* const offset = carver.take(K);
    for (int64_t i = 0; i < K; ++i) {
      const int64_t at = (b * a.heads + h) * K + i;
      const T total = a.saved_totals[at], inverse = total == T(0) ? T(0) : T(1) / total;
      T dot = 0;
      for (int64_t j = 0; j < d; ++j) {
        const T g = a.updates_grad[at * d + j];
        dot += g * a.saved_updates[at * d + j];
        share[i * d + j] = g * inverse;
      }
      offset[i] = -dot * inverse;
    }
    ws.heads[h].gradient = pack_linear<T>(share, K, d, d, 1, offset, carver);
  }

  // The weights of a tile, from its attention: A + ε of the slots there are, zero for the tokens past `count`.
  void add_epsilon(int64_t b, int64_t count, int64_t panels, T* attention) const {
    constexpr int W = kPanel<T>, V = kLanes<T>;
    for (int64_t p = 0; p < panels; ++p) {
      for (int64_t k = 0; k < K; ++k, attention += W) {
        if (!kept(b, k)) continue;
        for (int lane = 0; lane < W; lane += V) {
          store<T>(attention + lane, load<T>(attention + lane) + broadcast<T>(T(a.eps)));
        }
        for (int64_t lane = count - p * W; lane < W; ++lane) attention[lane] = 0;
      }
    }
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
          const int64_t map_size = s.panels * kPanel<T> * K, row = (b * a.tokens + start) * K;
          std::memset(ws.map, 0, size_t(map_size) * sizeof(T));
          std::memset(ws.dmap, 0, size_t(map_size) * sizeof(T));
          if (backward && a.map_grad) load_pixels<T>(a.map_grad + row, K, count, K, s.panels, ws.dmap);
          for (int64_t h = 0; h < a.heads; ++h) {
            load_pixels<T>(a.k + b * a.k_stride[0] + h * a.k_stride[1] + start * a.k_stride[2], a.k_stride[2], count, d,
                           s.panels, ws.keys);
            load_pixels<T>(a.v + b * a.v_stride[0] + h * a.v_stride[1] + start * a.v_stride[2], a.v_stride[2], count, d,
                           s.panels, ws.values);
            attend(ws.heads[h].scores, s, ws.keys, ws.attention, ws.map);
            if (backward) {
              tile_backward(part, b, h, start, count, s, ws);
              continue;
            }
            add_epsilon(b, count, s.panels, ws.attention);
            accumulate_products<T>(ws.attention, K, ws.values, d, s.panels, ws.scratch, products_of(part, b, h));
            accumulate_rows<T>(ws.attention, K, s.panels, totals_of(part, b, h));
          }
          if (a.map) store_pixels<T>(ws.map, K, count, K, false, a.map + row);
        });
  }

  // Zeros for the slots that are masked out: what their weights of 0 would be multiplied with may be no number.
  void clear_masked(int64_t b, int64_t panels, T* dattention) const {
    for (int64_t row = 0; a.slot_mask && row < panels * K; ++row) {
      if (!kept(b, row % K)) std::memset(dattention + row * kPanel<T>, 0, kPanel<T> * sizeof(T));
    }
  }

  void tile_backward(int64_t part, int64_t b, int64_t h, int64_t start, int64_t count, const TileShape<T>& s,
                     Workspace& ws) const {
    const Head& head = ws.heads[h];
    const int64_t to = ((b * a.heads + h) * a.tokens + start) * d;
    apply(head.gradient, ws.values, s.panels, false, ws.dattention);
    clear_masked(b, s.panels, ws.dattention);
    softmax_backward<T>(ws.attention, ws.dmap, T(1), 1, K, s.panels, ws.dattention);
    accumulate_products<T>(ws.dattention, K, ws.keys, d, s.panels, ws.scratch, products_of(part, b, h));
    apply_transposed(head.scores.scores, ws.dattention, s.panels, ws.out);
    store_pixels<T>(ws.out, d, count, d, false, a.k_grad + to);
    add_epsilon(b, count, s.panels, ws.attention);
    apply_transposed(head.gradient, ws.attention, s.panels, ws.out);
    store_pixels<T>(ws.out, d, count, d, false, a.v_grad + to);
  }

  void reduce() const {
    const Partials parts{plan.pixel_parts, a.batch * image_size};
    for (int64_t b = 0; b < a.batch; ++b) {
      for (int64_t h = 0; h < a.heads; ++h) {
        const int64_t at = (b * a.heads + h) * K;
        T* const to = (backward ? a.q_grad : a.updates) + at * d;
        reduce_products<T>(products_of(0, b, h), parts, K, d, d, 1, to);
        if (backward) {
          for (int64_t i = 0; i < K * d; ++i) to[i] *= T(a.scale);
          continue;
        }
        reduce_rows<T>(totals_of(0, b, h), parts, K, a.totals + at);
        for (int64_t k = 0; k < K; ++k) {
          const T total = a.totals[at + k], inverse = total == T(0) ? T(0) : T(1) / total;
          for (int64_t j = 0; j < d; ++j) to[k * d + j] *= inverse;
        }
      }
    }
  }
};

template <typename T>
void slot_attention(const SlotAttentionArgs<T>& args) {
  SlotAttention<T>(args).run();
}

}  // namespace fastslots::FASTSLOTS_ISA
