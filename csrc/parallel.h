// Threads for one call. None outlives it, so there is nothing that fork or many calls at once could upset.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace omniops {

// Hands out 0 ... count - 1, each once, to the threads that ask.
class Tickets {
 public:
  explicit Tickets(std::int64_t count) : count_(count) {}

  bool take(std::int64_t& ticket) {
    ticket = next_.fetch_add(1, std::memory_order_relaxed);
    return ticket < count_;
  }
  void cancel() { next_.store(count_, std::memory_order_relaxed); }

 private:
  std::atomic<std::int64_t> next_{0};
  std::int64_t count_;
};

// Calls work(tickets) on up to `threads` threads, this one among them, and rethrows the first exception.
template <class Work>
void parallel(std::int64_t count, std::int64_t threads, const Work& work) {
  Tickets tickets(count);
  std::exception_ptr error;
  std::mutex mutex;
  const auto guarded = [&] {
    try {
      work(tickets);
    } catch (...) {
      tickets.cancel();
      const std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  if (threads > count) threads = count;
  if (threads > 1) {
    others.reserve(static_cast<std::size_t>(threads - 1));
    try {
      while (static_cast<std::int64_t>(others.size()) + 1 < threads) others.emplace_back(guarded);
    } catch (const std::exception&) {
      // The system gives no more threads, or no memory for them: those there are do all of the work.
    }
  }
  guarded();
  for (std::thread& other : others) other.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace omniops
