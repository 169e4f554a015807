// Slot attention in which no token is projected: its keys and values are the tokens themselves, normed on the way, since
// the projections are folded into the slots. (slot_attention.h has keys and values of their own, and heads.)
//
//   n_t = (x_t − mean)/σ    A[t,:] = softmax_k(r_k·n_t + o_k)    w = A + ε    N_k = Σ_t w[t,k]    u_k = Σ_t w[t,k] n_t / N_k
//
// and with u' the gradient of u, g_k = u'_k / N_k and h_k = −u'_k·u_k / N_k, that of the map added to ∂A:
//
//   ∂A = g_k·n_t + h_k    ∂S = A·(∂A − Σ_k A·∂A)    ∂r_k = Σ_t ∂S n_t    ∂o_k = Σ_t ∂S    ∂n_t = Σ_k (∂S r_k + w g_k)
//   ∂x_t = (∂n_t − mean(∂n_t) − n_t·mean(∂n_t∘n_t)) / σ
//
// A normed token has mean 0, so r and g without their means give the same scores and a ∂n_t of mean 0, and the last
// mean is Σ_k (∂S (r_k·n_t) + w (g_k·n_t)) / S, of numbers that are there. A panel of tokens at a time lies in the
// fastest cache in two forms: as columns for the scores, where a vector is one feature of many tokens, and as rows for the
// sums over tokens and for the gradient, which is added to what the iterations after this one have left there.
#pragma once

#include "plan.h"
#include "row_maps.h"
#include "weights.h"

namespace fastslots::FASTSLOTS_ISA {

template <typename T>
class FoldedSlotAttention {
 public:
  explicit FoldedSlotAttention(const FoldedSlotAttentionArgs<T>& args)
      : a(args), K(args.slots), S(args.width), lanes_S(whole_lanes<T>(S)), backward(args.gathered_grad != nullptr),
        normed(args.norm_eps >= 0), maps(backward ? 2 * K : K),
        plan(args.batch, args.tokens, K * S, 0, args.threads, kPanel<T>),
        image_size((K * (lanes_S + kLanes<T>) + 15) / 16 * 16) {}

  void run() {
    const int64_t workspace_size = Workspace(*this, nullptr).size;
    Block<T> images(plan.pixel_parts * a.batch * image_size), workspaces(plan.workers * workspace_size);
    image_base = images.get();
    auto body = [&](int64_t task, int thread) {
      Workspace ws(*this, workspaces.get() + thread * workspace_size);
      const int64_t part = plan.pixel_part(task);
      plan.walk(
          task,
          [&](int64_t b) {
            pack(b, ws);
            std::memset(products_of(part, b), 0, size_t(image_size) * sizeof(T));
          },
          [&](int64_t b, int64_t start, int64_t count) { tile(part, b, start, count, ws); });
    };
    parallel_for(plan.tasks(), a.threads, body);
    for (int64_t b = 0; b < a.batch; ++b) reduce(b);
  }

 private:
  static constexpr int W = kPanel<T>;
  const FoldedSlotAttentionArgs<T>& a;
  const int64_t K, S, lanes_S;
  const bool backward, normed;
  const int64_t maps;  // rows that meet a token: r, and g behind it
  const Plan<T> plan;
  const int64_t image_size;
  T* image_base = nullptr;

  struct Workspace {
    T *columns, *rows, *mean, *rstd, *scores, *attention, *weights, *map, *dmap, *dtokens, *matrix, *offsets, *packed;
    int64_t size;
    Workspace(const FoldedSlotAttention& o, T* base) {
      Carver<T> carver{base};
      columns = carver.take(W * o.S);
      rows = carver.take(W * o.lanes_S);
      mean = carver.take(W);
      rstd = carver.take(W);
      scores = carver.take(W * o.maps);
      attention = carver.take(W * o.K);
      weights = carver.take(W * o.maps);
      map = carver.take(W * o.K);
      dmap = carver.take(W * o.K);
      dtokens = carver.take(o.S != o.lanes_S ? W * o.lanes_S : 0);
      matrix = carver.take(o.maps * o.lanes_S);
      offsets = carver.take(o.maps);
      packed = carver.take(o.maps * o.S);
      size = carver.used;
    }
  };

  T* products_of(int64_t part, int64_t b) const { return image_base + (part * a.batch + b) * image_size; }
  T* totals_of(int64_t part, int64_t b) const { return products_of(part, b) + K * lanes_S; }
  bool kept(int64_t b, int64_t k) const { return !a.slot_mask || a.slot_mask[b * K + k]; }

  // r and o of an image, then g and h; zeros for slots that are masked out, whatever they hold.
  void pack(int64_t b, Workspace& ws) const {
    std::memset(ws.matrix, 0, size_t(maps * lanes_S) * sizeof(T));
    for (int64_t k = 0; k < K; ++k) {
      const int64_t at = b * K + k;
      ws.offsets[k] = kept(b, k) ? a.offsets[at] : T(0);
      if (kept(b, k)) std::memcpy(ws.matrix + k * lanes_S, a.slot_rows + at * S, size_t(S) * sizeof(T));
      if (!backward) continue;
      const T total = kept(b, k) ? a.saved_totals[at] : T(0), inverse = total == T(0) ? T(0) : T(1) / total;
      T dot = 0;
      for (int64_t j = 0; inverse != T(0) && j < S; ++j) {
        const T g = a.gathered_grad[at * S + j];
        dot += g * a.saved_gathered[at * S + j];
        ws.matrix[(K + k) * lanes_S + j] = g * inverse;
      }
      ws.offsets[K + k] = -dot * inverse;
    }
    for (int64_t m = 0; normed && m < maps; ++m) {
      T* const row = ws.matrix + m * lanes_S;
      T mean = 0;
      for (int64_t j = 0; j < S; ++j) mean += row[j];
      mean /= T(S);
      for (int64_t j = 0; j < S; ++j) row[j] -= mean;
    }
    pack_rows<T>(ws.matrix, maps, S, lanes_S, 1, ws.packed);
  }

  // The tile's tokens as columns [S][W], zeros past `count`, and as rows [count][lanes_S].
  const T* load_tokens(int64_t b, int64_t start, int64_t count, Workspace& ws) const {
    const T* const from = a.token_rows + (b * a.tokens + start) * S;
    load_pixels<T>(from, S, count, S, 1, ws.columns);
    if (!normed && S == lanes_S) return from;
    if (normed) normalise<T>(ws.columns, S, 1, T(a.norm_eps), ws.columns, ws.rstd, ws.mean);
    for (int64_t t = 0; t < count; ++t) {
      const Vec<T> mean = broadcast<T>(normed ? ws.mean[t] : T(0)), rstd = broadcast<T>(normed ? ws.rstd[t] : T(1));
      T* const row = ws.rows + t * lanes_S;
      feature_blocks<T>(S, [&](int64_t j, int width, int) {
        store<T>(row + j, (load_part<T>(from + t * S + j, width) - mean) * rstd);
      });
      for (int64_t j = S; j < lanes_S; ++j) row[j] = 0;
    }
    return ws.rows;
  }

  // out [K][W] = the attention with ε, zeros for masked slots and for tokens past `count`.
  void weigh(int64_t b, int64_t count, const T* attention, T* out) const {
    for (int64_t k = 0; k < K; ++k, attention += W, out += W) {
      const Vec<T> eps = broadcast<T>(kept(b, k) ? T(a.eps) : T(0));
      for (int lane = 0; lane < W; lane += kLanes<T>) store<T>(out + lane, load<T>(attention + lane) + eps);
      for (int64_t lane = count; lane < W; ++lane) out[lane] = 0;
    }
  }

  void tile(int64_t part, int64_t b, int64_t start, int64_t count, Workspace& ws) const {
    const uint8_t* const keep = a.slot_mask ? a.slot_mask + b * K : nullptr;
    const int64_t of_map = (b * a.tokens + start) * K;
    const T* const rows = load_tokens(b, start, count, ws);
    multiply<T>(ws.packed, maps, S, ws.offsets, ws.columns, 1, false, ws.scores);
    std::memcpy(ws.attention, ws.scores, size_t(K * W) * sizeof(T));
    std::memset(ws.map, 0, size_t(K * W) * sizeof(T));
    softmax<T>(ws.attention, 1, K, 1, keep, T(1), ws.map);
    if (a.map) store_pixels<T>(ws.map, K, count, K, false, a.map + of_map);
    if (!backward) {
      weigh(b, count, ws.attention, ws.weights);
    } else {
      std::memset(ws.dmap, 0, size_t(K * W) * sizeof(T));
      if (a.map_grad) load_pixels<T>(a.map_grad + of_map, K, count, K, 1, ws.dmap);
      std::memcpy(ws.weights, ws.scores + K * W, size_t(K * W) * sizeof(T));
      softmax_backward<T>(ws.attention, ws.dmap, T(1), 1, K, 1, ws.weights);
      for (int64_t k = 0; k < K; ++k) {
        for (int64_t lane = count; lane < W; ++lane) ws.weights[k * W + lane] = 0;
      }
    }
    product<T, false>({ws.weights, W}, {rows, lanes_S, W}, K, lanes_S, count, true, {products_of(part, b), lanes_S});
    accumulate_rows<T>(ws.weights, K, 1, totals_of(part, b));
    if (a.tokens_grad) {
      weigh(b, count, ws.attention, ws.weights + K * W);
      token_gradient(rows, (b * a.tokens + start) * S, count, ws);
    }
  }

  // weights: ∂S, then w, [2K][W].
  void token_gradient(const T* rows, int64_t at, int64_t count, Workspace& ws) const {
    if (normed) scale_gradient(ws);
    T* const to = a.tokens_grad + at;
    const bool whole = S == lanes_S;
    product<T, true>({ws.weights, W}, {ws.matrix, lanes_S, W}, count, lanes_S, maps, whole && a.add,
                     {whole ? to : ws.dtokens, lanes_S});
    if (whole && !normed) return;
    for (int64_t t = 0; t < count; ++t) {
      const Vec<T> along = broadcast<T>(normed ? ws.mean[t] : T(0));
      const T* const from = whole ? to + t * S : ws.dtokens + t * lanes_S;
      feature_blocks<T>(S, [&](int64_t j, int width, int done) {
        Vec<T> d = load_part<T>(from + j, width) - along * load_part<T>(rows + t * lanes_S + j, width);
        if (!whole && a.add) {
          Vec<T> before = load_part<T>(to + t * S + j, width);
          for (int i = 0; i < done; ++i) before[i] = to[t * S + j + i], d[i] = T(0);  // added by the block before
          d += before;
        }
        store_part<T>(to + t * S + j, d, width);
      });
    }
  }

  // Divides the weights by σ, and leaves mean(∂n∘n)/σ of each token where its mean was.
  void scale_gradient(Workspace& ws) const {
    for (int lane = 0; lane < W; lane += kLanes<T>) {
      const auto at = [&](const T* from) { return load<T>(from + lane); };
      const Vec<T> rstd = at(ws.rstd);
      Vec<T> dot = {};
      for (int64_t m = 0; m < maps; ++m) {
        const Vec<T> weight = at(ws.weights + m * W) * rstd;
        dot += weight * (at(ws.scores + m * W) - broadcast<T>(ws.offsets[m]));
        store<T>(ws.weights + m * W + lane, weight);
      }
      store<T>(ws.mean + lane, dot * (T(1) / T(S)));
    }
  }

  void reduce(int64_t b) const {
    const Partials parts{plan.pixel_parts, a.batch * image_size};
    T* const sums = backward ? a.offsets_grad : a.totals;
    reduce_rows<T>(totals_of(0, b), parts, K, sums + b * K);
    for (int64_t k = 0; k < K; ++k) {
      const T total = sums[b * K + k];
      const T factor = backward ? T(1) : total == T(0) ? T(0) : T(1) / total;
      T* const to = (backward ? a.rows_grad : a.gathered) + (b * K + k) * S;
      for (int64_t j = 0; j < S; ++j) {
        T sum = 0;
        for (int64_t part = 0; part < parts.count; ++part) sum += products_of(part, b)[k * lanes_S + j];
        to[j] = sum * factor;
      }
    }
  }
};

template <typename T>
void folded_slot_attention(const FoldedSlotAttentionArgs<T>& args) {
  FoldedSlotAttention<T>(args).run();
}

}  // namespace fastslots::FASTSLOTS_ISA
