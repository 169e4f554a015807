// How a call is cut into tasks and tiles.
//
// A task is a rectangle of images x pixels; it walks its images in order and the tiles of each image in order, and adds
// gradients into sums of its own. So nothing depends on the thread that runs a task, and the sums of all tasks are
// added in the order of the tasks. How a call is cut does not depend on the number of threads: nor do the bits.
#pragma once

#include "simd.h"

namespace fastslots::FASTSLOTS_ISA {

constexpr int kTilePixels = 96;  // 64 to 192 measure alike at widths 64 and 180 (Zen 4), 32 is 3 % slower

// Tasks of a call, and of a large one three times as many: 24 are shared evenly by 1, 2, 3, 4, 6, 8, 12 and 24 threads,
// but each has sums of its own, which must be cleared and added.
constexpr int64_t kParts = 8;
constexpr int64_t kManyPixels = 16384;

template <typename T>
struct Plan {
  int64_t batch, pixels, pixel_parts = 1, image_parts = 1, panels = 1, workers;

  // per_image: elements of the gradient sums that an image has of its own, which cutting the pixels multiplies;
  // per_pixel: those of a pixel that all images share (0 where they share none), which cutting the images multiplies.
  Plan(int64_t batch_size, int64_t pixel_count, int64_t per_image, int64_t per_pixel, int threads,
       int64_t most_pixels = kTilePixels)
      : batch(batch_size), pixels(pixel_count), workers(threads > 1 ? threads : 1) {
    constexpr int W = kPanel<T>;
    const int64_t parts = batch * pixels < kManyPixels ? kParts : 3 * kParts;
    const int64_t most = (pixels + W - 1) / W;  // a part of the pixels has at least one panel
    if (batch >= parts && (pixels * per_pixel <= batch * per_image || most < parts)) {
      image_parts = parts;
    } else {
      image_parts = parts > kParts && batch >= parts ? 3 : 1;  // rectangles, where both ways have their price
      const int64_t wanted = parts / image_parts;
      pixel_parts = most < wanted ? (most > 0 ? most : 1) : wanted;
    }
    const int64_t share = (pixels + pixel_parts - 1) / pixel_parts, largest = most_pixels / W > 0 ? most_pixels / W : 1;
    panels = (share + W - 1) / W;
    panels = panels > largest ? largest : panels < 1 ? 1 : panels;
  }

  // Every image a task.
  Plan(int64_t batch_size, int64_t pixel_count)
      : batch(batch_size), pixels(pixel_count), image_parts(batch_size > 0 ? batch_size : 1), workers(1) {
    const int64_t most = (pixels + kPanel<T> - 1) / kPanel<T>, largest = kTilePixels / kPanel<T>;
    panels = most > largest ? largest : most > 0 ? most : 1;
  }

  int64_t tasks() const { return pixel_parts * image_parts; }
  int64_t pixel_part(int64_t task) const { return task % pixel_parts; }
  int64_t image_part(int64_t task) const { return task / pixel_parts; }
  int64_t tile_pixels() const { return panels * kPanel<T>; }

  // Calls tile(image, first pixel, count) for every tile of a task, with begin_image(image) before those of an image.
  template <typename BeginImage, typename Tile>
  void walk(int64_t task, BeginImage begin_image, Tile tile) const {
    const int64_t first = pixels * pixel_part(task) / pixel_parts;
    const int64_t last = pixels * (pixel_part(task) + 1) / pixel_parts;
    for (int64_t image = first_image(task); image < last_image(task); ++image) {
      begin_image(image);
      for (int64_t start = first; start < last; start += tile_pixels()) {
        tile(image, start, last - start < tile_pixels() ? last - start : tile_pixels());
      }
    }
  }

  // For what a tile's images share: blocks of `most` tiles, each begun, then walked for one image after the other, then
  // ended. Tiles are told by (first pixel, count, place in the block).
  template <typename BeginTile, typename BeginImage, typename Tile, typename EndTile>
  void walk_blocks(int64_t task, int64_t most, BeginTile begin_tile, BeginImage begin_image, Tile tile,
                   EndTile end_tile) const {
    const int64_t first = pixels * pixel_part(task) / pixel_parts;
    const int64_t last = pixels * (pixel_part(task) + 1) / pixel_parts;
    for (int64_t block = first; block < last; block += most * tile_pixels()) {
      const int64_t end = last - block < most * tile_pixels() ? last : block + most * tile_pixels();
      const auto each_tile = [&](auto visit) {
        int64_t place = 0;
        for (int64_t start = block; start < end; start += tile_pixels(), ++place) {
          visit(start, end - start < tile_pixels() ? end - start : tile_pixels(), place);
        }
      };
      each_tile(begin_tile);
      for (int64_t b = first_image(task); b < last_image(task); ++b) {
        begin_image(b);
        each_tile([&](int64_t start, int64_t count, int64_t place) { tile(b, start, count, place); });
      }
      each_tile(end_tile);
    }
  }

  int64_t first_image(int64_t task) const { return batch * image_part(task) / image_parts; }
  int64_t last_image(int64_t task) const { return batch * (image_part(task) + 1) / image_parts; }
};

// The gradient of pixels that all images may share [shared ? 1 : B, L, D]: the first part of the images writes it, the
// others have copies (`size` elements each, `copies` of them), added up at the end.
template <typename T>
struct PixelGradient {
  T* grad;
  T* extra = nullptr;
  int64_t size, copies;

  PixelGradient(const Plan<T>& plan, T* to, bool shared, int64_t D)
      : grad(to), size(to && shared ? plan.pixels * D : 0), copies(size ? plan.image_parts - 1 : 0) {}

  T* of_task(const Plan<T>& plan, int64_t task) const {
    const int64_t part = plan.image_part(task);
    return size == 0 || part == 0 ? grad : extra + (part - 1) * size;
  }

  // Whether a tile of this image adds to what an earlier image of the task wrote.
  bool adds(const Plan<T>& plan, int64_t task, int64_t image) const {
    return size > 0 && image > plan.first_image(task);
  }

  void finish(const Plan<T>& plan) {
    if (plan.batch == 0 && size) std::memset(grad, 0, size_t(size) * sizeof(T));
    for (int64_t copy = 0; copy < copies; ++copy) {
      for (int64_t i = 0; i < size; ++i) grad[i] += extra[copy * size + i];
    }
  }
};

}  // namespace fastslots::FASTSLOTS_ISA
