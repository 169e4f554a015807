// Few rows attend to many tokens: gathered = A·tokens, A = softmax over the tokens of rows·tokensᵀ.
//
// One pass over the tokens each way, a tile of them at a time, so that no [M, T] matrix is ever stored. Forward: the
// softmax is kept up as tiles come, by its largest score and its sum (rescaled where the largest grows); parts of the
// tokens are combined at the end, in their order. Backward, with lse and δ_m = dgathered_m · gathered_m:
//
//   A = exp(scores − lse)   ds = A∘(dgathered·tokensᵀ − δ)   dtokens = Aᵀ·dgathered + dsᵀ·rows   drows = ds·tokens
#pragma once

#include "api.h"
#include "plan.h"
#include "rows_gemm.h"
#include "weights.h"

namespace fastslots::FASTSLOTS_ISA {

template <typename T>
class TokenAttention {
 public:
  explicit TokenAttention(const TokenAttentionArgs<T>& args)
      : a(args), M(args.rows), S(args.width), lanes_M(whole_vectors(M)), lanes_S(whole_vectors(S)),
        backward(args.gathered_grad != nullptr), plan(args.batch, args.tokens, 1, 0, args.threads),
        part_size((M * lanes_S + 2 * lanes_M + 15) / 16 * 16) {}

  void run() {
    const int64_t workspace_size = Workspace(*this, nullptr).size;
    Block<T> parts(plan.pixel_parts * a.batch * part_size), workspaces(plan.workers * workspace_size);
    part_base = parts.get();
    auto body = [&](int64_t task, int thread) {
      Workspace workspace(*this, workspaces.get() + thread * workspace_size);
      const int64_t part = plan.pixel_part(task);
      plan.walk(
          task, [&](int64_t b) { begin_image(part, b, workspace); },
          [&](int64_t b, int64_t start, int64_t count) {
            if (backward) {
              backward_tile(sums_of(part, b), b, start, count, workspace);
            } else {
              forward_tile(sums_of(part, b), b, start, count, workspace);
            }
          });
    };
    parallel_for(plan.tasks(), a.threads, body);
    for (int64_t b = 0; b < a.batch; ++b) backward ? add_parts(b) : combine_parts(b);
  }

 private:
  const TokenAttentionArgs<T>& a;
  const int64_t M, S, lanes_M, lanes_S;
  const bool backward;
  const Plan<T> plan;
  const int64_t part_size;
  T* part_base = nullptr;

  static int64_t whole_vectors(int64_t n) { return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>; }

  // What a part of an image's tokens adds up to.
  struct Sums {
    T* rows;     // [M][lanes_S] gathered so far, or drows
    T* largest;  // [lanes_M] score (forward)
    T* total;    // [lanes_M] Σ exp(score − largest) (forward)
  };

  Sums sums_of(int64_t part, int64_t b) const {
    T* const base = part_base + (part * a.batch + b) * part_size;
    return {base, base + M * lanes_S, base + M * lanes_S + lanes_M};
  }

  struct Workspace {
    T *row_panels, *grad_panels, *rows, *grads, *lse, *delta, *factor, *tokens, *weights, *dscores, *dtokens;
    int64_t size;
    Workspace(const TokenAttention& o, T* base) {
      Carver<T> carver{base};
      const int64_t count = o.plan.tile_pixels(), panels = (o.M + kPanel<T> - 1) / kPanel<T> * kPanel<T> * o.S;
      row_panels = carver.take(panels);
      grad_panels = carver.take(o.backward ? panels : 0);
      rows = carver.take(o.backward ? o.M * o.lanes_S : 0);
      grads = carver.take(o.backward ? o.M * o.lanes_S : 0);
      lse = carver.take(o.lanes_M);
      delta = carver.take(o.lanes_M);
      factor = carver.take(o.lanes_M);
      const bool copied = o.S != o.lanes_S;
      tokens = carver.take(copied ? count * o.lanes_S : 0);
      weights = carver.take(count * o.lanes_M);
      dscores = carver.take(o.backward ? count * o.lanes_M : 0);
      dtokens = carver.take(o.backward && copied ? count * o.lanes_S : 0);
      size = carver.used;
    }
  };

  // [rows, S] -> [rows, lanes_S], zeros past S.
  void widen(const T* from, int64_t rows, T* to) const {
    for (int64_t i = 0; i < rows; ++i, to += lanes_S) {
      std::memcpy(to, from + i * S, size_t(S) * sizeof(T));
      for (int64_t j = S; j < lanes_S; ++j) to[j] = 0;
    }
  }

  void begin_image(int64_t part, int64_t b, Workspace& ws) const {
    const T* const rows = a.query_rows + b * M * S;
    const Sums sums = sums_of(part, b);
    pack_columns<T>(rows, M, S, ws.row_panels);
    std::memset(sums.rows, 0, size_t(part_size) * sizeof(T));
    for (int64_t m = 0; m < lanes_M; ++m) sums.largest[m] = -T(__builtin_inff());
    if (!backward) return;
    const T* const grads = a.gathered_grad + b * M * S;
    const T* const gathered = a.saved_gathered + b * M * S;
    pack_columns<T>(grads, M, S, ws.grad_panels);
    widen(rows, M, ws.rows);
    widen(grads, M, ws.grads);
    for (int64_t m = 0; m < lanes_M; ++m) {
      ws.lse[m] = m < M ? a.saved_lse[b * M + m] : T(0);
      T delta = 0;
      for (int64_t j = 0; m < M && j < S; ++j) delta += grads[m * S + j] * gathered[m * S + j];
      ws.delta[m] = delta;
    }
  }

  // The tile's tokens in whole vectors: in place where they come so.
  const T* tokens_of(int64_t b, int64_t start, int64_t count, Workspace& ws) const {
    const T* const from = a.token_rows + (b * a.tokens + start) * S;
    if (S == lanes_S) return from;
    widen(from, count, ws.tokens);
    return ws.tokens;
  }

  // out [count][lanes_M] = tokens · matrixᵀ, of which `panels` are the packed columns.
  void score(const T* tokens, int64_t count, const T* panels, T* out) const {
    product<T, false>({tokens, lanes_S}, {panels, kPanel<T>, S * kPanel<T>}, count, lanes_M, S, false, {out, lanes_M});
  }

  // sums [M][lanes_S] += weightsᵀ · tokens
  void gather(const T* weights, const T* tokens, int64_t count, T* sums) const {
    product<T, true>({weights, lanes_M}, {tokens, lanes_S, kPanel<T>}, M, lanes_S, count, true, {sums, lanes_S});
  }

  void forward_tile(const Sums& sums, int64_t b, int64_t start, int64_t count, Workspace& ws) const {
    const T* const tokens = tokens_of(b, start, count, ws);
    score(tokens, count, ws.row_panels, ws.weights);
    for (int64_t m = 0; m < lanes_M; m += kLanes<T>) {
      const Vec<T> before = load<T>(sums.largest + m);
      Vec<T> largest = before;
      for (int64_t t = 0; t < count; ++t) largest = max_of<T>(load<T>(ws.weights + t * lanes_M + m), largest);
      const Vec<T> factor = exponential<T>(before - largest);
      Vec<T> total = load<T>(sums.total + m) * factor;
      for (int64_t t = 0; t < count; ++t) {
        T* const at = ws.weights + t * lanes_M + m;
        const Vec<T> e = exponential<T>(load<T>(at) - largest);
        total += e;
        store<T>(at, e);
      }
      store<T>(sums.largest + m, largest);
      store<T>(sums.total + m, total);
      store<T>(ws.factor + m, factor);
    }
    for (int64_t m = 0; m < M; ++m) {
      if (ws.factor[m] == 1) continue;
      for (int64_t j = 0; j < lanes_S; ++j) sums.rows[m * lanes_S + j] *= ws.factor[m];
    }
    gather(ws.weights, tokens, count, sums.rows);
  }

  void backward_tile(const Sums& sums, int64_t b, int64_t start, int64_t count, Workspace& ws) const {
    const T* const tokens = tokens_of(b, start, count, ws);
    score(tokens, count, ws.row_panels, ws.weights);
    score(tokens, count, ws.grad_panels, ws.dscores);
    for (int64_t m = 0; m < lanes_M; m += kLanes<T>) {
      const Vec<T> lse = load<T>(ws.lse + m), delta = load<T>(ws.delta + m);
      for (int64_t at = m; at < count * lanes_M; at += lanes_M) {
        const Vec<T> weight = exponential<T>(load<T>(ws.weights + at) - lse);
        store<T>(ws.weights + at, weight);
        store<T>(ws.dscores + at, weight * (load<T>(ws.dscores + at) - delta));
      }
    }
    if (a.rows_grad) gather(ws.dscores, tokens, count, sums.rows);
    if (!a.tokens_grad) return;
    T* const to = a.tokens_grad + (b * a.tokens + start) * S;
    const Out<T> out = {S == lanes_S ? to : ws.dtokens, lanes_S};
    product<T, false>({ws.weights, lanes_M}, {ws.grads, lanes_S, kPanel<T>}, count, lanes_S, M, false, out);
    product<T, false>({ws.dscores, lanes_M}, {ws.rows, lanes_S, kPanel<T>}, count, lanes_S, M, true, out);
    for (int64_t t = 0; S != lanes_S && t < count; ++t) {
      std::memcpy(to + t * S, ws.dtokens + t * lanes_S, size_t(S) * sizeof(T));
    }
  }

  // gathered and lse of an image: its parts brought to one largest score and added. No tokens: 0 and −∞.
  void combine_parts(int64_t b) const {
    for (int64_t m = 0; m < M; ++m) {
      T largest = -T(__builtin_inff()), total = 0;
      for (int64_t part = 0; part < plan.pixel_parts; ++part) {
        const T candidate = sums_of(part, b).largest[m];
        largest = candidate > largest ? candidate : largest;
      }
      T* const to = a.gathered + (b * M + m) * S;
      for (int64_t j = 0; j < S; ++j) to[j] = 0;
      for (int64_t part = 0; part < plan.pixel_parts && a.tokens > 0; ++part) {
        const Sums sums = sums_of(part, b);
        const T factor = std::exp(sums.largest[m] - largest);
        total += sums.total[m] * factor;
        for (int64_t j = 0; j < S; ++j) to[j] += sums.rows[m * lanes_S + j] * factor;
      }
      for (int64_t j = 0; j < S && a.tokens > 0; ++j) to[j] /= total;
      a.lse[b * M + m] = largest + std::log(total);
    }
  }

  void add_parts(int64_t b) const {
    for (int64_t m = 0; a.rows_grad && m < M; ++m) {
      for (int64_t j = 0; j < S; ++j) {
        T total = 0;
        for (int64_t part = 0; part < plan.pixel_parts; ++part) total += sums_of(part, b).rows[m * lanes_S + j];
        a.rows_grad[(b * M + m) * S + j] = total;
      }
    }
  }
};

template <typename T>
void token_attention(const TokenAttentionArgs<T>& args) {
  TokenAttention<T>(args).run();
}

}  // namespace fastslots::FASTSLOTS_ISA
