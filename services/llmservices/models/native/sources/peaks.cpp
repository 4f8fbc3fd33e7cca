// What is measured beside a step's own figures, so that they can be told as fractions.
#include "abi.h"

#include <chrono>

#include "engine.h"

namespace {

// Seconds that `work` takes on all threads, which are awake before.
double seconds(Pool *pool, void (*work)(void *, int), void *argument, void (*wake)(void *, int), void *little) {
    pool_run(pool, wake, little);
    const auto start = std::chrono::steady_clock::now();
    pool_run(pool, work, argument);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

} // namespace

double llm_read_bandwidth(const void *start, int64_t bytes, int32_t threads, const char *isa) {
    const Kernels *kernels = kernels_named(isa);
    if (!kernels || threads < 1 || bytes < READING_PIECE) return 0;
    Pool *pool = pool_open(threads);
    if (!pool) return 0;
    Reading little{(const char *)start, READING_PIECE, threads, 0};
    Reading reading{(const char *)start, bytes, threads, 0};
    const double took = seconds(pool, kernels->read, &reading, kernels->read, &little);
    pool_close(pool);
    return (double)(bytes / READING_PIECE * READING_PIECE) / took;
}

double llm_dot_peak(int32_t kind, int64_t rounds, int32_t threads, const char *isa) {
    const Kernels *kernels = kernels_named(isa);
    if (!kernels || threads < 1 || rounds < 1) return 0;
    Pool *pool = pool_open(threads);
    if (!pool) return 0;
    Dots little{kind, 1000, 0}, dots{kind, rounds, 0};
    const double took = seconds(pool, kernels->dots, &dots, kernels->dots, &little);
    pool_close(pool);
    return (double)dots.operations * threads / took;
}
