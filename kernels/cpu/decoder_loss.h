// The decoder's loss over all pixels of all images, with its gradients: fastslots.ops.tiled in C++.
#pragma once

#include "decoder.h"
#include "plan.h"

namespace fastslots::FASTSLOTS_ISA {

template <typename T>
class DecoderLoss {
 public:
  explicit DecoderLoss(DecoderLossArgs<T>& args)
      : a(args), decoder(args), D(args.width), HK(args.heads * args.slots), backward(args.layer_grads != nullptr),
        plan(args.batch, args.pixels, args.layer_count * 2 * D * HK, args.query_batch == 1 ? D : 0, args.threads),
        query_grad(plan, backward ? args.queries_grad : nullptr, args.query_batch == 1, D) {}

  void run() {
    shared_size = backward ? shared_sums(nullptr).used : 0;
    image_size = backward ? image_sums(nullptr).used : 0;
    const int64_t workspace_size = Workspace(*this, nullptr).size, tasks = plan.tasks();
    Block<T> sums(tasks * shared_size), images(plan.pixel_parts * a.batch * image_size);
    Block<T> queries(query_grad.copies * query_grad.size), workspaces(plan.workers * workspace_size);
    Block<double> losses(2 * tasks);
    shared_base = sums.get(), image_base = images.get(), query_grad.extra = queries.get();

    auto body = [&](int64_t task, int thread) {
      Workspace workspace(*this, workspaces.get() + thread * workspace_size);
      run_task(task, workspace, losses.get() + 2 * task);
    };
    parallel_for(tasks, a.threads, body);

    double recon = 0, pairs = 0;
    for (int64_t task = 0; task < tasks; ++task) {
      recon += losses.get()[2 * task];
      pairs += losses.get()[2 * task + 1];
    }
    a.recon = recon / double(a.batch > 0 ? a.batch : 1);
    a.interaction = pairs / pixel_count();
    if (backward) reduce(tasks);
  }

 private:
  DecoderLossArgs<T>& a;
  const PackedDecoder<T> decoder;
  const int64_t D, HK;
  const bool backward;
  const Plan<T> plan;
  PixelGradient<T> query_grad;
  int64_t shared_size = 0, image_size = 0;
  T *shared_base = nullptr, *image_base = nullptr;

  double pixel_count() const { return a.batch * a.pixels > 0 ? double(a.batch * a.pixels) : 1.0; }

  struct Sums {
    LayerSums<T> layers[kMostMaps];
    LinearSums<T> head[kMostMaps];
    int64_t used;
  };

  Sums shared_sums(T* base) const {
    Sums sums = {};
    Carver<T> carver{base};
    for (int64_t i = 0; i < a.layer_count; ++i) {
      sums.layers[i].values_bias = carver.take(D * kLanes<T>);
      carve_sums<T>(carver, a.ff_widths[i], D, sums.layers[i].widen);
      carve_sums<T>(carver, D, a.ff_widths[i], sums.layers[i].narrow);
    }
    for (int64_t i = 0; i < a.head_count; ++i) {
      carve_sums<T>(carver, decoder.head(i).rows, decoder.head(i).columns, sums.head[i]);
    }
    sums.used = carver.used;
    return sums;
  }

  Sums image_sums(T* base) const {
    Sums sums = {};
    Carver<T> carver{base};
    for (int64_t i = 0; i < a.layer_count; ++i) {
      carve_sums<T>(carver, HK, D, sums.layers[i].scores);
      sums.layers[i].values = carver.take(gradient_size<T>(HK, D));
    }
    sums.used = carver.used;
    return sums;
  }

  // One thread's tile, and the losses' own part of it.
  struct Workspace : PackedDecoder<T>::Tile {
    T *dx, *dmap, *factor, *weight, *pairs;
    int64_t size;
    Workspace(const DecoderLoss& o, T* base) {
      Carver<T> carver{base};
      const int64_t pixels = o.plan.tile_pixels();
      o.decoder.carve(carver, o.plan.panels, *this);
      dx = carver.take(pixels * o.D);
      dmap = carver.take(pixels * o.a.slots);
      for (T** row : {&factor, &weight, &pairs}) *row = carver.take(pixels);
      size = carver.used;
    }
  };

  void run_task(int64_t task, Workspace& ws, double* losses) {
    losses[0] = losses[1] = 0;
    T* const shared = shared_base + task * shared_size;
    std::memset(shared, 0, size_t(shared_size) * sizeof(T));
    Sums sums = shared_sums(shared);
    plan.walk(
        task,
        [&](int64_t b) {
          decoder.begin_image(b, ws);
          T* const image = image_base + (plan.pixel_part(task) * a.batch + b) * image_size;
          std::memset(image, 0, size_t(image_size) * sizeof(T));
          const Sums own = image_sums(image);
          for (int64_t i = 0; i < a.layer_count; ++i) {
            sums.layers[i].scores = own.layers[i].scores;
            sums.layers[i].values = own.layers[i].values;
          }
        },
        [&](int64_t b, int64_t start, int64_t count) {
          const TileShape<T> s = decoder.shape(b, count);
          forward_tile(s, b, start, count, ws, losses);
          if (!backward) return;
          backward_tile(s, sums, ws);
          if (query_grad.grad) {
            T* const to = query_grad.of_task(plan, task) + decoder.query_row(b, start) * D;
            store_pixels<T>(ws.dx, D, count, D, query_grad.adds(plan, task, b), to);
          }
        });
  }

  // Adds the tile's losses; leaves the gradient of its pixels in ws.wide and that of its map in ws.dmap.
  void forward_tile(const TileShape<T>& s, int64_t b, int64_t start, int64_t count, Workspace& ws, double* losses) {
    constexpr int W = kPanel<T>;
    const T* out = decoder.forward(s, b, start, count, ws);
    const T pair_factor = T(a.interaction_weight / pixel_count());
    for (int64_t i = 0; i < s.panels * W; ++i) {
      ws.weight[i] = i >= count ? T(0) : a.pixel_weight ? a.pixel_weight[b * a.pixels + start + i] : T(1);
      ws.factor[i] = ws.weight[i] * pair_factor;
    }
    interaction<T>(ws.map, a.slots, s.panels, ws.factor, ws.pairs, backward ? ws.dmap : nullptr);
    for (int64_t i = 0; i < count; ++i) losses[1] += double(ws.pairs[i]) * double(ws.weight[i]);
    losses[0] += compare(out, b, start, count, s.panels, ws);
  }

  void backward_tile(const TileShape<T>& s, const Sums& sums, Workspace& ws) const {
    decoder.backward_head(s, sums.head, ws, ws.dx);
    for (int64_t i = a.layer_count - 1; i >= 0; --i) {
      const bool input = i > 0 || query_grad.grad;
      backward_layer(ws.layers[i], sums.layers[i], s, ws.states[i], ws.dmap, input, ws.dx, ws.wide, ws.narrow,
                     ws.scratch);
    }
  }

  // Σ weight·(out − target)², and its gradient into ws.wide (0 past the last pixel).
  double compare(const T* out, int64_t b, int64_t start, int64_t count, int64_t panel_count, Workspace& ws) const {
    constexpr int W = kPanel<T>;
    const int64_t C = a.head_rows[a.head_count - 1];
    const T factor = T(2 * a.recon_weight / double(a.batch));
    const T* target = a.target + (b * a.pixels + start) * C;
    double total = 0;
    for (int64_t i = 0; i < panel_count * W; ++i) {
      for (int64_t c = 0; c < C; ++c) {
        const int64_t at = (i / W * C + c) * W + i % W;
        const T error = i < count ? out[at] - target[i * C + c] : T(0);
        total += double(ws.weight[i]) * double(error) * double(error);
        ws.wide[at] = factor * ws.weight[i] * error;
      }
    }
    return total;
  }

  void reduce(int64_t tasks) {
    const Sums shared = shared_sums(shared_base);
    const Partials all{tasks, shared_size};
    for (int64_t i = 0; i < a.layer_count; ++i) {
      const auto& w = a.layers[i];
      const auto& to = a.layer_grads[i];
      const auto& sums = shared.layers[i];
      if (to.b) reduce_rows<T>(sums.values_bias, all, D, to.b);
      reduce_normed<T>(sums.widen, all, a.ff_widths[i], D, w.w1, w.norm_weight, w.norm_bias, to.w1, to.b1,
                       to.norm_weight, to.norm_bias);
      reduce_linear<T>(sums.narrow, all, D, a.ff_widths[i], to.w2, to.b2);
    }
    for (int64_t i = 0; i < a.head_count; ++i) {
      const auto& to = a.head_grads[i];
      if (i == 0) {
        reduce_normed<T>(shared.head[0], all, decoder.head(0).rows, D, a.head[0].weight, a.head_norm_weight, a.head_norm_bias,
                         to.weight, to.bias, a.head_norm_weight_grad, a.head_norm_bias_grad);
      } else {
        reduce_linear<T>(shared.head[i], all, decoder.head(i).rows, decoder.head(i).columns, to.weight, to.bias);
      }
    }
    const Partials parts{plan.pixel_parts, a.batch * image_size};
    auto body = [&](int64_t b, int) {
      const Sums sums = image_sums(image_base + b * image_size);
      for (int64_t i = 0; i < a.layer_count; ++i) {
        reduce_projections<T>(sums.layers[i], parts, b, D, HK, a.layer_grads[i]);
      }
    };
    parallel_for(a.batch, a.threads, body);
    query_grad.finish(plan);
  }
};

template <typename T>
void decoder_loss(DecoderLossArgs<T>& args) {
  DecoderLoss<T>(args).run();
}

}  // namespace fastslots::FASTSLOTS_ISA
