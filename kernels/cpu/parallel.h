// Threads and scratch memory: the only place that knows OpenMP.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastslots {

// Runs body(context, task, thread) for every task, tasks handed out as threads fall idle. `thread` < `threads`.
// Results must not depend on which thread took a task. Bodies must not throw.
using TaskBody = void (*)(void* context, int64_t task, int thread);
void run_tasks(int64_t tasks, int threads, void* context, TaskBody body);

template <typename Body>
void parallel_for(int64_t tasks, int threads, Body& body) {
  run_tasks(tasks, threads, &body, [](void* context, int64_t task, int thread) {
    (*static_cast<Body*>(context))(task, thread);
  });
}

// Tasks that finish in any order and take turns in theirs, asleep until it is theirs: wait(i) returns when all tasks
// before i have called done. Tasks must be handed out in order, as run_tasks does.
class Turns {
 public:
  Turns();
  ~Turns();
  Turns(const Turns&) = delete;
  Turns& operator=(const Turns&) = delete;
  void wait(int64_t task);
  void done();

 private:
  struct State;
  State* state_;
};

// Cache-line aligned memory, not initialised; std::bad_alloc where there is none. Freed by release().
void* allocate(size_t bytes);
void release(void* memory);

}  // namespace fastslots
