#include "prefetch_ring.h"

#include "words.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <utility>

namespace fasttrace {
namespace {

template <typename Error, typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  throw Error(words("prefetch_ring: ", parts...));
}

template <typename... Parts>
void require_valid(bool condition, const Parts&... parts) {
  require<std::invalid_argument>(condition, parts...);
}

template <typename... Parts>
void require_state(bool condition, const Parts&... parts) {
  require<std::runtime_error>(condition, parts...);
}

// How many calls every part keeps.
int64_t count_calls(const std::vector<RingPart>& parts, int64_t slots) {
  require_valid(slots >= 1, "slots is ", slots, "; at least 1 is needed");
  require_valid(!parts.empty(), "there are no parts");
  int64_t calls = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    const RingPart& part = parts[i];
    require_valid(part.kept > 0, "part ", i, ": its kept rows are at address ", part.kept);
    require_valid(part.staged > 0, "part ", i, ": its slots are at address ", part.staged);
    require_valid(part.staged_bytes > 0 && part.staged_bytes % slots == 0, "part ", i,
                  ": expected bytes of ", slots, " slots of one size, got ", part.staged_bytes);
    const int64_t size = part.staged_bytes / slots;
    require_valid(part.kept_bytes > 0 && part.kept_bytes % size == 0, "part ", i,
                  ": expected kept bytes of calls of ", size, " each, got ", part.kept_bytes);
    const int64_t kept = part.kept_bytes / size;
    if (i == 0) calls = kept;
    require_valid(kept == calls, "part ", i, " keeps ", kept, " calls, but part 0 keeps ", calls);
  }
  return calls;
}

void* pointer(int64_t address, int64_t offset) {
  return reinterpret_cast<void*>(static_cast<uintptr_t>(address) + static_cast<uintptr_t>(offset));
}

}  // namespace

PrefetchRing::PrefetchRing(std::vector<RingPart> parts, int64_t slots, RingCopy copy)
    : parts_(std::move(parts)), slots_(slots), copy_(std::move(copy)) {
  calls_ = count_calls(parts_, slots_);
  holders_.assign(slots_, kNone);
  worker_ = std::thread([this] { work(); });
}

PrefetchRing::~PrefetchRing() { close(); }

void PrefetchRing::prefetch(int64_t call) {
  const std::lock_guard lock(mutex_);
  check_open(call, true);
  require_state(!is_known(call), "call ", call, " has been asked for already; release it first");
  waiting_.push_back(call);
  changed_.notify_all();
}

void PrefetchRing::wait(int64_t call) {
  std::unique_lock lock(mutex_);
  check_open(call, true);
  require_state(is_known(call), "call ", call, " was not asked for; prefetch(", call,
                ") comes first");
  changed_.wait(lock,
                [&] { return is_ready(call) || !is_known(call) || closed_ || !failure_.empty(); });
  check_open(call, true);
  require_state(is_known(call), "call ", call, " was released while it was waited for");
}

void PrefetchRing::release(int64_t call) {
  std::unique_lock lock(mutex_);
  check_open(call, false);
  require_state(is_known(call), "call ", call, " is not held, so it can't be released");
  waiting_.erase(std::remove(waiting_.begin(), waiting_.end(), call), waiting_.end());
  changed_.wait(lock, [&] { return copying_ != call; });
  if (holder(call) == call) holder(call) = kNone;
  changed_.notify_all();
}

void PrefetchRing::close() {
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    changed_.notify_all();
  }
  // A second one that closes returns, as the first does, when the thread is gone.
  const std::lock_guard lock(joining_);
  if (worker_.joinable()) worker_.join();
}

bool PrefetchRing::is_waiting(int64_t call) const {
  return std::find(waiting_.begin(), waiting_.end(), call) != waiting_.end();
}

std::deque<int64_t>::iterator PrefetchRing::next() {
  return std::find_if(waiting_.begin(), waiting_.end(),
                      [this](int64_t call) { return holder(call) == kNone; });
}

void PrefetchRing::check_open(int64_t call, bool need_worker) const {
  require_valid(call >= 0 && call < calls_, "there is no call ", call, "; ", calls_, " are kept");
  require_state(!closed_, "it is closed");
  require_state(!need_worker || failure_.empty(), failure_);
}

void PrefetchRing::work() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return closed_ || next() != waiting_.end(); });
    if (closed_) return;
    const auto chosen = next();
    const int64_t call = *chosen;
    waiting_.erase(chosen);
    holder(call) = copying_ = call;
    lock.unlock();
    std::string failure;
    try {
      copy_call(call);
    } catch (const std::exception& error) {
      failure = "the copy of call " + std::to_string(call) + " failed: " + error.what();
    } catch (...) {
      failure = "the copy of call " + std::to_string(call) + " failed";
    }
    lock.lock();
    copying_ = kNone;
    failure_ = failure;
    changed_.notify_all();
    if (!failure_.empty()) return;
  }
}

void PrefetchRing::copy_call(int64_t call) {
  for (const RingPart& part : parts_) {
    if (closed_) return;
    const int64_t size = part.staged_bytes / slots_;
    void* to = pointer(part.staged, call % slots_ * size);
    const void* from = pointer(part.kept, call * size);
    if (copy_) {
      copy_(to, from, static_cast<size_t>(size));
    } else {
      std::memcpy(to, from, static_cast<size_t>(size));
    }
  }
}

}  // namespace fasttrace
