// The encoder of all images as one operator: a forward, and a backward that reads what the forward kept or runs it again.
//
// Each of a fixed number of groups adds the gradients of its images in their order, and the groups are added in theirs,
// so that the bits do not depend on the number of threads.
#pragma once

#include "encoder.h"
#include "parallel.h"

namespace fastslots::FASTSLOTS_ISA {

constexpr int64_t kGroups = 12;  // shared evenly by 1, 2, 3, 4 and 6 threads

template <typename T>
class EncoderCall {
 public:
  EncoderCall(const EncoderArgs<T>& args, bool forward, bool backward)
      : a(args), encoder(args, forward, backward), query_sum(encoder.sums_end()),
        sums_size(query_sum + encoder.K * encoder.L) {}

  void run_forward() {
    const int64_t state = a.saved ? 0 : encoder.measure_state(), scratch = encoder.measure_scratch(false);
    const int64_t workers = a.threads > 1 ? (a.threads < a.batch ? a.threads : a.batch) : 1;
    Block<T> memory(workers * (state + scratch));
    auto body = [&](int64_t b, int thread) {
      T* const own = memory.get() + thread * (state + scratch);
      auto s = state_of(b, own + scratch);
      auto w = encoder.carve_scratch(own, false);
      forward_image(b, s, w, a.out + b * encoder.K * encoder.results());
    };
    parallel_for(a.batch, int(workers), body);
  }

  void run_backward() {
    const int64_t groups = a.batch < kGroups ? (a.batch > 0 ? a.batch : 1) : kGroups;
    const int64_t state = a.saved ? 0 : encoder.measure_state(), scratch = encoder.measure_scratch(true);
    const int64_t workers = a.threads > 1 ? (a.threads < groups ? a.threads : groups) : 1;
    Block<T> memory(workers * (state + scratch));
    Block<T> total(sums_size);
    GroupSums<T> sums(sums_size, workers);
    auto body = [&](int64_t group, int thread) {
      T* const own = memory.get() + thread * (state + scratch);
      sums.add(group, thread, {total.get(), sums_size, group == 0}, [&](T* to) {
        auto w = encoder.carve_scratch(own, true);
        encoder.begin_group(w);
        for (int64_t b = a.batch * group / groups; b < a.batch * (group + 1) / groups; ++b) {
          auto s = state_of(b, own + scratch);
          if (!a.saved) forward_image(b, s, w, nullptr);
          encoder.backward_image(a.out_grad + b * encoder.K * encoder.results(), picks_of(b), s, w, to);
          add_queries(b, w.dx, to);
        }
        encoder.end_group(w, to);
      });
    };
    parallel_for(groups, int(workers), body);
    encoder.write_gradients(total.get(), a.grads);
    if (a.queries_grad && a.query_batch == 1) {
      write_rows(total.get() + query_sum, encoder.K, encoder.S, encoder.L, a.queries_grad);
    }
  }

 private:
  const EncoderArgs<T>& a;
  const Encoder<T> encoder;
  const int64_t query_sum, sums_size;

  typename Encoder<T>::State state_of(int64_t b, T* own) const {
    return encoder.carve_state(a.saved ? a.saved + b * encoder.measure_state() : own);
  }

  const int64_t* picks_of(int64_t b) const { return a.picks ? a.picks + b * encoder.K : nullptr; }

  void forward_image(int64_t b, typename Encoder<T>::State& s, typename Encoder<T>::Scratch& w, T* out) const {
    const T* const queries = a.queries + (a.query_batch == 1 ? 0 : b) * encoder.K * encoder.S;
    encoder.forward_image(a.images + b * a.channels * a.side * a.side, queries, picks_of(b), s, w, out);
  }

  void add_queries(int64_t b, const T* dx, T* sums) const {
    if (a.query_batch == 1) return add_to<T>(sums + query_sum, dx, encoder.K * encoder.L);
    if (a.queries_grad) {
      write_rows(dx, encoder.K, encoder.S, encoder.L, a.queries_grad + b * encoder.K * encoder.S);
    }
  }
};

template <typename T>
void encoder(const EncoderArgs<T>& args) {
  if (args.out) return EncoderCall<T>(args, true, false).run_forward();
  EncoderCall<T>(args, !args.saved, true).run_backward();
}

template <typename T>
int64_t encoder_saved_size(const EncoderArgs<T>& args) {
  return Encoder<T>::saved_size(args);
}

}  // namespace fastslots::FASTSLOTS_ISA
