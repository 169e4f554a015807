// The encoder of all images, forward and backward: fastslots/models/encoder.py in C++.
//
//   CNN -> + position -> norm over tokens and channels -> MLP -> norm -> Transformer of the queries -> norm -> output
//
// Images are independent, so one image is one task, from its pixels to its slots and back. Images meet in the sums of
// the weights' gradients alone: each of a fixed number of groups adds those of its images in their order, and the groups
// are added in theirs, so that the bits do not depend on the number of threads.
#pragma once

#include "api.h"
#include "convolution.h"
#include "parallel.h"
#include "query_transformer.h"
#include "weights.h"
#include "winograd.h"

namespace fastslots::FASTSLOTS_ISA {

constexpr int64_t kGroups = 12;  // shared evenly by 1, 2, 3, 4 and 6 threads

template <typename T>
class Encoder {
 public:
  Encoder(const EncoderArgs<T>& args, bool forward, bool backward)
      : a(args), K(args.slots), S(args.width), L(whole_lanes<T>(args.width)), packed_(pack(nullptr, forward, backward)) {
    pack(packed_.get(), forward, backward);
  }

  // Elements that the forward of an image leaves for its backward.
  static int64_t saved_size(const EncoderArgs<T>& args) { return Encoder(args, nullptr).measure_state(); }

  void run_forward() {
    const int64_t state = a.saved ? 0 : measure_state(), scratch = measure_scratch(false);
    const int64_t workers = a.threads > 1 ? (a.threads < a.batch ? a.threads : a.batch) : 1;
    Block<T> memory(workers * (state + scratch));
    auto body = [&](int64_t b, int thread) {
      T* const own = memory.get() + thread * (state + scratch);
      State s = carve_state(a.saved ? a.saved + b * measure_state() : own + scratch);
      Scratch w = carve_scratch(own, false);
      forward_image(b, s, w, a.out + b * K * results());
    };
    parallel_for(a.batch, int(workers), body);
  }

  void run_backward() {
    const int64_t groups = a.batch < kGroups ? (a.batch > 0 ? a.batch : 1) : kGroups;
    const int64_t state = a.saved ? 0 : measure_state(), scratch = measure_scratch(true);
    const int64_t workers = a.threads > 1 ? (a.threads < groups ? a.threads : groups) : 1;
    Block<T> memory(workers * (state + scratch)), sums(groups * sums_size_);
    auto body = [&](int64_t group, int thread) {
      T* const own = memory.get() + thread * (state + scratch);
      T* const to = sums.get() + group * sums_size_;
      std::memset(to, 0, size_t(sums_size_) * sizeof(T));
      Scratch w = carve_scratch(own, true);
      begin_group(w);
      for (int64_t b = a.batch * group / groups; b < a.batch * (group + 1) / groups; ++b) {
        State s = carve_state(a.saved ? a.saved + b * measure_state() : own + scratch);
        if (!a.saved) forward_image(b, s, w, nullptr);
        backward_image(b, s, w, to);
      }
      end_group(w, to);
    };
    parallel_for(groups, int(workers), body);
    add_partials<T>(sums.get(), groups, sums_size_, a.threads);
    write_gradients(sums.get());
  }

 private:
  const EncoderArgs<T>& a;
  const int64_t K, S, L;
  int64_t tokens_ = 0, token_input_ = 0, sums_size_ = 0;
  // How a convolution is computed: directly, or by Winograd's form with weights packed for it.
  struct Form {
    bool winograd = false, gradient = false;
    const T *forward = nullptr, *backward = nullptr;
  };

  Convolution<T> convs_[kMostMaps];
  Form forms_[kMostMaps];
  int64_t sides_[kMostMaps + 1] = {};
  RowMap<T> position_, token1_, token2_, seed_, output_;
  RowNorm<T> norm_;
  QueryTransformer<T> transformer_;
  const T* positions_ = nullptr;  // [tokens][L], the same for all images
  int64_t query_sum_ = 0;
  Block<T> packed_;

  Encoder(const EncoderArgs<T>& args, std::nullptr_t)
      : a(args), K(args.slots), S(args.width), L(whole_lanes<T>(args.width)), packed_(0) {
    pack(nullptr, false, false);
  }

  int64_t results() const { return a.outputs ? a.outputs : S; }
  int64_t hidden_lanes() const { return whole_lanes<T>(a.token_hidden); }

  // -> elements used; with a null base only these.
  int64_t pack(T* base, bool forward, bool backward) {
    Packer<T> pack{{base}, {nullptr}, forward, backward};
    const T* const* from = a.weights;
    const auto next = [&] { return *from++; };
    const auto map = [&](int64_t in, int64_t out) {
      const T* const weight = next();
      return pack_row_map<T>(weight, next(), in, out, pack);
    };
    int64_t channels = a.channels;
    sides_[0] = a.side;
    for (int64_t i = 0; i < a.conv_count; channels = a.conv_rows[i], ++i) {
      const T* const weight = next();
      Form& form = forms_[i];
      form.winograd = a.winograd && i > 0 && winograd_pays(channels, a.conv_rows[i], a.conv_kernels[i],
                                                           a.conv_strides[i], sides_[i]);
      form.gradient = form.winograd && sides_[i] >= kWinogradGradientSide;
      if (form.winograd) pack.forward = pack.backward = false;
      convs_[i] = pack_convolution<T>(weight, next(), channels, a.conv_rows[i], a.conv_kernels[i], a.conv_strides[i],
                                      i == 0, pack);
      pack.forward = forward, pack.backward = backward;
      if (form.winograd) pack_winograd_form(i, weight, pack);
      sides_[i + 1] = (sides_[i] + a.conv_strides[i] - 1) / a.conv_strides[i];
    }
    token_input_ = channels, tokens_ = sides_[a.conv_count] * sides_[a.conv_count];
    if (a.conv_count) {
      position_ = map(4, S);
      T* const positions = pack.weights.take(forward ? tokens_ * L : 0);
      positions_ = positions;
      if (base && forward) make_positions(positions);
    }
    token1_ = map(token_input_, a.token_hidden);
    token2_ = map(a.token_hidden, S);
    if (a.picks) seed_ = pack_row_map<T>(next(), nullptr, S, S, pack);
    transformer_.K = K, transformer_.S = S, transformer_.H = a.heads, transformer_.tokens = tokens_;
    transformer_.count = a.layer_count, transformer_.eps = T(a.eps);
    transformer_.pack(next, a.ff_widths, pack);
    const T* const gamma = next();
    norm_ = pack_row_norm<T>(gamma, next(), S, pack);
    if (a.outputs) output_ = map(S, a.outputs);
    query_sum_ = pack.sum(K * L);
    sums_size_ = pack.sums.used;
    return pack.weights.used;
  }

  void pack_winograd_form(int64_t i, const T* weight, Packer<T>& pack) {
    with_kernel(convs_[i].kernel, [&](auto R) {
      const auto packed = [&](bool turned) {
        return pack_winograd<T, R>(weight, convs_[i].in, convs_[i].out, turned, pack.weights);
      };
      if (pack.forward) forms_[i].forward = packed(false);
      if (pack.backward) forms_[i].backward = packed(true);
    });
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

  // What the backward of an image reads.
  struct State {
    Picture<T> pictures[kMostMaps + 1];  // the image and what each convolution makes of it; the last, normed, are tokens
    T* slopes[kMostMaps];
    T *normed, *hidden, *slope, *tokens, *token_rstd, *scalars;  // scalars: rstd of the joint norm
    QueryState<T> layers[kMostMaps];
    T *final_normed, *final_rstd, *final_scaled;
  };

  int64_t border(int64_t i) const { return i < a.conv_count ? a.conv_kernels[i] / 2 : 0; }

  Picture<T> picture(int64_t i) const {
    const int64_t stride = i == 0 && a.conv_count ? a.channels : whole_lanes<T>(i ? a.conv_rows[i - 1] : a.channels);
    return {nullptr, sides_[i], border(i), stride};
  }

  int64_t fill_state(Carver<T> c, State& s) const {
    for (int64_t i = 0; i <= a.conv_count; ++i) {
      s.pictures[i] = picture(i);
      s.pictures[i].data = c.take(s.pictures[i].size());
      if (i) s.slopes[i - 1] = c.take(sides_[i] * sides_[i] * s.pictures[i].stride);
    }
    s.normed = s.pictures[a.conv_count].data;
    s.hidden = c.take(tokens_ * hidden_lanes());
    s.slope = c.take(tokens_ * hidden_lanes());
    s.tokens = c.take(tokens_ * L);
    s.token_rstd = c.take(tokens_);
    s.scalars = c.take(1);
    transformer_.carve(c, s.layers);
    s.final_normed = c.take(K * L), s.final_rstd = c.take(K), s.final_scaled = c.take(K * L);
    return c.used;
  }

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
    T *x, *picked, *dx, *out, *dtokens, *dhidden, *dinput;
    T* pictures[2];
    T *tiles, *products;         // of a batch of tiles in Winograd's form
    T* gradients[kMostMaps];     // sums of a group there
  };

  int64_t fill_scratch(Carver<T> c, Scratch& w, bool backward) const {
    w.transformer = transformer_.carve_workspace(c, backward);
    w.x = c.take(K * L), w.picked = c.take(K * L), w.out = c.take(K * whole_lanes<T>(results()));
    w.dx = c.take(backward ? K * L : 0);
    w.dtokens = c.take(backward ? tokens_ * L : 0);
    w.dhidden = c.take(backward ? kRowTile * hidden_lanes() : 0);
    int64_t largest = tokens_ * whole_lanes<T>(token_input_);
    for (int64_t i = 1; i <= a.conv_count; ++i) {
      Picture<T> p = picture(i);
      p.border = a.conv_kernels[i - 1] / 2;  // that of the convolution which gives it: its backward reads past the edge
      largest = p.size() > largest ? p.size() : largest;
    }
    for (T*& memory : w.pictures) memory = c.take(backward ? largest : 0);
    int64_t channels = 0;
    for (int64_t i = 0; i < a.conv_count; ++i) {
      const int64_t in = whole_lanes<T>(convs_[i].in), out = whole_lanes<T>(convs_[i].out), most = in > out ? in : out;
      if (forms_[i].winograd && most > channels) channels = most;
      w.gradients[i] = c.take(backward && forms_[i].gradient ? kProducts * in * out : 0);
    }
    w.tiles = c.take(channels ? kProducts * winograd_stride(channels) : 0);
    w.products = c.take(channels ? kProducts * winograd_stride(channels) : 0);
    return c.used;
  }

  Scratch carve_scratch(T* base, bool backward) const {
    Scratch w = {};
    fill_scratch({base}, w, backward);
    return w;
  }

  int64_t measure_scratch(bool backward) const {
    Scratch w = {};
    return fill_scratch({nullptr}, w, backward);
  }

  int64_t pick(int64_t b, int64_t k) const { return a.picks[b * K + k]; }

  // Planes [channels, side, side] -> pixels.
  void load_image(int64_t b, const Picture<T>& to) const {
    const int64_t area = a.side * a.side;
    const T* const from = a.images + b * a.channels * area;
    for (int64_t y = 0; y < a.side; ++y) {
      for (int64_t x = 0; x < a.side; ++x) {
        T* const pixel = to.at(y, x);
        for (int64_t c = 0; c < to.stride; ++c) pixel[c] = c < a.channels ? from[c * area + y * a.side + x] : T(0);
      }
    }
  }

  // out: [K, results], or null where only the state is asked for.
  void forward_image(int64_t b, State& s, Scratch& w, T* out) const {
    clear_border<T>(s.pictures[0]);
    load_image(b, s.pictures[0]);
    for (int64_t i = 0; i < a.conv_count; ++i) {
      const Picture<T>& to = s.pictures[i + 1];
      clear_border<T>(to);
      convolve_forward(i, s.pictures[i], to, w);
      for (int64_t y = 0; y < to.side; ++y) {
        gelu<T>(to.at(y, 0), s.slopes[i] + y * to.side * to.stride, to.side * to.stride);
      }
    }
    if (positions_) add_to<T>(s.normed, positions_, tokens_ * L);
    normalise_jointly(s);
    row_tiles(tokens_, [&](int64_t first, int64_t count) {
      T* const hidden = s.hidden + first * hidden_lanes();
      apply_rows<T>(token1_, s.normed + first * whole_lanes<T>(token_input_), count, false, hidden);
      gelu<T>(hidden, s.slope + first * hidden_lanes(), count * hidden_lanes());
      apply_rows<T>(token2_, hidden, count, false, s.tokens + first * L);
      normalise_rows<T>(s.tokens + first * L, count, S, T(a.eps), s.tokens + first * L, s.token_rstd + first);
    });
    const T* const queries = a.queries + (a.query_batch == 1 ? 0 : b) * K * S;
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t j = 0; j < L; ++j) w.x[k * L + j] = j < S ? queries[k * S + j] : T(0);
    }
    if (a.picks) {
      for (int64_t k = 0; k < K; ++k) std::memcpy(w.picked + k * L, s.tokens + pick(b, k) * L, size_t(L) * sizeof(T));
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

  void convolve_forward(int64_t i, const Picture<T>& in, const Picture<T>& out, Scratch& w) const {
    const Convolution<T>& c = convs_[i];
    if (!forms_[i].winograd) return convolve<T>(c, in, out);
    with_kernel(c.kernel, [&](auto R) {
      winograd_convolve<T, R>(forms_[i].forward, c.bias, c.in, c.out, in, out, w.tiles, w.products);
    });
  }

  void convolve_back(int64_t i, const Picture<T>& dout, const Picture<T>& din, Scratch& w) const {
    const Convolution<T>& c = convs_[i];
    if (!forms_[i].winograd) return convolve_backward<T>(c, dout, din);
    with_kernel(c.kernel, [&](auto R) {
      winograd_convolve<T, R>(forms_[i].backward, nullptr, c.out, c.in, dout, din, w.tiles, w.products);
    });
  }

  void accumulate_layer(int64_t i, const Picture<T>& in, const Picture<T>& dout, Scratch& w, T* sums) const {
    const Convolution<T>& c = convs_[i];
    if (!forms_[i].gradient) return accumulate_convolution<T>(c, in, dout, sums);
    with_kernel(c.kernel, [&](auto R) {
      winograd_correlate<T, R>(in, dout, c.in, c.out, w.tiles, w.products, w.gradients[i]);
    });
    accumulate_bias<T>(c, dout, sums);
  }

  // What a group has summed up for 64 products: cleared at its begin, and transformed into the arena at its end.
  void begin_group(Scratch& w) const {
    for (int64_t i = 0; i < a.conv_count; ++i) {
      const int64_t size = kProducts * whole_lanes<T>(convs_[i].in) * whole_lanes<T>(convs_[i].out);
      if (forms_[i].gradient) std::memset(w.gradients[i], 0, size_t(size) * sizeof(T));
    }
  }

  void end_group(Scratch& w, T* sums) const {
    for (int64_t i = 0; i < a.conv_count; ++i) {
      const Convolution<T>& c = convs_[i];
      if (!forms_[i].gradient) continue;
      with_kernel(c.kernel, [&](auto R) { winograd_finish<T, R>(w.gradients[i], c.in, c.out, sums + c.weight_sum); });
    }
  }

  // In place, over all tokens and channels together. Sums of the rows are added in double.
  void normalise_jointly(State& s) const {
    const int64_t lanes = whole_lanes<T>(token_input_), last = lanes - kLanes<T>;
    const Vec<T> mask = last_lanes<T>(token_input_);
    double sum = 0, squares = 0;
    for (int64_t t = 0; t < tokens_; ++t) {
      Vec<T> row = {};
      for (int64_t j = 0; j < lanes; j += kLanes<T>) row += load<T>(s.normed + t * lanes + j);
      sum += double(sum_of<T>(row));
    }
    const double count = double(tokens_) * double(token_input_);
    const T mean = T(sum / count);
    for (int64_t t = 0; t < tokens_; ++t) {
      Vec<T> row = {};
      for (int64_t j = 0; j < lanes; j += kLanes<T>) {
        Vec<T> d = load<T>(s.normed + t * lanes + j) - mean;
        if (j == last) d *= mask;
        row += d * d;
        store<T>(s.normed + t * lanes + j, d);
      }
      squares += double(sum_of<T>(row));
    }
    s.scalars[0] = T(1 / std::sqrt(squares / count + a.eps));
    for (int64_t i = 0; i < tokens_ * lanes; i += kLanes<T>) store<T>(s.normed + i, load<T>(s.normed + i) * s.scalars[0]);
  }

  void backward_image(int64_t b, State& s, Scratch& w, T* sums) const {
    const T* const from = a.out_grad + b * K * results();
    const int64_t wide = whole_lanes<T>(results());
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t j = 0; j < wide; ++j) w.out[k * wide + j] = j < results() ? from[k * results() + j] : T(0);
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
    if (a.picks) {
      for (int64_t k = 0; k < K; ++k) std::memcpy(w.picked + k * L, s.tokens + pick(b, k) * L, size_t(L) * sizeof(T));
      accumulate_row_map<T>(seed_, w.picked, w.dx, K, sums);
      apply_rows_transposed<T>(seed_, w.dx, K, false, w.picked);
      for (int64_t k = 0; k < K; ++k) add_to<T>(w.dtokens + pick(b, k) * L, w.picked + k * L, L);
    }
    if (a.query_batch == 1) {
      add_to<T>(sums + query_sum_, w.dx, K * L);
    } else {
      for (int64_t k = 0; k < K; ++k) {
        std::memcpy(a.queries_grad + (b * K + k) * S, w.dx + k * L, size_t(S) * sizeof(T));
      }
    }
    backward_tokens(s, w, sums);
    backward_convolutions(s, w, sums);
  }

  // From w.dtokens to the gradient of what the joint norm read, in w.pictures[0] as the last picture.
  void backward_tokens(const State& s, Scratch& w, T* sums) const {
    const int64_t lanes = whole_lanes<T>(token_input_);
    T* const dnormed = w.pictures[1];
    double sum = 0, dot = 0;
    row_tiles(tokens_, [&](int64_t first, int64_t count) {
      T* const d = w.dtokens + first * L;
      const T* const normed = s.normed + first * lanes;
      normalise_rows_backward<T>(d, s.tokens + first * L, s.token_rstd + first, count, S, false, d);
      accumulate_row_map<T>(token2_, s.hidden + first * hidden_lanes(), d, count, sums);
      apply_rows_transposed<T>(token2_, d, count, false, w.dhidden);
      scale_by<T>(w.dhidden, s.slope + first * hidden_lanes(), count * hidden_lanes());
      accumulate_row_map<T>(token1_, normed, w.dhidden, count, sums);
      if (!a.conv_count) return;
      T* const to = dnormed + first * lanes;
      apply_rows_transposed<T>(token1_, w.dhidden, count, false, to);
      for (int64_t t = 0; t < count; ++t) {
        Vec<T> row = {}, along = {};
        for (int64_t j = t * lanes; j < (t + 1) * lanes; j += kLanes<T>) {
          row += load<T>(to + j);
          along += load<T>(to + j) * load<T>(normed + j);
        }
        sum += double(sum_of<T>(row)), dot += double(sum_of<T>(along));
      }
    });
    if (!a.conv_count) return;
    const double count = double(tokens_) * double(token_input_);
    const T mean = T(sum / count), along = T(dot / count), scale = s.scalars[0];
    const int64_t last = lanes - kLanes<T>;
    const Vec<T> mask = last_lanes<T>(token_input_);
    for (int64_t t = 0; t < tokens_; ++t) {
      for (int64_t j = 0; j < lanes; j += kLanes<T>) {
        T* const at = dnormed + t * lanes + j;
        Vec<T> d = scale * (load<T>(at) - mean - load<T>(s.normed + t * lanes + j) * along);
        if (j == last) d *= mask;
        store<T>(at, d);
      }
    }
    // position: y = grid·Wᵀ + bias, of four columns
    product<T, true>({a.grid, 4}, {dnormed, L, kPanel<T>}, 4, L, tokens_, true, {sums + position_.weight_sum, L});
    add_columns<T>(dnormed, tokens_, L, sums + position_.bias_sum);
  }

  void backward_convolutions(const State& s, Scratch& w, T* sums) const {
    for (int64_t i = a.conv_count - 1, at = 1; i >= 0; --i, at = 1 - at) {
      // The gradient of this picture, past GELU, into a bordered one; the last came without a border.
      Picture<T> dout = picture(i + 1);
      const bool given = i == a.conv_count - 1;
      if (given) {
        const T* const from = w.pictures[1];
        dout.border = convs_[i].kernel / 2, dout.data = w.pictures[0], at = 0;
        for (int64_t y = 0; y < dout.side; ++y) {
          std::memcpy(dout.at(y, 0), from + y * dout.side * dout.stride, size_t(dout.side * dout.stride) * sizeof(T));
        }
      } else {
        dout.border = convs_[i].kernel / 2, dout.data = w.pictures[at];
      }
      clear_border<T>(dout);
      for (int64_t y = 0; y < dout.side; ++y) {
        scale_by<T>(dout.at(y, 0), s.slopes[i] + y * dout.side * dout.stride, dout.side * dout.stride);
      }
      accumulate_layer(i, s.pictures[i], dout, w, sums);
      if (i == 0) return;
      Picture<T> din = picture(i);
      din.border = convs_[i - 1].kernel / 2, din.data = w.pictures[1 - at];
      convolve_back(i, dout, din, w);
    }
  }

  static void write_vector(const T* from, int64_t count, T* to) {
    if (to) std::memcpy(to, from, size_t(count) * sizeof(T));
  }

  // to [rows][columns] = the transpose of from [columns][stride].
  static void write_transposed(const T* from, int64_t rows, int64_t columns, int64_t stride, T* to) {
    for (int64_t i = 0; to && i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) to[i * columns + j] = from[j * stride + i];
    }
  }

  void write_gradients(const T* sums) const {
    T* const* to = a.grads;
    const auto norm = [&](const RowNorm<T>& n) {
      write_vector(sums + n.gamma_sum, n.width, *to++);
      write_vector(sums + n.beta_sum, n.width, *to++);
    };
    const auto map = [&](const RowMap<T>& m) {
      write_transposed(sums + m.weight_sum, m.out, m.in, whole_lanes<T>(m.out), *to++);
      write_vector(sums + m.bias_sum, m.out, *to++);
    };
    for (int64_t i = 0; i < a.conv_count; ++i) {
      write_kernel(convs_[i], sums + convs_[i].weight_sum, *to++);
      write_vector(sums + convs_[i].bias_sum, convs_[i].out, *to++);
    }
    if (a.conv_count) map(position_);
    map(token1_), map(token2_);
    if (a.picks) write_transposed(sums + seed_.weight_sum, S, S, L, *to++);
    for (int64_t i = 0; i < a.layer_count; ++i) {
      const QueryLayer<T>& l = transformer_.layers[i];
      norm(l.norm_q), norm(l.norm_tokens), map(l.to_q);
      if (T* const kv = *to++) write_rows(sums + l.key_sum, kv), write_rows(sums + l.value_sum, kv + S * S);
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
    if (a.queries_grad && a.query_batch == 1) {
      for (int64_t k = 0; k < K; ++k) write_vector(sums + query_sum_ + k * L, S, a.queries_grad + k * S);
    }
  }

  void write_rows(const T* from, T* to) const {
    for (int64_t i = 0; i < S; ++i) std::memcpy(to + i * S, from + i * L, size_t(S) * sizeof(T));
  }

  static void write_kernel(const Convolution<T>& c, const T* from, T* to) {
    const int64_t channels = whole_lanes<T>(c.out), area = c.kernel * c.kernel;
    for (int64_t o = 0; to && o < c.out; ++o) {
      for (int64_t i = 0; i < c.in; ++i) {
        for (int64_t tap = 0; tap < area; ++tap) to[(o * c.in + i) * area + tap] = from[(tap * c.in_stride + i) * channels + o];
      }
    }
  }
};

template <typename T>
void encoder(const EncoderArgs<T>& args) {
  if (args.out) return Encoder<T>(args, true, false).run_forward();
  Encoder<T>(args, !args.saved, true).run_backward();
}

template <typename T>
int64_t encoder_saved_size(const EncoderArgs<T>& args) {
  return Encoder<T>::saved_size(args);
}

}  // namespace fastslots::FASTSLOTS_ISA
