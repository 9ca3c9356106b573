// The threads that a call is computed on: started for it, so that none is left for a fork to lose, or of the OpenMP
// runtime that `mamba_use_threads_of` was given.

#ifndef THREADS_H
#define THREADS_H

#include <stdint.h>

// function(argument) on `threads` threads, the caller's one, until all have returned. There may be fewer: what a thread
// that does not come would do, the others must.
void run_threads(void (*function)(void *), void *argument, int64_t threads);

// How many of the threads to take for work that is worth starting so many: each should save more than its start costs.
int64_t threads_worth(int64_t threads, int64_t worth);

#endif
