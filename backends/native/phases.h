// Work in phases, each of tasks that need nothing of one another, on threads that a call starts once.

#ifndef PHASES_H
#define PHASES_H

#include <stdint.h>
#include <stdlib.h>

#include <initializer_list>

struct Plan;
typedef void PhaseFunction(const Plan &, int64_t task);

// Each thread has a share of tasks that lie side by side, so that the memory which it asks for ahead of one is that of
// its next. `begun` counts the tasks begun of each share, and `done` those done of all. The threads share nothing else.
struct Phase {
    PhaseFunction *function;
    int64_t tasks, done;
    int64_t *begun;
};

constexpr int64_t MOST_PHASES = 9;

// The phases of one step, and what their functions read: the step itself, and the arrays that one phase leaves for
// another.
struct Plan {
    const void *step, *work;
    Phase phases[MOST_PHASES];
    int32_t phase_count;

    Plan(const void *step, const void *work) : step(step), work(work), phases(), phase_count(0) {}
    void add(PhaseFunction *function, int64_t tasks) { phases[phase_count++] = {function, tasks, 0, nullptr}; }
};

// Computes the plans one after another. `weights` is how many numbers they read in all, which says how many threads
// are worth their start. Returns false if there is not the memory.
bool run_plans(Plan *plans, int64_t count, int64_t threads, int64_t weights);

struct Room {
    float **array;
    int64_t size;
};

// Allocates arrays of so many floats in one piece, each from a boundary of a vector on. Returns the piece, for `free`,
// or null if there is not the memory.
float *divide_memory(std::initializer_list<Room> rooms);

// The steps of one call, of the same sizes and settings: each may read what the one before it writes.
// plan_of(step, work) gives the plan of one. Returns 0, or 1 if there is not the memory, which `memory` null says too.
template <class Step, class Work>
static int32_t run_steps(const Step *steps, int64_t count, Plan (*plan_of)(const Step &, const Work &), const Work &work,
                         float *memory, int64_t weights) {
    Plan *plans = (Plan *)malloc(sizeof(Plan) * count);
    bool enough = memory && plans;
    for (int64_t k = 0; enough && k < count; k++) plans[k] = plan_of(steps[k], work);
    enough = enough && run_plans(plans, count, steps->threads, count * weights);
    free(plans);
    free(memory);
    return !enough;
}

#endif
