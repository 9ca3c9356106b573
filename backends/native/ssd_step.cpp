// One position of a residual block whose recurrence is the ssd (Dao and Gu 2024, arXiv:2405.21060, figure 6), for a few
// rows on CPUs.

#ifndef WIDTH

#include <float.h>

#include "block_parts.h"
#include "phases.h"
#include "scan.h"

// Channels of the recurrence, of the convolution, and of what out_proj reads.
static int64_t scanned_of(const SsdStep &s) { return s.h * s.p; }
static int64_t filters_of(const SsdStep &s) { return s.h * s.p + 2 * s.g * s.n; }
static int64_t inner_of(const SsdStep &s) { return s.beside + s.h * s.p; }

// Where z, the convolution's input and dt begin in in_proj's outputs, and how many these are.
static int64_t z_of(const SsdStep &s) { return 2 * s.beside; }
static int64_t xBC_of(const SsdStep &s) { return z_of(s) + scanned_of(s); }
static int64_t dt_of(const SsdStep &s) { return xBC_of(s) + filters_of(s); }
static int64_t projected_of(const SsdStep &s) { return dt_of(s) + s.h; }

// The arrays that one phase leaves for another: hidden (b, d), xBC (b, h p + 2 g n) after the convolution, y (b, beside
// + h p), taps (k, h p + 2 g n), and the sums (parts, b, outputs) of a product. in_proj's sums are of so many `parts`.
struct SsdWork {
    float *hidden, *xBC, *y, *taps, *sums;
    int64_t parts;
};

#define WIDTH 4
#include "ssd_step.cpp"
#ifdef __x86_64__
#define WIDTH 8
#include "ssd_step.cpp"
#define WIDTH 16
#include "ssd_step.cpp"
#endif

int32_t mamba_ssd_steps(const SsdStep *steps, int64_t count) {
    if (!count) return 0;
    const SsdStep &s = *steps;
    const int64_t in = sums_of(s, projected_of(s)), out = sums_of(s, s.d);
    SsdWork w;
    w.parts = tiling_of(s, projected_of(s)).parts;
    float *memory = divide_memory({{&w.hidden, s.b * s.d},
                                   {&w.xBC, s.b * filters_of(s)},
                                   {&w.y, s.b * inner_of(s)},
                                   {&w.taps, s.k * filters_of(s)},
                                   {&w.sums, in < out ? out : in}});
    auto plan_of = FOR_LANES(s.width ? s.width : mamba_scan_width(), plan_of);
    return run_steps(steps, count, plan_of, w, memory, s.d * (projected_of(s) + inner_of(s)));
}

#else  // Compiled once for each width.

#include "block_parts.h"

BEGIN_WIDTH

// `left` of in_proj's outputs, from `first` on.
INLINE V projected(const SsdStep &s, const SsdWork &w, int64_t row, int64_t first, int64_t left) {
    return collected(s, w.sums, s.in_proj, w.parts, projected_of(s), row, first, left);
}

INLINE V silu(V value) { return value * sigmoid(value); }

static void normalise(const Plan &plan, int64_t row) {
    const SsdStep &s = *(const SsdStep *)plan.step;
    const SsdWork &w = *(const SsdWork *)plan.work;
    norm_residual(s, w.hidden, row);
}

static void project_in(const Plan &plan, int64_t task) {
    const SsdStep &s = *(const SsdStep *)plan.step;
    const SsdWork &w = *(const SsdWork *)plan.work;
    project_task(s, w.sums, s.in_proj, w.hidden, s.d, s.d, projected_of(s), task);
}

// Writes x, B and C after the short convolution and its SiLU, and the window that the next position sees.
static void convolve(const Plan &plan, int64_t task) {
    const SsdStep &s = *(const SsdStep *)plan.step;
    const SsdWork &w = *(const SsdWork *)plan.work;
    const int64_t filters = filters_of(s);
    const Range channels = range_of(filters, channels_of(s, filters), task);
    const int64_t end = channels.first + channels.count;
    load_taps(s, w.taps, filters, channels);
    for (int64_t row = 0; row < s.b; row++)
        for (int64_t c = channels.first; c < end; c += WIDTH) {
            V xBC = projected(s, w, row, xBC_of(s) + c, end - c);
            write_float(w.xBC + row * filters + c, convolved(s, w.taps, xBC, filters, row, c, end - c), end - c);
        }
}

// h = decay h + u B, of one channel's n states. Returns the terms of h C, lane by lane.
INLINE V advance(const float *h, float *new_h, float decay, float u, const float *B, const float *C, int64_t n) {
    V y = {};
    for (int64_t k = 0; k < n; k += WIDTH) {
        const int64_t left = n - k;
        V value = decay * read_float(h + k, left) + u * read_float(B + k, left);
        write_float(new_h + k, value, left);
        y += value * read_float(C + k, left);
    }
    return y;
}

// The recurrence of one head of a row, with the gate unless a norm comes before that.
static void scan_head(const SsdStep &s, const SsdWork &w, int64_t row, int64_t head) {
    const float *x = w.xBC + row * filters_of(s) + head * s.p;
    const float *B = w.xBC + row * filters_of(s) + scanned_of(s) + head / (s.h / s.g) * s.n, *C = B + s.g * s.n;
    const int64_t state = (row * s.h + head) * s.p * s.n;
    float *y = w.y + row * inner_of(s) + s.beside + head * s.p;
    float step = softplus(projected(s, w, row, dt_of(s) + head, 1) + s.dt_bias[head])[0];
    step = step < s.least ? s.least : step > s.most ? s.most : step;
    // A step of zero keeps the state, also where the rate is beyond a float.
    float rate = exponential(splat(s.A_log[head]))[0];
    rate = rate > FLT_MAX ? FLT_MAX : rate;
    const float decay = exponential(splat(-step * rate))[0];
    const bool gates = !(s.gated_norm && s.norm_before_gate);
    for (int64_t c = 0; c < s.p; c += WIDTH) {
        const int64_t left = s.p - c;
        V lanes[WIDTH] = {}, of_x = read_float(x + c, left), D = splat(s.D[head]);
        for (int64_t j = 0; j < WIDTH && j < left; j++) {
            const int64_t at = state + (c + j) * s.n;
            lanes[j] = advance(s.ssm_state + at, s.new_ssm_state + at, decay, step * x[c + j], B, C, s.n);
        }
        if (s.D_per_channel) D = read_float(s.D + head * s.p + c, left);
        V value = sums_of_lanes(lanes) + D * of_x;
        if (gates) value *= silu(projected(s, w, row, z_of(s) + head * s.p + c, left));
        write_float(y + c, value, left);
    }
}

// One head of a row, and its share of the channels beside the recurrence.
static void scan(const Plan &plan, int64_t task) {
    const SsdStep &s = *(const SsdStep *)plan.step;
    const SsdWork &w = *(const SsdWork *)plan.work;
    const int64_t row = task / s.h, head = task % s.h;
    scan_head(s, w, row, head);
    const Range channels = range_of(s.beside, divide_up(s.beside, s.h), head);
    for (int64_t c = channels.first, end = c + channels.count; c < end; c += WIDTH) {
        V gate = projected(s, w, row, c, end - c), gated = projected(s, w, row, s.beside + c, end - c);
        write_float(w.y + row * inner_of(s) + c, silu(gate) * gated, end - c);
    }
}

// The root mean square norm of a row's channels of one group, and the gate where it comes after.
static void norm_group(const Plan &plan, int64_t task) {
    const SsdStep &s = *(const SsdStep *)plan.step;
    const SsdWork &w = *(const SsdWork *)plan.work;
    const int64_t row = task / s.g, count = scanned_of(s) / s.g, first = task % s.g * count;
    float *y = w.y + row * inner_of(s) + s.beside + first;
    V squares = {};
    for (int64_t c = 0; c < count; c += WIDTH) {
        V value = read_float(y + c, count - c);
        squares += value * value;
    }
    const float scale = norm_scale(squares, count, s.gated_eps);
    for (int64_t c = 0; c < count; c += WIDTH) {
        const int64_t left = count - c;
        V value = read_float(y + c, left) * scale;
        value *= read(s.gated_norm + (s.bfloat16 ? 2 : 4) * (first + c), left, s.bfloat16);
        if (s.norm_before_gate) value *= silu(projected(s, w, row, z_of(s) + first + c, left));
        write_float(y + c, value, left);
    }
}

static void project_out(const Plan &plan, int64_t task) {
    const SsdStep &s = *(const SsdStep *)plan.step;
    const SsdWork &w = *(const SsdWork *)plan.work;
    project_task(s, w.sums, s.out_proj, w.y, inner_of(s), inner_of(s), s.d, task);
}

static void add(const Plan &plan, int64_t row) {
    const SsdStep &s = *(const SsdStep *)plan.step;
    const SsdWork &w = *(const SsdWork *)plan.work;
    add_to_residual(s, w.sums, row);
}

static Plan plan_of(const SsdStep &s, const SsdWork &w) {
    Plan plan(&s, &w);
    plan.add(normalise, s.b);
    plan.add(project_in, tasks_of(s, projected_of(s)));
    plan.add(convolve, divide_up(filters_of(s), channels_of(s, filters_of(s))));
    plan.add(scan, s.b * s.h);
    if (s.gated_norm) plan.add(norm_group, s.b * s.g);
    plan.add(project_out, tasks_of(s, s.d));
    plan.add(add, s.b);
    return plan;
}

END_WIDTH

#undef WIDTH

#endif
