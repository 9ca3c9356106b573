// The product of the head of one position on CPUs: logits in float32.

#ifndef WIDTH

#include "phases.h"
#include "products.h"
#include "scan.h"

// The inputs (b, inputs), and the sums (parts, b, outputs) of the product.
struct LinearWork {
    float *hidden, *sums;
};

#define WIDTH 4
#include "linear_step.cpp"
#ifdef __x86_64__
#define WIDTH 8
#include "linear_step.cpp"
#define WIDTH 16
#include "linear_step.cpp"
#endif

int32_t mamba_linear_step(const LinearStep *step) {
    const LinearStep &s = *step;
    LinearWork w;
    float *memory = divide_memory({{&w.hidden, s.b * s.inputs}, {&w.sums, sums_of(s, s.outputs)}});
    auto plan_of = FOR_LANES(s.width ? s.width : mamba_scan_width(), plan_of);
    return run_steps(step, 1, plan_of, w, memory, s.inputs * s.outputs);
}

#else  // Compiled once for each width.

#include "products.h"

BEGIN_WIDTH

static void widen(const Plan &plan, int64_t row) {
    const LinearStep &s = *(const LinearStep *)plan.step;
    const LinearWork &w = *(const LinearWork *)plan.work;
    for (int64_t i = row * s.inputs, end = i + s.inputs; i < end; i += WIDTH)
        write_float(w.hidden + i, read(s.x + (s.bfloat16 ? 2 : 4) * i, end - i, s.bfloat16), end - i);
}

static void project(const Plan &plan, int64_t task) {
    const LinearStep &s = *(const LinearStep *)plan.step;
    const LinearWork &w = *(const LinearWork *)plan.work;
    project_task(s, w.sums, s.matrix, w.hidden, s.inputs, s.inputs, s.outputs, task);
}

static void write_outputs(const Plan &plan, int64_t row) {
    const LinearStep &s = *(const LinearStep *)plan.step;
    const LinearWork &w = *(const LinearWork *)plan.work;
    const int64_t parts = tiling_of(s, s.outputs).parts;
    for (int64_t o = 0; o < s.outputs; o += WIDTH)
        write_float(s.y + row * s.outputs + o,
                    collected(s, w.sums, s.matrix, parts, s.outputs, row, o, s.outputs - o), s.outputs - o);
}

static Plan plan_of(const LinearStep &s, const LinearWork &w) {
    Plan plan(&s, &w);
    plan.add(widen, s.b);
    plan.add(project, tasks_of(s, s.outputs));
    plan.add(write_outputs, s.b);
    return plan;
}

END_WIDTH

#undef WIDTH

#endif
