// The ssd by chunks of positions, as matrix products (Dao and Gu 2024, section 6): what its forward and its gradient
// share. A source that includes itself once a width includes this file there too.
//
// Inside a chunk, y_i = sum over j <= i of (C_i B_j) exp(a_j+1 + ... + a_i) u_j + exp(a_1 + ... + a_i) h C_i with
// u = dt x and a = dt A. The matrices (n, p) of a state have rows of whole vectors, and so have all others here.

#ifndef SSD_CHUNK_H
#define SSD_CHUNK_H

#include <float.h>

#include "scan.h"
#include "tasks.h"
#include "vectors.h"

// Positions of a chunk. Neither it nor the order of a sum depends on the vector width or the threads.
constexpr int64_t CHUNK = 64;
// Chunks are computed in spans of them, whose shared arrays are at most about so many bytes and stay in the last cache.
constexpr int64_t SPAN_BYTES = 8 << 20;

static inline int64_t whole(int64_t count) { return divide_up(count, WIDEST) * WIDEST; }
static inline int64_t chunks_of(const Ssd &s) { return divide_up(s.l, CHUNK); }
static inline int64_t state_size(const Ssd &s) { return s.n * whole(s.p); }
static inline int64_t operand_size(const Ssd &s) { return CHUNK * whole(s.n); }
static inline int64_t element_size(const Ssd &s) { return s.bfloat16 ? 2 : 4; }
static inline int64_t heads_of_group(const Ssd &s) { return s.h / s.g; }
static inline char *element(const Ssd &s, const Sequence &a, int64_t row, int64_t t, int64_t channel) {
    return a.data ? a.data + element_size(s) * (row * a.batch + t * a.position + channel) : nullptr;
}
static inline bool is_masked(const Ssd &s, int64_t row, int64_t t) { return s.mask && !s.mask[row * s.l + t]; }

// The state before a chunk, (n, p), or where the gradient of one after it stands.
static inline float *boundary(const Ssd &s, int64_t row, int64_t chunk, int64_t head) {
    return s.boundaries + ((row * chunks_of(s) + chunk) * s.h + head) * state_size(s);
}

// Chunks `first` to `first + count` of all rows, and what is computed of them for all heads: step sizes (h, CHUNK), B
// and C (g, CHUNK, n), and their products (g, CHUNK, CHUNK).
struct Span {
    const Ssd *ssd;
    int64_t first, count;
    // Whether the products are B C^T and not C B^T.
    bool for_gradient;
    float *steps, *B, *C, *products;

    int64_t index(int64_t row, int64_t chunk) const { return row * count + chunk - first; }
    float *steps_of(int64_t row, int64_t chunk, int64_t head) const {
        return steps + (index(row, chunk) * ssd->h + head) * CHUNK;
    }
    int64_t operand(int64_t row, int64_t chunk, int64_t group) const {
        return (index(row, chunk) * ssd->g + group) * operand_size(*ssd);
    }
    float *products_of(int64_t row, int64_t chunk, int64_t group) const {
        return products + (index(row, chunk) * ssd->g + group) * CHUNK * CHUNK;
    }
};

// Floats of a span's arrays for one chunk of a row.
static inline int64_t span_floats(const Ssd &s) { return s.h * CHUNK + s.g * (2 * operand_size(s) + CHUNK * CHUNK); }

// How many chunks a span has, if one of a row takes so many floats: enough for all threads.
static inline int64_t span_length(const Ssd &s, int64_t floats) {
    const int64_t fitting = SPAN_BYTES / 4 / (s.b * floats), busy = divide_up(2 * s.threads, s.b * s.g);
    const int64_t count = fitting < busy ? busy : fitting;
    return count < 1 ? 1 : count < chunks_of(s) ? count : chunks_of(s);
}

// For so many floats, from a boundary of a vector on; null where there is not the memory.
static inline float *allocate(int64_t count) {
    return (float *)aligned_alloc(64, divide_up(sizeof(float) * count + 1, 64) * 64);
}

// Shares out the memory of `span_floats` for each chunk. Returns what follows it.
static inline float *place_span(Span &span, float *memory) {
    const Ssd &s = *span.ssd;
    const int64_t all = s.b * span.count;
    span.steps = memory;
    span.B = span.steps + all * s.h * CHUNK;
    span.C = span.B + all * s.g * operand_size(s);
    span.products = span.C + all * s.g * operand_size(s);
    return span.products + all * s.g * CHUNK * CHUNK;
}

// A chunk's runs of positions between restarts: number k is bounds[k] to bounds[k + 1]. The state before the chunk
// reaches the first `entered` positions; those from `leaving` on reach the state after it.
struct Runs {
    int64_t count, entered, leaving, bounds[CHUNK + 1];
    bool passed() const { return count == 1 && entered; }
};
static inline Runs runs_of(const Ssd &s, int64_t row, int64_t chunk) {
    const int64_t start = chunk * CHUNK, steps = s.l - start < CHUNK ? s.l - start : CHUNK;
    const uint8_t *restart = s.restart ? s.restart + row * s.l + start : nullptr;
    Runs runs = {0, 0, 0, {}};
    for (int64_t t = 0; t < steps; t++)
        if (!t || (restart && restart[t])) runs.bounds[runs.count++] = t;
    runs.bounds[runs.count] = steps;
    runs.leaving = runs.bounds[runs.count - 1];
    runs.entered = restart && restart[0] ? 0 : runs.bounds[1];
    return runs;
}

// Of a head and a chunk. Sums of the logarithms up to each position, in units of log 2: on a grid they are exact, and
// what is off the grid is summed by itself. A difference of two rounded sums would be wrong by the rounding of the
// larger, which one long step makes large. start: what passes from the state before the chunk to a position; end: from
// a position to the state after it; through: from one state to the other.
struct Decays {
    float on_grid[CHUNK], off_grid[CHUNK], start[CHUNK], end[CHUNK], through;
};

#endif

#ifdef WIDTH

#include "matrices.h"

BEGIN_WIDTH

// Below it 2^x is zero. Sums of a chunk's logarithms are then below 2^14, and multiples of 2^-10.
static const float LEAST_LOG = -160.0f, GRID = 1024.0f, ROUNDER = 12582912.0f;

INLINE V power_of_2(V value) { return decay_of(value, splat(1.0f)); }
INLINE V numbers_from(int64_t first) {
    V lanes = {};
    for (int lane = 0; lane < WIDTH; lane++) lanes[lane] = (float)lane;
    return lanes + (float)first;
}

static void find_decays(Decays &d, const float *step, float A, const Runs &runs) {
    const int64_t steps = runs.bounds[runs.count];
    // A step of size zero, that of a position that does not count, times -inf would be NaN.
    const float scaled = A * 1.4426950409f, rate = scaled < -FLT_MAX ? -FLT_MAX : scaled;
    float on_grid = 0.0f, off_grid = 0.0f;
    for (int64_t t = 0; t < CHUNK; t++) {
        const float product = t < steps ? step[t] * rate : 0.0f, log = product < LEAST_LOG ? LEAST_LOG : product;
        const float nearest = (log * GRID + ROUNDER - ROUNDER) / GRID;
        d.on_grid[t] = on_grid += nearest;
        d.off_grid[t] = off_grid += log - nearest;
    }
    for (int64_t t = 0; t < CHUNK; t += WIDTH) {
        const V grid = load(d.on_grid + t), rest = load(d.off_grid + t);
        store(d.start + t, power_of_2(grid + rest));
        store(d.end + t, power_of_2((on_grid - grid) + (off_grid - rest)));
    }
    d.through = runs.passed() ? d.start[steps - 1] : 0.0f;
}

// `count` numbers of the compute dtype as a row of whole vectors.
INLINE void load_row(float *to, const char *from, int64_t count, bool bfloat16) {
    for (int64_t c = 0; c < whole(count); c += WIDTH)
        store(to + c, c < count ? read(from + (bfloat16 ? 2 : 4) * c, count - c, bfloat16) : V{});
}
INLINE void clear_row(float *to, int64_t count) {
    for (int64_t c = 0; c < whole(count); c += WIDTH) store(to + c, V{});
}

// (step sizes, what they are before the softplus and the limits) of WIDTH heads at one position.
struct Step {
    V size, raw, unlimited;
};
INLINE Step step_of(const Ssd &s, int64_t row, int64_t t, int64_t head) {
    const int64_t left = s.h - head;
    Step step;
    step.raw = read(element(s, s.dt, row, t, head), left, s.bfloat16);
    if (s.dt_bias) step.raw += read_float(s.dt_bias + head, left);
    step.unlimited = s.dt_softplus ? softplus(step.raw) : step.raw;
    step.size = step.unlimited < s.least ? splat(s.least) : step.unlimited;
    step.size = step.size > s.most ? splat(s.most) : step.size;
    return step;
}

// The tiles of left right, where `right` is transposed already: those that have what is on the diagonal or below it, or
// above it if `upper`.
struct Triangle {
    const float *left, *right;
    float *to;
    int64_t stride, count;
    bool upper;
    template <int ROWS, int VECS> void at(int64_t row, int64_t column) const {
        if (upper ? column + VECS * WIDTH <= row : column >= row + ROWS) return;
        V sums[ROWS][VECS] = {};
        multiply<false>(sums, left + row * stride, stride, right + column, CHUNK, count);
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECS; v++) store(to + (row + r) * CHUNK + column + v * WIDTH, sums[r][v]);
    }
};

// What a span's task needs memory for: the transpose of B or of C.
static void prepare(const Span &span, int64_t row, int64_t chunk, float *transposed) {
    const Ssd &s = *span.ssd;
    const int64_t start = chunk * CHUNK, stride = whole(s.n);
    for (int64_t t = 0; t < CHUNK; t++) {
        const bool absent = start + t >= s.l || is_masked(s, row, start + t);
        for (int64_t head = 0; head < s.h; head += WIDTH) {
            const V size = absent ? V{} : step_of(s, row, start + t, head).size;
            for (int64_t j = 0; j < WIDTH && head + j < s.h; j++) span.steps_of(row, chunk, head + j)[t] = size[j];
        }
        for (int64_t group = 0; group < s.g; group++) {
            const int64_t at = span.operand(row, chunk, group) + t * stride;
            if (absent) {
                clear_row(span.B + at, s.n);
                clear_row(span.C + at, s.n);
            } else {
                load_row(span.B + at, element(s, s.B, row, start + t, group * s.n), s.n, s.bfloat16);
                load_row(span.C + at, element(s, s.C, row, start + t, group * s.n), s.n, s.bfloat16);
            }
        }
    }
    for (int64_t group = 0; group < s.g; group++) {
        const float *B = span.B + span.operand(row, chunk, group), *C = span.C + span.operand(row, chunk, group);
        transpose_into(transposed, CHUNK, span.for_gradient ? C : B, stride, CHUNK, s.n);
        float *to = span.products_of(row, chunk, group);
        const Triangle triangle = {span.for_gradient ? B : C, transposed, to, stride, s.n, span.for_gradient};
        for_tiles(triangle, 0, CHUNK, 0, CHUNK);
    }
}

// The state after a chunk, or the gradient of that before it: `through` times the other one, and left^T right over the
// positions `first` to `end`. left (CHUNK, n), right (CHUNK, p).
struct Passed {
    const float *left, *right, *from;
    float *to;
    int64_t n, p, first, end;
    float through;
    template <int ROWS, int VECS> void at(int64_t row, int64_t column) const {
        V sums[ROWS][VECS] = {};
        // Where the decay is zero, Inf and NaN are left behind too.
        if (through != 0.0f)
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < VECS; v++)
                    sums[r][v] = through * load(from + (row + r) * p + column + v * WIDTH);
        multiply<true>(sums, left + first * n + row, n, right + first * p + column, p, end - first);
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECS; v++) store(to + (row + r) * p + column + v * WIDTH, sums[r][v]);
    }
};

// D of a head's channels, zeros where there is none.
INLINE void load_D(const Ssd &s, float *to, int64_t head) {
    for (int64_t c = 0; c < whole(s.p); c += WIDTH) {
        V value = {};
        if (s.D && s.D_per_channel && c < s.p) value = read_float(s.D + head * s.p + c, s.p - c);
        if (s.D && !s.D_per_channel) value = splat(s.D[head]);
        store(to + c, value);
    }
}

END_WIDTH

#endif
