// Of PyTorch's operations many leave the threads of its OpenMP runtime waiting for the next one, by spinning for
// milliseconds. On as many cores as there are threads, others beside them would have half of each: so the runtime's own
// are used where they can be.

#include "threads.h"

#include <pthread.h>

#include "scan.h"

constexpr int64_t MOST_THREADS = 256;

// OpenMP's function(argument) on each of so many threads; null while there is none.
typedef void Parallel(void (*function)(void *), void *argument, unsigned threads, unsigned flags);
static Parallel *parallel;

// A child of a fork has not the runtime's threads.
static void forget_parallel() { parallel = nullptr; }

// given: GOMP_parallel of that runtime, or null.
EXPORT void mamba_use_threads_of(Parallel *given) {
    static const int registered = pthread_atfork(nullptr, nullptr, forget_parallel);
    parallel = registered ? nullptr : given;
}

struct Started {
    void (*function)(void *);
    void *argument;
};

static void *call_started(void *argument) {
    const Started &started = *(const Started *)argument;
    started.function(started.argument);
    return nullptr;
}

void run_threads(void (*function)(void *), void *argument, int64_t threads) {
    if (threads > 1 && parallel) return parallel(function, argument, threads, 0);
    Started start = {function, argument};
    pthread_t helpers[MOST_THREADS];
    int64_t started = 0;
    while (started + 1 < threads && !pthread_create(&helpers[started], nullptr, call_started, &start)) started++;
    function(argument);
    for (int64_t k = 0; k < started; k++) pthread_join(helpers[k], nullptr);
}

int64_t threads_worth(int64_t threads, int64_t worth) {
    // Another number than before makes the runtime end threads, and start them again for the next operation.
    if (!parallel || worth <= 1) threads = threads < worth ? threads : worth;
    threads = threads < MOST_THREADS ? threads : MOST_THREADS;
    return threads < 1 ? 1 : threads;
}
