// Where threads come from: torch's own OpenMP runtime, whose workers are there and awake after any operator of torch.
// They spin for milliseconds before they sleep, so threads of our own would wait for a core: on two cores, right after
// an operator of torch, quantising was no faster on a second thread of ours than on one.
//
// Nothing here links OpenMP, for a second runtime in a process can turn 1 % of overhead into 60 %: the one function
// needed of torch's is given to us. Without it, and in a child after a fork, where those workers are not, a call starts
// threads and ends them (some 50 us).

#include "parallel.h"

#include <pthread.h>

#include <system_error>
#include <thread>
#include <vector>

namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel
std::atomic<Parallel> torch_parallel{nullptr};

}  // namespace

extern "C" void mext_use_threads_of(void* gomp_parallel) {
  static const int forgotten_in_children = pthread_atfork(nullptr, nullptr, [] { torch_parallel = nullptr; });
  if (forgotten_in_children == 0) torch_parallel = reinterpret_cast<Parallel>(gomp_parallel);
}

void mext::on_threads(int threads, void (*work)(void*), void* data) {
  if (const Parallel parallel = torch_parallel) return parallel(work, data, static_cast<unsigned>(threads), 0);
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < threads; ++i) others.emplace_back(work, data);
  } catch (const std::system_error&) {
    // The system gives no more: those that there are do all of it.
  }
  work(data);
  for (std::thread& other : others) other.join();
}
