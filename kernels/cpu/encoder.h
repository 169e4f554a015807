// The encoder of one image, forward and backward: fastslots/models/encoder.py in C++.
//
//   CNN -> + position -> norm over tokens and channels -> MLP -> norm -> Transformer of the queries -> norm -> output
//
// Images are independent: one image is one task, from its pixels to its slots and back (encoder_call.h, train_step.h).
// They meet in the sums of the weights' gradients alone, `sums` here.
#pragma once

#include <initializer_list>

#include "cnn.h"
#include "query_transformer.h"
#include "weights.h"

namespace fastslots::FASTSLOTS_ISA {

template <typename T>
class Encoder {
 public:
  const EncoderArgs<T>& a;
  const int64_t K, S, L;

  // Weights are packed for the directions that a call needs; `filled`: at once, or by `fill`.
  Encoder(const EncoderArgs<T>& args, bool forward, bool backward, bool filled = true)
      : a(args), K(args.slots), S(args.width), L(whole_lanes<T>(args.width)), forward_(forward), backward_(backward),
        packed_(pack({nullptr})) {
    pack({packed_.get(), 0, filled});
  }

  // A share of the packing, all of which must be done before anything else is called.
  void fill(PackShare& share) const { Encoder(a, forward_, backward_, nullptr).pack({packed_.get(), 0, true, &share}); }

  // Elements that the forward of an image leaves for its backward.
  static int64_t saved_size(const EncoderArgs<T>& args) {
    Encoder encoder(args, false, false, nullptr);
    encoder.pack({nullptr});
    return encoder.measure_state();
  }

  int64_t results() const { return a.outputs ? a.outputs : S; }
  int64_t sums_end() const { return sums_end_; }  // offset behind the last of the gradients' sums

  // What the backward of an image reads.
  struct State {
    typename Cnn<T>::State cnn;
    T *normed, *tokens, *token_rstd, *scalars;  // scalars: rstd of the joint norm
    T *hidden, *slope;                          // of the token MLP, unless it is made again
    QueryState<T> layers[kMostMaps];
    T *final_normed, *final_rstd, *final_scaled;
  };

  State carve_state(T* base) const {
    State s = {};
    fill_state({base}, s);
    return s;
  }

  int64_t measure_state() const {
    State s = {};
    return fill_state({nullptr}, s);
  }

  struct Scratch {
    typename QueryTransformer<T>::Workspace transformer;
    typename Cnn<T>::Workspace cnn;
    T *x, *picked, *dx, *out, *dtokens, *hidden, *slope, *dhidden;  // dx: after the backward, the gradient of the first queries [K][L]
  };

  Scratch carve_scratch(T* base, bool backward) const {
    Scratch w = {};
    fill_scratch({base}, w, backward);
    return w;
  }

  int64_t measure_scratch(bool backward) const {
    Scratch w = {};
    return fill_scratch({nullptr}, w, backward);
  }

  // Before the first image of a group that adds its gradients up in the same scratch, and behind its last.
  void begin_group(Scratch& w) const { cnn_.begin_group(w.cnn); }
  void end_group(Scratch& w, T* sums) const { cnn_.end_group(w.cnn, sums); }

  // planes [channels, side, side], queries [K, S], picks [K] or null. out: [K, results], or null where only the state is
  // asked for.
  void forward_image(const T* planes, const T* queries, const int64_t* picks, State& s, Scratch& w, T* out) const {
    cnn_.forward(planes, s.cnn, w.cnn);
    if (positions_) add_to<T>(s.normed, positions_, tokens_ * L);
    s.scalars[0] = normalise_all<T>(s.normed, tokens_, token_input_, a.eps);
    row_tiles(tokens_, [&](int64_t first, int64_t count) {
      const Hidden h = hidden_of(s, w, first);
      make_hidden(s, first, count, h);
      apply_rows<T>(token2_, h.value, count, false, s.tokens + first * L);
      normalise_rows<T>(s.tokens + first * L, count, S, T(a.eps), s.tokens + first * L, s.token_rstd + first);
    });
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t j = 0; j < L; ++j) w.x[k * L + j] = j < S ? queries[k * S + j] : T(0);
    }
    if (picks) {
      for (int64_t k = 0; k < K; ++k) std::memcpy(w.picked + k * L, s.tokens + picks[k] * L, size_t(L) * sizeof(T));
      apply_rows<T>(seed_, w.picked, K, true, w.x);
    }
    transformer_.forward(s.tokens, w.x, s.layers, w.transformer);
    normalise_rows<T>(w.x, K, S, T(a.eps), s.final_normed, s.final_rstd);
    scale_rows<T>(norm_, s.final_normed, K, s.final_scaled);
    if (!out) return;
    const T* rows = s.final_scaled;
    if (a.outputs) apply_rows<T>(output_, rows, K, false, w.out), rows = w.out;
    for (int64_t k = 0; k < K; ++k) {
      std::memcpy(out + k * results(), rows + k * whole_lanes<T>(results()), size_t(results()) * sizeof(T));
    }
  }

  // From the gradient of `out`: adds to the sums, and leaves that of the first queries in w.dx.
  void backward_image(const T* out_grad, const int64_t* picks, State& s, Scratch& w, T* sums) const {
    const int64_t wide = whole_lanes<T>(results());
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t j = 0; j < wide; ++j) w.out[k * wide + j] = j < results() ? out_grad[k * results() + j] : T(0);
    }
    T* d = w.out;
    if (a.outputs) {
      accumulate_row_map<T>(output_, s.final_scaled, w.out, K, sums);
      apply_rows_transposed<T>(output_, w.out, K, false, w.x), d = w.x;
    }
    scale_rows_backward<T>(norm_, s.final_normed, K, sums, d);
    normalise_rows_backward<T>(d, s.final_normed, s.final_rstd, K, S, false, w.dx);
    std::memset(w.dtokens, 0, size_t(tokens_ * L) * sizeof(T));
    transformer_.backward(s.tokens, w.dx, w.dtokens, s.layers, sums, w.transformer);
    if (picks) {
      for (int64_t k = 0; k < K; ++k) std::memcpy(w.picked + k * L, s.tokens + picks[k] * L, size_t(L) * sizeof(T));
      accumulate_row_map<T>(seed_, w.picked, w.dx, K, sums);
      apply_rows_transposed<T>(seed_, w.dx, K, false, w.picked);
      for (int64_t k = 0; k < K; ++k) add_to<T>(w.dtokens + picks[k] * L, w.picked + k * L, L);
    }
    backward_tokens(s, w, sums);
    cnn_.backward(s.cnn, w.cnn, sums);
  }

  // From the sums to gradients as torch keeps them, in the order of a.weights; null where not asked for.
  void write_gradients(const T* sums, T* const* to) const {
    const auto norm = [&](const RowNorm<T>& n) {
      write_vector(sums + n.gamma_sum, n.width, *to++);
      write_vector(sums + n.beta_sum, n.width, *to++);
    };
    const auto map = [&](const RowMap<T>& m) { write_row_map<T>(m, sums, to[0], to[1]), to += 2; };
    for (int64_t i = 0; i < a.conv_count; ++i, to += 2) cnn_.write(i, sums, to[0], to[1]);
    if (a.conv_count) map(position_);
    map(token1_), map(token2_);
    if (a.seeded) write_transposed(sums + seed_.weight_sum, S, S, L, seed_stride(), *to++);
    for (int64_t i = 0; i < a.layer_count; ++i) {
      const QueryLayer<T>& l = transformer_.layers[i];
      norm(l.norm_q), norm(l.norm_tokens), map(l.to_q);
      if (T* const kv = *to++) {
        write_rows(sums + l.key_sum, S, S, L, kv), write_rows(sums + l.value_sum, S, S, L, kv + S * S);
      }
      if (T* const bias = *to++) {
        std::memset(bias, 0, size_t(S) * sizeof(T));
        write_vector(sums + l.value_bias_sum, S, bias + S);
      }
      map(l.to_out), norm(l.norm_self);
      map(l.qkv);
      if (T* const bias = to[-1]) std::memset(bias + S, 0, size_t(S) * sizeof(T));  // of the keys: exactly 0
      map(l.self_out), norm(l.norm_ff), map(l.widen), map(l.narrow);
    }
    norm(norm_);
    if (a.outputs) map(output_);
  }

 private:
  int64_t tokens_ = 0, token_input_ = 0, sums_end_ = 0;
  Cnn<T> cnn_;
  RowMap<T> position_, token1_, token2_, seed_, output_;
  RowNorm<T> norm_;
  QueryTransformer<T> transformer_;
  const T* positions_ = nullptr;  // [tokens][L], the same for all images
  const bool forward_, backward_;
  Block<T> packed_;

  // One without memory of its own, to be packed.
  Encoder(const EncoderArgs<T>& args, bool forward, bool backward, std::nullptr_t)
      : a(args), K(args.slots), S(args.width), L(whole_lanes<T>(args.width)), forward_(forward), backward_(backward),
        packed_(0) {}

  int64_t hidden_lanes() const { return whole_lanes<T>(a.token_hidden); }

  // The hidden layer of many tokens is made again in the backward, tile by tile, rather than kept: clevr6's takes 17 MB
  // of memory a thread, and 2 % of the step's time.
  bool keeps_hidden() const { return tokens_ * hidden_lanes() * int64_t(sizeof(T)) <= int64_t(1) << 20; }

  struct Hidden {
    T *value, *slope;
  };

  Hidden hidden_of(const State& s, const Scratch& w, int64_t first) const {
    const int64_t at = first * hidden_lanes();
    return keeps_hidden() ? Hidden{s.hidden + at, s.slope + at} : Hidden{w.hidden, w.slope};
  }

  void make_hidden(const State& s, int64_t first, int64_t count, const Hidden& h) const {
    apply_rows<T>(token1_, s.normed + first * whole_lanes<T>(token_input_), count, false, h.value);
    gelu<T>(h.value, h.slope, count * hidden_lanes());
  }
  int64_t seed_stride() const { return a.seed_stride ? a.seed_stride : S; }

  // -> elements used; with a null base only these.
  int64_t pack(const Carver<T>& to) {
    Packer<T> pack{to, {nullptr}, forward_, backward_};
    const T* const* from = a.weights;
    const auto next = [&] { return *from++; };
    const auto map = [&](int64_t in, int64_t out) {
      const T* const weight = next();
      return pack_row_map<T>(weight, next(), in, out, pack);
    };
    cnn_.pack(a, next, pack);
    token_input_ = a.conv_count ? a.conv_rows[a.conv_count - 1] : a.channels;
    tokens_ = cnn_.sides[a.conv_count] * cnn_.sides[a.conv_count];
    if (a.conv_count) {
      const Piece<T> piece(pack.weights, 4 * tokens_ * L);
      position_ = map(4, S);
      T* const positions = pack.weights.take(forward_ ? tokens_ * L : 0);
      positions_ = positions;
      if (piece.fills() && forward_) make_positions(positions);
    }
    pack.forward = forward_ || !keeps_hidden();
    token1_ = map(token_input_, a.token_hidden);
    pack.forward = forward_;
    token2_ = map(a.token_hidden, S);
    if (a.seeded) seed_ = pack_row_map<T>(next(), nullptr, S, S, pack, seed_stride());
    transformer_.K = K, transformer_.S = S, transformer_.H = a.heads, transformer_.tokens = tokens_;
    transformer_.count = a.layer_count, transformer_.eps = T(a.eps);
    transformer_.pack(next, a.ff_widths, pack);
    const T* const gamma = next();
    norm_ = pack_row_norm<T>(gamma, next(), S, pack);
    if (a.outputs) output_ = map(S, a.outputs);
    sums_end_ = pack.sums.used;
    return pack.weights.used;
  }

  void make_positions(T* to) const {
    constexpr int64_t kWide = whole_lanes<T>(4);
    T rows[kRowTile * kWide];
    row_tiles(tokens_, [&](int64_t first, int64_t count) {
      std::memset(rows, 0, sizeof(rows));
      for (int64_t t = 0; t < count; ++t) std::memcpy(rows + t * kWide, a.grid + (first + t) * 4, 4 * sizeof(T));
      apply_rows<T>(position_, rows, count, false, to + first * L);
    });
  }

  int64_t fill_state(Carver<T> c, State& s) const {
    cnn_.carve(c, s.cnn);
    s.normed = s.cnn.pictures[a.conv_count].data;
    s.hidden = c.take(keeps_hidden() ? tokens_ * hidden_lanes() : 0);
    s.slope = c.take(keeps_hidden() ? tokens_ * hidden_lanes() : 0);
    s.tokens = c.take(tokens_ * L);
    s.token_rstd = c.take(tokens_);
    s.scalars = c.take(1);
    transformer_.carve(c, s.layers);
    s.final_normed = c.take(K * L), s.final_rstd = c.take(K), s.final_scaled = c.take(K * L);
    return c.used;
  }

  int64_t fill_scratch(Carver<T> c, Scratch& w, bool backward) const {
    w.transformer = transformer_.carve_workspace(c, backward);
    w.x = c.take(K * L), w.picked = c.take(K * L), w.out = c.take(K * whole_lanes<T>(results()));
    w.dx = c.take(backward ? K * L : 0);
    for (T** memory : {&w.hidden, &w.slope}) *memory = c.take(keeps_hidden() ? 0 : kRowTile * hidden_lanes());
    w.dhidden = c.take(backward ? kRowTile * hidden_lanes() : 0);
    const int64_t lanes = whole_lanes<T>(token_input_);
    cnn_.carve(c, tokens_ * (lanes > L ? lanes : L), backward, w.cnn);
    w.dtokens = w.cnn.pictures[0];  // which the CNN's backward takes when it has been read
    return c.used;
  }

  // From w.dtokens to the gradient of what the joint norm read, in w.cnn.pictures[1] as the last picture.
  void backward_tokens(const State& s, Scratch& w, T* sums) const {
    const int64_t lanes = whole_lanes<T>(token_input_);
    T* const dnormed = w.cnn.pictures[1];
    row_tiles(tokens_, [&](int64_t first, int64_t count) {
      T* const d = w.dtokens + first * L;
      const T* const normed = s.normed + first * lanes;
      normalise_rows_backward<T>(d, s.tokens + first * L, s.token_rstd + first, count, S, false, d);
      const Hidden h = hidden_of(s, w, first);
      if (!keeps_hidden()) make_hidden(s, first, count, h);
      accumulate_row_map<T>(token2_, h.value, d, count, sums);
      apply_rows_transposed<T>(token2_, d, count, false, w.dhidden);
      scale_by<T>(w.dhidden, h.slope, count * hidden_lanes());
      accumulate_row_map<T>(token1_, normed, w.dhidden, count, sums);
      if (a.conv_count) apply_rows_transposed<T>(token1_, w.dhidden, count, false, dnormed + first * lanes);
    });
    if (!a.conv_count) return;
    normalise_all_backward<T>(s.normed, s.scalars[0], tokens_, token_input_, dnormed);
    // position: y = grid·Wᵀ + bias, of four columns
    product<T, true>({a.grid, 4}, {dnormed, L, kPanel<T>}, 4, L, tokens_, true, {sums + position_.weight_sum, L});
    add_columns<T>(dnormed, tokens_, L, sums + position_.bias_sum);
  }
};

}  // namespace fastslots::FASTSLOTS_ISA
