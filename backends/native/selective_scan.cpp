// The S6 recurrence (Gu and Dao 2023, equations 2 and 4) on CPUs: what mamba_core.backend documents, float32 inside.
// A plain C ABI that needs C's library and its threads only. The file includes itself once a vector width: lanes are
// channels, which lie side by side in memory, and the states of a chunk of positions never leave the cache.

#ifndef WIDTH

#include <cfloat>
#include <initializer_list>

#include "scan.h"
#include "tasks.h"
#include "vectors.h"

// One task is BLOCK channels of one row; it keeps its state in memory every CHUNK positions. Neither depends on the
// vector width or the threads, and so the order of every sum is the same for any number of them.
constexpr int64_t BLOCK = 64, CHUNK = 32, STATES = 2;
// After so many chunks sums over positions go to double: a million additions in float lose more than float32's
// tolerance.
constexpr int64_t SUMMED = 64;

// What a thread computes in. Rows of positions; n here is a multiple of STATES, with states of zeros added.
struct Work {
    float raw[CHUNK][BLOCK], step[CHUNK][BLOCK], x[CHUNK][BLOCK], u[CHUNK][BLOCK], z[CHUNK][BLOCK];
    float linear[CHUNK][BLOCK], dy[CHUNK][BLOCK], dlinear[CHUNK][BLOCK], du[CHUNK][BLOCK], dlog[CHUNK][BLOCK];
    float decay[CHUNK][STATES][WIDEST], before[CHUNK + 1][STATES][WIDEST];
    float dB_lanes[STATES][CHUNK][WIDEST], dC_lanes[STATES][CHUNK][WIDEST];
    float D[BLOCK], bias[BLOCK], dD[BLOCK], dbias[BLOCK];
    double dD_total[BLOCK], dbias_total[BLOCK];
    uint8_t masked[CHUNK], restart[CHUNK];
    // (n, BLOCK) each; A in units of log 2.
    float *A, *h, *g, *dA;
    double *dA_total;
    // (CHUNK, n rounded up to whole vectors) each.
    float *B, *C;
};

// The sums that run over more than a task: dB and dC (b, chunks, blocks, n, CHUNK), the others a row of the batch.
struct Partial {
    float *dB, *dC, *dA, *dD, *dbias;
};

struct Task {
    const Scan *scan;
    const Partial *partial;
    int64_t row, block;
};

static int64_t padded(int64_t n) { return divide_up(n, STATES) * STATES; }
static int64_t stride_of_B(int64_t n) { return divide_up(n, WIDEST) * WIDEST; }
static int64_t blocks_of(const Scan &s) { return divide_up(s.e, BLOCK); }
static int64_t chunks_of(const Scan &s) { return divide_up(s.l, CHUNK); }
static int64_t tile_of(const Scan &s) { return padded(s.n) * BLOCK; }
static char *at(const Scan &s, const Sequence &a, int64_t row, int64_t t, int64_t channel) {
    return a.data ? a.data + (s.bfloat16 ? 2 : 4) * (row * a.batch + t * a.position + channel) : nullptr;
}
static float *boundary(const Scan &s, int64_t row, int64_t block, int64_t chunk) {
    return s.boundaries + ((row * blocks_of(s) + block) * chunks_of(s) + chunk) * tile_of(s);
}
static float *partial_of(const Scan &s, float *sums, int64_t row, int64_t chunk, int64_t block) {
    return sums + ((row * chunks_of(s) + chunk) * blocks_of(s) + block) * padded(s.n) * CHUNK;
}

// Adds what has come together in `part` to the total, and leaves there zeros, or in the end the total.
static void add_to(double *total, float *part, int64_t size, bool last) {
    for (int64_t k = 0; k < size; k++) {
        total[k] += part[k];
        part[k] = last ? (float)total[k] : 0.0f;
    }
}

typedef void Function(const Task &, Work &);
struct Kernel {
    Function *forward, *backward, *sum_over_blocks;
};

#define WIDTH 4
#include "selective_scan.cpp"
#ifdef __x86_64__
#define WIDTH 8
#include "selective_scan.cpp"
#define WIDTH 16
#include "selective_scan.cpp"
#endif

static int widest() {
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return 16;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 8;
#endif
    return 4;
}

static const Kernel &kernel_of(__attribute__((unused)) const Scan &s) {
#ifdef __x86_64__
    int width = s.width ? s.width : widest();
    if (width >= 16) return width16::kernel;
    if (width >= 8) return width8::kernel;
#endif
    return width4::kernel;
}

static size_t work_size_of(const Scan &s) {
    return sizeof(Work) + sizeof(double) * tile_of(s) +
           sizeof(float) * (4 * tile_of(s) + 2 * CHUNK * stride_of_B(s.n));
}

struct Job {
    const Scan *scan;
    const Partial *partial;
    Function *function;
    int64_t per_row;
};

static void run_one(const void *argument, int64_t index, void *memory) {
    const Job &job = *(const Job *)argument;
    const Scan &s = *job.scan;
    Work &w = *(Work *)memory;
    w.dA_total = (double *)(&w + 1);
    w.A = (float *)(w.dA_total + tile_of(s));
    w.h = w.A + tile_of(s);
    w.g = w.h + tile_of(s);
    w.dA = w.g + tile_of(s);
    w.B = w.dA + tile_of(s);
    w.C = w.B + CHUNK * stride_of_B(s.n);
    job.function({job.scan, job.partial, index / job.per_row, index % job.per_row}, w);
}

static bool run(const Scan &s, const Partial *partial, Function *function, int64_t per_row) {
    int64_t threads = threads_worth(s.threads, 1 + (s.b * s.l * s.e * s.n >> 18));
    Job job = {&s, partial, function, per_row};
    return run_tasks(run_one, &job, s.b * per_row, threads, work_size_of(s));
}

static void sum_over_rows(float *total, const float *rows, int64_t b, int64_t size) {
    if (!total) return;
    memset(total, 0, sizeof(float) * size);
    for (int64_t row = 0; row < b; row++)
        for (int64_t k = 0; k < size; k++) total[k] += rows[row * size + k];
}

// Raised with every change to a struct or to a function's meaning, as ABI in __init__.py.
EXPORT int32_t mamba_native_abi() { return 11; }

int32_t mamba_scan_width() { return widest(); }

int64_t mamba_scan_boundaries(int64_t b, int64_t l, int64_t e, int64_t n) {
    return b * divide_up(l, CHUNK) * divide_up(e, BLOCK) * BLOCK * padded(n);
}

int32_t mamba_scan_forward(const Scan *scan) {
    return !run(*scan, nullptr, kernel_of(*scan).forward, blocks_of(*scan));
}

int32_t mamba_scan_backward(const Scan *scan) {
    const Scan &s = *scan;
    int64_t per_task = s.b * chunks_of(s) * blocks_of(s) * padded(s.n) * CHUNK, per_row = s.b * s.e * (s.n + 2);
    float *memory = (float *)malloc(sizeof(float) * (2 * per_task + per_row));
    if (!memory) return 1;
    float *dA = memory + 2 * per_task, *dD = dA + s.b * s.e * s.n, *dbias = dD + s.b * s.e;
    Partial partial = {memory, memory + per_task, dA, dD, dbias};
    const Kernel &kernel = kernel_of(s);
    bool done = run(s, &partial, kernel.backward, blocks_of(s)) &&
                run(s, &partial, kernel.sum_over_blocks, chunks_of(s));
    if (done) {
        sum_over_rows(s.dA, dA, s.b, s.e * s.n);
        sum_over_rows(s.dD, dD, s.b, s.e);
        sum_over_rows(s.ddelta_bias, dbias, s.b, s.e);
    }
    free(memory);
    return !done;
}

#else  // What is compiled for each width.

#include "vectors.h"

BEGIN_WIDTH

// States at a time where there are so many, and registers for them.
#if WIDTH == 16 || !defined __x86_64__
constexpr int64_t MOST_STATES = 2 * STATES;
#else
constexpr int64_t MOST_STATES = STATES;
#endif

// (channels, n) as it is outside to a tile (n, BLOCK), zero beyond the channels and states; and back.
static void to_tile(float *tile, const float *rows, int64_t channels, int64_t n, float factor) {
    for (int64_t c = 0; c < BLOCK; c += WIDTH)
        for (int64_t k = 0; k < n; k += WIDTH) {
            V square[WIDTH];
            for (int64_t j = 0; j < WIDTH; j++)
                square[j] = c + j < channels ? read((char *)(rows + (c + j) * n + k), n - k, false) * factor : V{};
            transpose(square);
            for (int64_t j = 0; j < WIDTH && k + j < padded(n); j++) store(tile + (k + j) * BLOCK + c, square[j]);
        }
}
static void from_tile(float *rows, const float *tile, int64_t channels, int64_t n) {
    for (int64_t c = 0; c < channels; c += WIDTH)
        for (int64_t k = 0; k < n; k += WIDTH) {
            V square[WIDTH];
            for (int64_t j = 0; j < WIDTH; j++) square[j] = k + j < n ? load(tile + (k + j) * BLOCK + c) : V{};
            transpose(square);
            for (int64_t j = 0; j < WIDTH && c + j < channels; j++)
                write((char *)(rows + (c + j) * n + k), square[j], n - k, false);
        }
}

// What goes through the rows of a chunk is compiled for a dtype and for blocks that are WHOLE, of BLOCK channels: a
// vector that might not be full would have the compiler keep nothing in registers.
#define OF_ROWS(function)                                                                  \
    (channels == BLOCK ? (s.bfloat16 ? function<true, true> : function<false, true>)       \
                       : (s.bfloat16 ? function<true, false> : function<false, false>))

static void load_B_and_C(const Task &task, Work &w, int64_t start, int64_t steps) {
    const Scan &s = *task.scan;
    const int64_t size = s.bfloat16 ? 2 : 4, stride = stride_of_B(s.n);
    for (int64_t t = 0; t < steps; t++) {
        const bool masked = s.mask && !s.mask[task.row * s.l + start + t];
        const char *B = at(s, s.B, task.row, start + t, 0), *C = at(s, s.C, task.row, start + t, 0);
        for (int64_t k = 0; k < s.n; k += WIDTH) {
            store(w.B + t * stride + k, masked ? V{} : read(B + size * k, s.n - k, s.bfloat16));
            store(w.C + t * stride + k, masked ? V{} : read(C + size * k, s.n - k, s.bfloat16));
        }
    }
}

// Of a chunk what the recurrence needs; zeros where masked, and so a NaN that stands there is harmless. What only the
// gradient needs stays out of the way of a cache that the rest fills.
template <bool BFLOAT16, bool WHOLE>
static void load_chunk(const Task &task, Work &w, int64_t start, int64_t steps, int64_t first, int64_t channels,
                       bool for_gradient) {
    const Scan &s = *task.scan;
    constexpr int64_t SIZE = BFLOAT16 ? 2 : 4;
    // A local, because a store of vectors might have changed anything else.
    const bool through_softplus = s.delta_softplus;
    load_B_and_C(task, w, start, steps);
    for (int64_t t = 0; t < steps; t++) {
        int64_t position = task.row * s.l + start + t;
        const bool masked = s.mask && !s.mask[position];
        w.masked[t] = masked;
        w.restart[t] = s.restart && s.restart[position];
        const char *x = at(s, s.x, task.row, start + t, first), *delta = at(s, s.delta, task.row, start + t, first);
        for (int64_t c = 0; c < channels; c += WIDTH) {
            const int64_t left = WHOLE ? WIDTH : channels - c;
            V x_t = V{}, raw = V{}, step = V{};
            if (!masked) {
                x_t = read(x + SIZE * c, left, BFLOAT16);
                raw = read(delta + SIZE * c, left, BFLOAT16) + load(w.bias + c);
                step = through_softplus ? softplus(raw) : raw;
            }
            if (for_gradient) {
                store(w.x[t] + c, x_t);
                store(w.raw[t] + c, raw);
            }
            store(w.step[t] + c, step);
            store(w.u[t] + c, step * x_t);
            store(w.linear[t] + c, load(w.D + c) * x_t);
        }
    }
}

static void load_state(const Scan &s, float *tile, const float *state, int64_t offset, int64_t channels) {
    if (state)
        to_tile(tile, state + offset, channels, s.n, 1.0f);
    else
        memset(tile, 0, sizeof(float) * tile_of(s));
}

// What does not change over the positions.
static void load_channels(const Scan &s, Work &w, int64_t first, int64_t channels) {
    to_tile(w.A, s.A + first * s.n, channels, s.n, 1.4426950409f);
    // A step of size zero, that of a position that does not count, times -inf would be NaN.
    for (int64_t i = 0; i < tile_of(s); i++) w.A[i] = w.A[i] < -FLT_MAX ? -FLT_MAX : w.A[i];
    memset(w.D, 0, sizeof w.D);
    memset(w.bias, 0, sizeof w.bias);
    if (s.D) memcpy(w.D, s.D + first, sizeof(float) * channels);
    if (s.delta_bias) memcpy(w.bias, s.delta_bias + first, sizeof(float) * channels);
}

// Rows lie pages apart, where no prefetcher of the machine's finds them.
INLINE void touch(const Task &task, const Sequence &array, int64_t position, int64_t first, int64_t channels) {
    const Scan &s = *task.scan;
    if (!array.data || position < 0 || position >= s.l) return;
    const char *line = at(s, array, task.row, position, first), *end = line + channels * (s.bfloat16 ? 2 : 4);
    for (line -= (uintptr_t)line % 64; line < end; line += 64) __builtin_prefetch(line);
}

template <int COUNT>
INLINE void load_states(V *values, const float *tile) {
    for (int j = 0; j < COUNT; j++) values[j] = load(tile + j * BLOCK);
}
template <int COUNT>
INLINE void store_states(float *tile, const V *values) {
    for (int j = 0; j < COUNT; j++) store(tile + j * BLOCK, values[j]);
}

// COUNT states of WIDTH channels over a chunk: together they share what is loaded of a position.
template <int COUNT>
INLINE void advance(const Scan &s, Work &w, int64_t k, int64_t c, int64_t steps) {
    int64_t stride = stride_of_B(s.n);
    const float *B = w.B + k, *C = w.C + k;
    V A[COUNT], h[COUNT];
    load_states<COUNT>(A, w.A + k * BLOCK + c);
    load_states<COUNT>(h, w.h + k * BLOCK + c);
    for (int64_t t = 0; t < steps; t++, B += stride, C += stride) {
        V step = load(w.step[t] + c), u = load(w.u[t] + c), linear = load(w.linear[t] + c);
        if (w.restart[t])
            for (int j = 0; j < COUNT; j++) h[j] = V{};
        for (int j = 0; j < COUNT; j++) {
            h[j] = decay_of(step, A[j]) * h[j] + u * B[j];
            linear += h[j] * C[j];
        }
        store(w.linear[t] + c, linear);
    }
    store_states<COUNT>(w.h + k * BLOCK + c, h);
}

template <bool BFLOAT16, bool WHOLE>
static void write_outputs(const Task &task, Work &w, int64_t start, int64_t steps, int64_t first, int64_t channels) {
    const Scan &s = *task.scan;
    constexpr int64_t SIZE = BFLOAT16 ? 2 : 4;
    const bool gated = s.z.data;
    for (int64_t t = 0; t < steps; t++) {
        char *y = at(s, s.y, task.row, start + t, first);
        const char *z = at(s, s.z, task.row, start + t, first);
        const bool masked = w.masked[t];
        for (int64_t c = 0; c < channels; c += WIDTH) {
            const int64_t left = WHOLE ? WIDTH : channels - c;
            V value = load(w.linear[t] + c);
            if (gated) {
                V gate = read(z + SIZE * c, left, BFLOAT16);
                value *= gate * sigmoid(gate);
            }
            write(y + SIZE * c, masked ? V{} : value, left, BFLOAT16);
        }
    }
}

// How many of a chunk's rows to have touched after `states` states from the k-th on of these channels.
INLINE int64_t share(const Scan &s, int64_t k, int64_t states, int64_t c, int64_t channels) {
    int64_t vectors = divide_up(channels, WIDTH);
    return (k * vectors + (c / WIDTH + 1) * states) * CHUNK / (padded(s.n) * vectors);
}

static void forward(const Task &task, Work &w) {
    const Scan &s = *task.scan;
    int64_t first = task.block * BLOCK, channels = s.e - first < BLOCK ? s.e - first : BLOCK;
    int64_t state = (task.row * s.e + first) * s.n;
    load_channels(s, w, first, channels);
    load_state(s, w.h, s.initial_state, state, channels);
    for (int64_t start = 0; start < s.l; start += CHUNK) {
        int64_t steps = s.l - start < CHUNK ? s.l - start : CHUNK;
        if (s.boundaries)
            memcpy(boundary(s, task.row, task.block, start / CHUNK), w.h, sizeof(float) * tile_of(s));
        OF_ROWS(load_chunk)(task, w, start, steps, first, channels, false);
        int64_t touched = 0;
        for (int64_t k = 0, states; k < s.n; k += states) {
            states = s.n - k > STATES ? MOST_STATES : STATES;
            for (int64_t c = 0; c < channels; c += WIDTH) {
                if (states == STATES)
                    advance<STATES>(s, w, k, c, steps);
                else
                    advance<MOST_STATES>(s, w, k, c, steps);
                for (int64_t until = share(s, k, states, c, channels); touched < until; touched++) {
                    for (const Sequence *array : {&s.x, &s.delta, &s.z})
                        touch(task, *array, start + CHUNK + touched, first, channels);
                    touch(task, s.y, start + touched, first, channels);
                }
            }
        }
        OF_ROWS(write_outputs)(task, w, start, steps, first, channels);
    }
    if (s.final_state) from_tile(s.final_state + state, w.h, channels, s.n);
}

// What is particular to the gradient: dy, the gradient of the ungated output, and zeros to add to.
template <bool BFLOAT16, bool WHOLE>
static void load_gradients(const Task &task, Work &w, int64_t start, int64_t steps, int64_t first, int64_t channels) {
    const Scan &s = *task.scan;
    constexpr int64_t SIZE = BFLOAT16 ? 2 : 4;
    const bool gated = s.z.data;
    for (int64_t t = 0; t < steps; t++) {
        const char *dy_t = at(s, s.dy, task.row, start + t, first), *z_t = at(s, s.z, task.row, start + t, first);
        const bool masked = w.masked[t];
        for (int64_t c = 0; c < channels; c += WIDTH) {
            const int64_t left = WHOLE ? WIDTH : channels - c;
            V dy = masked ? V{} : read(dy_t + SIZE * c, left, BFLOAT16), dlinear = dy;
            if (gated) {
                V z = masked ? V{} : read(z_t + SIZE * c, left, BFLOAT16);
                store(w.z[t] + c, z);
                dlinear = dy * z * sigmoid(z);
            }
            store(w.dy[t] + c, dy);
            store(w.dlinear[t] + c, dlinear);
            store(w.du[t] + c, V{});
            store(w.dlog[t] + c, V{});
        }
    }
}

// As `advance`, and keeps what the gradient goes back over. w.h stays the state before the chunk.
INLINE void recompute(const Scan &s, Work &w, int64_t k, int64_t c, int64_t steps) {
    int64_t stride = stride_of_B(s.n);
    const float *B = w.B + k, *C = w.C + k;
    bool gated = s.z.data;
    V A[STATES], h[STATES];
    load_states<STATES>(A, w.A + k * BLOCK + c);
    load_states<STATES>(h, w.h + k * BLOCK + c);
    for (int64_t t = 0; t < steps; t++, B += stride, C += stride) {
        V step = load(w.step[t] + c), u = load(w.u[t] + c), y = V{};
        for (int j = 0; j < STATES; j++) {
            store(w.before[t][j], h[j]);
            if (w.restart[t]) h[j] = V{};
            V decay = decay_of(step, A[j]);
            store(w.decay[t][j], decay);
            h[j] = decay * h[j] + u * B[j];
            y += h[j] * C[j];
        }
        // Only the gradient of a gate needs it.
        if (gated) store(w.linear[t] + c, load(w.linear[t] + c) + y);
    }
    for (int j = 0; j < STATES; j++) store(w.before[steps][j], h[j]);
}

// The gradients of STATES states and WIDTH channels, last position first; sums over channels begin where fresh.
INLINE void differentiate(const Scan &s, Work &w, int64_t k, int64_t c, int64_t steps, bool fresh) {
    int64_t stride = stride_of_B(s.n);
    const float *B = w.B + k + steps * stride, *C = w.C + k + steps * stride;
    V A[STATES], h[STATES], g[STATES], dA[STATES];
    load_states<STATES>(A, w.A + k * BLOCK + c);
    load_states<STATES>(g, w.g + k * BLOCK + c);
    load_states<STATES>(dA, w.dA + k * BLOCK + c);
    for (int j = 0; j < STATES; j++) h[j] = load(w.before[steps][j]);
    for (int64_t t = steps - 1; t >= 0; t--) {
        B -= stride;
        C -= stride;
        V step = load(w.step[t] + c), u = load(w.u[t] + c), dlinear = load(w.dlinear[t] + c);
        V du = load(w.du[t] + c), dlog_step = load(w.dlog[t] + c);
        for (int j = 0; j < STATES; j++) {
            float *dB = w.dB_lanes[j][t], *dC = w.dC_lanes[j][t];
            g[j] += dlinear * C[j];
            store(dC, (fresh ? V{} : load(dC)) + dlinear * h[j]);
            store(dB, (fresh ? V{} : load(dB)) + u * g[j]);
            du += g[j] * B[j];
            h[j] = load(w.before[t][j]);
            g[j] *= load(w.decay[t][j]);
            V dlog = g[j] * h[j];
            if (w.restart[t]) g[j] = dlog = V{};
            dA[j] += dlog * step;
            dlog_step += dlog * A[j];
        }
        store(w.du[t] + c, du);
        store(w.dlog[t] + c, dlog_step);
    }
    store_states<STATES>(w.g + k * BLOCK + c, g);
    store_states<STATES>(w.dA + k * BLOCK + c, dA);
}

// The sum of every position's lanes.
static void sum_lanes(float *sums, const float (*rows)[WIDEST]) {
    for (int64_t start = 0; start < CHUNK; start += WIDTH) {
        V part[WIDTH];
        for (int k = 0; k < WIDTH; k++) part[k] = load(rows[start + k]);
        store(sums + start, sums_of_lanes(part));
    }
}

template <bool BFLOAT16, bool WHOLE>
static void write_gradients(const Task &task, Work &w, int64_t start, int64_t steps, int64_t first, int64_t channels) {
    const Scan &s = *task.scan;
    constexpr int64_t SIZE = BFLOAT16 ? 2 : 4;
    const bool gated = s.z.data, through_softplus = s.delta_softplus;
    for (int64_t t = 0; t < steps; t++) {
        char *dx_t = at(s, s.dx, task.row, start + t, first), *ddelta_t = at(s, s.ddelta, task.row, start + t, first);
        char *dz_t = at(s, s.dz, task.row, start + t, first);
        const bool masked = w.masked[t];
        for (int64_t c = 0; c < channels; c += WIDTH) {
            const int64_t left = WHOLE ? WIDTH : channels - c;
            V x = load(w.x[t] + c), dlinear = load(w.dlinear[t] + c), du = load(w.du[t] + c);
            V dx = du * load(w.step[t] + c) + dlinear * load(w.D + c);
            // As A is in units of log 2, so is this.
            V ddelta = load(w.dlog[t] + c) * 0.6931471806f + du * x;
            if (through_softplus) ddelta *= sigmoid(load(w.raw[t] + c));
            if (masked) dx = ddelta = V{};
            store(w.dD + c, load(w.dD + c) + dlinear * x);
            store(w.dbias + c, load(w.dbias + c) + ddelta);
            write(dx_t + SIZE * c, dx, left, BFLOAT16);
            write(ddelta_t + SIZE * c, ddelta, left, BFLOAT16);
            if (!gated) continue;
            V z = load(w.z[t] + c), gate = sigmoid(z), dz = load(w.dy[t] + c) * load(w.linear[t] + c);
            dz *= gate * (1.0f + z * (1.0f - gate));
            write(dz_t + SIZE * c, masked ? V{} : dz, left, BFLOAT16);
        }
    }
}

static void backward(const Task &task, Work &w) {
    const Scan &s = *task.scan;
    int64_t first = task.block * BLOCK, channels = s.e - first < BLOCK ? s.e - first : BLOCK;
    int64_t state = (task.row * s.e + first) * s.n;
    load_channels(s, w, first, channels);
    load_state(s, w.g, s.dfinal_state, state, channels);
    memset(w.dA, 0, sizeof(float) * tile_of(s));
    memset(w.dD, 0, sizeof w.dD);
    memset(w.dbias, 0, sizeof w.dbias);
    memset(w.dA_total, 0, sizeof(double) * tile_of(s));
    memset(w.dD_total, 0, sizeof w.dD_total);
    memset(w.dbias_total, 0, sizeof w.dbias_total);
    for (int64_t chunk = chunks_of(s) - 1; chunk >= 0; chunk--) {
        int64_t start = chunk * CHUNK, steps = s.l - start < CHUNK ? s.l - start : CHUNK;
        memcpy(w.h, boundary(s, task.row, task.block, chunk), sizeof(float) * tile_of(s));
        OF_ROWS(load_chunk)(task, w, start, steps, first, channels, true);
        OF_ROWS(load_gradients)(task, w, start, steps, first, channels);
        float *dB = partial_of(s, task.partial->dB, task.row, chunk, task.block);
        float *dC = partial_of(s, task.partial->dC, task.row, chunk, task.block);
        int64_t touched = 0;
        for (int64_t k = 0; k < s.n; k += STATES) {
            for (int64_t c = 0; c < channels; c += WIDTH) {
                recompute(s, w, k, c, steps);
                if (c)
                    differentiate(s, w, k, c, steps, false);
                else
                    differentiate(s, w, k, c, steps, true);
                for (int64_t until = share(s, k, STATES, c, channels); touched < until; touched++) {
                    for (const Sequence *array : {&s.x, &s.delta, &s.z, &s.dy})
                        touch(task, *array, start - CHUNK + touched, first, channels);
                    for (const Sequence *array : {&s.dx, &s.ddelta, &s.dz})
                        touch(task, *array, start + touched, first, channels);
                }
            }
            for (int64_t j = 0; j < STATES; j++) {
                sum_lanes(dB + (k + j) * CHUNK, w.dB_lanes[j]);
                sum_lanes(dC + (k + j) * CHUNK, w.dC_lanes[j]);
            }
        }
        OF_ROWS(write_gradients)(task, w, start, steps, first, channels);
        if (chunk % SUMMED == 0) {
            add_to(w.dA_total, w.dA, tile_of(s), chunk == 0);
            add_to(w.dD_total, w.dD, BLOCK, chunk == 0);
            add_to(w.dbias_total, w.dbias, BLOCK, chunk == 0);
        }
    }
    if (s.dinitial_state) from_tile(s.dinitial_state + state, w.g, channels, s.n);
    from_tile(task.partial->dA + state, w.dA, channels, s.n);
    memcpy(task.partial->dD + task.row * s.e + first, w.dD, sizeof(float) * channels);
    memcpy(task.partial->dbias + task.row * s.e + first, w.dbias, sizeof(float) * channels);
}

// dB and dC of one chunk of a row; its index stands where that of a block does.
static void sum_over_blocks(const Task &task, Work &w) {
    const Scan &s = *task.scan;
    int64_t chunk = task.block, start = chunk * CHUNK, steps = s.l - start < CHUNK ? s.l - start : CHUNK;
    for (int which = 0; which < 2; which++) {
        const Sequence &result = which ? s.dC : s.dB;
        float *sums = partial_of(s, which ? task.partial->dC : task.partial->dB, task.row, chunk, 0);
        int64_t size = padded(s.n) * CHUNK;
        for (int64_t block = 1; block < blocks_of(s); block++)
            for (int64_t k = 0; k < size; k += WIDTH)
                store(sums + k, load(sums + k) + load(sums + block * size + k));
        for (int64_t t = 0; t < steps; t++) {
            for (int64_t k = 0; k < s.n; k++) w.B[k] = sums[k * CHUNK + t];
            for (int64_t k = 0; k < s.n; k += WIDTH)
                write(at(s, result, task.row, start + t, k), load(w.B + k), s.n - k, s.bfloat16);
        }
    }
}

static const Kernel kernel = {forward, backward, sum_over_blocks};

END_WIDTH

#undef WIDTH

#endif
