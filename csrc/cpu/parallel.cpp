#include "parallel.h"

#if !defined(_WIN32)
#include <dlfcn.h>
#include <pthread.h>
#endif

#include <atomic>

#include "job.h"
#include "thread_pool.h"

namespace wandapp {
namespace {

// libgomp's entry point, which LLVM's and Intel's runtimes have too. It is looked up instead of linked: a second
// runtime in the process would be a second set of threads.
using Parallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

// libgomp hangs in a forked child whose parent had used it.
std::atomic<bool> forked{false};

#if !defined(_WIN32)
// When the module is loaded, for the parent may use OpenMP through torch alone. A fork before that: leave_openmp.
[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

Parallel openmp() {
#if !defined(_WIN32)
  static const Parallel found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return forked.load(std::memory_order_relaxed) ? nullptr : found;
#else
  return nullptr;
#endif
}

}  // namespace

void parallel_for(int64_t pieces, int threads, const std::function<void(int64_t)>& piece) {
  if (threads <= 1 || pieces <= 1) {
    for (int64_t i = 0; i < pieces; ++i) piece(i);
    return;
  }
  Job job(piece, pieces);
  if (const Parallel run = openmp()) {
    run([](void* data) { static_cast<Job*>(data)->work(); }, &job, static_cast<unsigned>(threads), 0);
  } else {
    work_in_pool(job, threads);
  }
  job.rethrow();
}

void leave_openmp() { forked = true; }

const char* parallel_backend() { return openmp() != nullptr ? "openmp" : "own"; }

}  // namespace wandapp
