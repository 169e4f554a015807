#include "parallel.h"

#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

// ThreadSanitizer cannot see how an OpenMP runtime synchronises: under it, the same tasks run on plain threads.
#if defined(__SANITIZE_THREAD__)
#include <atomic>
#include <thread>
#else
#include <omp.h>
#endif
#include <pthread.h>
#include <sys/mman.h>

namespace fastslots {

namespace {

// A forked child has none of its parent's threads, and an OpenMP runtime that had made them waits for them forever: a
// child runs its tasks on the one thread that it has.
bool forked = false;
[[maybe_unused]] const int kRegistered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

constexpr size_t kLine = 64;

// Blocks that a thread has released and may have again: what a step takes, the next takes too, and the system would hand
// out fresh pages, cleared and mapped one by one. Each thread that calls has its own, so that nothing is shared. Where
// they are too many, the one that has lain longest is freed: another call left it, of other sizes.
class Spare {
 public:
  ~Spare() {
    for (const Kept& kept : blocks_) std::free(kept.memory);
  }

  void* take(size_t bytes) {
    size_t best = blocks_.size();
    for (size_t i = 0; i < blocks_.size(); ++i) {
      const bool fits = blocks_[i].bytes >= bytes && blocks_[i].bytes <= 2 * bytes;
      if (fits && (best == blocks_.size() || blocks_[i].bytes < blocks_[best].bytes)) best = i;
    }
    if (best == blocks_.size()) return nullptr;
    void* const memory = blocks_[best].memory;
    remove(best);
    return memory;
  }

  bool keep(void* memory, size_t bytes) {
    if (!keeps(bytes)) return false;
    while (total_ + bytes > most_) {
      std::free(blocks_[0].memory);
      remove(0);
    }
    blocks_.push_back({memory, bytes});
    total_ += bytes;
    return true;
  }

  bool keeps(size_t bytes) const { return bytes >= kSmallest && bytes <= most_; }

  // Calls take a part of their memory for each of their threads.
  void serves(int threads) {
    const size_t most = kMostOfThread * size_t(threads);
    most_ = most > most_ ? most : most_;
  }

 private:
  struct Kept {
    void* memory;
    size_t bytes;
  };
  static constexpr size_t kSmallest = size_t(1) << 16, kMostOfThread = size_t(1) << 24;  // 64 KiB, 16 MiB
  std::vector<Kept> blocks_;  // the oldest first
  size_t total_ = 0, most_ = kMostOfThread;

  void remove(size_t place) {
    total_ -= blocks_[place].bytes;
    blocks_.erase(blocks_.begin() + std::ptrdiff_t(place));
  }
};

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kReuse = false;  // every block is one of its own, so that a use past its end or its life is seen
#else
constexpr bool kReuse = true;
#endif
thread_local Spare spare;

}  // namespace

void run_tasks(int64_t tasks, int threads, void* context, TaskBody body) {
  if (tasks <= 0) return;
  if (threads > tasks) threads = int(tasks);
  spare.serves(threads > 1 ? threads : 1);
  if (threads <= 1 || forked) {
    for (int64_t task = 0; task < tasks; ++task) body(context, task, 0);
    return;
  }
#if defined(__SANITIZE_THREAD__)
  std::atomic<int64_t> next{0};
  std::vector<std::thread> pool;
  for (int thread = 0; thread < threads; ++thread) {
    pool.emplace_back([&, thread] {
      for (int64_t task = next++; task < tasks; task = next++) body(context, task, thread);
    });
  }
  for (std::thread& thread : pool) thread.join();
#else
  // Monotonic: tasks begin in their order, on which Turns rely.
#pragma omp parallel for num_threads(threads) schedule(monotonic : dynamic, 1)
  for (int64_t task = 0; task < tasks; ++task) body(context, task, omp_get_thread_num());
#endif
}

struct Turns::State {
  std::mutex mutex;
  std::condition_variable changed;
  int64_t next = 0;
};

Turns::Turns() : state_(new State) {}
Turns::~Turns() { delete state_; }

void Turns::wait(int64_t task) {
  std::unique_lock<std::mutex> lock(state_->mutex);
  state_->changed.wait(lock, [&] { return state_->next == task; });
}

void Turns::done() {
  {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    ++state_->next;
  }
  state_->changed.notify_all();
}

namespace {

// Of a block that stays: in pages of 2 MiB where the system has them to give, so that a core whose caches have been swept
// does not look each 4 KiB up anew. (Blocks that come and go were slower with them.)
void* large_pages(size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr size_t kPage = size_t(1) << 21;
  if (bytes >= kPage) {
    void* const memory = std::aligned_alloc(kPage, bytes);
    if (memory) madvise(memory, bytes / kPage * kPage, MADV_HUGEPAGE);
    return memory;
  }
#endif
  return std::aligned_alloc(kLine, bytes);
}

}  // namespace

// A line in front of a block holds its size.
void* allocate(size_t bytes) {
  const size_t whole = (bytes / kLine + 2) * kLine;
  void* memory = kReuse ? spare.take(whole) : nullptr;
  if (memory == nullptr) {
    memory = kReuse && spare.keeps(whole) ? large_pages(whole) : std::aligned_alloc(kLine, whole);
    if (memory == nullptr) throw std::bad_alloc();
    *static_cast<size_t*>(memory) = whole;
  }
  return static_cast<char*>(memory) + kLine;
}

void release(void* memory) {
  void* const block = static_cast<char*>(memory) - kLine;
  if (kReuse && spare.keep(block, *static_cast<size_t*>(block))) return;
  std::free(block);
}

}  // namespace fastslots
