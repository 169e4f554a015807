// The encoder's Transformer for one image: K queries attend to its tokens, then to one another, then the feed-forward.
//
// The cross-attention is folded from the query side, as in fastslots/models/encoder.py: with q = to_q(norm_q(x)),
//
//   rows[hk] = scale · Wk_hᵀ q_hk       A = softmax_t((γ∘rows) · tokens)      gathered = A · tokens
//   out[k]   = to_out(.. Wv_h (γ∘gathered_hk + β) ..)
//
// Tokens come normalised once. All is row-major with whole vectors (row_maps.h), M = H·K rows in the cross-attention.
#pragma once

#include "heads.h"

namespace fastslots::FASTSLOTS_ISA {

template <typename T>
struct QueryLayer {
  RowNorm<T> norm_q, norm_tokens, norm_self, norm_ff;
  RowMap<T> to_q, to_out, qkv, self_out, widen, narrow;
  const T *key = nullptr, *value = nullptr;  // [S][whole S], as torch keeps them
  const T* value_heads = nullptr;
  const T* key_heads = nullptr;
  const T* value_bias = nullptr;
  int64_t key_sum = 0, value_sum = 0, value_bias_sum = 0;
};

// What the backward of a layer reads.
template <typename T>
struct QueryState {
  T *normed1, *rstd1, *scaled1, *q, *rows, *attention, *gathered, *heads1;
  T *normed2, *rstd2, *scaled2, *qkv, *weights, *heads2;
  T *normed3, *rstd3, *scaled3, *hidden, *slope;
};

template <typename T>
class QueryTransformer {
 public:
  int64_t K = 0, S = 0, H = 0, tokens = 0;
  int64_t count = 0;
  QueryLayer<T> layers[kMostMaps];
  T eps = T(0);

  int64_t d() const { return S / H; }
  int64_t L() const { return whole_lanes<T>(S); }
  int64_t M() const { return H * K; }
  int64_t lanes_M() const { return whole_lanes<T>(M()); }

  // next(): the addresses of the layer's arrays, in the order of `encoder_tensors` (fastslots/ops/encoder.py).
  template <typename Next>
  void pack(Next next, const int64_t* ff_widths, Packer<T>& pack) {
    for (int64_t i = 0; i < count; ++i) {
      QueryLayer<T>& l = layers[i];
      const auto norm = [&] {
        const T* const gamma = next();
        return pack_row_norm<T>(gamma, next(), S, pack);
      };
      const auto map = [&](int64_t in, int64_t out) {
        const T* const weight = next();
        return pack_row_map<T>(weight, next(), in, out, pack);
      };
      l.norm_q = norm();
      l.norm_tokens = norm();
      l.to_q = map(S, S);
      const T* const kv = next();
      const T* const kv_bias = next();
      l.key = heads().pack(kv, S, 1, pack.weights), l.value = heads().pack(kv + S * S, S, 1, pack.weights);
      if (pack.forward) l.value_heads = heads().pack_transposed(kv + S * S, S, 1, pack.weights);
      if (pack.backward) l.key_heads = heads().pack_transposed(kv, S, 1, pack.weights);
      l.value_bias = pack_vector<T>(kv_bias + S, S, pack.weights);
      l.key_sum = pack.sum(S * L()), l.value_sum = pack.sum(S * L()), l.value_bias_sum = pack.sum(L());
      l.to_out = map(S, S);
      l.norm_self = norm();
      const T* const qkv = next();
      const T* const qkv_bias = next();
      T* const bias = pack.weights.take(3 * S);  // that of the keys cancels in the softmax: 0
      {
        const Piece<T> piece(pack.weights, 6 * S * S);
        for (int64_t j = 0; piece.fills() && j < 3 * S; ++j) bias[j] = j < S || j >= 2 * S ? qkv_bias[j] : T(0);
        l.qkv = pack_row_map<T>(qkv, bias, S, 3 * S, pack);
      }
      l.self_out = map(S, S);
      l.norm_ff = norm();
      l.widen = map(S, ff_widths[i]);
      l.narrow = map(ff_widths[i], S);
    }
  }

  void carve(Carver<T>& c, QueryState<T>* states) const {
    const int64_t rows = K * L();
    for (int64_t i = 0; i < count; ++i) {
      QueryState<T>& s = states[i];
      s.normed1 = c.take(rows), s.rstd1 = c.take(K), s.scaled1 = c.take(rows), s.q = c.take(rows);
      s.rows = c.take(M() * L()), s.attention = c.take(tokens * lanes_M()), s.gathered = c.take(M() * L());
      s.heads1 = c.take(rows);
      s.normed2 = c.take(rows), s.rstd2 = c.take(K), s.scaled2 = c.take(rows);
      s.qkv = c.take(K * whole_lanes<T>(3 * S)), s.weights = c.take(H * K * K), s.heads2 = c.take(rows);
      s.normed3 = c.take(rows), s.rstd3 = c.take(K), s.scaled3 = c.take(rows);
      const int64_t wide = K * whole_lanes<T>(layers[i].widen.out);
      s.hidden = c.take(wide), s.slope = c.take(wide);
    }
  }

  // One thread's memory between the products.
  struct Workspace {
    T *panels, *dpanels, *m1, *m2, *m3, *k1, *k2, *wide, *head, *scores, *sums;
  };

  Workspace carve_workspace(Carver<T>& c, bool backward) const {
    Workspace w;
    int64_t widest = whole_lanes<T>(3 * S);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t wide = whole_lanes<T>(layers[i].widen.out);
      widest = wide > widest ? wide : widest;
    }
    const int64_t panels = L() * whole_panels<T>(M());
    w.panels = c.take(panels), w.dpanels = c.take(backward ? panels : 0);
    w.m1 = c.take(M() * L()), w.m2 = c.take(M() * L()), w.m3 = c.take(M() * L());
    w.k1 = c.take(K * L()), w.k2 = c.take(K * L()), w.wide = c.take(K * widest);
    w.head = c.take(heads().scratch_size());
    w.scores = c.take(backward ? kRowTile * lanes_M() : 0);
    w.sums = c.take(3 * lanes_M());
    return w;
  }

  // x [K][L]: the queries, replaced by what the layers make of them.
  void forward(const T* n, T* x, QueryState<T>* states, Workspace& w) const {
    for (int64_t i = 0; i < count; ++i) {
      const QueryLayer<T>& l = layers[i];
      QueryState<T>& s = states[i];
      cross(l, s, n, x, w);
      self(l, s, x, w);
      normalise_rows<T>(x, K, S, eps, s.normed3, s.rstd3);
      scale_rows<T>(l.norm_ff, s.normed3, K, s.scaled3);
      apply_rows<T>(l.widen, s.scaled3, K, false, s.hidden);
      gelu<T>(s.hidden, s.slope, K * whole_lanes<T>(l.widen.out));
      apply_rows<T>(l.narrow, s.hidden, K, true, x);
    }
  }

  // dx: gradient of the result, replaced by that of the queries. Adds to dtokens [tokens][L] and to the arena.
  void backward(const T* n, T* dx, T* dn, const QueryState<T>* states, T* sums, Workspace& w) const {
    for (int64_t i = count - 1; i >= 0; --i) {
      const QueryLayer<T>& l = layers[i];
      const QueryState<T>& s = states[i];
      accumulate_row_map<T>(l.narrow, s.hidden, dx, K, sums);
      apply_rows_transposed<T>(l.narrow, dx, K, false, w.wide);
      scale_by<T>(w.wide, s.slope, K * whole_lanes<T>(l.widen.out));
      normed_map_backward(l.widen, l.norm_ff, s.scaled3, s.normed3, s.rstd3, sums, dx, w);
      self_backward(l, s, dx, sums, w);
      cross_backward(l, s, n, dx, dn, sums, w);
    }
  }

 private:
  Heads<T> heads() const { return {K, H, d(), S, L()}; }

  // The gradient w.wide of a map's result back through the norm before it, added to dx.
  void normed_map_backward(const RowMap<T>& map, const RowNorm<T>& norm, const T* scaled, const T* normed, const T* rstd,
                           T* sums, T* dx, Workspace& w) const {
    accumulate_row_map<T>(map, scaled, w.wide, K, sums);
    apply_rows_transposed<T>(map, w.wide, K, false, w.k1);
    scale_rows_backward<T>(norm, normed, K, sums, w.k1);
    normalise_rows_backward<T>(w.k1, normed, rstd, K, S, true, dx);
  }

  void narrow(const T* rows, const T* transposed, T* x, Workspace& w) const {
    heads().narrow(rows, transposed, x, w.head);
    for (int64_t k = 0; k < K; ++k) std::memset(x + k * L() + S, 0, size_t(L() - S) * sizeof(T));
  }

  void cross(const QueryLayer<T>& l, QueryState<T>& s, const T* n, T* x, Workspace& w) const {
    normalise_rows<T>(x, K, S, eps, s.normed1, s.rstd1);
    scale_rows<T>(l.norm_q, s.normed1, K, s.scaled1);
    apply_rows<T>(l.to_q, s.scaled1, K, false, s.q);
    heads().widen(s.q, l.key, s.rows);
    const T scale = T(1) / std::sqrt(T(S));
    each_row(M(), [&](int64_t at, int64_t j) {
      const Vec<T> row = load<T>(s.rows + at) * scale;
      store<T>(s.rows + at, row);
      store<T>(w.m1 + at, row * load<T>(l.norm_tokens.gamma + j));
    });
    attend(s, n, w);
    each_row(M(), [&](int64_t at, int64_t j) {
      store<T>(w.m1 + at, load<T>(s.gathered + at) * load<T>(l.norm_tokens.gamma + j) + load<T>(l.norm_tokens.beta + j));
    });
    narrow(w.m1, l.value_heads, s.heads1, w);
    for (int64_t k = 0; k < K; ++k) add_to<T>(s.heads1 + k * L(), l.value_bias, L());
    apply_rows<T>(l.to_out, s.heads1, K, true, x);
  }

  // Calls body(offset, column) for every vector of `rows` rows.
  template <typename Body>
  void each_row(int64_t rows, Body body) const {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < L(); j += kLanes<T>) body(i * L() + j, j);
    }
  }

  // w.m1: rows -> s.attention and s.gathered.
  void attend(QueryState<T>& s, const T* n, Workspace& w) const {
    const int64_t width = lanes_M();
    T *const largest = w.sums, *const total = largest + width, *const part = total + width;
    pack_columns<T>(w.m1, M(), L(), w.panels);
    for (int64_t m = 0; m < width; ++m) largest[m] = -T(__builtin_inff()), total[m] = 0;
    row_tiles(tokens, [&](int64_t first, int64_t count) {
      T* const a = s.attention + first * width;
      product<T, false>({n + first * L(), L()}, {w.panels, kPanel<T>, L() * kPanel<T>}, count, width, L(), false,
                        {a, width});
      for (int64_t m = 0; m < width; m += kLanes<T>) {
        Vec<T> most = load<T>(largest + m);
        for (int64_t t = 0; t < count; ++t) most = max_of<T>(load<T>(a + t * width + m), most);
        store<T>(largest + m, most);
      }
    });
    row_tiles(tokens, [&](int64_t first, int64_t count) {
      T* const a = s.attention + first * width;
      for (int64_t m = 0; m < width; m += kLanes<T>) {
        const Vec<T> most = load<T>(largest + m);
        Vec<T> sum = {};
        for (int64_t t = 0; t < count; ++t) {
          const Vec<T> e = exponential<T>(load<T>(a + t * width + m) - most);
          sum += e;
          store<T>(a + t * width + m, e);
        }
        store<T>(part + m, sum);
      }
      add_to<T>(total, part, width);
    });
    for (int64_t m = 0; m < width; m += kLanes<T>) store<T>(total + m, T(1) / load<T>(total + m));
    std::memset(s.gathered, 0, size_t(M() * L()) * sizeof(T));
    row_tiles(tokens, [&](int64_t first, int64_t count) {
      T* const a = s.attention + first * width;
      for (int64_t t = 0; t < count; ++t) scale_by<T>(a + t * width, total, width);
      product<T, true>({a, width}, {n + first * L(), L(), kPanel<T>}, M(), L(), count, true, {s.gathered, L()});
    });
  }

  void cross_backward(const QueryLayer<T>& l, const QueryState<T>& s, const T* n, T* dx, T* dn, T* sums,
                      Workspace& w) const {
    accumulate_row_map<T>(l.to_out, s.heads1, dx, K, sums);
    apply_rows_transposed<T>(l.to_out, dx, K, false, w.k2);
    add_columns<T>(w.k2, K, L(), sums + l.value_bias_sum);
    each_row(M(), [&](int64_t at, int64_t j) {
      store<T>(w.m1 + at, load<T>(s.gathered + at) * load<T>(l.norm_tokens.gamma + j) + load<T>(l.norm_tokens.beta + j));
    });
    heads().accumulate(w.k2, w.m1, sums + l.value_sum);
    heads().widen(w.k2, l.value, w.m2);  // the gradient of γ∘gathered + β
    scale_rows_backward<T>(l.norm_tokens, s.gathered, M(), sums, w.m2);
    each_row(M(), [&](int64_t at, int64_t j) {
      store<T>(w.m1 + at, load<T>(s.rows + at) * load<T>(l.norm_tokens.gamma + j));
    });
    attend_backward(s, n, dn, w);  // w.m3: the gradient of γ∘rows
    const T scale = T(1) / std::sqrt(T(S));
    for (int64_t j = 0; j < L(); j += kLanes<T>) {
      Vec<T> dgamma = load<T>(sums + l.norm_tokens.gamma_sum + j);
      const Vec<T> gamma = load<T>(l.norm_tokens.gamma + j);
      for (int64_t m = 0; m < M(); ++m) {
        const Vec<T> d = load<T>(w.m3 + m * L() + j);
        dgamma += d * load<T>(s.rows + m * L() + j);
        store<T>(w.m3 + m * L() + j, d * gamma * scale);
      }
      store<T>(sums + l.norm_tokens.gamma_sum + j, dgamma);
    }
    heads().accumulate(s.q, w.m3, sums + l.key_sum);
    narrow(w.m3, l.key_heads, w.wide, w);
    normed_map_backward(l.to_q, l.norm_q, s.scaled1, s.normed1, s.rstd1, sums, dx, w);
  }

  // From w.m1 (rows) and w.m2 (gradient of gathered): w.m3 = the gradient of the rows, and that of the tokens to dn.
  void attend_backward(const QueryState<T>& s, const T* n, T* dn, Workspace& w) const {
    const int64_t width = lanes_M();
    T* const delta = w.sums;
    pack_columns<T>(w.m2, M(), L(), w.dpanels);
    for (int64_t m = 0; m < width; ++m) {
      Vec<T> dot = {};
      for (int64_t j = 0; m < M() && j < L(); j += kLanes<T>) {
        dot += load<T>(w.m2 + m * L() + j) * load<T>(s.gathered + m * L() + j);
      }
      delta[m] = sum_of<T>(dot);
    }
    std::memset(w.m3, 0, size_t(M() * L()) * sizeof(T));
    row_tiles(tokens, [&](int64_t first, int64_t count) {
      const T* const a = s.attention + first * width;
      const T* const of_tile = n + first * L();
      product<T, false>({of_tile, L()}, {w.dpanels, kPanel<T>, L() * kPanel<T>}, count, width, L(), false,
                        {w.scores, width});
      for (int64_t m = 0; m < width; m += kLanes<T>) {
        const Vec<T> of_row = load<T>(delta + m);
        for (int64_t t = 0; t < count; ++t) {
          T* const at = w.scores + t * width + m;
          store<T>(at, load<T>(a + t * width + m) * (load<T>(at) - of_row));
        }
      }
      product<T, false>({a, width}, {w.m2, L(), kPanel<T>}, count, L(), M(), true, {dn + first * L(), L()});
      product<T, false>({w.scores, width}, {w.m1, L(), kPanel<T>}, count, L(), M(), true, {dn + first * L(), L()});
      product<T, true>({w.scores, width}, {of_tile, L(), kPanel<T>}, M(), L(), count, true, {w.m3, L()});
    });
  }

  // Among the queries: K² small sums a head.
  void self(const QueryLayer<T>& l, QueryState<T>& s, T* x, Workspace&) const {
    normalise_rows<T>(x, K, S, eps, s.normed2, s.rstd2);
    scale_rows<T>(l.norm_self, s.normed2, K, s.scaled2);
    apply_rows<T>(l.qkv, s.scaled2, K, false, s.qkv);
    const int64_t stride = whole_lanes<T>(3 * S);
    const T scale = T(1) / std::sqrt(T(S));
    std::memset(s.heads2, 0, size_t(K * L()) * sizeof(T));
    for (int64_t h = 0; h < H; ++h) {
      const T *const q = s.qkv + h * d(), *const k = q + S, *const v = k + S;
      for (int64_t i = 0; i < K; ++i) {
        T* const a = s.weights + (h * K + i) * K;
        T largest = -T(__builtin_inff()), total = 0;
        for (int64_t j = 0; j < K; ++j) {
          a[j] = scale * dot(q + i * stride, k + j * stride);
          largest = a[j] > largest || a[j] != a[j] ? a[j] : largest;
        }
        for (int64_t j = 0; j < K; ++j) total += a[j] = std::exp(a[j] - largest);
        for (int64_t j = 0; j < K; ++j) add_scaled(a[j] /= total, v + j * stride, s.heads2 + i * L() + h * d());
      }
    }
    apply_rows<T>(l.self_out, s.heads2, K, true, x);
  }

  void self_backward(const QueryLayer<T>& l, const QueryState<T>& s, T* dx, T* sums, Workspace& w) const {
    accumulate_row_map<T>(l.self_out, s.heads2, dx, K, sums);
    apply_rows_transposed<T>(l.self_out, dx, K, false, w.k2);
    const int64_t stride = whole_lanes<T>(3 * S);
    const T scale = T(1) / std::sqrt(T(S));
    std::memset(w.wide, 0, size_t(K * stride) * sizeof(T));
    for (int64_t h = 0; h < H; ++h) {
      const T *const q = s.qkv + h * d(), *const k = q + S, *const v = k + S;
      T *const dq = w.wide + h * d(), *const dk = dq + S, *const dv = dk + S;
      for (int64_t i = 0; i < K; ++i) {
        const T* const a = s.weights + (h * K + i) * K;
        const T* const dout = w.k2 + i * L() + h * d();
        T mean = 0;
        for (int64_t j = 0; j < K; ++j) mean += a[j] * dot(dout, v + j * stride);
        for (int64_t j = 0; j < K; ++j) {
          const T ds = scale * a[j] * (dot(dout, v + j * stride) - mean);
          add_scaled(ds, k + j * stride, dq + i * stride);
          add_scaled(ds, q + i * stride, dk + j * stride);
          add_scaled(a[j], dout, dv + j * stride);
        }
      }
    }
    normed_map_backward(l.qkv, l.norm_self, s.scaled2, s.normed2, s.rstd2, sums, dx, w);
  }

  T dot(const T* a, const T* b) const {
    T sums[8] = {}, sum = 0;
    int64_t i = 0;
    for (; i + 8 <= d(); i += 8) {
      for (int64_t j = 0; j < 8; ++j) sums[j] += a[i + j] * b[i + j];
    }
    for (; i < d(); ++i) sum += a[i] * b[i];
    for (T part : sums) sum += part;
    return sum;
  }

  void add_scaled(T factor, const T* x, T* to) const {
    for (int64_t i = 0; i < d(); ++i) to[i] += factor * x[i];
  }
};

}  // namespace fastslots::FASTSLOTS_ISA
