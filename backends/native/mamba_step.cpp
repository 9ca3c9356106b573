// One position of a residual block with a Mamba-1 mixer (Gu and Dao 2023, figure 3) for a few rows on CPUs.

#ifndef WIDTH

#include "block_parts.h"
#include "phases.h"
#include "scan.h"

static int64_t mixed_of(const MambaStep &s) { return s.r + 2 * s.n; }

// The arrays that one phase leaves for another: hidden (b, d), x, z, delta and y (b, e), dtbc (b, r + 2n), taps (k, e),
// A (e, n), and the sums (parts, b, outputs) of a product.
struct MambaWork {
    float *hidden, *x, *z, *dtbc, *delta, *y, *taps, *A, *sums;
};

#define WIDTH 4
#include "mamba_step.cpp"
#ifdef __x86_64__
#define WIDTH 8
#include "mamba_step.cpp"
#define WIDTH 16
#include "mamba_step.cpp"
#endif

int32_t mamba_mamba_steps(const MambaStep *steps, int64_t count) {
    if (!count) return 0;
    const MambaStep &s = *steps;
    int64_t sums = 0;
    for (int64_t outputs : {2 * s.e, mixed_of(s), s.e, s.d}) {
        int64_t size = sums_of(s, outputs);
        sums = sums < size ? size : sums;
    }
    MambaWork w;
    float *memory = divide_memory({{&w.hidden, s.b * s.d},
                                   {&w.x, s.b * s.e},
                                   {&w.z, s.b * s.e},
                                   {&w.delta, s.b * s.e},
                                   {&w.y, s.b * s.e},
                                   {&w.dtbc, s.b * mixed_of(s)},
                                   {&w.taps, s.k * s.e},
                                   {&w.A, s.e * s.n},
                                   {&w.sums, sums}});
    auto plan_of = FOR_LANES(s.width ? s.width : mamba_scan_width(), plan_of);
    return run_steps(steps, count, plan_of, w, memory, s.e * (3 * s.d + mixed_of(s) + s.r));
}

#else  // Compiled once for each width.

#include "block_parts.h"

BEGIN_WIDTH

static void normalise(const Plan &plan, int64_t row) {
    const MambaStep &s = *(const MambaStep *)plan.step;
    const MambaWork &w = *(const MambaWork *)plan.work;
    norm_residual(s, w.hidden, row);
}

static void project_in(const Plan &plan, int64_t task) {
    const MambaStep &s = *(const MambaStep *)plan.step;
    const MambaWork &w = *(const MambaWork *)plan.work;
    project_task(s, w.sums, s.in_proj, w.hidden, s.d, s.d, 2 * s.e, task);
}

// Writes x after the short convolution and its SiLU, the window that the next position sees, and z.
static void convolve(const Plan &plan, int64_t task) {
    const MambaStep &s = *(const MambaStep *)plan.step;
    const MambaWork &w = *(const MambaWork *)plan.work;
    const int64_t parts = tiling_of(s, 2 * s.e).parts;
    const Range channels = range_of(s.e, channels_of(s, s.e), task);
    const int64_t end = channels.first + channels.count;
    load_taps(s, w.taps, s.e, channels);
    for (int64_t row = 0; row < s.b; row++)
        for (int64_t c = channels.first; c < end; c += WIDTH) {
            int64_t left = end - c;
            V x = collected(s, w.sums, s.in_proj, parts, 2 * s.e, row, c, left);
            write_float(w.x + row * s.e + c, convolved(s, w.taps, x, s.e, row, c, left), left);
            V z = collected(s, w.sums, s.in_proj, parts, 2 * s.e, row, s.e + c, left);
            write_float(w.z + row * s.e + c, z, left);
        }
}

static void project_x(const Plan &plan, int64_t task) {
    const MambaStep &s = *(const MambaStep *)plan.step;
    const MambaWork &w = *(const MambaWork *)plan.work;
    project_task(s, w.sums, s.x_proj, w.x, s.e, s.e, mixed_of(s), task);
}

// The root mean square norm of `count` numbers in their place; the weight may be null.
static void norm_in_place(const MambaStep &s, float *values, int64_t count, const char *weight) {
    V squares = {};
    for (int64_t i = 0; i < count; i += WIDTH) {
        V value = read_float(values + i, count - i);
        squares += value * value;
    }
    const float scale = norm_scale(squares, count, s.selection_eps);
    for (int64_t i = 0; i < count; i += WIDTH) {
        V value = read_float(values + i, count - i) * scale;
        if (weight) value *= read(weight + (s.bfloat16 ? 2 : 4) * i, count - i, s.bfloat16);
        write_float(values + i, value, count - i);
    }
}

// dt, B and C of one row.
static void collect(const Plan &plan, int64_t row) {
    const MambaStep &s = *(const MambaStep *)plan.step;
    const MambaWork &w = *(const MambaWork *)plan.work;
    const int64_t mixed = mixed_of(s), parts = tiling_of(s, mixed).parts;
    float *dtbc = w.dtbc + row * mixed;
    for (int64_t i = 0; i < mixed; i += WIDTH)
        write_float(dtbc + i, collected(s, w.sums, s.x_proj, parts, mixed, row, i, mixed - i), mixed - i);
    if (s.selection_eps > 0) {
        norm_in_place(s, dtbc, s.r, s.dt_norm);
        norm_in_place(s, dtbc + s.r, s.n, s.B_norm);
        norm_in_place(s, dtbc + s.r + s.n, s.n, s.C_norm);
    }
}

// Advances the states of one channel of a row. Returns the terms of its output, lane by lane.
INLINE V advance(const MambaStep &s, const MambaWork &w, int64_t row, int64_t channel) {
    const float *B = w.dtbc + row * mixed_of(s) + s.r, *C = B + s.n, *A = w.A + channel * s.n;
    const float *h = s.ssm_state + (row * s.e + channel) * s.n;
    float *new_h = s.new_ssm_state + (row * s.e + channel) * s.n;
    float step = w.delta[row * s.e + channel], u = step * w.x[row * s.e + channel];
    V y = {};
    for (int64_t k = 0; k < s.n; k += WIDTH) {
        int64_t left = s.n - k;
        V value = decay_of(splat(step), read_float(A + k, left)) * read_float(h + k, left);
        value += u * read_float(B + k, left);
        write_float(new_h + k, value, left);
        y += value * read_float(C + k, left);
    }
    return y;
}

static void project_dt(const Plan &plan, int64_t task) {
    const MambaStep &s = *(const MambaStep *)plan.step;
    const MambaWork &w = *(const MambaWork *)plan.work;
    project_task(s, w.sums, {s.dt_proj, nullptr}, w.dtbc, mixed_of(s), s.r, s.e, task);
}

// The step sizes, the recurrence and its gate.
static void scan(const Plan &plan, int64_t task) {
    const MambaStep &s = *(const MambaStep *)plan.step;
    const MambaWork &w = *(const MambaWork *)plan.work;
    const Matrix dt_proj = {s.dt_proj, nullptr};
    const int64_t parts = tiling_of(s, s.e).parts;
    auto [first, count] = range_of(s.e, channels_of(s, s.e), task);
    for (int64_t i = first * s.n, end = (first + count) * s.n; i < end; i += WIDTH)
        write_float(w.A + i, exponential(read_float(s.A_log + i, end - i)) * -1.4426950409f, end - i);
    for (int64_t row = 0; row < s.b; row++)
        for (int64_t c = first; c < first + count; c += WIDTH) {
            int64_t left = first + count - c, at = row * s.e + c;
            V raw = collected(s, w.sums, dt_proj, parts, s.e, row, c, left), lanes[WIDTH] = {};
            raw += read_float(s.delta_bias + c, left);
            write_float(w.delta + at, softplus(raw), left);
            for (int64_t j = 0; j < WIDTH && j < left; j++) lanes[j] = advance(s, w, row, c + j);
            V y = sums_of_lanes(lanes) + read_float(s.D + c, left) * read_float(w.x + at, left);
            V z = read_float(w.z + at, left);
            write_float(w.y + at, y * z * sigmoid(z), left);
        }
}

static void project_out(const Plan &plan, int64_t task) {
    const MambaStep &s = *(const MambaStep *)plan.step;
    const MambaWork &w = *(const MambaWork *)plan.work;
    project_task(s, w.sums, s.out_proj, w.y, s.e, s.e, s.d, task);
}

// Adds the block's output to the residual stream.
static void add(const Plan &plan, int64_t row) {
    const MambaStep &s = *(const MambaStep *)plan.step;
    const MambaWork &w = *(const MambaWork *)plan.work;
    add_to_residual(s, w.sums, row);
}

static Plan plan_of(const MambaStep &s, const MambaWork &w) {
    const int64_t channel_tasks = divide_up(s.e, channels_of(s, s.e));
    Plan plan(&s, &w);
    plan.add(normalise, s.b);
    plan.add(project_in, tasks_of(s, 2 * s.e));
    plan.add(convolve, channel_tasks);
    plan.add(project_x, tasks_of(s, mixed_of(s)));
    plan.add(collect, s.b);
    plan.add(project_dt, tasks_of(s, s.e));
    plan.add(scan, channel_tasks);
    plan.add(project_out, tasks_of(s, s.d));
    plan.add(add, s.b);
    return plan;
}

END_WIDTH

#undef WIDTH

#endif
