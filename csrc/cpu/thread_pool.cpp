#include "thread_pool.h"

#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

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
  void run(int64_t pieces, int threads, const std::function<void(int64_t)>& piece) {
    std::unique_lock<std::mutex> only_job(job_mutex_, std::try_to_lock);
    if (!only_job.owns_lock()) {
      for (int64_t i = 0; i < pieces; ++i) piece(i);
      return;
    }
    Job job{&piece, pieces};
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (started_ < threads - 1) {
        std::thread(&Pool::work, this, started_).detach();
        ++started_;
      }
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
    while (job.helpers.load(std::memory_order_acquire) != 0) relax();
    if (job.error) std::rethrow_exception(job.error);
  }

 private:
  struct Job {
    const std::function<void(int64_t)>* piece;
    int64_t pieces;
    std::atomic<int64_t> next{0};
    std::atomic<int> helpers{0};
    std::mutex error_mutex{};
    std::exception_ptr error{};

    Job(const std::function<void(int64_t)>* what, int64_t count) : piece(what), pieces(count) {}

    void work() {
      try {
        for (int64_t i = next++; i < pieces; i = next++) (*piece)(i);
      } catch (...) {
        next = pieces;
        std::lock_guard<std::mutex> lock(error_mutex);
        if (!error) error = std::current_exception();
      }
    }
  };

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
          job->helpers.fetch_add(1, std::memory_order_relaxed);
        }
      }
      if (job == nullptr) continue;
      job->work();
      job->helpers.fetch_sub(1, std::memory_order_release);
    }
  }

  std::mutex job_mutex_;  // held for a whole job
  std::mutex mutex_;      // guards what follows
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
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

void parallel_for(int64_t pieces, int threads, const std::function<void(int64_t)>& piece) {
  if (threads <= 1 || pieces <= 1) {
    for (int64_t i = 0; i < pieces; ++i) piece(i);
    return;
  }
  pool().run(pieces, threads, piece);
}

}  // namespace wandapp
