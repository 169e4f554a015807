// From the slots of one image to what its decoder's layers need of them, and back: `Decoder.layers` in
// fastslots/models/decoder.py with `fold_projections` and `fold_norm` of fastslots/ops/reference.py.
//
//   hidden = MLP(z)        k, v = to_kv(norm_slots(hidden)), without a key bias
//   G_h = γ ∘ (scale · k_h · Wq_h)    g_h = scale · bq_h·k_h + (scale · k_h · Wq_h)·β    U_h = v_h · Wo_hᵀ
//
// γ, β: the affine part of the norm of the queries. Rows hk of G and U are D wide, in whole vectors.
#pragma once

#include "api.h"
#include "heads.h"

namespace fastslots::FASTSLOTS_ISA {

template <typename T>
class SlotFold {
 public:
  int64_t K, Z, D, H, inner;
  T eps, scale;

  // Of one layer and image: gradients have the same form.
  struct Folded {
    T *G, *g, *U;  // [HK][whole D], [HK], [HK][whole D]
  };

  struct State {
    T *z, *hidden, *slope, *mlp;
    T *normed[kMostMaps], *rstd[kMostMaps], *scaled[kMostMaps], *kv[kMostMaps], *raw[kMostMaps];
    Folded folded[kMostMaps];
  };

  struct Scratch {
    Folded grads[kMostMaps];
    T *dkv, *dmlp, *dhidden, *row, *head;
  };

  SlotFold(const TrainStepArgs<T>& a, Packer<T>& pack)
      : K(a.encoder.slots), Z(a.slot_dim), D(a.decoder.width), H(a.decoder.heads), inner(a.inner), eps(T(a.decoder.eps)),
        scale(T(a.attention_scale)), count_(a.decoder.layer_count), heads_{K, H, inner / H, D, whole_lanes<T>(2 * inner)} {
    first_ = pack_row_map<T>(a.slot_mlp[0], a.slot_mlp[1], Z, a.slot_hidden, pack);
    second_ = pack_row_map<T>(a.slot_mlp[2], a.slot_mlp[3], a.slot_hidden, a.slot_width, pack);
    for (int64_t i = 0; i < count_; ++i) {
      const SlotFoldArrays<const T*>& w = a.folds[i];
      Layer& l = layers_[i];
      l.norm_q = pack_row_norm<T>(w.norm_q_weight, w.norm_q_bias, D, pack);
      l.norm_slots = pack_row_norm<T>(w.norm_slots_weight, w.norm_slots_bias, a.slot_width, pack);
      T* const bias = pack.weights.take(2 * inner);  // that of the keys cancels in the softmax: 0
      {
        const Piece<T> piece(pack.weights, 4 * inner * a.slot_width);
        for (int64_t j = 0; piece.fills() && j < 2 * inner; ++j) bias[j] = j < inner ? T(0) : w.kv_bias[j];
        l.kv = pack_row_map<T>(w.kv_weight, bias, a.slot_width, 2 * inner, pack);
      }
      l.query = heads_.pack(w.q_weight, D, 1, pack.weights);
      l.query_transposed = heads_.pack_transposed(w.q_weight, D, 1, pack.weights);
      l.out = heads_.pack(w.out_weight, 1, inner, pack.weights);
      l.out_transposed = heads_.pack_transposed(w.out_weight, 1, inner, pack.weights);
      l.query_bias = w.q_bias;
      l.query_sum = pack.sum(inner * lanes()), l.out_sum = pack.sum(inner * lanes()), l.bias_sum = pack.sum(inner);
    }
  }

  int64_t lanes() const { return whole_lanes<T>(D); }

  void carve(Carver<T>& c, State& s) const {
    s.z = c.take(K * whole_lanes<T>(Z));
    const int64_t wide = K * whole_lanes<T>(first_.out), slots = K * whole_lanes<T>(second_.out);
    s.hidden = c.take(wide), s.slope = c.take(wide), s.mlp = c.take(slots);
    for (int64_t i = 0; i < count_; ++i) {
      s.normed[i] = c.take(slots), s.rstd[i] = c.take(K), s.scaled[i] = c.take(slots);
      s.kv[i] = c.take(K * heads_.stride), s.raw[i] = c.take(H * K * lanes());
      carve(c, s.folded[i]);
    }
  }

  void carve(Carver<T>& c, Scratch& w) const {
    for (int64_t i = 0; i < count_; ++i) carve(c, w.grads[i]);
    w.dkv = c.take(K * heads_.stride), w.row = c.take(K * whole_lanes<T>(second_.out));
    w.dmlp = c.take(K * whole_lanes<T>(second_.out)), w.dhidden = c.take(K * whole_lanes<T>(first_.out));
    w.head = c.take(heads_.scratch_size());
  }

  // From s.z [K][whole Z] to s.folded.
  void forward(State& s) const {
    apply_rows<T>(first_, s.z, K, false, s.hidden);
    gelu<T>(s.hidden, s.slope, K * whole_lanes<T>(first_.out));
    apply_rows<T>(second_, s.hidden, K, false, s.mlp);
    for (int64_t i = 0; i < count_; ++i) {
      const Layer& l = layers_[i];
      const Folded& f = s.folded[i];
      normalise_rows<T>(s.mlp, K, second_.out, eps, s.normed[i], s.rstd[i]);
      scale_rows<T>(l.norm_slots, s.normed[i], K, s.scaled[i]);
      apply_rows<T>(l.kv, s.scaled[i], K, false, s.kv[i]);
      heads_.widen(s.kv[i], l.query, s.raw[i]);
      heads_.widen(s.kv[i] + inner, l.out, f.U);
      for (int64_t row = 0; row < H * K; ++row) {
        T* const raw = s.raw[i] + row * lanes();
        Vec<T> shift = {};
        for (int64_t j = 0; j < lanes(); j += kLanes<T>) {
          const Vec<T> value = load<T>(raw + j) * scale;
          store<T>(raw + j, value);
          store<T>(f.G + row * lanes() + j, value * load<T>(l.norm_q.gamma + j));
          shift += value * load<T>(l.norm_q.beta + j);
        }
        const T* const k = key(s.kv[i], row);
        T dot = 0;
        for (int64_t c = 0; c < heads_.d; ++c) dot += k[c] * l.query_bias[row / K * heads_.d + c];
        f.g[row] = scale * dot + sum_of<T>(shift);
      }
    }
  }

  // From w.grads to the gradient of z, in dz [K][whole Z]; adds to the sums.
  void backward(const State& s, Scratch& w, T* sums, T* dz) const {
    for (int64_t i = count_ - 1; i >= 0; --i) {
      const Layer& l = layers_[i];
      const Folded& d = w.grads[i];
      unfold_norm(l, s.raw[i], d, sums);  // d.G: the gradient of k_h · Wq_h, d.g of bq_h·k_h
      std::memset(w.dkv, 0, size_t(K * heads_.stride) * sizeof(T));
      heads_.narrow(d.G, l.query_transposed, w.dkv, w.head);
      heads_.narrow(d.U, l.out_transposed, w.dkv + inner, w.head);
      heads_.accumulate(s.kv[i], d.G, sums + l.query_sum);
      heads_.accumulate(s.kv[i] + inner, d.U, sums + l.out_sum);
      for (int64_t row = 0; row < H * K; ++row) {
        const T *const k = key(s.kv[i], row), *const bias = l.query_bias + row / K * heads_.d;
        T *const dk = key(w.dkv, row), *const dbias = sums + l.bias_sum + row / K * heads_.d;
        for (int64_t c = 0; c < heads_.d; ++c) dk[c] += d.g[row] * bias[c], dbias[c] += d.g[row] * k[c];
      }
      accumulate_row_map<T>(l.kv, s.scaled[i], w.dkv, K, sums);
      apply_rows_transposed<T>(l.kv, w.dkv, K, false, w.row);
      scale_rows_backward<T>(l.norm_slots, s.normed[i], K, sums, w.row);
      normalise_rows_backward<T>(w.row, s.normed[i], s.rstd[i], K, second_.out, i + 1 < count_, w.dmlp);
    }
    accumulate_row_map<T>(second_, s.hidden, w.dmlp, K, sums);
    apply_rows_transposed<T>(second_, w.dmlp, K, false, w.dhidden);
    scale_by<T>(w.dhidden, s.slope, K * whole_lanes<T>(first_.out));
    accumulate_row_map<T>(first_, s.z, w.dhidden, K, sums);
    apply_rows_transposed<T>(first_, w.dhidden, K, false, dz);
  }

  void write_mlp(const T* sums, T* const* to) const {
    write_row_map<T>(first_, sums, to[0], to[1]), write_row_map<T>(second_, sums, to[2], to[3]);
  }

  void write_layer(int64_t i, const T* sums, const SlotFoldArrays<T*>& to) const {
    const Layer& l = layers_[i];
    write_vector(sums + l.norm_q.gamma_sum, D, to.norm_q_weight), write_vector(sums + l.norm_q.beta_sum, D, to.norm_q_bias);
    write_vector(sums + l.norm_slots.gamma_sum, second_.out, to.norm_slots_weight);
    write_vector(sums + l.norm_slots.beta_sum, second_.out, to.norm_slots_bias);
    write_row_map<T>(l.kv, sums, to.kv_weight, to.kv_bias);
    if (to.kv_bias) std::memset(to.kv_bias, 0, size_t(inner) * sizeof(T));  // of the keys: exactly 0
    write_rows(sums + l.query_sum, inner, D, lanes(), to.q_weight);
    write_vector(sums + l.bias_sum, inner, to.q_bias);
    write_transposed(sums + l.out_sum, D, inner, lanes(), inner, to.out_weight);
  }

 private:
  struct Layer {
    RowNorm<T> norm_q, norm_slots;
    RowMap<T> kv;
    const T *query, *query_transposed, *out, *out_transposed, *query_bias;
    int64_t query_sum, out_sum, bias_sum;
  };

  int64_t count_;
  Heads<T> heads_;
  RowMap<T> first_, second_;
  Layer layers_[kMostMaps];

  void carve(Carver<T>& c, Folded& f) const { f.G = c.take(H * K * lanes()), f.g = c.take(H * K), f.U = c.take(H * K * lanes()); }

  // Of row hk, the head's part of slot k.
  template <typename P>
  P* key(P* kv, int64_t row) const {
    return kv + row % K * heads_.stride + row / K * heads_.d;
  }

  // Back through the norm's affine part and the scale.
  void unfold_norm(const Layer& l, const T* raw, const Folded& d, T* sums) const {
    for (int64_t j = 0; j < lanes(); j += kLanes<T>) {
      Vec<T> dgamma = load<T>(sums + l.norm_q.gamma_sum + j), dbeta = load<T>(sums + l.norm_q.beta_sum + j);
      const Vec<T> gamma = load<T>(l.norm_q.gamma + j), beta = load<T>(l.norm_q.beta + j);
      for (int64_t row = 0; row < H * K; ++row) {
        T* const dG = d.G + row * lanes() + j;
        const Vec<T> value = load<T>(raw + row * lanes() + j);
        dgamma += load<T>(dG) * value;
        dbeta += d.g[row] * value;
        store<T>(dG, scale * (load<T>(dG) * gamma + d.g[row] * beta));
      }
      store<T>(sums + l.norm_q.gamma_sum + j, dgamma);
      store<T>(sums + l.norm_q.beta_sum + j, dbeta);
    }
    for (int64_t row = 0; row < H * K; ++row) d.g[row] *= scale;
  }
};

}  // namespace fastslots::FASTSLOTS_ISA
