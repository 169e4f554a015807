// Loss and gradients of the whole model where each image decodes pixels of its own, in one parallel region:
//
//   draw pixels and seeds -> encoder -> posterior -> slots folded into the decoder -> its loss and back, tile by tile
//   -> back through the folding, the posterior and the encoder
//
// An image is walked forward and back by one thread, in a core's cache. Images are cut into a fixed number of groups, each
// of which adds gradients up in the order of its images; the groups are added in theirs. So nothing depends on the number
// of threads. The plain path of the same is SlotVAE.training_loss, which tests compare this with.
#pragma once

#include "decoder_loss.h"
#include "draws.h"
#include "encoder.h"
#include "slot_fold.h"

namespace fastslots::FASTSLOTS_ISA {

constexpr int64_t kStepGroups = 8;  // shared evenly by 1, 2, 4 and 8 threads; each has sums of its own to clear and add

template <typename T>
class TrainStep {
 public:
  explicit TrainStep(TrainStepArgs<T>& args)
      : a(args), B(args.encoder.batch), K(args.encoder.slots), P(args.decoder.pixels),
        C(args.decoder.head_rows[args.decoder.head_count - 1]), target_(B * P * C), weight_(B * P),
        encoder_(args.encoder, true, true, false), decoder_(with_arrays(args.decoder), Plan<T>(B, P)),
        fold_size_(measure_fold()), fold_memory_(fold_size_), sums_{nullptr, encoder_.sums_end()}, fold_(make_fold()) {
    learned_sum_ = sums_.used;
    sums_.take(K * encoder_.L);
    seen_sum_ = sums_.used;
    sums_.take(a.patch_side ? (a.encoder.channels + 3) * encoder_.L : 0);
    decoder_sum_ = sums_.used;
    sums_size_ = decoder_sum_ + decoder_.shared_sums(nullptr).used;
    fill();
  }

  void run() {
    const int64_t groups = B < kStepGroups ? (B > 0 ? B : 1) : kStepGroups;
    const int64_t most = a.encoder.threads > 1 ? a.encoder.threads : 1, workers = most < groups ? most : groups;
    const int64_t size = Memory(*this, nullptr).used;
    Block<T> memory(workers * size);
    Block<T> total(sums_size_);
    GroupSums<T> sums(sums_size_, workers);
    Block<double> losses(3 * groups);
    auto body = [&](int64_t group, int thread) {
      Memory m(*this, memory.get() + thread * size);
      double* const of_group = losses.get() + 3 * group;
      of_group[0] = of_group[1] = of_group[2] = 0;
      sums.add(group, thread, {total.get(), sums_size_, group == 0}, [&](T* to) {
        m.shared = decoder_.shared_sums(to + decoder_sum_);
        encoder_.begin_group(m.scratch);
        for (int64_t b = B * group / groups; b < B * (group + 1) / groups; ++b) image(b, m, to, of_group);
        encoder_.end_group(m.scratch, to);
      });
    };
    parallel_for(groups, int(workers), body);
    double loss[3] = {};
    for (int64_t i = 0; i < 3 * groups; ++i) loss[i % 3] += losses.get()[i];
    a.recon = loss[0] / double(B > 0 ? B : 1), a.interaction = loss[1] / decoder_.pixel_count();
    a.kl = loss[2] / double(B > 0 ? B : 1);
    write(total.get());
  }

 private:
  TrainStepArgs<T>& a;
  const int64_t B, K, P, C;
  Block<T> target_, weight_;
  const Encoder<T> encoder_;
  const DecoderLoss<T> decoder_;
  const int64_t fold_size_;
  Block<T> fold_memory_;
  Carver<T> sums_;  // counts the elements of the gradients' sums
  const SlotFold<T> fold_;
  int64_t learned_sum_, seen_sum_, decoder_sum_, sums_size_;

  // The images' targets and weights are gathered here, by the task of each image.
  DecoderLossArgs<T>& with_arrays(DecoderLossArgs<T>& d) const {
    d.target = target_.get(), d.pixel_weight = a.pixels ? a.pixel_weight : a.favours ? weight_.get() : nullptr;
    return d;
  }

  int64_t measure_fold() const {
    Packer<T> pack{{nullptr}, {nullptr}, true, true};
    const SlotFold<T> fold(a, pack);
    return pack.weights.used;
  }

  SlotFold<T> make_fold() {
    Packer<T> pack{{fold_memory_.get(), 0, false}, sums_, true, true};
    SlotFold<T> fold(a, pack);
    sums_ = pack.sums;
    return fold;
  }

  // Packs the weights, a share a thread.
  void fill() const {
    const int threads = a.encoder.threads > 1 ? a.encoder.threads : 1;
    const int shares = threads < PackShare::kMost ? threads : PackShare::kMost;
    auto body = [&](int64_t index, int) {
      PackShare share;
      share.index = int(index), share.count = shares;
      encoder_.fill(share);
      decoder_.decoder.fill(share);
      Packer<T> pack{{fold_memory_.get(), 0, true, &share}, {nullptr}, true, true};
      const SlotFold<T> fold(a, pack);
    };
    parallel_for(shares, shares, body);
  }

  int64_t latent() const { return a.slot_dim; }
  SeedChoice<T> seeds() const {
    return {a.encoder.channels, a.encoder.side, a.patch_side, K, a.places, a.token_of};
  }
  PixelDraw<T> draw() const { return {a.encoder.channels, a.encoder.side, Favours(a.favours)}; }

  // One thread's.
  struct Memory {
    typename Encoder<T>::State state;
    typename Encoder<T>::Scratch scratch;
    typename SlotFold<T>::State fold;
    typename SlotFold<T>::Scratch fold_scratch;
    typename DecoderLoss<T>::Workspace tile;
    typename DecoderLoss<T>::Sums image, shared;
    T *image_sums, *projections, *queries, *out, *out_grad, *dz, *seen, *draws, *codes;
    int64_t *picks, *pixels;
    int32_t* index;
    T* noise;
    int64_t used, image_size, tile_size;

    Memory(const TrainStep& o, T* base) : tile(o.decoder_, nullptr) {
      Carver<T> c{base};
      const auto& enc = o.encoder_;
      constexpr int64_t kWords = 8 / sizeof(T);  // of T in an int64
      state = enc.carve_state(c.take(enc.measure_state()));
      scratch = enc.carve_scratch(c.take(enc.measure_scratch(true)), true);
      T* const of_tile = c.take(tile_size = tile.size);
      if (base) tile = typename DecoderLoss<T>::Workspace(o.decoder_, of_tile);
      image_size = o.decoder_.image_sums(nullptr).used;
      image_sums = c.take(image_size), image = o.decoder_.image_sums(image_sums);
      projections = c.take(o.a.decoder.layer_count * 4 * (o.decoder_.D * o.decoder_.HK + 16));
      o.fold_.carve(c, fold), o.fold_.carve(c, fold_scratch);
      queries = c.take(o.K * enc.S), out = c.take(o.K * enc.results()), out_grad = c.take(o.K * enc.results());
      dz = c.take(o.K * whole_lanes<T>(o.latent()));
      seen = c.take(o.a.patch_side ? o.K * o.seeds().seen_width() : 0);
      const int64_t of_seeds = o.a.patch_side ? o.seeds().scratch_size() : 0, of_pixels = o.draw().scratch_size();
      draws = c.take(of_seeds > of_pixels ? of_seeds : of_pixels);
      codes = c.take(o.decoder_.plan.tile_pixels() * o.a.decoder.code_width);
      picks = reinterpret_cast<int64_t*>(c.take(o.K * kWords)), pixels = reinterpret_cast<int64_t*>(c.take(o.P * kWords));
      index = reinterpret_cast<int32_t*>(c.take(o.draw().index_size())), noise = c.take(o.K * o.latent());
      if (base) {  // lanes past a width are read, and never written
        std::memset(fold_scratch.grads[0].G, 0, size_t(fold_scratch.head - fold_scratch.grads[0].G) * sizeof(T));
        std::memset(fold.z, 0, size_t(o.K * whole_lanes<T>(o.latent())) * sizeof(T));
      }
      used = c.used;
    }
  };

  void image(int64_t b, Memory& m, T* sums, double* losses) const {
    const T* const planes = a.encoder.images + b * a.encoder.channels * a.encoder.side * a.encoder.side;
    const int64_t* const picks = a.patch_side ? m.picks : nullptr;
    if (a.patch_side) choose_seeds(b, planes, m), first_queries(m);
    encoder_.forward_image(planes, a.patch_side ? m.queries : a.encoder.queries, picks, m.state, m.scratch, m.out);
    losses[2] += sample(b, m);
    fold_.forward(m.fold);
    draw_pixels(b, planes, m);
    decode(b, m, losses);
    fold_.backward(m.fold, m.fold_scratch, sums, m.dz);
    sample_backward(m);
    encoder_.backward_image(m.out_grad, picks, m.state, m.scratch, sums);
    queries_backward(m, sums);
  }

  void choose_seeds(int64_t b, const T* planes, Memory& m) const {
    if (!a.picks) return seeds().choose(planes, m.draws, m.picks, m.seen);
    const int64_t numbers = K * seeds().seen_width();
    std::memcpy(m.picks, a.picks + b * K, size_t(K) * sizeof(int64_t));
    std::memcpy(m.seen, a.seen + b * numbers, size_t(numbers) * sizeof(T));
  }

  // queries[k] = learned + W · seen[k], W the columns of the seed weight past those for the token.
  void first_queries(Memory& m) const {
    const int64_t S = encoder_.S, width = seeds().seen_width(), stride = S + width;
    const T* const weight = seed_weight() + S;
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t j = 0; j < S; ++j) {
        T sum = a.encoder.queries[j];
        for (int64_t f = 0; f < width; ++f) sum += weight[j * stride + f] * m.seen[k * width + f];
        m.queries[k * S + j] = sum;
      }
    }
  }

  void queries_backward(const Memory& m, T* sums) const {
    const int64_t L = encoder_.L;
    if (!a.patch_side) return add_to<T>(sums + learned_sum_, m.scratch.dx, K * L);
    for (int64_t k = 0; k < K; ++k) {
      const T* const dx = m.scratch.dx + k * L;
      add_to<T>(sums + learned_sum_, dx, L);
      for (int64_t f = 0; f < seeds().seen_width(); ++f) {
        T* const to = sums + seen_sum_ + f * L;
        const T value = m.seen[k * seeds().seen_width() + f];
        for (int64_t j = 0; j < L; j += kLanes<T>) store<T>(to + j, load<T>(to + j) + load<T>(dx + j) * value);
      }
    }
  }

  // The place of the seed weight among the encoder's: behind the CNN with its position map, and the token MLP.
  int64_t seed_place() const { return (a.encoder.conv_count ? 2 * a.encoder.conv_count + 2 : 0) + 4; }
  const T* seed_weight() const { return a.encoder.weights[seed_place()]; }

  // z = mean + std·noise with std = exp(s)/2, into the folding's state -> the image's KL against N(0, 1).
  double sample(int64_t b, Memory& m) const {
    const int64_t Z = latent(), wide = whole_lanes<T>(Z), numbers = K * Z;
    double kl = 0;
    for (int64_t i = 0; a.variational && i < numbers; ++i) {
      const uint64_t place = uint64_t((a.first_image + b) * numbers + i + 1);
      m.noise[i] = a.noise ? a.noise[b * numbers + i] : T(normal_of(random_word(a.noise_key, place), a.quantiles));
    }
    for (int64_t k = 0; k < K; ++k) {
      const T* const row = m.out + k * encoder_.results();
      for (int64_t j = 0; j < Z; ++j) {
        T value = row[j];
        if (a.variational) {
          const T s = row[Z + j], std = T(0.5) * std::exp(s);
          m.out_grad[k * 2 * Z + Z + j] = std;  // kept for the backward
          value += std * m.noise[k * Z + j];
          kl += 0.5 * (double(row[j]) * double(row[j]) + double(std) * double(std) - 1) - (double(s) - 0.69314718055994531);
        }
        m.fold.z[k * wide + j] = value;
      }
    }
    return kl;
  }

  void sample_backward(Memory& m) const {
    const int64_t Z = latent(), wide = whole_lanes<T>(Z), results = encoder_.results();
    const T weight = T(a.kl_weight / double(B));
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t j = 0; j < Z; ++j) {
        const T d = m.dz[k * wide + j];
        T& to = m.out_grad[k * results + j];
        if (!a.variational) {
          to = d;
          continue;
        }
        T& std = m.out_grad[k * results + Z + j];
        to = d + weight * m.out[k * results + j];
        std = d * m.noise[k * Z + j] * std + weight * (std * std - 1);
      }
    }
  }

  // The image's pixels, with their weights and targets.
  void draw_pixels(int64_t b, const T* planes, Memory& m) const {
    if (a.pixels) {
      std::memcpy(m.pixels, a.pixels + b * P, size_t(P) * sizeof(int64_t));
    } else {
      const uint64_t first = uint64_t((a.first_image + b) * P + 1);
      draw().draw(planes, a.pixel_key, first, P, m.draws, m.index, m.pixels, weight_.get() + b * P);
    }
    const int64_t area = a.encoder.side * a.encoder.side;
    for (int64_t i = 0; i < P; ++i) {
      for (int64_t c = 0; c < C; ++c) target_.get()[(b * P + i) * C + c] = planes[c * area + m.pixels[i]];
    }
  }

  // Loss of the image and the gradients of its folded slots, in fold_scratch.grads.
  void decode(int64_t b, Memory& m, double* losses) const {
    const auto& decoder = decoder_.decoder;
    const int64_t D = decoder_.D, HK = decoder_.HK, E = a.decoder.code_width, tile = decoder_.plan.tile_pixels();
    Carver<T> carver{m.projections};
    decoder.pack_image(m.fold.folded, carver, m.tile);
    std::memset(m.image_sums, 0, size_t(m.image_size) * sizeof(T));
    auto sums = m.shared;
    for (int64_t i = 0; i < a.decoder.layer_count; ++i) {
      sums.layers[i].scores = m.image.layers[i].scores, sums.layers[i].values = m.image.layers[i].values;
    }
    for (int64_t start = 0; start < P; start += tile) {
      const int64_t count = P - start < tile ? P - start : tile;
      const TileShape<T> s = decoder.shape(b, count);
      for (int64_t i = 0; i < count; ++i) {
        std::memcpy(m.codes + i * E, a.decoder.code + m.pixels[start + i] * E, size_t(E) * sizeof(T));
      }
      const T* const made = decoder.make_queries_of(m.codes, count, s.panels, m.tile);
      std::memcpy(m.tile.x, made, size_t(s.panels * D * kPanel<T>) * sizeof(T));
      decoder_.run_tile(s, b, start, count, true, sums, m.tile, losses);
      std::memcpy(m.tile.wide, m.tile.dx, size_t(s.panels * D * kPanel<T>) * sizeof(T));
      decoder.query_mlp().backward(m.tile.code, s.panels, m.tile.query, sums.query, false, m.tile.wide, m.tile.wide2,
                                   m.tile.scratch);
    }
    const int64_t stride = fold_.lanes();
    const Partials whole{1, 0};
    for (int64_t i = 0; i < a.decoder.layer_count; ++i) {
      const auto& to = m.fold_scratch.grads[i];
      reduce_products<T>(sums.layers[i].scores.weight, whole, HK, D, stride, 1, to.G);
      reduce_rows<T>(sums.layers[i].scores.bias, whole, HK, to.g);
      reduce_products<T>(sums.layers[i].values, whole, HK, D, stride, 1, to.U);
    }
  }

  void write(const T* sums) const {
    auto body = [&](int64_t task, int) {
      if (task == 0) return write_encoder(sums);
      if (task == 1) return decoder_.reduce_shared(decoder_.shared_sums(const_cast<T*>(sums) + decoder_sum_));
      if (task == 2) return fold_.write_mlp(sums, a.slot_mlp_grads);
      fold_.write_layer(task - 3, sums, a.fold_grads[task - 3]);
    };
    parallel_for(3 + a.decoder.layer_count, a.encoder.threads, body);
  }

  void write_encoder(const T* sums) const {
    const int64_t S = encoder_.S, L = encoder_.L;
    encoder_.write_gradients(sums, a.encoder.grads);
    write_rows(sums + learned_sum_, a.patch_side ? 1 : K, S, L, a.encoder.queries_grad);
    if (!a.patch_side) return;
    const int64_t width = seeds().seen_width();
    write_transposed(sums + seen_sum_, S, width, L, S + width, a.encoder.grads[seed_place()] + S);
  }
};

template <typename T>
void train_step(TrainStepArgs<T>& args) {
  TrainStep<T>(args).run();
}

}  // namespace fastslots::FASTSLOTS_ISA
