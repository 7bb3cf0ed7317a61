#include "team.h"

#include "state.h"

#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace {

constexpr int kSpins = 4000;  // some 50 to 100 microseconds

void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A number that only grows, and who waits for it to change.
class Gate {
 public:
  uint32_t value() const { return value_.load(std::memory_order_acquire); }
  void advance() {
    value_.fetch_add(1);
    // Ordered with the waiter's `sleepers_` and its look at `value_`: one of the two sees the other.
    if (sleepers_.load() == 0) return;
    { std::lock_guard<std::mutex> lock(mutex_); }
    changed_.notify_all();
  }
  void wait_past(uint32_t old) {
    for (int i = 0; i < kSpins; i++) {
      if (value() != old) return;
      pause_briefly();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    changed_.wait(lock, [&] { return value_.load() != old; });
    sleepers_.fetch_sub(1);
  }

 private:
  alignas(64) std::atomic<uint32_t> value_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

// The caller may have changed how its thread rounds or flushes; every thread computes with the defaults.
class DefaultRounding {
 public:
#if defined(__x86_64__)
  DefaultRounding() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultRounding() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

}  // namespace

// A run is open from its start until the caller has passed through its last stage. Members that come later stay out;
// those inside are waited for. So a member that the system has suspended delays nobody unless it is inside.
struct Team {
  std::mutex turn;
  int threads = 1;
  Gate start, progress, left;
  std::atomic<bool> open{false}, quit{false};
  std::atomic<int> inside{0};
  void* task = nullptr;
  void (*work)(void*, int) = nullptr;
  std::vector<std::thread> members;
};

namespace {

std::atomic<int> wanted_threads{1};
std::atomic<Team*> current{nullptr};

void serve(Team* team, int number, uint32_t seen) {
  for (;;) {
    team->start.wait_past(seen);
    seen = team->start.value();
    if (team->quit) return;
    // Ordered with the caller's `open` and its look at `inside`: one of the two sees the other.
    team->inside.fetch_add(1);
    if (team->open.load()) {
      const DefaultRounding rounding;
      team->work(team->task, number);
    }
    if (team->inside.fetch_sub(1) == 1) team->left.advance();
  }
}

// Members take no signals: those are the caller's.
void recruit(Team* team, int threads) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  // Members wait at the gate, so `threads` is settled before any of them reads it.
  try {
    while ((int)team->members.size() < threads - 1)
      team->members.emplace_back(serve, team, (int)team->members.size() + 1, team->start.value());
  } catch (const std::system_error&) {
    // No more threads to be had: fewer compute the same bits.
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  team->threads = (int)team->members.size() + 1;
}

void disband(Team* team) {
  team->quit = true;
  team->start.advance();
  for (std::thread& member : team->members) member.join();
  team->members.clear();
  team->quit = false;
}

// A child has the caller's thread alone: the members are gone, and what they held stays as it was.
void forget_members() { current.store(nullptr); }

Team* here() {
  static const int registered = pthread_atfork(nullptr, nullptr, forget_members);
  (void)registered;
  Team* team = current.load();
  if (team) return team;
  auto fresh = std::make_unique<Team>();
  if (current.compare_exchange_strong(team, fresh.get())) return fresh.release();  // never destroyed
  return team;
}

}  // namespace

void team_progress(Team* team) { team->progress.advance(); }

void team_await(Team* team, const int32_t* finished, int32_t units) {
  for (;;) {
    const uint32_t before = team->progress.value();
    if (__atomic_load_n(finished, __ATOMIC_ACQUIRE) >= units) return;
    team->progress.wait_past(before);
  }
}

void team_set_threads(int threads) {
  wanted_threads.store(threads < 1 ? 1 : threads > kMaxThreads ? kMaxThreads : threads);
}

int team_threads() { return wanted_threads.load(); }

Team* team_acquire(int* threads) {
  Team* team = here();
  team->turn.lock();
  const int wanted = wanted_threads.load();
  if (team->threads != wanted) {
    disband(team);
    recruit(team, wanted);
  }
  *threads = team->threads;
  return team;
}

void team_release(Team* team) { team->turn.unlock(); }

void team_run(Team* team, void* task, void (*work)(void*, int)) {
  const DefaultRounding rounding;
  team->task = task;
  team->work = work;
  team->open.store(true);
  if (team->threads > 1) team->start.advance();
  work(task, 0);
  team->open.store(false);
  for (;;) {
    const uint32_t before = team->left.value();
    if (team->inside.load() == 0) return;
    team->left.wait_past(before);
  }
}
