// Tasks shared out among threads. The order of no sum may depend on which thread takes which task.

#ifndef TASKS_H
#define TASKS_H

#include <stdlib.h>

#include "threads.h"

struct Tasks {
    // function(argument, index, work) for every index below count; work is a thread's own, of work_size bytes.
    void (*function)(const void *argument, int64_t index, void *work);
    const void *argument;
    int64_t count, next;
    char *works;
    size_t work_size;
    int32_t started;
};

static void take_tasks(void *argument) {
    Tasks &tasks = *(Tasks *)argument;
    void *work = tasks.works + tasks.work_size * __atomic_fetch_add(&tasks.started, 1, __ATOMIC_RELAXED);
    for (;;) {
        int64_t index = __atomic_fetch_add(&tasks.next, 1, __ATOMIC_RELAXED);
        if (index >= tasks.count) return;
        tasks.function(tasks.argument, index, work);
    }
}

// At most `threads` of them. False where there is not the memory.
static bool run_tasks(void (*function)(const void *, int64_t, void *), const void *argument, int64_t count,
                      int64_t threads, size_t work_size) {
    threads = threads_worth(threads, count);
    work_size = (work_size + 63) / 64 * 64;
    char *works = (char *)aligned_alloc(64, work_size * threads + 64);
    if (!works) return false;
    Tasks tasks = {function, argument, count, 0, works, work_size, 0};
    run_threads(take_tasks, &tasks, threads);
    free(works);
    return true;
}

#endif
