// A few rows by experts that each is a SwiGLU, on CPUs. Of the weights those of the chosen experts alone are read.

#ifndef WIDTH

#include <stdlib.h>

#include "phases.h"
#include "products.h"
#include "scan.h"

// Some of the choices, which are sorted by expert: those of one.
struct Group {
    int64_t expert, first, count;
};

// `order` has the choices (m k), counted row by row, sorted by expert, and `groups` those of each expert; both stand
// behind the arrays. The arrays have a row a choice in that order: the inputs (d,), gate | up (2 i,) and their product
// (i,), the outputs (d,).
struct ExpertsWork {
    float *inputs, *both, *active, *outputs;
    int64_t *order;
    Group *groups;
    int64_t sorted, group_count;
};

#define WIDTH 4
#include "experts_step.cpp"
#ifdef __x86_64__
#define WIDTH 8
#include "experts_step.cpp"
#define WIDTH 16
#include "experts_step.cpp"
#endif

// Sorts the choices, those of an expert in their order. An expert that there is not is left out: its choice adds NaN.
static void sort_choices(const ExpertsStep &s, ExpertsWork &w) {
    int64_t at = 0;
    w.group_count = 0;
    for (int64_t expert = 0; expert < s.experts; expert++) {
        const int64_t first = at;
        for (int64_t choice = 0; choice < s.b * s.k; choice++)
            if (s.chosen[choice] == expert) w.order[at++] = choice;
        if (at > first) w.groups[w.group_count++] = {expert, first, at - first};
    }
    w.sorted = at;
}

int32_t mamba_experts_step(const ExpertsStep *step) {
    const ExpertsStep &s = *step;
    const int64_t choices = s.b * s.k;
    ExpertsWork w;
    float *memory = divide_memory({{&w.inputs, choices * s.d},
                                   {&w.both, choices * 2 * s.i},
                                   {&w.active, choices * s.i},
                                   {&w.outputs, choices * s.d}});
    w.order = (int64_t *)malloc((sizeof(int64_t) + sizeof(Group)) * (choices + 1));
    if (!memory || !w.order) {
        free(memory);
        free(w.order);
        return 1;
    }
    w.groups = (Group *)(w.order + choices);
    sort_choices(s, w);
    auto plan_of = FOR_LANES(s.width ? s.width : mamba_scan_width(), plan_of);
    int32_t failed = run_steps(step, 1, plan_of, w, memory, 3 * w.group_count * s.d * s.i);
    free(w.order);
    return failed;
}

#else  // Compiled once for each width.

#include "products.h"

BEGIN_WIDTH

static void widen_choice(const Plan &plan, int64_t at) {
    const ExpertsStep &s = *(const ExpertsStep *)plan.step;
    const ExpertsWork &w = *(const ExpertsWork *)plan.work;
    const char *x = s.x + (s.bfloat16 ? 2 : 4) * (w.order[at] / s.k) * s.d;
    for (int64_t i = 0; i < s.d; i += WIDTH)
        write_float(w.inputs + at * s.d + i, read(x + (s.bfloat16 ? 2 : 4) * i, s.d - i, s.bfloat16), s.d - i);
}

// Tasks of one expert's product, for each of which there is a column of at most OUTPUTS outputs.
INLINE void multiply_by_expert(const ExpertsStep &s, const ExpertsWork &w, const char *weights, const float *x,
                               int64_t inputs, float *y, int64_t outputs, int64_t task) {
    const int64_t columns = divide_up(outputs, OUTPUTS);
    const Group &group = w.groups[task / columns];
    const Range its = range_of(outputs, OUTPUTS, task % columns);
    const Matrix matrix = {weights + (s.bfloat16 ? 2 : 4) * group.expert * inputs * outputs, nullptr};
    multiply_parts({matrix, group.count, inputs, outputs, !!s.bfloat16, false, x + group.first * inputs, inputs,
                    y + group.first * outputs + its.first, outputs},
                   its, {0, inputs});
}

static void project_up(const Plan &plan, int64_t task) {
    const ExpertsStep &s = *(const ExpertsStep *)plan.step;
    const ExpertsWork &w = *(const ExpertsWork *)plan.work;
    multiply_by_expert(s, w, s.gate_up, w.inputs, s.d, w.both, 2 * s.i, task);
}

static void activate(const Plan &plan, int64_t at) {
    const ExpertsStep &s = *(const ExpertsStep *)plan.step;
    const ExpertsWork &w = *(const ExpertsWork *)plan.work;
    const float *gates = w.both + at * 2 * s.i;
    for (int64_t i = 0; i < s.i; i += WIDTH) {
        const V gate = read_float(gates + i, s.i - i), up = read_float(gates + s.i + i, s.i - i);
        write_float(w.active + at * s.i + i, gate * sigmoid(gate) * up, s.i - i);
    }
}

static void project_down(const Plan &plan, int64_t task) {
    const ExpertsStep &s = *(const ExpertsStep *)plan.step;
    const ExpertsWork &w = *(const ExpertsWork *)plan.work;
    multiply_by_expert(s, w, s.down, w.active, s.i, w.outputs, s.d, task);
}

// The sum over a row's choices, in their own order.
static void add_up(const Plan &plan, int64_t row) {
    const ExpertsStep &s = *(const ExpertsStep *)plan.step;
    const ExpertsWork &w = *(const ExpertsWork *)plan.work;
    float *y = s.y + row * s.d;
    memset(y, 0, sizeof(float) * s.d);
    for (int64_t choice = row * s.k; choice < (row + 1) * s.k; choice++) {
        int64_t at = 0;
        while (at < w.sorted && w.order[at] != choice) at++;
        const bool there = at < w.sorted;
        for (int64_t i = 0; i < s.d; i += WIDTH) {
            const V out = there ? read_float(w.outputs + at * s.d + i, s.d - i) : splat(__builtin_nanf(""));
            write_float(y + i, read_float(y + i, s.d - i) + s.probability[choice] * out, s.d - i);
        }
    }
}

static Plan plan_of(const ExpertsStep &s, const ExpertsWork &w) {
    Plan plan(&s, &w);
    plan.add(widen_choice, w.sorted);
    plan.add(project_up, w.group_count * divide_up(2 * s.i, OUTPUTS));
    plan.add(activate, w.sorted);
    plan.add(project_down, w.group_count * divide_up(s.d, OUTPUTS));
    plan.add(add_up, s.b);
    return plan;
}

END_WIDTH

#undef WIDTH

#endif
