// The pieces of one job, taken one by one by whoever has time.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>

namespace wandapp {

class Job {
 public:
  Job(const std::function<void(int64_t)>& piece, int64_t pieces) : piece_(piece), pieces_(pieces) {}

  // Never throws: an exception ends the job and waits for rethrow().
  void work() noexcept {
    try {
      for (int64_t i = next_++; i < pieces_; i = next_++) piece_(i);
    } catch (...) {
      next_ = pieces_;
      std::lock_guard<std::mutex> lock(error_mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }

  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  const std::function<void(int64_t)>& piece_;
  const int64_t pieces_;
  std::atomic<int64_t> next_{0};
  std::mutex error_mutex_;
  std::exception_ptr error_;
};

}  // namespace wandapp
