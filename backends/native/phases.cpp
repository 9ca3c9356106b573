#include "phases.h"

#include <sched.h>

#include "threads.h"
#include "vectors.h"

constexpr int64_t SPINS = 2000;

static void relax() {
#if defined __x86_64__
    __builtin_ia32_pause();
#elif defined __aarch64__
    __asm__ volatile("yield");
#endif
}

struct Team {
    Plan *plans;
    int64_t count, threads, arrived;
};

// Does the thread's own share of each phase, and then what is left of the others'.
static void work_through(Plan &plan, int64_t thread, int64_t threads) {
    for (Phase *phase = plan.phases; phase < plan.phases + plan.phase_count; phase++) {
        for (int64_t k = 0; k < threads; k++) {
            int64_t owner = (thread + k) % threads, end = phase->tasks * (owner + 1) / threads;
            for (;;) {
                int64_t task = phase->tasks * owner / threads;
                task += __atomic_fetch_add(&phase->begun[owner], 1, __ATOMIC_RELAXED);
                if (task >= end) break;
                phase->function(plan, task);
                __atomic_fetch_add(&phase->done, 1, __ATOMIC_RELEASE);
            }
        }
        for (int64_t spins = 0; __atomic_load_n(&phase->done, __ATOMIC_ACQUIRE) < phase->tasks; spins++)
            if (spins < SPINS)
                relax();
            else
                sched_yield();
    }
}

// Every thread runs this. No thread waits for one that comes late or not at all.
static void work_through_all(void *argument) {
    Team &team = *(Team *)argument;
    int64_t thread = __atomic_fetch_add(&team.arrived, 1, __ATOMIC_RELAXED);
    for (int64_t k = 0; k < team.count; k++) work_through(team.plans[k], thread, team.threads);
}

bool run_plans(Plan *plans, int64_t count, int64_t threads, int64_t weights) {
    threads = threads_worth(threads, 1 + (weights >> 17));
    int64_t *begun = (int64_t *)calloc(count * MOST_PHASES * threads, sizeof(int64_t));
    if (!begun) return false;
    for (int64_t k = 0; k < count; k++)
        for (int64_t phase = 0; phase < MOST_PHASES; phase++)
            plans[k].phases[phase].begun = begun + (k * MOST_PHASES + phase) * threads;
    Team team = {plans, count, threads, 0};
    run_threads(work_through_all, &team, threads);
    free(begun);
    return true;
}

float *divide_memory(std::initializer_list<Room> rooms) {
    int64_t size = 0;
    for (const Room &room : rooms) size += divide_up(room.size, WIDEST) * WIDEST;
    float *memory = (float *)aligned_alloc(64, sizeof(float) * size), *next = memory;
    for (const Room &room : rooms) {
        *room.array = next;
        if (memory) next += divide_up(room.size, WIDEST) * WIDEST;
    }
    return memory;
}
