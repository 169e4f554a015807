// The decoder's loss over all pixels of all images, with its gradients: fastslots.ops.decoder_loss in C++.
#pragma once

#include "decoder.h"
#include "plan.h"

namespace fastslots::FASTSLOTS_ISA {

constexpr int64_t kBlockTiles = 8;  // tiles whose queries, made for all images, are held while these take turns

template <typename T>
class DecoderLoss {
 public:
  explicit DecoderLoss(DecoderLossArgs<T>& args)
      : a(args), decoder(args), D(args.width), HK(args.heads * args.slots), backward(args.layer_grads != nullptr),
        plan(args.batch, args.pixels, args.layer_count * 2 * D * HK, args.query_batch == 1 ? D : 0, args.threads),
        query_grad(plan, backward ? args.queries_grad : nullptr, args.query_batch == 1, D) {}

  // For a caller that walks image by image itself, fills the decoder, and uses what is public below.
  DecoderLoss(DecoderLossArgs<T>& args, const Plan<T>& own)
      : a(args), decoder(args, false), D(args.width), HK(args.heads * args.slots), backward(true), plan(own),
        query_grad(plan, nullptr, false, D) {}

  void run() {
    shared_size = backward ? shared_sums(nullptr).used : 0;
    image_size = backward ? image_sums(nullptr).used : 0;
    const int64_t workspace_size = Workspace(*this, nullptr).size, tasks = plan.tasks();
    const int64_t workers = plan.workers < tasks ? plan.workers : tasks;
    const int64_t most_images = (a.batch + plan.image_parts - 1) / plan.image_parts;
    Block<T> shared(shared_size), images(a.batch * image_size);
    Block<T> queries(query_grad.copies * query_grad.size), workspaces(workers * workspace_size);
    Block<double> losses(2 * tasks);
    GroupSums<T> shared_groups(shared_size, workers), image_groups(most_images * image_size, workers);
    query_grad.extra = queries.get();

    auto body = [&](int64_t task, int thread) {
      Workspace workspace(*this, workspaces.get() + thread * workspace_size);
      const int64_t first = plan.first_image(task), own = plan.last_image(task) - first;
      const GroupTotal<T> of_images{images.get() + first * image_size, own * image_size, plan.pixel_part(task) == 0};
      shared_groups.add(task, thread, {shared.get(), shared_size, task == 0}, [&](T* to) {
        image_groups.add(task, thread, of_images, [&](T* image_to) {
          run_task(task, to, image_to, workspace, losses.get() + 2 * task);
        });
      });
    };
    parallel_for(tasks, int(workers), body);

    double recon = 0, pairs = 0;
    for (int64_t task = 0; task < tasks; ++task) {
      recon += losses.get()[2 * task];
      pairs += losses.get()[2 * task + 1];
    }
    a.recon = recon / double(a.batch > 0 ? a.batch : 1);
    a.interaction = pairs / pixel_count();
    if (backward) reduce(shared.get(), images.get());
  }

  DecoderLossArgs<T>& a;
  const PackedDecoder<T> decoder;
  const int64_t D, HK;
  const bool backward;
  const Plan<T> plan;

  double pixel_count() const { return a.batch * a.pixels > 0 ? double(a.batch * a.pixels) : 1.0; }

  struct Sums {
    LayerSums<T> layers[kMostMaps];
    LinearSums<T> head[kMostMaps], query[kMostMaps];
    int64_t used;
  };

  static void carve_mlp(Carver<T>& carver, const Mlp<T>& mlp, LinearSums<T>* sums) {
    for (int64_t i = 0; i < mlp.count; ++i) carve_sums<T>(carver, mlp.maps[i].rows, mlp.maps[i].columns, sums[i]);
  }

  Sums shared_sums(T* base) const {
    Sums sums = {};
    Carver<T> carver{base};
    for (int64_t i = 0; i < a.layer_count; ++i) {
      sums.layers[i].values_bias = carver.take(D * kLanes<T>);
      carve_sums<T>(carver, a.ff_widths[i], D, sums.layers[i].widen);
      carve_sums<T>(carver, D, a.ff_widths[i], sums.layers[i].narrow);
    }
    carve_mlp(carver, decoder.head(), sums.head);
    if (a.query_map_grads) carve_mlp(carver, decoder.query_mlp(), sums.query);
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

  // One thread's tile, and the loss's own part of it.
  struct Workspace : PackedDecoder<T>::Tile {
    T *dx, *dmap, *queries, *dqueries, *factor, *weight, *pairs;
    int64_t size;
    Workspace(const DecoderLoss& o, T* base) {
      Carver<T> carver{base};
      const int64_t pixels = o.plan.tile_pixels();
      o.decoder.carve(carver, o.plan.panels, *this);
      dx = carver.take(pixels * o.D);
      queries = carver.take(o.decoder.makes_queries() ? kBlockTiles * pixels * o.D : 0);
      dqueries = carver.take(o.a.query_map_grads ? kBlockTiles * pixels * o.D : 0);
      dmap = carver.take(pixels * o.a.slots);
      factor = carver.take(pixels);
      weight = carver.take(pixels);
      pairs = carver.take(pixels);
      size = carver.used;
    }
  };

  // From the queries in ws.x: adds the tile's losses and gradients; that of the queries is in ws.dx where needed.
  void run_tile(const TileShape<T>& s, int64_t b, int64_t start, int64_t count, bool query_needed, const Sums& sums,
                Workspace& ws, double* losses) const {
    forward_tile(s, b, start, count, ws, losses);
    if (!backward) return;
    decoder.backward_head(s, sums.head, ws, ws.dx);
    for (int64_t i = a.layer_count - 1; i >= 0; --i) {
      backward_layer(ws.layers[i], sums.layers[i], s, ws.states[i], ws.dmap, i > 0 || query_needed, ws.dx, ws.wide,
                     ws.narrow, ws.scratch);
    }
  }

  // Adds the tile's losses; leaves the gradient of its pixels in ws.wide and that of its map in ws.dmap.
  void forward_tile(const TileShape<T>& s, int64_t b, int64_t start, int64_t count, Workspace& ws,
                    double* losses) const {
    constexpr int W = kPanel<T>;
    const T* out = decoder.forward(s, ws);
    const T pair_factor = T(a.interaction_weight / pixel_count());
    for (int64_t i = 0; i < s.panels * W; ++i) {
      ws.weight[i] = i >= count ? T(0) : a.pixel_weight ? a.pixel_weight[b * a.pixels + start + i] : T(1);
      ws.factor[i] = ws.weight[i] * pair_factor;
    }
    interaction<T>(ws.map, a.slots, s.panels, ws.factor, ws.pairs, backward ? ws.dmap : nullptr);
    for (int64_t i = 0; i < count; ++i) losses[1] += double(ws.pairs[i]) * double(ws.weight[i]);
    losses[0] += compare(out, b, start, count, s.panels, ws);
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

  // The gradients of what all images share, out of sums that lie in one piece.
  void reduce_shared(const Sums& shared) const {
    const Partials all{1, 0};
    for (int64_t i = 0; i < a.layer_count; ++i) {
      const auto& w = a.layers[i];
      const auto& to = a.layer_grads[i];
      const auto& sums = shared.layers[i];
      if (to.b) reduce_rows<T>(sums.values_bias, all, D, to.b);
      reduce_normed<T>(sums.widen, all, a.ff_widths[i], D, w.w1, w.norm_weight, w.norm_bias, to.w1, to.b1,
                       to.norm_weight, to.norm_bias);
      reduce_linear<T>(sums.narrow, all, D, a.ff_widths[i], to.w2, to.b2);
    }
    reduce_normed<T>(shared.head[0], all, a.head_rows[0], D, a.head[0].weight, a.head_norm_weight, a.head_norm_bias,
                     a.head_grads[0].weight, a.head_grads[0].bias, a.head_norm_weight_grad, a.head_norm_bias_grad);
    reduce_mlp(decoder.head(), 1, shared.head, all, a.head_grads);
    if (a.query_map_grads) reduce_mlp(decoder.query_mlp(), 0, shared.query, all, a.query_map_grads);
  }

 private:
  PixelGradient<T> query_grad;
  int64_t shared_size = 0, image_size = 0;

  // images: the sums of the task's images, one behind the other.
  void run_task(int64_t task, T* shared, T* images, Workspace& ws, double* losses) {
    losses[0] = losses[1] = 0;
    Sums sums = shared_sums(shared);
    const auto begin_image = [&](int64_t b) {
      decoder.begin_image(b, ws);
      const Sums of_image = image_sums(images + (b - plan.first_image(task)) * image_size);
      for (int64_t i = 0; i < a.layer_count; ++i) {
        sums.layers[i].scores = of_image.layers[i].scores;
        sums.layers[i].values = of_image.layers[i].values;
      }
    };
    if (!decoder.makes_queries()) {
      plan.walk(task, begin_image, [&](int64_t b, int64_t start, int64_t count) {
        const TileShape<T> s = decoder.shape(b, count);
        decoder.load_queries(b, start, count, s.panels, ws);
        run_tile(s, b, start, count, query_grad.grad != nullptr, sums, ws, losses);
        if (!query_grad.grad) return;
        T* const to = query_grad.of_task(plan, task) + decoder.query_row(b, start) * D;
        store_pixels<T>(ws.dx, D, count, D, query_grad.adds(plan, task, b), to);
      });
      return;
    }
    const bool query_needed = a.query_map_grads != nullptr;
    const int64_t tile_size = plan.tile_pixels() * D;
    plan.walk_blocks(
        task, kBlockTiles,
        [&](int64_t start, int64_t count, int64_t place) {
          const int64_t panels = decoder.shape(0, count).panels;
          const T* made = decoder.make_queries(start, count, panels, ws);
          std::memcpy(ws.queries + place * tile_size, made, size_t(panels * D * kPanel<T>) * sizeof(T));
          if (query_needed) std::memset(ws.dqueries + place * tile_size, 0, size_t(tile_size) * sizeof(T));
        },
        begin_image,
        [&](int64_t b, int64_t start, int64_t count, int64_t place) {
          const TileShape<T> s = decoder.shape(b, count);
          std::memcpy(ws.x, ws.queries + place * tile_size, size_t(s.panels * D * kPanel<T>) * sizeof(T));
          run_tile(s, b, start, count, query_needed, sums, ws, losses);
          if (query_needed) add_to<T>(ws.dqueries + place * tile_size, ws.dx, s.panels * D * kPanel<T>);
        },
        [&](int64_t start, int64_t count, int64_t place) {
          if (!query_needed) return;
          const int64_t panels = decoder.shape(0, count).panels;
          decoder.make_queries(start, count, panels, ws);  // again, for the activations inside the MLP
          std::memcpy(ws.wide, ws.dqueries + place * tile_size, size_t(panels * D * kPanel<T>) * sizeof(T));
          decoder.query_mlp().backward(ws.code, panels, ws.query, sums.query, false, ws.wide, ws.wide2, ws.scratch);
        });
  }

  void reduce(T* shared, T* images) {
    reduce_shared(shared_sums(shared));
    const Partials whole{1, 0};
    auto body = [&](int64_t b, int) {
      const Sums sums = image_sums(images + b * image_size);
      for (int64_t i = 0; i < a.layer_count; ++i) {
        reduce_projections<T>(sums.layers[i], whole, b, D, HK, a.layer_grads[i]);
      }
    };
    parallel_for(a.batch, a.threads, body);
    query_grad.finish(plan);
  }

  static void reduce_mlp(const Mlp<T>& mlp, int64_t first, const LinearSums<T>* sums, Partials all,
                         const LinearArrays<T*>* to) {
    for (int64_t i = first; i < mlp.count; ++i) {
      reduce_linear<T>(sums[i], all, mlp.maps[i].rows, mlp.maps[i].columns, to[i].weight, to[i].bias);
    }
  }
};

template <typename T>
void decoder_loss(DecoderLossArgs<T>& args) {
  DecoderLoss<T>(args).run();
}

}  // namespace fastslots::FASTSLOTS_ISA
