// Run under sanitizers by test_prefetch_ring.py. Returns 0, or says what was wrong.

#include "prefetch_ring.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

using fasttrace::PrefetchRing;
using fasttrace::RingPart;

namespace {

int failures = 0;

void expect(bool condition, const char* what) {
  if (condition) return;
  std::printf("wrong: %s\n", what);
  ++failures;
}

template <typename Run>
std::string message_of(const Run& run) {
  try {
    run();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

// Two sites of different sizes; byte values tell site and call.
struct Memory {
  static constexpr int64_t kCalls = 12, kSlots = 2;
  std::vector<unsigned char> kept[2], staged[2];
  int64_t sizes[2];

  explicit Memory(int64_t scale = 1) : sizes{97 * scale, 4096 * scale} {
    for (int site = 0; site < 2; ++site) {
      for (int64_t call = 0; call < kCalls; ++call) {
        kept[site].insert(kept[site].end(), sizes[site], byte(site, call));
      }
      staged[site].resize(kSlots * sizes[site]);
    }
  }
  static unsigned char byte(int site, int64_t call) {
    return static_cast<unsigned char>(1 + 100 * site + call);
  }
  static int64_t address(std::vector<unsigned char>& bytes) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(bytes.data()));
  }
  std::vector<RingPart> parts() {
    std::vector<RingPart> found;
    for (int site = 0; site < 2; ++site) {
      found.push_back({address(kept[site]), static_cast<int64_t>(kept[site].size()),
                       address(staged[site]), static_cast<int64_t>(staged[site].size())});
    }
    return found;
  }
  bool holds(int64_t call) const {
    for (int site = 0; site < 2; ++site) {
      for (int64_t i = 0; i < sizes[site]; ++i) {
        const int64_t at = call % kSlots * sizes[site] + i;
        if (staged[site][at] != byte(site, call)) return false;
      }
    }
    return true;
  }
};

// As a cache does it; between rounds the kept rows are written anew.
void reads_what_was_kept() {
  Memory memory;
  PrefetchRing ring(memory.parts(), Memory::kSlots);
  for (int round = 0; round < 50; ++round) {
    ring.prefetch(0);
    for (int64_t call = 0; call < Memory::kCalls; ++call) {
      if (call + 1 < Memory::kCalls) ring.prefetch(call + 1);
      ring.wait(call);
      expect(memory.holds(call), "a slot holds its call");
      // Whoever was released may be written, slot and kept rows alike.
      if (call + 1 < Memory::kCalls && round % 3 == 0) {
        ring.release(call + 1);
        std::memset(&memory.staged[1][(call + 1) % 2 * memory.sizes[1]], 0, memory.sizes[1]);
        std::memset(&memory.kept[0][(call + 1) * memory.sizes[0]], Memory::byte(0, call + 1),
                    memory.sizes[0]);
        ring.prefetch(call + 1);
      }
      ring.release(call);
    }
  }
}

// One thread asks and waits, another one releases.
void from_two_threads() {
  Memory memory;
  PrefetchRing ring(memory.parts(), Memory::kSlots);
  for (int64_t call = 0; call < Memory::kCalls; ++call) ring.prefetch(call);
  std::vector<std::thread> readers;
  for (int64_t first = 0; first < Memory::kSlots; ++first) {
    readers.emplace_back([&, first] {
      for (int64_t call = first; call < Memory::kCalls; call += Memory::kSlots) {
        ring.wait(call);
        expect(memory.holds(call), "a slot holds the call of its reader");
        ring.release(call);
      }
    });
  }
  for (auto& reader : readers) reader.join();
}

void ends_with_work_outstanding() {
  for (int round = 0; round < 20; ++round) {
    Memory memory(200);
    PrefetchRing ring(memory.parts(), Memory::kSlots);
    for (int64_t call = 0; call < Memory::kCalls; ++call) ring.prefetch(call);
    if (round % 2 == 0) ring.wait(1);
    if (round % 3 == 0) {
      std::thread other([&] { ring.close(); });
      ring.close();
      other.join();
      expect(message_of([&] { ring.wait(0); }) == "prefetch_ring: it is closed", "closed");
    }
    // `ring` goes before `memory`.
  }
}

// A copy that is held up, until a moment after somebody has begun to release it.
void releasing_ends_a_copy() {
  Memory memory;
  std::atomic<bool> begun = false;
  bool ended = false;  // no atomic: whoever was released may look
  PrefetchRing ring(memory.parts(), Memory::kSlots, [&](void* to, const void* from, size_t bytes) {
    begun = true;
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    std::memcpy(to, from, bytes);
    ended = bytes == 4096;
  });
  ring.prefetch(3);
  while (!begun) std::this_thread::yield();
  ring.release(3);
  expect(ended, "a released call is not copied any more");
  expect(message_of([&] { ring.wait(3); }) ==
             "prefetch_ring: call 3 was not asked for; prefetch(3) comes first",
         "a released call is forgotten");
}

void closing_wakes_who_waits() {
  Memory memory;
  PrefetchRing ring(memory.parts(), Memory::kSlots);
  ring.prefetch(0);
  ring.wait(0);
  ring.prefetch(2);
  std::string message;
  std::thread waiting([&] { message = message_of([&] { ring.wait(2); }); });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  ring.close();
  waiting.join();
  expect(message == "prefetch_ring: it is closed", "who waits is told that it was closed");
}

template <typename Thrown>
void a_copy_that_fails(const Thrown& thrown, const std::string& words) {
  Memory memory;
  PrefetchRing ring(memory.parts(), Memory::kSlots, [&](void* to, const void* from, size_t bytes) {
    if (*static_cast<const unsigned char*>(from) == Memory::byte(1, 3)) {
      throw thrown;
    }
    std::memcpy(to, from, bytes);
  });
  ring.prefetch(2);
  ring.wait(2);
  expect(memory.holds(2), "calls before the failure are copied");
  ring.prefetch(3);
  expect(message_of([&] { ring.wait(3); }) == words, "who waits is told of the failure");
  expect(message_of([&] { ring.wait(2); }) == words, "also for another call");
  expect(message_of([&] { ring.prefetch(4); }) == words, "nothing more can be asked for");
  expect(message_of([&] { ring.release(3); }).empty(), "what was asked for can be released");
}

}  // namespace

int main() {
  reads_what_was_kept();
  from_two_threads();
  ends_with_work_outstanding();
  releasing_ends_a_copy();
  closing_wakes_who_waits();
  a_copy_that_fails(std::runtime_error("the disk is gone"),
                    "prefetch_ring: the copy of call 3 failed: the disk is gone");
  a_copy_that_fails(7, "prefetch_ring: the copy of call 3 failed");
  return failures;
}
