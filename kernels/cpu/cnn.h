// The encoder's CNN for one image: convolutions with GELU after each, forward and backward.
//
// A convolution is computed directly or by Winograd's form, whichever is faster for its shape. The weights' gradients of
// a group of images add up in the arena, or, in Winograd's form, in the group's own sums of products, which are
// transformed into the arena once at the group's end.
#pragma once

#include "api.h"
#include "convolution.h"
#include "winograd.h"

namespace fastslots::FASTSLOTS_ISA {

template <typename T>
class Cnn {
 public:
  int64_t count = 0;
  int64_t sides[kMostMaps + 1] = {};

  // The image and what each convolution makes of it, and the slopes of the GELUs: what the backward reads.
  struct State {
    Picture<T> pictures[kMostMaps + 1];
    T* slopes[kMostMaps];
  };

  struct Workspace {
    T* pictures[2];           // of the backward
    T *tiles, *products;      // of a batch of tiles in Winograd's form
    T* gradients[kMostMaps];  // sums of a group there
  };

  // next(): the addresses of weight and bias of each convolution.
  template <typename Next>
  void pack(const EncoderArgs<T>& a, Next next, Packer<T>& pack) {
    const bool forward = pack.forward, backward = pack.backward;
    count = a.conv_count, channels_ = a.channels, kernels_ = a.conv_kernels;
    sides[0] = a.side;
    int64_t channels = a.channels;
    for (int64_t i = 0; i < count; channels = a.conv_rows[i], ++i) {
      const T* const weight = next();
      Form& form = forms_[i];
      form.winograd = a.winograd && i > 0 && winograd_pays(channels, a.conv_rows[i], a.conv_kernels[i],
                                                           a.conv_strides[i], sides[i]);
      form.gradient = form.winograd && sides[i] >= kWinogradGradientSide;
      if (form.winograd) pack.forward = pack.backward = false;
      convs_[i] = pack_convolution<T>(weight, next(), channels, a.conv_rows[i], a.conv_kernels[i], a.conv_strides[i],
                                      i == 0, pack);
      pack.forward = forward, pack.backward = backward;
      if (form.winograd) pack_winograd_form(i, weight, pack);
      sides[i + 1] = (sides[i] + a.conv_strides[i] - 1) / a.conv_strides[i];
    }
  }

  void carve(Carver<T>& c, State& s) const {
    for (int64_t i = 0; i <= count; ++i) {
      s.pictures[i] = picture(i);
      s.pictures[i].data = c.take(s.pictures[i].size());
      if (i) s.slopes[i - 1] = c.take(sides[i] * sides[i] * s.pictures[i].stride);
    }
  }

  // least: elements that both pictures hold in any case, for those who use them too.
  void carve(Carver<T>& c, int64_t least, bool backward, Workspace& w) const {
    int64_t largest = least;
    for (int64_t i = 1; i <= count; ++i) {
      Picture<T> p = picture(i);
      p.border = kernels_[i - 1] / 2;  // that of the convolution which gives it: its backward reads past the edge
      largest = p.size() > largest ? p.size() : largest;
    }
    for (T*& memory : w.pictures) memory = c.take(backward ? largest : 0);
    int64_t channels = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t in = whole_lanes<T>(convs_[i].in), out = whole_lanes<T>(convs_[i].out), most = in > out ? in : out;
      if (forms_[i].winograd && most > channels) channels = most;
      w.gradients[i] = c.take(backward && forms_[i].gradient ? kProducts * winograd_point(in * out) : 0);
    }
    w.tiles = c.take(channels ? kProducts * winograd_stride(channels) : 0);
    w.products = c.take(channels ? kProducts * winograd_stride(channels) : 0);
  }

  // planes: [channels, side, side].
  void forward(const T* planes, State& s, Workspace& w) const {
    clear_border<T>(s.pictures[0]);
    load_image(planes, s.pictures[0]);
    for (int64_t i = 0; i < count; ++i) {
      const Picture<T>& to = s.pictures[i + 1];
      clear_border<T>(to);
      convolve_forward(i, s.pictures[i], to, w);
      for (int64_t y = 0; y < to.side; ++y) {
        gelu<T>(to.at(y, 0), s.slopes[i] + y * to.side * to.stride, to.side * to.stride);
      }
    }
  }

  // From the gradient of the last picture, in w.pictures[1] without a border.
  void backward(const State& s, Workspace& w, T* sums) const {
    for (int64_t i = count - 1, at = 1; i >= 0; --i, at = 1 - at) {
      // The gradient of this picture, past GELU, into a bordered one; the last came without a border.
      Picture<T> dout = picture(i + 1);
      const bool given = i == count - 1;
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

  // What a group has summed up for 64 products: cleared at its begin, and transformed into the arena at its end.
  void begin_group(Workspace& w) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t size = kProducts * winograd_point(whole_lanes<T>(convs_[i].in) * whole_lanes<T>(convs_[i].out));
      if (forms_[i].gradient) std::memset(w.gradients[i], 0, size_t(size) * sizeof(T));
    }
  }

  void end_group(Workspace& w, T* sums) const {
    for (int64_t i = 0; i < count; ++i) {
      const Convolution<T>& c = convs_[i];
      if (!forms_[i].gradient) continue;
      with_kernel(c.kernel, [&](auto R) { winograd_finish<T, R>(w.gradients[i], c.in, c.out, sums + c.weight_sum); });
    }
  }

  // From the sums to gradients as torch keeps them; either may be null.
  void write(int64_t i, const T* sums, T* weight, T* bias) const {
    const Convolution<T>& c = convs_[i];
    const T* const from = sums + c.weight_sum;
    const int64_t channels = whole_lanes<T>(c.out), area = c.kernel * c.kernel;
    fetch(from, c.kernel * c.depth() * channels);
    for (int64_t o = 0; weight && o < c.out; ++o) {
      for (int64_t k = 0; k < c.in; ++k) {
        T* const to = weight + (o * c.in + k) * area;
        for (int64_t tap = 0; tap < area; ++tap) to[tap] = from[(tap * c.in_stride + k) * channels + o];
      }
    }
    if (bias) std::memcpy(bias, sums + c.bias_sum, size_t(c.out) * sizeof(T));
  }

 private:
  // How a convolution is computed: directly, or by Winograd's form with weights packed for it.
  struct Form {
    bool winograd = false, gradient = false;
    const T *forward = nullptr, *backward = nullptr;
  };

  Convolution<T> convs_[kMostMaps];
  Form forms_[kMostMaps];
  int64_t channels_ = 0;
  const int64_t* kernels_ = nullptr;

  void pack_winograd_form(int64_t i, const T* weight, Packer<T>& pack) {
    with_kernel(convs_[i].kernel, [&](auto R) {
      const auto packed = [&](bool turned) {
        return pack_winograd<T, R>(weight, convs_[i].in, convs_[i].out, turned, pack.weights);
      };
      if (pack.forward) forms_[i].forward = packed(false);
      if (pack.backward) forms_[i].backward = packed(true);
    });
  }

  int64_t border(int64_t i) const { return i < count ? kernels_[i] / 2 : 0; }

  Picture<T> picture(int64_t i) const {
    const int64_t stride = i == 0 ? (count ? channels_ : whole_lanes<T>(channels_)) : whole_lanes<T>(convs_[i - 1].out);
    return {nullptr, sides[i], border(i), stride};
  }

  // Planes -> pixels.
  void load_image(const T* from, const Picture<T>& to) const {
    const int64_t area = to.side * to.side;
    for (int64_t y = 0; y < to.side; ++y) {
      for (int64_t x = 0; x < to.side; ++x) {
        T* const pixel = to.at(y, x);
        for (int64_t c = 0; c < to.stride; ++c) pixel[c] = c < channels_ ? from[c * area + y * to.side + x] : T(0);
      }
    }
  }

  void convolve_forward(int64_t i, const Picture<T>& in, const Picture<T>& out, Workspace& w) const {
    const Convolution<T>& c = convs_[i];
    if (!forms_[i].winograd) return convolve<T>(c, in, out);
    with_kernel(c.kernel, [&](auto R) {
      winograd_convolve<T, R>(forms_[i].forward, c.bias, c.in, c.out, in, out, w.tiles, w.products);
    });
  }

  void convolve_back(int64_t i, const Picture<T>& dout, const Picture<T>& din, Workspace& w) const {
    const Convolution<T>& c = convs_[i];
    if (!forms_[i].winograd) return convolve_backward<T>(c, dout, din);
    with_kernel(c.kernel, [&](auto R) {
      winograd_convolve<T, R>(forms_[i].backward, nullptr, c.out, c.in, dout, din, w.tiles, w.products);
    });
  }

  void accumulate_layer(int64_t i, const Picture<T>& in, const Picture<T>& dout, Workspace& w, T* sums) const {
    const Convolution<T>& c = convs_[i];
    if (!forms_[i].gradient) return accumulate_convolution<T>(c, in, dout, sums);
    with_kernel(c.kernel, [&](auto R) {
      winograd_correlate<T, R>(in, dout, c.in, c.out, w.tiles, w.products, w.gradients[i]);
    });
    accumulate_bias<T>(c, dout, sums);
  }
};

}  // namespace fastslots::FASTSLOTS_ISA
