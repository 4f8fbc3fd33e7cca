#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
static inline void breathe() { _mm_pause(); }
#elif defined(__aarch64__)
static inline void breathe() { __asm__ __volatile__("yield"); }
#else
static inline void breathe() {}
#endif

namespace {

constexpr int SPINS = 3000; // some tens of microseconds: longer than phases differ, far below a time slice

// A number that only grows, and those who wait for it to change.
struct Turn {
    std::atomic<uint32_t> number{0};
    std::atomic<int> sleepers{0};
    std::mutex mutex;
    std::condition_variable changed;

    void advance() {
        number.fetch_add(1); // sequentially consistent with `sleepers`: one of the two sides sees the other
        if (sleepers.load() > 0) {
            std::lock_guard<std::mutex> held(mutex);
            changed.notify_all();
        }
    }

    void wait_beyond(uint32_t seen) {
        for (int spin = 0; spin < SPINS; spin++) {
            if (number.load(std::memory_order_acquire) != seen) return;
            breathe();
        }
        std::unique_lock<std::mutex> held(mutex);
        sleepers.fetch_add(1);
        while (number.load() == seen) changed.wait(held);
        sleepers.fetch_sub(1);
    }
};

} // namespace

struct Pool {
    int threads;
    Turn started;
    Turn met;
    std::atomic<int> arrived{0};
    void (*work)(void *, int) = nullptr;
    void *argument = nullptr;
    bool ending = false;
    std::vector<std::thread> workers;

    void serve(int thread) {
        uint32_t seen = 0;
        for (;;) {
            started.wait_beyond(seen);
            seen++;
            if (ending) return;
            work(argument, thread);
            pool_barrier(this);
        }
    }
};

Pool *pool_open(int threads) {
    Pool *pool = new (std::nothrow) Pool;
    if (!pool) return nullptr;
    pool->threads = threads;
    for (int thread = 1; thread < threads; thread++)
        pool->workers.emplace_back([pool, thread] { pool->serve(thread); });
    return pool;
}

void pool_close(Pool *pool) {
    pool->ending = true;
    pool->started.advance();
    for (std::thread &worker : pool->workers) worker.join();
    delete pool;
}

int64_t pool_now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

void pool_breathe() { breathe(); }

void pool_rest() { std::this_thread::sleep_for(std::chrono::microseconds(20)); }

int pool_threads(const Pool *pool) { return pool->threads; }

void pool_run(Pool *pool, void (*work)(void *, int), void *argument) {
    pool->work = work;
    pool->argument = argument;
    if (pool->threads > 1) pool->started.advance();
    work(argument, 0);
    pool_barrier(pool);
}

void pool_barrier(Pool *pool) {
    if (pool->threads == 1) return;
    const uint32_t seen = pool->met.number.load(std::memory_order_relaxed);
    if (pool->arrived.fetch_add(1, std::memory_order_acq_rel) == pool->threads - 1) {
        pool->arrived.store(0, std::memory_order_relaxed);
        pool->met.advance();
    } else {
        pool->met.wait_beyond(seen);
    }
}
