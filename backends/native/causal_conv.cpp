// The short causal convolution of each channel and its SiLU on CPUs, as shifted multiply-adds in float32: what
// mamba_core.backend documents. A plain C ABI; the file includes itself once a vector width.

#ifndef WIDTH

#include "scan.h"
#include "tasks.h"
#include "vectors.h"

// Positions whose g = dy * silu'(linear) the gradient has at once, and the most tasks that a row is cut into: each
// keeps its own sum of the weight's gradient.
constexpr int64_t CONV_CHUNK = 32, CONV_TASKS = 64;
// Positions computed together, which share what is loaded of the weight, where each sees as many inputs as there are
// taps.
constexpr int64_t TOGETHER = 4;

// What counts in a row. An input is numbered among those that count, from 0; those of the initial state from -(k-1).
struct Row {
    // Of each position the number of its input, or -1; of each number the position, and the first input of its run.
    int64_t *number, *position, *first;
    int64_t count;
};

struct Call {
    const Conv *conv;
    Row *rows;
    int64_t parts, size;
    // (tasks, k + 1, e): what each adds to the gradient of the weight, and last of the bias.
    float *sums;
};

static int64_t bytes_of(const Conv &s) { return s.bfloat16 ? 2 : 4; }
static int64_t row_bytes(const Conv &s) { return s.e * bytes_of(s); }
static int64_t carried(const Conv &s) { return s.k - 1; }
static char *row_of(const Conv &s, const Sequence &a, int64_t row, int64_t position) {
    return a.data + bytes_of(s) * (row * a.batch + position * a.position);
}
static const char *state_of(const Conv &s, const char *state, int64_t row, int64_t slot) {
    return state ? state + bytes_of(s) * (row * carried(s) + slot) * s.e : nullptr;
}

// What a thread's memory begins with, and what follows in it.
static size_t taps_size(const Conv &s) { return sizeof(void *) * (2 * s.k + TOGETHER - 1); }
static float *gradients_in(const Conv &s, void *work) { return (float *)((char *)work + taps_size(s)); }

// An input by its number, null for zeros.
static const char *input_of(const Conv &s, const Row *rows, int64_t row, int64_t input) {
    if (input < 0) return state_of(s, s.initial_state, row, input + carried(s));
    return row_of(s, s.x, row, rows[row].position[input]);
}

// The first input of the run that the row ends in.
static int64_t last_run(const Conv &s, const Row &row) { return row.count ? row.first[row.count - 1] : -carried(s); }

#define WIDTH 4
#include "causal_conv.cpp"
#ifdef __x86_64__
#define WIDTH 8
#include "causal_conv.cpp"
#define WIDTH 16
#include "causal_conv.cpp"
#endif

struct ConvKernel {
    void (*forward)(const void *, int64_t, void *), (*backward)(const void *, int64_t, void *);
};

static ConvKernel conv_kernel_of(__attribute__((unused)) const Conv &s) {
#ifdef __x86_64__
    int width = s.width ? s.width : mamba_scan_width();
    if (width >= 16) return {width16::forward, width16::backward};
    if (width >= 8) return {width8::forward, width8::backward};
#endif
    return {width4::forward, width4::backward};
}

// Numbers the inputs of every row; null where there is not the memory.
static Row *number_inputs(const Conv &s) {
    Row *rows = (Row *)malloc(s.b * (sizeof(Row) + 3 * s.l * sizeof(int64_t)));
    if (!rows) return nullptr;
    int64_t *memory = (int64_t *)(rows + s.b);
    for (int64_t k = 0; k < s.b; k++, memory += 3 * s.l) {
        Row row = {memory, memory + s.l, memory + 2 * s.l, 0};
        int64_t first = -carried(s);
        for (int64_t t = 0; t < s.l; t++) {
            row.number[t] = -1;
            if (s.mask && !s.mask[k * s.l + t]) continue;
            if (s.restart && s.restart[k * s.l + t]) first = row.count;
            row.position[row.count] = t;
            row.first[row.count] = first;
            row.number[t] = row.count++;
        }
        rows[k] = row;
    }
    return rows;
}

static void write_final_state(const Conv &s, const Row *rows) {
    for (int64_t row = 0; s.final_state && row < s.b; row++)
        for (int64_t slot = 0; slot < carried(s); slot++) {
            int64_t input = rows[row].count - carried(s) + slot;
            const char *from = input < last_run(s, rows[row]) ? nullptr : input_of(s, rows, row, input);
            char *to = (char *)state_of(s, s.final_state, row, slot);
            if (from)
                memcpy(to, from, row_bytes(s));
            else
                memset(to, 0, row_bytes(s));
        }
}

static Call call_of(const Conv &s) {
    int64_t parts = CONV_TASKS / s.b < 1 ? 1 : CONV_TASKS / s.b, chunks = divide_up(s.l, CONV_CHUNK);
    int64_t size = CONV_CHUNK * (divide_up(chunks, parts) < 1 ? 1 : divide_up(chunks, parts));
    // A row of no positions has still a state.
    return {&s, number_inputs(s), s.l ? divide_up(s.l, size) : 1, size, nullptr};
}

static int64_t conv_threads(const Conv &s) { return threads_worth(s.threads, 1 + (s.b * s.l * s.e >> 17)); }

EXPORT int32_t mamba_conv_forward(const Conv *conv) {
    const Conv &s = *conv;
    Call call = call_of(s);
    if (!call.rows) return 1;
    bool done = run_tasks(conv_kernel_of(s).forward, &call, s.b * call.parts, conv_threads(s), taps_size(s));
    write_final_state(s, call.rows);
    free(call.rows);
    return !done;
}

EXPORT int32_t mamba_conv_backward(const Conv *conv) {
    const Conv &s = *conv;
    Call call = call_of(s);
    int64_t tasks = s.b * call.parts, sums = (s.k + 1) * s.e;
    call.sums = (float *)calloc(tasks * sums, sizeof(float));
    size_t work = taps_size(s) + sizeof(float) * (CONV_CHUNK + carried(s)) * s.e;
    bool done = call.rows && call.sums &&
                run_tasks(conv_kernel_of(s).backward, &call, tasks, conv_threads(s), work);
    if (done) {
        for (int64_t task = 1; task < tasks; task++)
            for (int64_t k = 0; k < sums; k++) call.sums[k] += call.sums[task * sums + k];
        memcpy(s.dweight, call.sums, sizeof(float) * s.k * s.e);
        if (s.dbias) memcpy(s.dbias, call.sums + s.k * s.e, sizeof(float) * s.e);
    }
    free(call.sums);
    free(call.rows);
    return !done;
}

#else  // What is compiled for each width.

#include "vectors.h"

BEGIN_WIDTH

// The inputs that a position sees, and their rows of the weight. After these inputs may come those of the positions
// after.
struct Taps {
    const char **inputs;
    const float **weights;
    int64_t count;
};

// At the beginning of a thread's memory.
static Taps taps_of(const Call &call, int64_t row, int64_t number, void *work) {
    const Conv &s = *call.conv;
    Taps taps = {(const char **)work, (const float **)work + s.k + TOGETHER - 1, 0};
    for (int64_t tap = 0; tap < s.k; tap++) {
        int64_t input = number - carried(s) + tap;
        const char *from = input < call.rows[row].first[number] ? nullptr : input_of(s, call.rows, row, input);
        if (!from) continue;
        taps.inputs[taps.count] = from;
        taps.weights[taps.count++] = s.weight + tap * s.e;
    }
    return taps;
}

INLINE V linear_of(const Conv &s, const Taps &taps, int64_t c, bool bfloat16) {
    int64_t left = s.e - c, at = (bfloat16 ? 2 : 4) * c;
    V total = s.bias ? read((const char *)(s.bias + c), left, false) : V{};
    for (int64_t tap = 0; tap < taps.count; tap++)
        total += read((const char *)(taps.weights[tap] + c), left, false) * read(taps.inputs[tap] + at, left, bfloat16);
    return total;
}

// COUNT outputs at the channels from c on, of which `left` are left: each sees the inputs from one further on.
template <int COUNT>
INLINE void convolve(const Conv &s, const Taps &taps, char *const *y, int64_t c, int64_t left, bool bfloat16) {
    int64_t at = (bfloat16 ? 2 : 4) * c;
    V total[COUNT];
    for (int j = 0; j < COUNT; j++) total[j] = s.bias ? read((const char *)(s.bias + c), left, false) : V{};
    for (int64_t tap = 0; tap < taps.count; tap++) {
        V weight = read((const char *)(taps.weights[tap] + c), left, false);
        for (int j = 0; j < COUNT; j++) total[j] += weight * read(taps.inputs[tap + j] + at, left, bfloat16);
    }
    for (int j = 0; j < COUNT; j++)
        write(y[j] + at, s.silu ? total[j] * sigmoid(total[j]) : total[j], left, bfloat16);
}
template <int COUNT, bool BFLOAT16>
static void convolve_rows(const Conv &s, const Taps &taps, char *const *y) {
    int64_t c = 0;
    for (; c + WIDTH <= s.e; c += WIDTH) convolve<COUNT>(s, taps, y, c, WIDTH, BFLOAT16);
    if (c < s.e) convolve<COUNT>(s, taps, y, c, s.e - c, BFLOAT16);
}

// Adds the inputs of the TOGETHER - 1 positions after; false where one of them does not see an input for every tap.
static bool see_more(const Call &call, int64_t row, int64_t t, int64_t until, Taps &taps) {
    const Conv &s = *call.conv;
    const Row &of = call.rows[row];
    int64_t number = of.number[t], last = number + TOGETHER - 1;
    if (t + TOGETHER > until || taps.count < s.k || of.number[t + TOGETHER - 1] != last) return false;
    if (of.first[last] != of.first[number]) return false;
    for (int64_t j = 1; j < TOGETHER; j++) taps.inputs[carried(s) + j] = input_of(s, call.rows, row, number + j);
    return true;
}

static void forward(const void *argument, int64_t index, void *work) {
    const Call &call = *(const Call *)argument;
    const Conv &s = *call.conv;
    int64_t row = index / call.parts, start = index % call.parts * call.size;
    int64_t until = start + call.size < s.l ? start + call.size : s.l;
    for (int64_t t = start, count; t < until; t += count) {
        count = 1;
        char *y[TOGETHER];
        for (int64_t j = 0; j < TOGETHER; j++) y[j] = row_of(s, s.y, row, t + j);
        int64_t number = call.rows[row].number[t];
        if (number < 0) {
            memset(*y, 0, row_bytes(s));
            continue;
        }
        Taps taps = taps_of(call, row, number, work);
        if (see_more(call, row, t, until, taps)) {
            count = TOGETHER;
            (s.bfloat16 ? convolve_rows<TOGETHER, true> : convolve_rows<TOGETHER, false>)(s, taps, y);
        } else
            (s.bfloat16 ? convolve_rows<1, true> : convolve_rows<1, false>)(s, taps, y);
    }
}

// dy through the SiLU, of the inputs numbered from..until; and what the first `own` of them add to the sums.
static void load_gradients(const Call &call, void *work, float *sums, int64_t row, int64_t from, int64_t until,
                           int64_t own) {
    const Conv &s = *call.conv;
    int64_t size = bytes_of(s);
    float *g = gradients_in(s, work);
    for (int64_t number = from; number < until; number++, g += s.e) {
        Taps taps = taps_of(call, row, number, work);
        const char *dy = row_of(s, s.dy, row, call.rows[row].position[number]);
        for (int64_t c = 0; c < s.e; c += WIDTH) {
            int64_t left = s.e - c;
            V value = read(dy + size * c, left, s.bfloat16);
            if (s.silu) {
                V linear = linear_of(s, taps, c, s.bfloat16), gate = sigmoid(linear);
                value *= gate * (1.0f + linear * (1.0f - gate));
            }
            write((char *)(g + c), value, left, false);
            if (number >= from + own) continue;
            for (int64_t tap = 0; tap < taps.count; tap++) {
                char *sum = (char *)(sums + (taps.weights[tap] - s.weight) + c);
                write(sum, read(sum, left, false) + value * read(taps.inputs[tap] + size * c, left, s.bfloat16), left,
                      false);
            }
            char *sum = (char *)(sums + s.k * s.e + c);
            write(sum, read(sum, left, false) + value, left, false);
        }
    }
}

// The gradient of an input: of the positions that see it, and of the final state. g begins at the input numbered
// `from`.
static void write_gradient(const Call &call, char *to, const float *g, int64_t row, int64_t from, int64_t input) {
    const Conv &s = *call.conv;
    const Row &of = call.rows[row];
    int64_t size = bytes_of(s), slot = input - (of.count - carried(s));
    bool kept = s.dfinal_state && slot >= 0 && input >= last_run(s, of);
    const char *dstate = kept ? state_of(s, s.dfinal_state, row, slot) : nullptr;
    for (int64_t c = 0; c < s.e; c += WIDTH) {
        int64_t left = s.e - c;
        V total = dstate ? read(dstate + size * c, left, s.bfloat16) : V{};
        for (int64_t tap = 0; tap < s.k; tap++) {
            int64_t seen = input + carried(s) - tap;
            if (seen < 0 || seen >= of.count || input < of.first[seen]) continue;
            total += read((const char *)(s.weight + tap * s.e + c), left, false) *
                     read((const char *)(g + (seen - from) * s.e + c), left, false);
        }
        write(to + size * c, total, left, s.bfloat16);
    }
}

static void backward(const void *argument, int64_t index, void *work) {
    const Call &call = *(const Call *)argument;
    const Conv &s = *call.conv;
    int64_t row = index / call.parts, start = index % call.parts * call.size;
    const Row &of = call.rows[row];
    float *g = gradients_in(s, work), *sums = call.sums + index * (s.k + 1) * s.e;
    if (start == 0 && s.dinitial_state) {
        int64_t until = carried(s) < of.count ? carried(s) : of.count;
        load_gradients(call, work, sums, row, 0, until, 0);
        for (int64_t slot = 0; slot < carried(s); slot++)
            write_gradient(call, (char *)state_of(s, s.dinitial_state, row, slot), g, row, 0, slot - carried(s));
    }
    int64_t end = start + call.size < s.l ? start + call.size : s.l;
    for (int64_t t = start; t < end; t += CONV_CHUNK) {
        int64_t from = -1, own = 0;
        for (int64_t k = t; k < end && k < t + CONV_CHUNK; k++) {
            if (of.number[k] < 0) {
                memset(row_of(s, s.dx, row, k), 0, row_bytes(s));
                continue;
            }
            if (!own++) from = of.number[k];
        }
        if (!own) continue;
        int64_t until = from + own + carried(s) < of.count ? from + own + carried(s) : of.count;
        load_gradients(call, work, sums, row, from, until, own);
        for (int64_t number = from; number < from + own; number++)
            write_gradient(call, row_of(s, s.dx, row, of.position[number]), g, row, from, number);
    }
}

END_WIDTH

#undef WIDTH

#endif
