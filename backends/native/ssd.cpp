// The ssd on sequences, on CPUs: its forward. `ssd_chunk.h` says how.

#ifndef WIDTH

#include "ssd_chunk.h"

// A task takes so many heads of a row at most: they share what is in the cache of B and C.
constexpr int64_t HEADS = 4;

// What a thread computes in: u and the part of it that is left at the chunk's end (CHUNK, p), the weights of u (CHUNK,
// CHUNK), a head's D (p,), and states (HEADS, n, p).
struct ForwardWork {
    float *u, *ended, *weights, *D, *states;
    Decays decays;
};
static int64_t forward_floats(const Ssd &s) {
    return (2 * CHUNK + 1) * whole(s.p) + CHUNK * CHUNK + HEADS * state_size(s);
}

#define WIDTH 4
#include "ssd.cpp"
#ifdef __x86_64__
#define WIDTH 8
#include "ssd.cpp"
#define WIDTH 16
#include "ssd.cpp"
#endif

struct ForwardJob {
    const Span *span;
    int64_t heads;
};

static void prepare_one(const void *argument, int64_t index, void *memory) {
    const Span &span = *(const Span *)argument;
    const Ssd &s = *span.ssd;
    const int64_t row = index / span.count, chunk = span.first + index % span.count;
    FOR_LANES(s.width ? s.width : mamba_scan_width(), prepare)(span, row, chunk, (float *)memory);
}

static void advance_one(const void *argument, int64_t index, void *memory) {
    const ForwardJob &job = *(const ForwardJob *)argument;
    const Ssd &s = *job.span->ssd;
    const int64_t p = whole(s.p), parts = divide_up(s.h, job.heads), first = index % parts * job.heads;
    ForwardWork w;
    w.u = (float *)memory;
    w.ended = w.u + CHUNK * p;
    w.weights = w.ended + CHUNK * p;
    w.D = w.weights + CHUNK * CHUNK;
    w.states = w.D + p;
    const int64_t heads = s.h - first < job.heads ? s.h - first : job.heads;
    FOR_LANES(s.width ? s.width : mamba_scan_width(), advance)(*job.span, w, index / parts, first, heads);
}

int64_t mamba_ssd_boundaries(int64_t b, int64_t l, int64_t h, int64_t p, int64_t n) {
    return b * divide_up(l, CHUNK) * h * n * whole(p);
}

int32_t mamba_ssd_forward(const Ssd *ssd) {
    const Ssd &s = *ssd;
    const int64_t length = span_length(s, span_floats(s));
    float *memory = allocate(s.b * length * span_floats(s));
    if (!memory) return 1;
    bool done = true;
    int64_t first = 0;
    do {
        const int64_t left = chunks_of(s) - first, count = left < length ? left : length;
        const int64_t work = 1 + (s.b * count * CHUNK * s.h * s.p * s.n >> 18);
        const int64_t threads = threads_worth(s.threads, work);
        Span span = {ssd, first, count, false, nullptr, nullptr, nullptr, nullptr};
        place_span(span, memory);
        int64_t heads = s.b * s.h / (4 * threads);
        heads = heads < 1 ? 1 : heads < HEADS ? heads : HEADS;
        const ForwardJob job = {&span, heads};
        done = run_tasks(prepare_one, &span, s.b * count, threads, sizeof(float) * operand_size(s)) &&
               run_tasks(advance_one, &job, s.b * divide_up(s.h, heads), threads, sizeof(float) * forward_floats(s));
        first += count;
    } while (done && first < chunks_of(s));
    free(memory);
    return !done;
}

#else  // Compiled once for each width.

#include "ssd_chunk.h"

BEGIN_WIDTH

// u of a head and what is left of it at the chunk's end.
static void load_inputs(const Span &span, ForwardWork &w, const Runs &runs, int64_t row, int64_t chunk, int64_t head) {
    const Ssd &s = *span.ssd;
    const int64_t start = chunk * CHUNK, p = whole(s.p);
    const float *step = span.steps_of(row, chunk, head);
    for (int64_t t = 0; t < runs.bounds[runs.count]; t++) {
        const char *x = element(s, s.x, row, start + t, head * s.p);
        const bool masked = is_masked(s, row, start + t);
        const float end = w.decays.end[t];
        for (int64_t c = 0; c < p; c += WIDTH) {
            V u = {};
            if (!masked && c < s.p) u = step[t] * read(x + element_size(s) * c, s.p - c, s.bfloat16);
            store(w.u + t * p + c, u);
            store(w.ended + t * p + c, end == 0.0f ? V{} : end * u);
        }
    }
}

// The weight that each u of a run has in y, zero where it is later, up to the end of a tile.
static void find_weights(const float *products, const Decays &d, const Runs &runs, float *weights) {
    for (int64_t k = 0; k < runs.count; k++)
        for (int64_t i = runs.bounds[k]; i < runs.bounds[k + 1]; i++) {
            const V on_grid = splat(d.on_grid[i]), off_grid = splat(d.off_grid[i]);
            const int64_t end = i + TILE_ROWS < CHUNK ? i + TILE_ROWS : CHUNK;
            for (int64_t j = runs.bounds[k] / WIDTH * WIDTH; j < end; j += WIDTH) {
                const V decay = power_of_2((on_grid - load(d.on_grid + j)) + (off_grid - load(d.off_grid + j)));
                const V value = decay * load(products + i * CHUNK + j);
                store(weights + i * CHUNK + j, numbers_from(j) <= (float)i ? value : V{});
            }
        }
}

// y of a run, which the state before the chunk has `entered` or not.
struct Outputs {
    const Ssd &s;
    const ForwardWork &w;
    const float *C, *state;
    int64_t row, start, head, run;
    bool entered;

    template <int ROWS, int VECS> void at(int64_t t, int64_t column) const {
        const int64_t n = whole(s.n), p = whole(s.p);
        V sums[ROWS][VECS] = {};
        if (entered) {
            multiply<false>(sums, C + t * n, n, state + column, p, s.n);
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < VECS; v++) sums[r][v] *= w.decays.start[t + r];
        }
        multiply<false>(sums, w.weights + t * CHUNK + run, CHUNK, w.u + run * p + column, p, t + ROWS - run);
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECS; v++) write_output(t + r, column + v * WIDTH, sums[r][v]);
    }

    INLINE_MEMBER void write_output(int64_t t, int64_t column, V value) const {
        const int64_t left = s.p - column, channel = head * s.p + column;
        if (left <= 0) return;
        if (is_masked(s, row, start + t)) return write(element(s, s.y, row, start + t, channel), V{}, left, s.bfloat16);
        if (s.D) value += load(w.D + column) * read(element(s, s.x, row, start + t, channel), left, s.bfloat16);
        if (s.z.data) {
            const V gate = read(element(s, s.z, row, start + t, channel), left, s.bfloat16);
            value *= gate * sigmoid(gate);
        }
        write(element(s, s.y, row, start + t, channel), value, left, s.bfloat16);
    }
};

static void advance_chunk(const Span &span, ForwardWork &w, int64_t row, int64_t chunk, int64_t head, float *state) {
    const Ssd &s = *span.ssd;
    const int64_t group = head / heads_of_group(s), p = whole(s.p);
    const float *B = span.B + span.operand(row, chunk, group), *C = span.C + span.operand(row, chunk, group);
    const Runs runs = runs_of(s, row, chunk);
    if (s.boundaries) memcpy(boundary(s, row, chunk, head), state, sizeof(float) * state_size(s));
    find_decays(w.decays, span.steps_of(row, chunk, head), s.A[head], runs);
    load_inputs(span, w, runs, row, chunk, head);
    find_weights(span.products_of(row, chunk, group), w.decays, runs, w.weights);
    load_D(s, w.D, head);
    for (int64_t k = 0; k < runs.count; k++) {
        const int64_t first = runs.bounds[k], end = runs.bounds[k + 1];
        const Outputs outputs = {s, w, C, state, row, chunk * CHUNK, head, first, end <= runs.entered};
        for_tiles(outputs, first, end, 0, p);
    }
    const Passed passed = {B, w.ended, state, state, whole(s.n), p, runs.leaving, runs.bounds[runs.count],
                           w.decays.through};
    for_tiles(passed, 0, s.n, 0, p);
}

// Some heads of a row over a span.
static void advance(const Span &span, ForwardWork &w, int64_t row, int64_t first, int64_t heads) {
    const Ssd &s = *span.ssd;
    const float *before = span.first ? s.final_state : s.initial_state;
    for (int64_t k = 0; k < heads; k++) {
        float *state = w.states + k * state_size(s);
        if (before)
            transpose_into(state, whole(s.p), before + (row * s.h + first + k) * s.p * s.n, s.n, s.p, s.n);
        else
            memset(state, 0, sizeof(float) * state_size(s));
    }
    for (int64_t chunk = span.first; chunk < span.first + span.count; chunk++)
        for (int64_t k = 0; k < heads; k++)
            advance_chunk(span, w, row, chunk, first + k, w.states + k * state_size(s));
    for (int64_t k = 0; k < heads; k++) {
        float *after = s.final_state + (row * s.h + first + k) * s.p * s.n;
        transpose_back(after, w.states + k * state_size(s), whole(s.p), s.p, s.n);
    }
}

END_WIDTH

#undef WIDTH

#endif
