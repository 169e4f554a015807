// What a step draws for an image: noise and the pixels that it decodes, the same bits as fastslots/train/draws.py and
// pixels.py give; and the seeds of its first queries, as fastslots/models/queries.py picks them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "simd.h"
#include "tile.h"

namespace fastslots::FASTSLOTS_ISA {

constexpr double kForegroundDistance = 0.05;
constexpr double kSeedTie = 1e-6;

// The median of `count` values, which are reordered: the lower of the two in the middle; NaN comes last.
template <typename T>
T lower_median(T* values, int64_t count) {
  T* const middle = values + (count - 1) / 2;
  std::nth_element(values, middle, values + count, [](T a, T b) { return a < b || (b != b && a == a); });
  return *middle;
}

// Output `index` (from 1) of SplitMix64 (Steele et al., OOPSLA 2014) seeded with `key`.
inline uint64_t random_word(uint64_t key, uint64_t index) {
  uint64_t x = key + index * 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// A whole number below `count` of the upper half of a word.
inline int64_t uniform_of(uint64_t word, int64_t count) { return int64_t((word >> 32) * uint64_t(count) >> 32); }

// Standard normal: half the sum of four quantiles of `table` [2^16], one for each 16 bits of a word.
inline float normal_of(uint64_t word, const int32_t* table) {
  int32_t total = 0;
  for (int part = 0; part < 4; ++part) total += table[uint16_t(word >> 16 * part) ^ 0x8000u];
  return float(total) * (0x1p-24f / 2);
}

// Which pixels a drawing favours: edges, foreground and all of them.
enum class Favours { all, foreground, edges };

template <typename T>
struct PixelDraw {
  int64_t channels, side;
  Favours favours;

  int64_t scratch_size() const { return 6 * side + side * side; }      // elements of T
  int64_t index_size() const { return 2 * side * side; }               // of int32

  // Pixels [count] of the words from output `first` on, and, unless all are alike, their weights 1/(side²·probability).
  // planes: [channels][side][side].
  void draw(const T* planes, uint64_t key, uint64_t first, int64_t count, T* scratch, int32_t* index, int64_t* pixels,
            T* weights) const {
    const int64_t area = side * side;
    int32_t* chosen[2] = {index, index + area};  // places of edges and foreground pixels, one behind the other
    int64_t counts[2] = {0, 0}, sets = 0;
    T* const value = scratch + 6 * side;
    if (favours == Favours::edges) {
      spreads(planes, scratch, value);
      counts[sets] = places(value, T(2 * kForegroundDistance), chosen[sets]), ++sets;
    }
    if (favours != Favours::all) {
      distances(planes, scratch, value);
      counts[sets] = places(value, T(kForegroundDistance), chosen[sets]), ++sets;
    }
    for (int64_t j = 0; j < count; ++j) {
      const uint64_t word = random_word(key, first + uint64_t(j));
      int64_t of = area, set = -1;
      for (int64_t i = sets - 1; i >= 0; --i) {
        if ((word >> i & 1) && counts[i]) of = counts[i], set = i;
      }
      const int64_t nth = uniform_of(word, of);
      pixels[j] = set < 0 ? nth : chosen[set][nth];
      float probability = float(1 / double(area));
      for (int64_t i = sets - 1; i >= 0; --i) {
        if (!counts[i]) continue;
        const bool here = std::binary_search(chosen[i], chosen[i] + counts[i], int32_t(pixels[j]));
        probability = 0.5f * probability + (here ? 0.5f / float(counts[i]) : 0.0f);
      }
      if (weights) weights[j] = T(1 / (float(area) * probability));
    }
  }

 private:
  // Pixels above `least`, in order; returns how many.
  int64_t places(const T* value, T least, int32_t* to) const {
    int64_t count = 0;
    for (int64_t i = 0; i < side * side; ++i) {
      to[count] = int32_t(i);
      count += value[i] > least;
    }
    return count;
  }

  // How far each pixel is from the median of the image's border, in the channel where it is farthest.
  void distances(const T* planes, T* border, T* to) const {
    const int64_t area = side * side;
    for (int64_t i = 0; i < area; ++i) to[i] = 0;
    for (int64_t c = 0; c < channels; ++c) {
      const T* const plane = planes + c * area;
      for (int64_t i = 0; i < side; ++i) {
        border[i] = plane[i], border[side + i] = plane[area - side + i];
        border[2 * side + i] = plane[i * side], border[3 * side + i] = plane[i * side + side - 1];
      }
      const T ground = lower_median(border, 4 * side);
      for (int64_t i = 0; i < area; ++i) {
        const T apart = std::abs(plane[i] - ground);
        to[i] = apart > to[i] ? apart : to[i];
      }
    }
  }

  // max − min over the 3x3 around each pixel, the largest of the channels. two: [2·side] of workspace.
  void spreads(const T* planes, T* two, T* to) const {
    T *const high = two, *const low = two + side;
    for (int64_t i = 0; i < side * side; ++i) to[i] = 0;
    for (int64_t row = 0; row < channels * side; ++row) {
      const int64_t y = row % side;
      const T *const here = planes + row * side, *const above = y ? here - side : here;
      const T* const below = y + 1 < side ? here + side : here;
      for (int64_t x = 0; x < side; ++x) {
        const T most = above[x] > here[x] ? above[x] : here[x], least = above[x] < here[x] ? above[x] : here[x];
        high[x] = below[x] > most ? below[x] : most, low[x] = below[x] < least ? below[x] : least;
      }
      for (int64_t x = 0; x < side; ++x) {
        const int64_t before = x ? x - 1 : x, after = x + 1 < side ? x + 1 : x;
        T most = high[before] > high[x] ? high[before] : high[x], least = low[before] < low[x] ? low[before] : low[x];
        most = high[after] > most ? high[after] : most, least = low[after] < least ? low[after] : least;
        T& at = to[y * side + x];
        at = most - least > at ? most - least : at;
      }
    }
  }
};

// Farthest-first traversal over the patches of an image (`farthest_patches` in fastslots/models/queries.py).
template <typename T>
struct SeedChoice {
  int64_t channels, side, patches, slots;  // patches: along a side
  const T* places;                         // [patches², 2]
  const int64_t* token_of;                 // [patches²]

  int64_t seen_width() const { return channels + 3; }
  int64_t scratch_size() const { return (channels + 4) * patches * patches; }

  // planes -> picks [slots], and seen [slots][channels + 3]: colour, place and distance. Sums are added as torch adds
  // them, squares rounded first, since patches of one colour at equal distances are many: the least bit decides.
  void choose(const T* planes, T* scratch, int64_t* picks, T* seen) const {
    const int64_t count = patches * patches, size = side / patches;
    T *const colours = scratch, *const weight = colours + channels * count, *const nearest = weight + count;
    T *const term = nearest + count, *const apart = term + count;
    for (int64_t p = 0; p < count; ++p) weight[p] = 0, nearest[p] = 1;
    for (int64_t c = 0; c < channels; ++c) {
      T* const colour = colours + c * count;
      for (int64_t p = 0; p < count; ++p) {
        const T* const corner = planes + (c * side + p / patches * size) * side + p % patches * size;
        T sum = 0;
        for (int64_t y = 0; y < size; ++y) {
          for (int64_t x = 0; x < size; ++x) sum += corner[y * side + x];
        }
        term[p] = colour[p] = sum / T(size * size);
      }
      const T ground = lower_median(term, count);
      add_squares(colour, 1, ground, term, weight);
    }
    for (int64_t p = 0; p < count; ++p) weight[p] = std::sqrt(weight[p]) + T(kSeedTie);
    for (int64_t k = 0; k < slots; ++k) {
      int64_t seed = 0;
      for (int64_t p = 1; p < count; ++p) {
        if (weight[p] * nearest[p] > weight[seed] * nearest[seed]) seed = p;
      }
      picks[k] = token_of[seed];
      T* const of_slot = seen + k * seen_width();
      for (int64_t c = 0; c < channels; ++c) of_slot[c] = colours[c * count + seed];
      of_slot[channels] = places[2 * seed], of_slot[channels + 1] = places[2 * seed + 1];
      of_slot[channels + 2] = nearest[seed];
      for (int64_t p = 0; p < count; ++p) apart[p] = 0;
      for (int64_t c = 0; c < channels; ++c) add_squares(colours + c * count, 1, of_slot[c], term, apart);
      for (int64_t axis = 0; axis < 2; ++axis) add_squares(places + axis, 2, of_slot[channels + axis], term, apart);
      for (int64_t p = 0; p < count; ++p) {
        const T distance = std::sqrt(apart[p]);
        nearest[p] = k == 0 || distance < nearest[p] ? distance : nearest[p];
      }
    }
  }

 private:
  // to += (value − from)² of each patch; in two passes, so that no square and sum become one rounding.
  void add_squares(const T* values, int64_t stride, T from, T* term, T* to) const {
    for (int64_t p = 0; p < patches * patches; ++p) {
      const T d = values[p * stride] - from;
      term[p] = d * d;
    }
    asm volatile("" : : "r"(term) : "memory");
    for (int64_t p = 0; p < patches * patches; ++p) to[p] += term[p];
  }
};

}  // namespace fastslots::FASTSLOTS_ISA
