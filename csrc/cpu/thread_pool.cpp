#include "thread_pool.h"

#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#include "job.h"

namespace wandapp {
namespace {

constexpr int kSpins = 2000;

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

class Pool {
 public:
  void run(Job& job, int threads) {
    std::unique_lock<std::mutex> only_job(job_mutex_, std::try_to_lock);
    if (!only_job.owns_lock()) return job.work();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      start(threads - 1);
      job_ = &job;
      allowed_ = threads - 1;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    job.work();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = nullptr;  // late threads find nothing
    }
    while (helpers_.load(std::memory_order_acquire) != 0) relax();
  }

 private:
  void start(int wanted) {
    try {
      while (started_ < wanted) {
        std::thread(&Pool::work, this, started_).detach();
        ++started_;
      }
    } catch (const std::system_error&) {  // no more threads: those that run do the work
    }
  }

  void work(int index) {
    uint64_t seen = 0;
    for (;;) {
      for (int i = 0; i < kSpins && generation_.load(std::memory_order_acquire) == seen; ++i) relax();
      Job* job = nullptr;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        seen = generation_.load(std::memory_order_relaxed);
        if (job_ != nullptr && index < allowed_) {
          job = job_;
          helpers_.fetch_add(1, std::memory_order_relaxed);
        }
      }
      if (job == nullptr) continue;
      job->work();
      helpers_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::mutex job_mutex_;  // held for a whole job
  std::mutex mutex_;      // guards what follows
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> helpers_{0};
  Job* job_ = nullptr;
  int allowed_ = 0;
  int started_ = 0;
};

// Never destroyed: its threads may outlive static destructors. A forked child gets a new one.
std::atomic<Pool*> current{nullptr};

Pool& pool() {
  static const bool once = [] {
    current = new Pool;
#if !defined(_WIN32)
    pthread_atfork(nullptr, nullptr, [] { current = new Pool; });
#endif
    return true;
  }();
  static_cast<void>(once);
  return *current.load();
}

}  // namespace

void work_in_pool(Job& job, int threads) { pool().run(job, threads); }

}  // namespace wandapp
