#include "parallel.h"

#include <cstdlib>
#include <new>

// ThreadSanitizer cannot see how an OpenMP runtime synchronises: under it, the same tasks run on plain threads.
#if defined(__SANITIZE_THREAD__)
#include <atomic>
#include <thread>
#include <vector>
#else
#include <omp.h>
#endif

namespace fastslots {

void run_tasks(int64_t tasks, int threads, void* context, TaskBody body) {
  if (tasks <= 0) return;
  if (threads > tasks) threads = int(tasks);
  if (threads <= 1) {
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
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t task = 0; task < tasks; ++task) body(context, task, omp_get_thread_num());
#endif
}

void* allocate(size_t bytes) {
  constexpr size_t kLine = 64;
  void* memory = std::aligned_alloc(kLine, (bytes / kLine + 1) * kLine);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void release(void* memory) { std::free(memory); }

}  // namespace fastslots
