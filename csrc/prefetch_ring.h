// Staging slots that a background thread fills ahead of their reader. No torch, CUDA or Python
// here. The semantics are those of kernels/fasttrace_kernels/prefetch.py.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace fasttrace {

// One site's memory, which the caller owns: its calls one after another, and its slots likewise.
struct RingPart {
  int64_t kept, kept_bytes;
  int64_t staged, staged_bytes;
};

using RingCopy = std::function<void(void* to, const void* from, size_t bytes)>;

// Call t goes to slot t % slots. Every method may be called from any thread; `wait`, `release` and
// `close` block.
class PrefetchRing {
 public:
  // Throws std::invalid_argument where addresses or sizes don't fit. copy: memcpy if empty.
  PrefetchRing(std::vector<RingPart> parts, int64_t slots, RingCopy copy = {});
  ~PrefetchRing();
  PrefetchRing(const PrefetchRing&) = delete;
  PrefetchRing& operator=(const PrefetchRing&) = delete;

  // Begin to copy a call, as soon as its slot is free.
  void prefetch(int64_t call);
  // Return when the slot holds the call.
  void wait(int64_t call);
  // Free the slot, or drop the wish. Afterwards nothing is copied on this call's behalf.
  void release(int64_t call);
  // End the thread; a copy in progress is not completed. Afterwards no memory is touched.
  void close();

 private:
  static constexpr int64_t kNone = -1;

  int64_t& holder(int64_t call) { return holders_[call % slots_]; }
  bool is_waiting(int64_t call) const;
  bool is_known(int64_t call) { return holder(call) == call || is_waiting(call); }
  bool is_ready(int64_t call) { return holder(call) == call && copying_ != call; }
  std::deque<int64_t>::iterator next();
  void check_open(int64_t call, bool need_worker) const;
  void work();
  void copy_call(int64_t call);

  const std::vector<RingPart> parts_;
  const int64_t slots_;
  const RingCopy copy_;
  int64_t calls_ = 0;

  std::mutex mutex_;  // guards all that follows, to `joining_`
  std::condition_variable changed_;
  std::deque<int64_t> waiting_;   // asked for, in that order; not begun
  std::vector<int64_t> holders_;  // of each slot: the call that it holds, or is filled with
  int64_t copying_ = kNone;
  std::string failure_;               // why the worker ended early
  std::atomic<bool> closed_ = false;  // also read by a copy, which doesn't hold the lock

  std::mutex joining_;
  std::thread worker_;
};

}  // namespace fasttrace
