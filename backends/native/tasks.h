// Tasks shared out among threads that live for one call: to start one costs some ten microseconds, and none is left for
// a fork to lose. The order of no sum may depend on which thread takes which task.

#ifndef TASKS_H
#define TASKS_H

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

struct Tasks {
    // function(argument, index, work) for every index below count; work is a thread's own, of work_size bytes.
    void (*function)(const void *argument, int64_t index, void *work);
    const void *argument;
    int64_t count, next;
    char *works;
    size_t work_size;
    int32_t started;
};

static void *take_tasks(void *argument) {
    Tasks &tasks = *(Tasks *)argument;
    void *work = tasks.works + tasks.work_size * __atomic_fetch_add(&tasks.started, 1, __ATOMIC_RELAXED);
    for (;;) {
        int64_t index = __atomic_fetch_add(&tasks.next, 1, __ATOMIC_RELAXED);
        if (index >= tasks.count) return nullptr;
        tasks.function(tasks.argument, index, work);
    }
}

// At most `threads` of them, the caller's one. False where there is not the memory.
static bool run_tasks(void (*function)(const void *, int64_t, void *), const void *argument, int64_t count,
                      int64_t threads, size_t work_size) {
    constexpr int64_t MOST = 256;
    threads = threads < count ? threads : count;
    threads = threads < MOST ? threads : MOST;
    threads = threads < 1 ? 1 : threads;
    work_size = (work_size + 63) / 64 * 64;
    char *works = (char *)aligned_alloc(64, work_size * threads + 64);
    if (!works) return false;
    Tasks tasks = {function, argument, count, 0, works, work_size, 0};
    pthread_t helpers[MOST];
    int64_t started = 0;
    // Where the system gives no more threads, those that there are do the work.
    while (started + 1 < threads && !pthread_create(&helpers[started], nullptr, take_tasks, &tasks)) started++;
    take_tasks(&tasks);
    for (int64_t k = 0; k < started; k++) pthread_join(helpers[k], nullptr);
    free(works);
    return true;
}

#endif
