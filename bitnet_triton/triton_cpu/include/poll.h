// Waiting for what another program writes.
#pragma once
#include <sched.h>
#include <time.h>
#include "atomics.h"
#include "program.h"

// How long a poll without a limit waits while no program of its kernel runs, in seconds
#ifndef TCPU_POLL_PATIENCE
#define TCPU_POLL_PATIENCE 10
#endif

namespace tcpu {

// Low half: programs that run and do not wait; high half: how often one began to. Launches of one
// kernel that run at once count together: one may wait for the other.
static uint64_t activity;

// Exists while a program runs. A thread is between two programs for an instant only
struct Running {
  Running() { __atomic_fetch_add(&activity, (1ull << 32) + 1, __ATOMIC_RELAXED); }
  ~Running() { __atomic_fetch_sub(&activity, 1, __ATOMIC_RELAXED); }
};
// Exists while a program waits
struct Waiting {
  Waiting() { __atomic_fetch_sub(&activity, 1, __ATOMIC_RELAXED); }
  ~Waiting() { __atomic_fetch_add(&activity, (1ull << 32) + 1, __ATOMIC_RELAXED); }
};

static inline uint64_t nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return uint64_t(now.tv_sec) * 1000000000u + uint64_t(now.tv_nsec);
}

// The writer may need this core: after a short while, give it away
static inline void pause_briefly(long trip) {
  if (trip > 100) {
    sched_yield();
    return;
  }
#if defined __x86_64__
  __builtin_ia32_pause();
#elif defined __aarch64__
  asm volatile("yield");
#endif
}

// One operation; its elements wait in turn and share the time.
class Poll {
 public:
  Poll() {}
  explicit Poll(int64_t limit) : limited(true), limit(uint64_t(limit)) {}

  // Tells whether `expected` was seen at `p`
  template <class T> TCPU_METHOD bool operator()(const T* p, T expected) {
    return a_load(p) == expected || wait(p, expected);
  }
  // Nobody is left who could write what it waits for, or the launch has failed
  bool hopeless() const { return gave_up; }

 private:
  bool limited = false, gave_up = false;
  uint64_t limit = 0, start = 0, last = 0, idle = 0, seen = 0;

  template <class T> __attribute__((noinline)) bool wait(const T* p, T expected) {
    const Waiting waiting;
    if (!start) start = last = nanoseconds();
    for (long trip = 0; !ends(); ++trip) {
      if (a_load(p) == expected) return true;
      pause_briefly(trip);
    }
    // Whoever wrote it may have ended before the end was noticed here
    if (a_load(p) != expected) return false;
    gave_up = false;
    return true;
  }

  bool ends() {
    if (__atomic_load_n(&current_failure->happened, __ATOMIC_RELAXED)) return gave_up = true;
    const uint64_t now = nanoseconds();
    if (limited) return now - start >= limit;
    // A process that was stopped for a minute has not waited for a minute
    constexpr uint64_t longest = 100000000;
    idle += now - last < longest ? now - last : longest;
    last = now;
    const uint64_t state = __atomic_load_n(&activity, __ATOMIC_RELAXED);
    if (state != seen || uint32_t(state)) idle = 0;
    seen = state;
    return gave_up = idle >= uint64_t(TCPU_POLL_PATIENCE * 1e9);
  }
};

}  // namespace tcpu
