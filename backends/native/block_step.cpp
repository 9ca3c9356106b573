// One position of a residual block (Gu and Dao 2023, figure 3), and the product of the head, for a few rows on CPUs.
// Reading the weights is what such a step costs, so each is read once and straight through, and all else stays in the
// cache. Whatever the weights are, the step computes in float32 and rounds to bfloat16 only the results that it writes:
// the states of the convolution and the residual stream. The plain operations round each projection's output as well.
// A plain C ABI that needs C's library and its threads only.

#ifndef WIDTH

#include <math.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include <initializer_list>

#include "scan.h"
#include "threads.h"
#include "vectors.h"

// A weight and a bias of the compute dtype. The weight is (outputs, inputs) as torch stores it, or (inputs, outputs)
// where the step says `transposed`. bias may be null.
struct Matrix {
    const char *weight, *bias;
};

// A residual block with a Mamba-1 mixer. Arrays are contiguous. Those of char are of the compute dtype, bfloat16 or
// float32; the residual stream has its own.
struct MambaStep {
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
    // Results. Each has memory of its own or that of the array which it replaces.
    char *new_residual, *new_conv_state;
    float *new_ssm_state;
    // Where it is above 0, dt (r,), B and C (n,) are each divided by sqrt(its mean square + selection_eps), between
    // x_proj and dt_proj. The plain operations round them to bfloat16 before that norm and after it; the step never
    // does.
    float selection_eps;
};

// y (b, outputs) float32 from x (b, inputs) of the compute dtype.
struct LinearStep {
    int64_t b, inputs, outputs;
    int32_t bfloat16, transposed, threads, width;
    const char *x;
    Matrix matrix;
    float *y;
};

static int64_t mixed_of(const MambaStep &s) { return s.r + 2 * s.n; }

// The arrays that one phase leaves for another: hidden (b, d), x, z, delta and y (b, e), dtbc (b, r + 2n), taps (k, e),
// A (e, n), and the sums (parts, b, outputs) of a product.
struct Work {
    float *hidden, *x, *z, *dtbc, *delta, *y, *taps, *A, *sums;
};

struct Plan;
typedef void Function(const Plan &, int64_t);

// Tasks that need nothing of one another. Each thread has a share of tasks that lie side by side, so that the memory
// which it asks for ahead of one is that of its next. `begun` counts the tasks begun of each share, and `done` those
// done of all. The threads share nothing else.
struct Phase {
    Function *function;
    int64_t tasks, done;
    int64_t *begun;
};

constexpr int64_t MOST_PHASES = 9;

struct Plan {
    const MambaStep *block;
    const LinearStep *linear;
    Work work;
    Phase phases[MOST_PHASES];
    int32_t phase_count;
};

struct Kernel {
    Function *normalise, *project_in, *convolve, *project_x, *collect, *project_dt, *scan, *project_out, *add;
    Function *widen, *project, *write_outputs;
};

// The most outputs of one task. They are few, so that no thread waits long for another's last task, and enough to read
// long stretches of memory. Where `transposed`, they are those whose sums the first cache holds. The inputs are then
// shared out as well, and the sums over each part of them are added up afterwards. The number of parts depends on the
// sizes only, and so does the order of sums.
constexpr int64_t OUTPUTS = 96, OUTPUTS_TRANSPOSED = 4096, FEWEST_PARTS = 4, MOST_PARTS = 16;
// The most channels of a task of the convolution or the scan.
constexpr int64_t CHANNELS = 384;
constexpr int64_t SPINS = 2000;
// Weights are asked for so many bytes before they are read.
constexpr int64_t AHEAD = 2048;

// How a product is shared out: a task has at most `outputs` of its outputs, `columns` such tasks have all of them, and
// each column has a task for each of the `parts` of the inputs.
struct Tiling {
    int64_t outputs, columns, parts;
};
template <class Step> static Tiling tiling_of(const Step &s, int64_t outputs) {
    const int64_t threads = s.threads < 1 ? 1 : s.threads;
    int64_t parts = 1, columns = divide_up(outputs, OUTPUTS);
    if (s.transposed) {
        parts = MOST_PARTS * OUTPUTS_TRANSPOSED / outputs;
        parts = parts < FEWEST_PARTS ? FEWEST_PARTS : parts < MOST_PARTS ? parts : MOST_PARTS;
        columns = divide_up(outputs, OUTPUTS_TRANSPOSED);
    }
    if (columns * parts < threads) columns = divide_up(threads, parts);
    int64_t size = divide_up(divide_up(outputs, columns), 2 * WIDEST) * 2 * WIDEST;
    return {size, divide_up(outputs, size), parts};
}
template <class Step> static int64_t tasks_of(const Step &s, int64_t outputs) {
    Tiling tiling = tiling_of(s, outputs);
    return tiling.columns * tiling.parts;
}
template <class Step> static int64_t sums_of(const Step &s, int64_t outputs) {
    return tiling_of(s, outputs).parts * s.b * outputs;
}

// The numbers of a row that a task has.
struct Range {
    int64_t first, count;
};
static Range range_of(int64_t total, int64_t size, int64_t task) {
    int64_t first = task * size;
    return {first, total - first < size ? total - first : size};
}
static int64_t channels_of(const MambaStep &s) {
    int64_t share = divide_up(divide_up(s.e, s.threads < 1 ? 1 : s.threads), WIDEST) * WIDEST;
    return share < CHANNELS ? share : CHANNELS;
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

// Returns false if there is not the memory.
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

// Allocates the arrays of `w` in one piece and returns it, or null if there is not the memory.
static float *divide_memory(const MambaStep &s, Work &w) {
    int64_t sums = 0;
    for (int64_t outputs : {2 * s.e, mixed_of(s), s.e, s.d}) {
        int64_t size = sums_of(s, outputs);
        sums = sums < size ? size : sums;
    }
    struct {
        float **array;
        int64_t size;
    } parts[] = {{&w.hidden, s.b * s.d}, {&w.x, s.b * s.e},          {&w.z, s.b * s.e},    {&w.delta, s.b * s.e},
                 {&w.y, s.b * s.e},      {&w.dtbc, s.b * mixed_of(s)}, {&w.taps, s.k * s.e}, {&w.A, s.e * s.n},
                 {&w.sums, sums}};
    int64_t size = 0;
    for (auto &part : parts) size += divide_up(part.size, WIDEST) * WIDEST;
    float *memory = (float *)aligned_alloc(64, sizeof(float) * size), *next = memory;
    for (auto &part : parts) {
        *part.array = next;
        if (memory) next += divide_up(part.size, WIDEST) * WIDEST;
    }
    return memory;
}

static Plan plan_of(const MambaStep &s, const Kernel &kernel, const Work &w) {
    const int64_t channel_tasks = divide_up(s.e, channels_of(s));
    return {&s, nullptr, w, {
        {kernel.normalise, s.b, 0, nullptr},
        {kernel.project_in, tasks_of(s, 2 * s.e), 0, nullptr},
        {kernel.convolve, channel_tasks, 0, nullptr},
        {kernel.project_x, tasks_of(s, mixed_of(s)), 0, nullptr},
        {kernel.collect, s.b, 0, nullptr},
        {kernel.project_dt, tasks_of(s, s.e), 0, nullptr},
        {kernel.scan, channel_tasks, 0, nullptr},
        {kernel.project_out, tasks_of(s, s.d), 0, nullptr},
        {kernel.add, s.b, 0, nullptr},
    }, 9};
}

// Computes blocks of the same sizes and settings one after another. A block may read what the one before it writes.
// This function and the next return 0, or 1 if there is not the memory.
EXPORT int32_t mamba_mamba_steps(const MambaStep *steps, int64_t count) {
    if (!count) return 0;
    const MambaStep &s = *steps;
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
    const int64_t inputs = divide_up(s.b * s.inputs, WIDEST) * WIDEST, sums = divide_up(sums_of(s, s.outputs), WIDEST);
    float *memory = (float *)aligned_alloc(64, sizeof(float) * (inputs + sums * WIDEST));
    if (!memory) return 1;
    w.hidden = memory;
    w.sums = memory + inputs;
    Plan plan = {nullptr, step, w, {
        {kernel.widen, s.b, 0, nullptr},
        {kernel.project, tasks_of(s, s.outputs), 0, nullptr},
        {kernel.write_outputs, s.b, 0, nullptr},
    }, 3};
    bool enough = run(&plan, 1, s.threads, s.inputs * s.outputs);
    free(memory);
    return !enough;
}

#else  // Compiled once for each width.

#include "vectors.h"

BEGIN_WIDTH

INLINE V read_float(const float *from, int64_t left) { return read((const char *)from, left, false); }
INLINE void write_float(float *to, V value, int64_t left) { write((char *)to, value, left, false); }

// y (b, outputs) = x (b, inputs) times a matrix without its bias. The strides are between rows.
struct Product {
    Matrix matrix;
    int64_t b, inputs, outputs;
    bool bfloat16, transposed;
    const float *x;
    int64_t x_stride;
    float *y;
    int64_t y_stride;
};

// One output of ROWS rows, lane by lane. Weights are read fastest straight through the memory and past the caches.
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

// Adds the products of COUNT inputs of each row to y, or sets y to them if `fresh`. Lanes are outputs.
template <int ROWS, int COUNT, bool BFLOAT16>
INLINE void add_inputs(const Product &p, const float *x, float *y, Range outputs, int64_t i, bool fresh) {
    const int64_t size = BFLOAT16 ? 2 : 4, row_bytes = size * p.outputs;
    const char *weight = p.matrix.weight + size * (i * p.outputs + outputs.first);
    for (int64_t o = 0; o < outputs.count; o += WIDTH) {
        const int64_t left = outputs.count - o;
        V value[COUNT];
        for (int k = 0; k < COUNT; k++) {
            const char *from = weight + k * row_bytes + size * o;
            __builtin_prefetch(from + AHEAD, 0, 0);
            value[k] = read(from, left, BFLOAT16);
        }
        for (int row = 0; row < ROWS; row++) {
            float *to = y + row * p.y_stride + o;
            V sum = fresh ? V{} : read_float(to, left);
            for (int k = 0; k < COUNT; k++) sum += value[k] * x[row * p.x_stride + i + k];
            write_float(to, sum, left);
        }
    }
}

// The product where a weight's outputs lie side by side. One row takes an input at a time, because memory is fastest
// read straight through. More rows take several, so that sums are not read and written again for each input. Either way
// inputs are added in their order.
template <int ROWS, bool BFLOAT16>
static void product_transposed(const Product &p, const float *x, float *y, Range outputs, Range inputs) {
    const int64_t end = inputs.first + inputs.count;
    int64_t i = inputs.first;
    if (i >= end)
        for (int row = 0; row < ROWS; row++) memset(y + row * p.y_stride, 0, sizeof(float) * outputs.count);
    constexpr int COUNT = ROWS == 1 ? 1 : 8;
    for (; i + COUNT <= end; i += COUNT)
        add_inputs<ROWS, COUNT, BFLOAT16>(p, x, y, outputs, i, i == inputs.first);
    for (; i < end; i++) add_inputs<ROWS, 1, BFLOAT16>(p, x, y, outputs, i, i == inputs.first);
}

template <int ROWS, bool BFLOAT16>
static void product_of_rows(const Product &p, int64_t row, Range outputs, Range inputs) {
    const float *x = p.x + row * p.x_stride;
    float *y = p.y + row * p.y_stride;
    if (p.transposed)
        product_transposed<ROWS, BFLOAT16>(p, x, y, outputs, inputs);
    else
        product<ROWS, BFLOAT16>(p, x, y, outputs.first, outputs.count);
}

template <bool BFLOAT16> static void product_of_all(const Product &p, Range outputs, Range inputs) {
    int64_t row = 0;
    for (; row + 8 <= p.b; row += 8) product_of_rows<8, BFLOAT16>(p, row, outputs, inputs);
    for (; row + 4 <= p.b; row += 4) product_of_rows<4, BFLOAT16>(p, row, outputs, inputs);
    for (; row + 2 <= p.b; row += 2) product_of_rows<2, BFLOAT16>(p, row, outputs, inputs);
    for (; row < p.b; row++) product_of_rows<1, BFLOAT16>(p, row, outputs, inputs);
}

// p.y is where the first output goes. `inputs` are all inputs unless the matrix is transposed.
static void multiply_parts(const Product &p, Range outputs, Range inputs) {
    (p.bfloat16 ? product_of_all<true> : product_of_all<false>)(p, outputs, inputs);
}

// One task of a product. `collected` then adds up its sums.
template <class Step>
static void project_task(const Step &s, const Work &w, const Matrix &matrix, const float *x, int64_t x_stride,
                         int64_t inputs, int64_t outputs, int64_t task) {
    const Tiling tiling = tiling_of(s, outputs);
    const int64_t part = task / tiling.columns;
    const int64_t size = divide_up(inputs, tiling.parts);
    const Range its_outputs = range_of(outputs, tiling.outputs, task % tiling.columns);
    const Range its_inputs = tiling.parts > 1 ? range_of(inputs, size, part) : Range{0, inputs};
    float *y = w.sums + part * s.b * outputs + its_outputs.first;
    multiply_parts({matrix, s.b, inputs, outputs, !!s.bfloat16, !!s.transposed, x, x_stride, y, outputs}, its_outputs,
                   its_inputs);
}

// A product's sums over all parts, and its bias: `left` of the outputs, from `first` on.
template <class Step>
INLINE V collected(const Step &s, const Work &w, const Matrix &matrix, int64_t parts, int64_t outputs, int64_t row,
                   int64_t first, int64_t left) {
    const float *from = w.sums + row * outputs + first;
    V total = read_float(from, left);
    for (int64_t part = 1; part < parts; part++) total += read_float(from + part * s.b * outputs, left);
    if (matrix.bias) total += read(matrix.bias + (s.bfloat16 ? 2 : 4) * first, left, s.bfloat16);
    return total;
}

// What a root mean square norm multiplies `count` numbers by; `squares` are the sums of their squares, lane by lane.
INLINE float norm_scale(V squares, int64_t count, float eps) {
    float sum = 0;
    for (int lane = 0; lane < WIDTH; lane++) sum += squares[lane];
    return 1.0f / sqrtf(sum / count + eps);
}

// The root mean square norm of one row of the residual stream.
static void normalise(const Plan &plan, int64_t row) {
    const MambaStep &s = *plan.block;
    const char *residual = s.residual + (s.residual_bfloat16 ? 2 : 4) * row * s.d;
    float *hidden = plan.work.hidden + row * s.d;
    V squares = {};
    for (int64_t i = 0; i < s.d; i += WIDTH) {
        V value = read(residual + (s.residual_bfloat16 ? 2 : 4) * i, s.d - i, s.residual_bfloat16);
        write_float(hidden + i, value, s.d - i);
        squares += value * value;
    }
    const float scale = norm_scale(squares, s.d, s.eps);
    for (int64_t i = 0; i < s.d; i += WIDTH) {
        V weight = read(s.norm + (s.bfloat16 ? 2 : 4) * i, s.d - i, s.bfloat16);
        write_float(hidden + i, read_float(hidden + i, s.d - i) * scale * weight, s.d - i);
    }
}

// Copies the filter to `taps`, one number at a time because a channel's taps lie side by side.
static void load_taps(const MambaStep &s, const Work &w, int64_t first, int64_t count) {
    for (int64_t c = first; c < first + count; c++)
        for (int64_t j = 0; j < s.k; j++) {
            int64_t at = s.transposed ? j * s.e + c : c * s.k + j;
            uint32_t bits = s.bfloat16 ? (uint32_t)((const uint16_t *)s.conv.weight)[at] << 16
                                       : ((const uint32_t *)s.conv.weight)[at];
            memcpy(w.taps + j * s.e + c, &bits, sizeof bits);
        }
}

static void project_in(const Plan &plan, int64_t task) {
    const MambaStep &s = *plan.block;
    project_task(s, plan.work, s.in_proj, plan.work.hidden, s.d, s.d, 2 * s.e, task);
}

// Writes x after the short convolution and its SiLU, the window that the next position sees, and z.
static void convolve(const Plan &plan, int64_t task) {
    const MambaStep &s = *plan.block;
    const Work &w = plan.work;
    const int64_t size = s.bfloat16 ? 2 : 4, parts = tiling_of(s, 2 * s.e).parts;
    const Range channels = range_of(s.e, channels_of(s), task);
    const int64_t end = channels.first + channels.count;
    load_taps(s, w, channels.first, channels.count);
    for (int64_t row = 0; row < s.b; row++)
        for (int64_t c = channels.first; c < end; c += WIDTH) {
            int64_t left = end - c, window = row * (s.k - 1) * s.e + c;
            V x = collected(s, w, s.in_proj, parts, 2 * s.e, row, c, left), sum = {};
            if (s.conv.bias) sum = read(s.conv.bias + size * c, left, s.bfloat16);
            for (int64_t j = 0; j < s.k; j++, window += s.e) {
                V input = j + 1 < s.k ? read(s.conv_state + size * window, left, s.bfloat16) : x;
                sum += input * read_float(w.taps + j * s.e + c, left);
                if (j) write(s.new_conv_state + size * (window - s.e), input, left, s.bfloat16);
            }
            write_float(w.x + row * s.e + c, sum * sigmoid(sum), left);
            V z = collected(s, w, s.in_proj, parts, 2 * s.e, row, s.e + c, left);
            write_float(w.z + row * s.e + c, z, left);
        }
}

static void project_x(const Plan &plan, int64_t task) {
    const MambaStep &s = *plan.block;
    project_task(s, plan.work, s.x_proj, plan.work.x, s.e, s.e, mixed_of(s), task);
}

// The root mean square norm of `count` numbers without a weight, in their place.
static void norm_in_place(float *values, int64_t count, float eps) {
    V squares = {};
    for (int64_t i = 0; i < count; i += WIDTH) {
        V value = read_float(values + i, count - i);
        squares += value * value;
    }
    const float scale = norm_scale(squares, count, eps);
    for (int64_t i = 0; i < count; i += WIDTH)
        write_float(values + i, read_float(values + i, count - i) * scale, count - i);
}

// dt, B and C of one row.
static void collect(const Plan &plan, int64_t row) {
    const MambaStep &s = *plan.block;
    const int64_t mixed = mixed_of(s), parts = tiling_of(s, mixed).parts;
    float *dtbc = plan.work.dtbc + row * mixed;
    for (int64_t i = 0; i < mixed; i += WIDTH)
        write_float(dtbc + i, collected(s, plan.work, s.x_proj, parts, mixed, row, i, mixed - i), mixed - i);
    if (s.selection_eps > 0)
        for (Range part : {Range{0, s.r}, Range{s.r, s.n}, Range{s.r + s.n, s.n}})
            norm_in_place(dtbc + part.first, part.count, s.selection_eps);
}

// Advances the states of one channel of a row. Returns the terms of its output, lane by lane.
INLINE V advance(const MambaStep &s, const Work &w, int64_t row, int64_t channel) {
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
    const MambaStep &s = *plan.block;
    project_task(s, plan.work, {s.dt_proj, nullptr}, plan.work.dtbc, mixed_of(s), s.r, s.e, task);
}

// The step sizes, the recurrence and its gate.
static void scan(const Plan &plan, int64_t task) {
    const MambaStep &s = *plan.block;
    const Work &w = plan.work;
    const Matrix dt_proj = {s.dt_proj, nullptr};
    const int64_t parts = tiling_of(s, s.e).parts;
    auto [first, count] = range_of(s.e, channels_of(s), task);
    for (int64_t i = first * s.n, end = (first + count) * s.n; i < end; i += WIDTH)
        write_float(w.A + i, exponential(read_float(s.A_log + i, end - i)) * -1.4426950409f, end - i);
    for (int64_t row = 0; row < s.b; row++)
        for (int64_t c = first; c < first + count; c += WIDTH) {
            int64_t left = first + count - c, at = row * s.e + c;
            V raw = collected(s, w, dt_proj, parts, s.e, row, c, left), lanes[WIDTH] = {};
            raw += read_float(s.delta_bias + c, left);
            write_float(w.delta + at, softplus(raw), left);
            for (int64_t j = 0; j < WIDTH && j < left; j++) lanes[j] = advance(s, w, row, c + j);
            V y = sums_of_lanes(lanes) + read_float(s.D + c, left) * read_float(w.x + at, left);
            V z = read_float(w.z + at, left);
            write_float(w.y + at, y * z * sigmoid(z), left);
        }
}

static void project_out(const Plan &plan, int64_t task) {
    const MambaStep &s = *plan.block;
    project_task(s, plan.work, s.out_proj, plan.work.y, s.e, s.e, s.d, task);
}

// Adds the block's output to the residual stream.
static void add(const Plan &plan, int64_t row) {
    const MambaStep &s = *plan.block;
    const int64_t size = s.residual_bfloat16 ? 2 : 4, parts = tiling_of(s, s.d).parts;
    for (int64_t c = 0; c < s.d; c += WIDTH) {
        int64_t left = s.d - c, at = size * (row * s.d + c);
        V sum = read(s.residual + at, left, s.residual_bfloat16);
        sum += collected(s, plan.work, s.out_proj, parts, s.d, row, c, left);
        write(s.new_residual + at, sum, left, s.residual_bfloat16);
    }
}

static void widen(const Plan &plan, int64_t row) {
    const LinearStep &s = *plan.linear;
    for (int64_t i = row * s.inputs, end = i + s.inputs; i < end; i += WIDTH)
        write_float(plan.work.hidden + i, read(s.x + (s.bfloat16 ? 2 : 4) * i, end - i, s.bfloat16), end - i);
}

static void project(const Plan &plan, int64_t task) {
    const LinearStep &s = *plan.linear;
    project_task(s, plan.work, s.matrix, plan.work.hidden, s.inputs, s.inputs, s.outputs, task);
}

static void write_outputs(const Plan &plan, int64_t row) {
    const LinearStep &s = *plan.linear;
    const int64_t parts = tiling_of(s, s.outputs).parts;
    for (int64_t o = 0; o < s.outputs; o += WIDTH)
        write_float(s.y + row * s.outputs + o,
                    collected(s, plan.work, s.matrix, parts, s.outputs, row, o, s.outputs - o), s.outputs - o);
}

static const Kernel kernel = {normalise,   project_in, convolve, project_x, collect,      project_dt, scan,
                              project_out, add,        widen,    project,   write_outputs};

END_WIDTH

#undef WIDTH

#endif
