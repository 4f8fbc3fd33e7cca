// Threads that compute one step together.
//
// They wait actively for a moment, then sleep: the phases of a step follow within microseconds,
// while a neighbour on the same core must not be starved by one that waits long.
#pragma once
#include <stdint.h>

struct Pool;

Pool *pool_open(int threads);
void pool_close(Pool *pool);
int pool_threads(const Pool *pool);
// Calls work(argument, thread) on every thread, the caller being thread 0; returns when all have.
void pool_run(Pool *pool, void (*work)(void *argument, int thread), void *argument);
// Nanoseconds of a clock that never stops.
int64_t pool_now();
// A moment's rest for one who waits actively.
void pool_breathe();
// Lets others have the core for a moment.
void pool_rest();
// Inside `work`: every thread arrives before any goes on.
void pool_barrier(Pool *pool);
