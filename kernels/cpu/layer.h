// One decoder layer, or its folded cross-attention alone, over all pixels: forward, and backward that runs the tile's
// forward again. Nothing but inputs and outputs spans all pixels.
#pragma once

#include "plan.h"
#include "weights.h"

namespace fastslots::FASTSLOTS_ISA {

template <typename T>
class LayerOp {
 public:
  explicit LayerOp(const LayerArgs<T>& args)
      : a(args), D(args.width), HK(args.heads * args.slots), F(args.ff_width), backward(args.y_grad != nullptr),
        plan(args.batch, args.pixels, 2 * D * HK, backward && args.x_batch == 1 ? D : 0, args.threads),
        x_grad(plan, backward ? args.x_grad : nullptr, args.x_batch == 1, D) {}

  void run() {
    Carver<T> measure{nullptr};
    pack(measure);
    Block<T> packed(measure.used);
    Carver<T> carver{packed.get()};
    pack(carver);

    shared_size = backward ? shared_sums(nullptr).used : 0;
    image_size = backward ? image_sums(nullptr).used : 0;
    const int64_t workspace_size = Workspace(*this, nullptr).size, tasks = plan.tasks();
    Block<T> shared(tasks * shared_size), images(plan.pixel_parts * a.batch * image_size);
    Block<T> copies(x_grad.copies * x_grad.size), workspaces(plan.workers * workspace_size);
    shared_base = shared.get(), image_base = images.get(), x_grad.extra = copies.get();
    auto body = [&](int64_t task, int thread) {
      Workspace workspace(*this, workspaces.get() + thread * workspace_size);
      run_task(task, workspace);
    };
    parallel_for(tasks, a.threads, body);
    if (backward) reduce();
  }

 private:
  const LayerArgs<T>& a;
  const int64_t D, HK, F;
  const bool backward;
  const Plan<T> plan;
  PixelGradient<T> x_grad;
  int64_t shared_size = 0, image_size = 0;
  T *shared_base = nullptr, *image_base = nullptr;
  Layer<T> shared_pack;

  struct Sums : LayerSums<T> {
    int64_t used;
  };

  struct Workspace {
    LayerState<T> state;
    Layer<T> pack;
    T *x, *dx, *wide, *narrow, *scratch, *map, *dmap, *projections;
    int64_t size;
    Workspace(const LayerOp& o, T* base) {
      Carver<T> carver{base};
      const int64_t pixels = o.plan.tile_pixels();
      state.carve(carver, o.plan.panels, o.D, o.HK, o.F);
      x = carver.take(pixels * o.D);
      dx = carver.take(pixels * o.D);
      narrow = carver.take(pixels * o.D);
      wide = carver.take(pixels * (o.F > o.HK ? o.F : o.HK));
      map = carver.take(pixels * o.a.slots);
      dmap = carver.take(pixels * o.a.slots);
      scratch = carver.take(pixels * kPanel<T>);
      projections = carver.take(4 * (o.D * o.HK + 16));
      size = carver.used;
    }
  };

  void pack(Carver<T>& carver) {
    if (F == 0) return;
    const auto& w = a.weights;
    shared_pack.widen = pack_normed<T>(w.w1, F, D, w.norm_weight, w.norm_bias, w.b1, carver);
    shared_pack.narrow = pack_linear<T>(w.w2, D, F, F, 1, w.b2, carver);
  }

  Sums shared_sums(T* base) const {
    Sums sums = {};
    Carver<T> carver{base};
    sums.values_bias = carver.take(D * kLanes<T>);
    if (F) {
      carve_sums<T>(carver, F, D, sums.widen);
      carve_sums<T>(carver, D, F, sums.narrow);
    }
    sums.used = carver.used;
    return sums;
  }

  Sums image_sums(T* base) const {
    Sums sums = {};
    Carver<T> carver{base};
    carve_sums<T>(carver, HK, D, sums.scores);
    sums.values = carver.take(gradient_size<T>(HK, D));
    sums.used = carver.used;
    return sums;
  }

  void run_task(int64_t task, Workspace& ws) {
    T* const shared = shared_base + task * shared_size;
    std::memset(shared, 0, size_t(shared_size) * sizeof(T));
    Sums sums = shared_sums(shared);
    plan.walk(
        task,
        [&](int64_t b) {
          Carver<T> carver{ws.projections};
          ws.pack = shared_pack;
          pack_projections<T>(a.weights, b, D, HK, carver, ws.pack);
          T* const image = image_base + (plan.pixel_part(task) * a.batch + b) * image_size;
          std::memset(image, 0, size_t(image_size) * sizeof(T));
          const Sums own = image_sums(image);
          sums.scores = own.scores;
          sums.values = own.values;
        },
        [&](int64_t b, int64_t start, int64_t count) {
          const TileShape<T> s{(count + kPanel<T> - 1) / kPanel<T>, D, a.heads, a.slots, T(a.eps), T(1),
                               a.slot_mask ? a.slot_mask + b * a.slots : nullptr};
          const int64_t x_row = (a.x_batch == 1 ? 0 : b) * a.pixels + start, row = b * a.pixels + start;
          load_pixels<T>(a.x + x_row * D, D, count, D, s.panels, ws.x);
          const T* y = forward_tile(s, ws);
          if (!backward) {
            store_pixels<T>(y, D, count, D, false, a.y + row * D);
            store_pixels<T>(ws.map, a.slots, count, a.slots, false, a.slot_map + row * a.slots);
            return;
          }
          load_pixels<T>(a.y_grad + row * D, D, count, D, s.panels, ws.dx);
          load_pixels<T>(a.slot_map_grad + row * a.slots, a.slots, count, a.slots, s.panels, ws.dmap);
          const T* dx = backward_tile(s, sums, ws);
          if (!x_grad.grad) return;
          T* const to = x_grad.of_task(plan, task) + x_row * D;
          store_pixels<T>(dx, D, count, D, x_grad.adds(plan, task, b), to);
        });
  }

  const T* forward_tile(const TileShape<T>& s, Workspace& ws) const {
    std::memset(ws.map, 0, size_t(s.panels * kPanel<T> * a.slots) * sizeof(T));
    if (F) {
      forward_layer(ws.pack, s, ws.state, ws.x, ws.map);
      return ws.x;
    }
    attend(ws.pack, s, ws.x, ws.state.attention, ws.map);
    if (!backward) apply(ws.pack.values, ws.state.attention, s.panels, false, ws.narrow);
    return ws.narrow;
  }

  const T* backward_tile(const TileShape<T>& s, const Sums& sums, Workspace& ws) const {
    if (F) {
      backward_layer(ws.pack, sums, s, ws.state, ws.dmap, x_grad.grad != nullptr, ws.dx, ws.wide, ws.narrow, ws.scratch);
      return ws.dx;
    }
    attend_backward(ws.pack, sums, s, ws.x, ws.state.attention, ws.dx, ws.dmap, ws.wide, ws.scratch, ws.narrow);
    return ws.narrow;
  }

  void reduce() {
    const auto &w = a.weights;
    const auto &to = a.grads;
    const Sums sums = shared_sums(shared_base);
    const Partials all{plan.tasks(), shared_size}, parts{plan.pixel_parts, a.batch * image_size};
    if (to.b) reduce_rows<T>(sums.values_bias, all, D, to.b);
    if (F) {
      reduce_normed<T>(sums.widen, all, F, D, w.w1, w.norm_weight, w.norm_bias, to.w1, to.b1, to.norm_weight,
                       to.norm_bias);
      reduce_linear<T>(sums.narrow, all, D, F, to.w2, to.b2);
    }
    for (int64_t b = 0; b < a.batch; ++b) {
      reduce_projections<T>(image_sums(image_base + b * image_size), parts, b, D, HK, to);
    }
    x_grad.finish(plan);
  }
};

template <typename T>
void layer(const LayerArgs<T>& args) {
  LayerOp<T>(args).run();
}

}  // namespace fastslots::FASTSLOTS_ISA
