// One position of a residual block (Gu and Dao 2023, figure 3), and the product of the head, for a few rows on CPUs.
// What such a step costs is to read the weights, so it reads them once and straight through, and all else stays in the
// cache. float32 inside, in whatever the weights are; a plain C ABI that needs C's library and its threads only.

#ifndef WIDTH

#include <math.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "scan.h"
#include "threads.h"
#include "vectors.h"

// Of the compute dtype: (outputs, inputs) as torch stores it, or (inputs, outputs) if `transposed`. bias may be null.
struct Matrix {
    const char *weight, *bias;
};

// Arrays are contiguous. Those of char are of the compute dtype, bfloat16 or float32; the residual stream has its own.
struct BlockStep {
    int64_t b, d, e, n, k, r;
    int32_t bfloat16, residual_bfloat16, transposed, threads, width;
    float eps;
    // (b, d), (b, k-1, e) and (b, e, n).
    const char *residual, *conv_state;
    const float *ssm_state;
    // (d,); conv is (e, k), or (k, e) where `transposed`.
    const char *norm;
    Matrix in_proj, conv, x_proj, out_proj;
    const char *dt_proj;
    // (e,), (e, n) and (e,).
    const float *delta_bias, *A_log, *D;
    // Results, in other memory; only new_residual may be residual.
    char *new_residual, *new_conv_state;
    float *new_ssm_state;
};

// y (b, outputs) float32 from x (b, inputs) of the compute dtype.
struct LinearStep {
    int64_t b, inputs, outputs;
    int32_t bfloat16, transposed, threads, width;
    const char *x;
    Matrix matrix;
    float *y;
};

static int64_t mixed_of(const BlockStep &s) { return s.r + 2 * s.n; }

// What passes from phase to phase: hidden (b, d), x, z, delta and y (b, e), dtbc (b, r + 2n), taps (k, e), A (e, n).
struct Work {
    float *hidden, *x, *z, *dtbc, *delta, *y, *taps, *A;
};

struct Plan;
typedef void Function(const Plan &, int64_t);

// Tasks of which none needs another; the counts of those begun and done are all that the threads share. Each thread has
// a share of them, side by side so that what it asks for ahead of a task is its next one's, and a count of those begun.
struct Phase {
    Function *function;
    int64_t tasks, done;
    int64_t *begun;
};

constexpr int64_t MOST_PHASES = 5;

struct Plan {
    const BlockStep *block;
    const LinearStep *linear;
    Work work;
    Phase phases[MOST_PHASES];
    int32_t phase_count;
};

struct Kernel {
    Function *normalise, *project_in, *project_x, *scan, *project_out;
    Function *widen, *project;
};

// Outputs of one task, at most: few, so that no thread waits long for another's last, and enough to read long stretches
// of memory, which outputs are that lie side by side, and rows are.
constexpr int64_t OUTPUTS = 96, OUTPUTS_TRANSPOSED = 768;
constexpr int64_t SPINS = 2000;
// By how many bytes weights are asked for before they are read; where `transposed`, of a task's, and more than the
// first cache has room for. And how many rows of them are then read side by side.
constexpr int64_t AHEAD = 2048, AHEAD_TRANSPOSED = 32768;
constexpr int STREAMS_TRANSPOSED = 8;

// How many of so many outputs are a task; BlockStep and LinearStep.
template <class Step> static int64_t per_task(const Step &s, int64_t outputs) {
    const int64_t most = s.transposed ? OUTPUTS_TRANSPOSED : OUTPUTS, unit = s.transposed ? 2 * WIDEST : WIDEST;
    int64_t share = divide_up(divide_up(outputs, s.threads < 1 ? 1 : s.threads), unit) * unit;
    return share < most ? share : most;
}
template <class Step> static int64_t tasks_of(const Step &s, int64_t outputs) {
    return divide_up(outputs, per_task(s, outputs));
}

// The outputs of a task.
struct Range {
    int64_t first, count;
};
template <class Step> static Range range_of(const Step &s, int64_t outputs, int64_t task) {
    int64_t size = per_task(s, outputs), first = task * size;
    return {first, outputs - first < size ? outputs - first : size};
}

#define WIDTH 4
#include "block_step.cpp"
#ifdef __x86_64__
#define WIDTH 8
#include "block_step.cpp"
#define WIDTH 16
#include "block_step.cpp"
#endif

static const Kernel &kernel_of(__attribute__((unused)) int32_t width) {
#ifdef __x86_64__
    if (!width) width = mamba_scan_width();
    if (width >= 16) return width16::kernel;
    if (width >= 8) return width8::kernel;
#endif
    return width4::kernel;
}

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

// The share of a thread, and then what is left of the others'.
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

// What every thread does. One that comes late, or not at all, is not waited for.
static void work_through_all(void *argument) {
    Team &team = *(Team *)argument;
    int64_t thread = __atomic_fetch_add(&team.arrived, 1, __ATOMIC_RELAXED);
    for (int64_t k = 0; k < team.count; k++) work_through(team.plans[k], thread, team.threads);
}

// False where there is not the memory.
static bool run(Plan *plans, int64_t count, int64_t threads, int64_t weights) {
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

// The memory of all of them, null where there is not so much.
static float *divide_memory(const BlockStep &s, Work &w) {
    struct {
        float **array;
        int64_t size;
    } parts[] = {{&w.hidden, s.b * s.d}, {&w.x, s.b * s.e},          {&w.z, s.b * s.e},    {&w.delta, s.b * s.e},
                 {&w.y, s.b * s.e},      {&w.dtbc, s.b * mixed_of(s)}, {&w.taps, s.k * s.e}, {&w.A, s.e * s.n}};
    int64_t size = 0;
    for (auto &part : parts) size += divide_up(part.size, WIDEST) * WIDEST;
    float *memory = (float *)aligned_alloc(64, sizeof(float) * size), *next = memory;
    for (auto &part : parts) {
        *part.array = next;
        if (memory) next += divide_up(part.size, WIDEST) * WIDEST;
    }
    return memory;
}

static Plan plan_of(const BlockStep &s, const Kernel &kernel, const Work &w) {
    return {&s, nullptr, w, {
        {kernel.normalise, s.b, 0, nullptr},
        {kernel.project_in, tasks_of(s, s.e), 0, nullptr},
        {kernel.project_x, tasks_of(s, mixed_of(s)), 0, nullptr},
        {kernel.scan, tasks_of(s, s.e), 0, nullptr},
        {kernel.project_out, tasks_of(s, s.d), 0, nullptr},
    }, 5};
}

// Blocks one after another, all of the same sizes and settings: each goes on from what the one before it writes, where
// the caller says so. Each of the two returns 0, or 1 where there is not the memory.
EXPORT int32_t mamba_block_steps(const BlockStep *steps, int64_t count) {
    if (!count) return 0;
    const BlockStep &s = *steps;
    Work w;
    float *memory = divide_memory(s, w);
    Plan *plans = (Plan *)malloc(sizeof(Plan) * count);
    bool enough = memory && plans;
    for (int64_t k = 0; enough && k < count; k++) plans[k] = plan_of(steps[k], kernel_of(s.width), w);
    enough = enough && run(plans, count, s.threads, count * s.e * (3 * s.d + mixed_of(s) + s.r));
    free(plans);
    free(memory);
    return !enough;
}

EXPORT int32_t mamba_linear_step(const LinearStep *step) {
    const LinearStep &s = *step;
    const Kernel &kernel = kernel_of(s.width);
    Work w = {};
    float *memory = w.hidden = (float *)aligned_alloc(64, 64 * divide_up(s.b * s.inputs, WIDEST));
    if (!memory) return 1;
    Plan plan = {nullptr, step, w, {
        {kernel.widen, s.b, 0, nullptr},
        {kernel.project, tasks_of(s, s.outputs), 0, nullptr},
    }, 2};
    bool enough = run(&plan, 1, s.threads, s.inputs * s.outputs);
    free(memory);
    return !enough;
}

#else  // What is compiled for each width.

#include "vectors.h"

BEGIN_WIDTH

INLINE V read_float(const float *from, int64_t left) { return read((const char *)from, left, false); }
INLINE void write_float(float *to, V value, int64_t left) { write((char *)to, value, left, false); }

// y (b, outputs) = x (b, inputs) times a matrix; strides between rows.
struct Product {
    Matrix matrix;
    int64_t b, inputs, outputs;
    bool bfloat16, transposed;
    const float *x;
    int64_t x_stride;
    float *y;
    int64_t y_stride;
};

// One output of ROWS rows, lane by lane. The memory serves weights fastest straight through and past the caches.
template <int ROWS, bool BFLOAT16>
INLINE void multiply(V (*sums)[WIDTH], const char *weight, const float *x, int64_t stride, int64_t inputs) {
    const int64_t size = BFLOAT16 ? 2 : 4;
    V even[ROWS] = {}, odd[ROWS] = {};
    int64_t i = 0;
    for (; i + 2 * WIDTH <= inputs; i += 2 * WIDTH) {
        const char *from = weight + size * i;
        __builtin_prefetch(from + AHEAD, 0, 0);
        __builtin_prefetch(from + AHEAD + size * WIDTH, 0, 0);
        V first = read_whole(from, BFLOAT16), second = read_whole(from + size * WIDTH, BFLOAT16);
        for (int row = 0; row < ROWS; row++) {
            even[row] += first * load(x + row * stride + i);
            odd[row] += second * load(x + row * stride + i + WIDTH);
        }
    }
    for (; i < inputs; i += WIDTH) {
        V rest = read(weight + size * i, inputs - i, BFLOAT16);
        for (int row = 0; row < ROWS; row++) even[row] += rest * read_float(x + row * stride + i, inputs - i);
    }
    for (int row = 0; row < ROWS; row++) sums[row][0] = even[row] + odd[row];
}

// Outputs first to first + count, of ROWS rows.
template <int ROWS, bool BFLOAT16>
static void product(const Product &p, const float *x, float *y, int64_t first, int64_t count) {
    const int64_t row_bytes = (BFLOAT16 ? 2 : 4) * p.inputs;
    for (int64_t o = 0; o < count; o += WIDTH) {
        V lanes[ROWS][WIDTH] = {};
        int64_t left = count - o < WIDTH ? count - o : WIDTH;
        for (int64_t j = 0; j < left; j++) {
            const char *weight = p.matrix.weight + (first + o + j) * row_bytes;
            multiply<ROWS, BFLOAT16>((V(*)[WIDTH])(lanes[0] + j), weight, x, p.x_stride, p.inputs);
        }
        for (int row = 0; row < ROWS; row++)
            write_float(y + row * p.y_stride + o, sums_of_lanes(lanes[row]), left);
    }
}

// Adds to y, whose lanes are outputs, COUNT inputs of each row.
template <int ROWS, int COUNT, bool BFLOAT16>
INLINE void add_inputs(const Product &p, const float *x, float *y, int64_t first, int64_t count, int64_t i) {
    const int64_t size = BFLOAT16 ? 2 : 4, row_bytes = size * p.outputs;
    const int64_t ahead = divide_up(AHEAD_TRANSPOSED, size * count) * row_bytes;
    const char *weight = p.matrix.weight + size * (i * p.outputs + first);
    for (int64_t o = 0; o < count; o += WIDTH) {
        V value[COUNT];
        for (int k = 0; k < COUNT; k++) {
            const char *from = weight + k * row_bytes + size * o;
            __builtin_prefetch(from + ahead, 0, 2);
            value[k] = read(from, count - o, BFLOAT16);
        }
        for (int row = 0; row < ROWS; row++) {
            float *to = y + row * p.y_stride + o;
            V sum = {};
            for (int k = 0; k < COUNT; k++) sum += value[k] * x[row * p.x_stride + i + k];
            write_float(to, i ? read_float(to, count - o) + sum : sum, count - o);
        }
    }
}

// Where the outputs lie side by side. Sums of so many inputs are added up, and rounding grows with their number only.
template <int ROWS, bool BFLOAT16>
static void product_transposed(const Product &p, const float *x, float *y, int64_t first, int64_t count) {
    int64_t i = 0;
    for (; i + STREAMS_TRANSPOSED <= p.inputs; i += STREAMS_TRANSPOSED)
        add_inputs<ROWS, STREAMS_TRANSPOSED, BFLOAT16>(p, x, y, first, count, i);
    for (; i < p.inputs; i++) add_inputs<ROWS, 1, BFLOAT16>(p, x, y, first, count, i);
}

template <bool BFLOAT16> static void products_of(const Product &p, int64_t first, int64_t count) {
    auto eight = p.transposed ? product_transposed<8, BFLOAT16> : product<8, BFLOAT16>;
    auto four = p.transposed ? product_transposed<4, BFLOAT16> : product<4, BFLOAT16>;
    auto one = p.transposed ? product_transposed<1, BFLOAT16> : product<1, BFLOAT16>;
    int64_t row = 0;
    for (; row + 8 <= p.b; row += 8) eight(p, p.x + row * p.x_stride, p.y + row * p.y_stride, first, count);
    for (; row + 4 <= p.b; row += 4) four(p, p.x + row * p.x_stride, p.y + row * p.y_stride, first, count);
    for (; row < p.b; row++) one(p, p.x + row * p.x_stride, p.y + row * p.y_stride, first, count);
}

// p.y is where output `first` goes.
static void products(const Product &p, int64_t first, int64_t count) {
    (p.bfloat16 ? products_of<true> : products_of<false>)(p, first, count);
    if (!p.matrix.bias) return;
    for (int64_t o = 0; o < count; o += WIDTH) {
        V bias = read(p.matrix.bias + (p.bfloat16 ? 2 : 4) * (first + o), count - o, p.bfloat16);
        for (int64_t row = 0; row < p.b; row++) {
            float *y = p.y + row * p.y_stride + o;
            write_float(y, read_float(y, count - o) + bias, count - o);
        }
    }
}

// The root mean square norm of one row of the residual stream.
static void normalise(const Plan &plan, int64_t row) {
    const BlockStep &s = *plan.block;
    const char *residual = s.residual + (s.residual_bfloat16 ? 2 : 4) * row * s.d;
    float *hidden = plan.work.hidden + row * s.d;
    V squares = {};
    for (int64_t i = 0; i < s.d; i += WIDTH) {
        V value = read(residual + (s.residual_bfloat16 ? 2 : 4) * i, s.d - i, s.residual_bfloat16);
        write_float(hidden + i, value, s.d - i);
        squares += value * value;
    }
    float sum = 0;
    for (int lane = 0; lane < WIDTH; lane++) sum += squares[lane];
    float scale = 1.0f / sqrtf(sum / s.d + s.eps);
    for (int64_t i = 0; i < s.d; i += WIDTH) {
        V weight = read(s.norm + (s.bfloat16 ? 2 : 4) * i, s.d - i, s.bfloat16);
        write_float(hidden + i, read_float(hidden + i, s.d - i) * scale * weight, s.d - i);
    }
}

// One number at a time, because the taps of a channel lie side by side.
static void load_taps(const BlockStep &s, const Work &w, int64_t first, int64_t count) {
    for (int64_t c = first; c < first + count; c++)
        for (int64_t j = 0; j < s.k; j++) {
            int64_t at = s.transposed ? j * s.e + c : c * s.k + j;
            uint32_t bits = s.bfloat16 ? (uint32_t)((const uint16_t *)s.conv.weight)[at] << 16
                                       : ((const uint32_t *)s.conv.weight)[at];
            memcpy(w.taps + j * s.e + c, &bits, sizeof bits);
        }
}

// The short convolution and its SiLU, in place of x, and the window that the next position sees.
static void convolve(const BlockStep &s, const Work &w, int64_t row, int64_t first, int64_t count) {
    const int64_t size = s.bfloat16 ? 2 : 4;
    for (int64_t c = first; c < first + count; c += WIDTH) {
        int64_t left = first + count - c, window = row * (s.k - 1) * s.e + c;
        float *x = w.x + row * s.e + c;
        V value = read_float(x, left), sum = {};
        if (s.conv.bias) sum = read(s.conv.bias + size * c, left, s.bfloat16);
        for (int64_t j = 0; j < s.k; j++, window += s.e) {
            V input = j + 1 < s.k ? read(s.conv_state + size * window, left, s.bfloat16) : value;
            sum += input * read_float(w.taps + j * s.e + c, left);
            if (j) write(s.new_conv_state + size * (window - s.e), input, left, s.bfloat16);
        }
        write_float(x, sum * sigmoid(sum), left);
    }
}

static void project_in(const Plan &plan, int64_t task) {
    const BlockStep &s = *plan.block;
    const Work &w = plan.work;
    auto [first, count] = range_of(s, s.e, task);
    Product p = {s.in_proj, s.b, s.d, 2 * s.e, !!s.bfloat16, !!s.transposed, w.hidden, s.d, w.x + first, s.e};
    products(p, first, count);
    p.y = w.z + first;
    products(p, s.e + first, count);
    load_taps(s, w, first, count);
    for (int64_t row = 0; row < s.b; row++) convolve(s, w, row, first, count);
}

static void project_x(const Plan &plan, int64_t task) {
    const BlockStep &s = *plan.block;
    const Work &w = plan.work;
    int64_t mixed = mixed_of(s);
    auto [first, count] = range_of(s, mixed, task);
    products({s.x_proj, s.b, s.e, mixed, !!s.bfloat16, !!s.transposed, w.x, s.e, w.dtbc + first, mixed}, first, count);
}

// The states of one channel of a row; the terms of its output lane by lane.
INLINE V advance(const BlockStep &s, const Work &w, int64_t row, int64_t channel) {
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

// The step sizes, the recurrence and its gate.
static void scan(const Plan &plan, int64_t task) {
    const BlockStep &s = *plan.block;
    const Work &w = plan.work;
    int64_t mixed = mixed_of(s);
    auto [first, count] = range_of(s, s.e, task);
    Matrix dt_proj = {s.dt_proj, nullptr};
    products({dt_proj, s.b, s.r, s.e, !!s.bfloat16, !!s.transposed, w.dtbc, mixed, w.delta + first, s.e}, first, count);
    for (int64_t i = first * s.n, end = (first + count) * s.n; i < end; i += WIDTH)
        write_float(w.A + i, exponential(read_float(s.A_log + i, end - i)) * -1.4426950409f, end - i);
    for (int64_t row = 0; row < s.b; row++)
        for (int64_t c = first; c < first + count; c += WIDTH) {
            int64_t left = first + count - c, at = row * s.e + c;
            V raw = read_float(w.delta + at, left) + read_float(s.delta_bias + c, left), lanes[WIDTH] = {};
            write_float(w.delta + at, softplus(raw), left);
            for (int64_t j = 0; j < WIDTH && j < left; j++) lanes[j] = advance(s, w, row, c + j);
            V y = sums_of_lanes(lanes) + read_float(s.D + c, left) * read_float(w.x + at, left);
            V z = read_float(w.z + at, left);
            write_float(w.y + at, y * z * sigmoid(z), left);
        }
}

static void project_out(const Plan &plan, int64_t task) {
    const BlockStep &s = *plan.block;
    const Work &w = plan.work;
    auto [first, count] = range_of(s, s.d, task);
    const int64_t size = s.residual_bfloat16 ? 2 : 4;
    // What was normalised is not needed any more.
    products({s.out_proj, s.b, s.e, s.d, !!s.bfloat16, !!s.transposed, w.y, s.e, w.hidden + first, s.d}, first, count);
    for (int64_t row = 0; row < s.b; row++)
        for (int64_t c = first; c < first + count; c += WIDTH) {
            int64_t left = first + count - c, at = row * s.d + c;
            V sum = read(s.residual + size * at, left, s.residual_bfloat16) + read_float(w.hidden + at, left);
            write(s.new_residual + size * at, sum, left, s.residual_bfloat16);
        }
}

static void widen(const Plan &plan, int64_t row) {
    const LinearStep &s = *plan.linear;
    for (int64_t i = row * s.inputs, end = i + s.inputs; i < end; i += WIDTH)
        write_float(plan.work.hidden + i, read(s.x + (s.bfloat16 ? 2 : 4) * i, end - i, s.bfloat16), end - i);
}

static void project(const Plan &plan, int64_t task) {
    const LinearStep &s = *plan.linear;
    auto [first, count] = range_of(s, s.outputs, task);
    products({s.matrix, s.b, s.inputs, s.outputs, !!s.bfloat16, !!s.transposed, plan.work.hidden, s.inputs,
              s.y + first, s.outputs}, first, count);
}

static const Kernel kernel = {normalise, project_in, project_x, scan, project_out, widen, project};

END_WIDTH

#undef WIDTH

#endif
