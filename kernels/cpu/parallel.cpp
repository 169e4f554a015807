#include "parallel.h"

#include <cstdlib>
#include <new>

#include <omp.h>

namespace fastslots {

void run_tasks(int64_t tasks, int threads, void* context, TaskBody body) {
  if (tasks <= 0) return;
  if (threads > tasks) threads = int(tasks);
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(context, task, 0);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t task = 0; task < tasks; ++task) body(context, task, omp_get_thread_num());
}

void* allocate(size_t bytes) {
  constexpr size_t kLine = 64;
  void* memory = std::aligned_alloc(kLine, (bytes / kLine + 1) * kLine);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void release(void* memory) { std::free(memory); }

}  // namespace fastslots
