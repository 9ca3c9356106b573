// The gradient of the ssd on sequences, on CPUs. `ssd_chunk.h` says how its forward goes. The last span of chunks is
// first. The gradients of a span's states are found from chunk to chunk; with these and the states that the forward
// kept, its chunks need nothing of one another.

#ifndef WIDTH

#include <initializer_list>

#include "ssd_tiles.h"

#define WIDTH 4
#include "ssd_backward.cpp"
#ifdef __x86_64__
#define WIDTH 8
#include "ssd_backward.cpp"
#define WIDTH 16
#include "ssd_backward.cpp"
#endif

// Shares out `memory` and returns how many floats it has to be, which is all if it is null.
static int64_t place_work(const Ssd &s, BackwardWork &w, float *memory) {
    const int64_t p = whole(s.p), n = whole(s.n);
    int64_t used = 0;
    auto place = [&](float *&array, int64_t size) {
        array = memory + used;
        used += size;
    };
    for (float **array : {&w.x, &w.u, &w.ended, &w.dlinear, &w.started, &w.dlinear_transposed})
        place(*array, CHUNK * p);
    for (float **array : {&w.decays, &w.weights, &w.dproducts, &w.dlogs}) place(*array, CHUNK * CHUNK);
    for (float **array : {&w.dB, &w.dC}) place(*array, CHUNK * n);
    for (float **array : {&w.state, &w.dstate}) place(*array, p * n);
    for (float **array : {&w.spanning, &w.entering, &w.leaving, &w.stepping}) place(*array, CHUNK * WIDEST);
    place(w.dsteps, heads_of_group(s) * CHUNK);
    place(w.D, p);
    place(w.dD, p);
    return used;
}

static int lanes_of(const Ssd &s) { return s.width ? s.width : mamba_scan_width(); }

static void prepare_one(const void *argument, int64_t index, void *memory) {
    const Span &span = *((const Gradients *)argument)->span;
    const int64_t row = index / span.count, chunk = span.first + index % span.count;
    FOR_LANES(lanes_of(*span.ssd), prepare)(span, row, chunk, (float *)memory);
}

static void pass_one(const void *argument, int64_t index, void *memory) {
    const Gradients &gradients = *(const Gradients *)argument;
    const Ssd &s = *gradients.span->ssd;
    FOR_LANES(lanes_of(s), pass_back)(gradients, index / s.h, index % s.h, (float *)memory);
}

static void differentiate_one(const void *argument, int64_t index, void *memory) {
    const Gradients &gradients = *(const Gradients *)argument;
    const Ssd &s = *gradients.span->ssd;
    const Span &span = *gradients.span;
    BackwardWork w;
    place_work(s, w, (float *)memory);
    const int64_t group = index % s.g, chunk = span.first + index / s.g % span.count, row = index / s.g / span.count;
    FOR_LANES(lanes_of(s), differentiate)(gradients, w, row, chunk, group);
}

// Adds what the chunks of a span give to the sums over all positions, the last chunk first.
static void add_sums(const Gradients &gradients, double *totals) {
    const Ssd &s = *gradients.span->ssd;
    const int64_t first = gradients.span->first, size = Gradients::sums_size(s);
    for (int64_t row = 0; row < s.b; row++)
        for (int64_t chunk = first + gradients.span->count - 1; chunk >= first; chunk--) {
            const float *sums = gradients.sums_of(row, chunk);
            for (int64_t k = 0; k < size; k++) totals[row * size + k] += sums[k];
        }
}

static void write_sums(const Ssd &s, double *totals) {
    const int64_t size = Gradients::sums_size(s);
    for (int64_t row = 1; row < s.b; row++)
        for (int64_t k = 0; k < size; k++) totals[k] += totals[row * size + k];
    for (int64_t head = 0; head < s.h; head++) {
        s.dA[head] = (float)totals[head];
        if (s.ddt_bias) s.ddt_bias[head] = (float)totals[s.h + head];
        double *of_head = totals + 2 * s.h + head * s.p, all = 0.0;
        for (int64_t c = 0; c < s.p; c++) {
            all += of_head[c];
            if (s.dD && s.D_per_channel) s.dD[head * s.p + c] = (float)of_head[c];
        }
        if (s.dD && !s.D_per_channel) s.dD[head] = (float)all;
    }
}

// One span: its gradients of the states, and then all others.
static bool differentiate_span(const Gradients &gradients) {
    const Span &span = *gradients.span;
    const Ssd &s = *span.ssd;
    BackwardWork w;
    const int64_t threads = threads_worth(s.threads, 1 + (s.b * span.count * CHUNK * s.h * s.p * s.n >> 17));
    const size_t to_pass = sizeof(float) * CHUNK * whole(s.p);
    const size_t to_differentiate = sizeof(float) * place_work(s, w, nullptr);
    return run_tasks(prepare_one, &gradients, s.b * span.count, threads, sizeof(float) * operand_size(s)) &&
           run_tasks(pass_one, &gradients, s.b * s.h, threads, to_pass) &&
           run_tasks(differentiate_one, &gradients, s.b * span.count * s.g, threads, to_differentiate);
}

int32_t mamba_ssd_backward(const Ssd *ssd) {
    const Ssd &s = *ssd;
    const int64_t of_states = s.h * state_size(s), of_sums = Gradients::sums_size(s);
    const int64_t of_chunk = span_floats(s) + of_states + of_sums, length = span_length(s, of_chunk);
    float *memory = allocate(s.b * (length * of_chunk + of_states));
    double *totals = (double *)calloc(s.b * of_sums, sizeof(double));
    bool done = memory && totals;
    if (done) FOR_LANES(lanes_of(s), begin_carried)(s, memory);
    for (int64_t end = chunks_of(s); done && end > 0; end -= length) {
        const int64_t first = end < length ? 0 : end - length;
        Span span = {ssd, first, end - first, true, nullptr, nullptr, nullptr, nullptr};
        float *states = place_span(span, memory + s.b * of_states);
        const Gradients gradients = {&span, states, memory, states + s.b * span.count * of_states};
        // What is carried stands after the span's last chunk.
        for (int64_t row = 0; row < s.b; row++)
            memcpy(gradients.after(row, end - 1, 0), memory + row * of_states, sizeof(float) * of_states);
        done = differentiate_span(gradients);
        if (done) add_sums(gradients, totals);
    }
    if (done) {
        write_sums(s, totals);
        FOR_LANES(lanes_of(s), end_carried)(s, memory);
    }
    free(totals);
    free(memory);
    return !done;
}

#else  // Compiled once for each width.

#include "ssd_tiles.h"

BEGIN_WIDTH

// The gradient of the final state, (b, h, n, p), and at the end that of the initial one.
static void begin_carried(const Ssd &s, float *carried) {
    for (int64_t k = 0; k < s.b * s.h; k++)
        if (s.dfinal_state)
            transpose_into(carried + k * state_size(s), whole(s.p), s.dfinal_state + k * s.p * s.n, s.n, s.p, s.n);
        else
            memset(carried + k * state_size(s), 0, sizeof(float) * state_size(s));
}
static void end_carried(const Ssd &s, const float *carried) {
    for (int64_t k = 0; s.dinitial_state && k < s.b * s.h; k++)
        transpose_back(s.dinitial_state + k * s.p * s.n, carried + k * state_size(s), whole(s.p), s.p, s.n);
}

// The gradients of a head's states over a span, from the last to the first.
static void pass_back(const Gradients &gradients, int64_t row, int64_t head, float *started) {
    const Span &span = *gradients.span;
    const Ssd &s = *span.ssd;
    const int64_t p = whole(s.p);
    Decays decays;
    for (int64_t chunk = span.first + span.count - 1; chunk >= span.first; chunk--) {
        const Runs runs = runs_of(s, row, chunk);
        find_decays(decays, span.steps_of(row, chunk, head), s.A[head], runs);
        for (int64_t t = 0; t < runs.entered; t++) {
            const bool masked = is_masked(s, row, chunk * CHUNK + t);
            for (int64_t c = 0; c < p; c += WIDTH) {
                V value = {};
                if (!masked && c < s.p)
                    value = decays.start[t] * dlinear_of(s, row, chunk * CHUNK + t, head * s.p + c, s.p - c);
                store(started + t * p + c, value);
            }
        }
        const float *C = span.C + span.operand(row, chunk, head / heads_of_group(s));
        const Passed passed = {C, started, gradients.after(row, chunk, head), gradients.after(row, chunk - 1, head),
                               whole(s.n), p, 0, runs.entered, decays.through};
        for_tiles(passed, 0, s.n, 0, p);
    }
}

// Of each position k, lane by lane: the sum over j < k <= i of the logarithms' gradients between j and i.
static void sum_spanning(const Chunk &c) {
    for (int64_t k = 0; k < c.runs.count; k++) {
        const int64_t first = c.runs.bounds[k], end = c.runs.bounds[k + 1];
        for (int64_t i = first / WIDTH * WIDTH; i < end; i += WIDTH) {
            V before = {};
            const V numbers = numbers_from(i);
            for (int64_t j = first; j < end && j < i + WIDTH; j++) {
                float *to = c.w.spanning + j * WIDEST;
                store(to, load(to) + (numbers < (float)j ? V{} : before));
                before += load(c.w.dlogs + j * CHUNK + i);
            }
        }
    }
}

INLINE float sum_of(const float *lanes) {
    float sum = 0.0f;
    for (int lane = 0; lane < WIDTH; lane++) sum += lanes[lane];
    return sum;
}

// through h dh, summed: the gradient of the logarithm of all of the chunk.
static float sum_through(const Chunk &c) {
    const float through = c.w.of_head.through;
    if (through == 0.0f) return 0.0f;
    const float *state = boundary(c.s, c.row, c.chunk, c.head), *dstate = c.gradients.after(c.row, c.chunk, c.head);
    V sums[4] = {};
    for (int64_t k = 0; k < state_size(c.s); k += WIDTH) sums[k / WIDTH % 4] += load(state + k) * load(dstate + k);
    float lanes[WIDTH];
    store(lanes, (sums[0] + sums[1]) + (sums[2] + sums[3]));
    return through * sum_of(lanes);
}

// The gradients of a head's step sizes, and its part of dA. Each logarithm is in the decays that span its position:
// sums of what spans it, and no differences of larger sums, of which next to nothing would be left after a long step.
static void find_dsteps(const Chunk &c, float *dsteps) {
    const BackwardWork &w = c.w;
    float dlog[CHUNK], after = 0.0f, before = 0.0f, dA = 0.0f;
    const float through = sum_through(c);
    // No logarithm matters beside an infinite rate: their gradients are zero, and so is the product.
    const float rate = c.s.A[c.head] < -FLT_MAX ? -FLT_MAX : c.s.A[c.head];
    for (int64_t t = c.steps() - 1; t >= 0; t--) {
        if (t < c.runs.entered) after += sum_of(w.entering + t * WIDEST);
        dlog[t] = sum_of(w.spanning + t * WIDEST) + (t < c.runs.entered ? after : 0.0f) + through;
    }
    for (int64_t t = c.runs.leaving; t < c.steps(); t++) {
        dlog[t] += before;
        before += sum_of(w.leaving + t * WIDEST);
    }
    for (int64_t t = 0; t < c.steps(); t++) {
        dsteps[t] = dlog[t] * rate + sum_of(w.stepping + t * WIDEST);
        dA += dlog[t] * c.step()[t];
    }
    c.gradients.sums_of(c.row, c.chunk)[c.head] = dA;
}

static void differentiate_head(const Chunk &c) {
    const Ssd &s = c.s;
    BackwardWork &w = c.w;
    const int64_t p = whole(s.p), n = whole(s.n), steps = c.steps(), leaving = c.runs.leaving;
    const float *state = boundary(s, c.row, c.chunk, c.head);
    find_decays(w.of_head, c.step(), s.A[c.head], c.runs);
    load_head(c);
    transpose_into(w.state, n, state, p, s.n, s.p);
    transpose_into(w.dstate, n, c.gradients.after(c.row, c.chunk, c.head), p, s.n, s.p);
    memset(w.spanning, 0, sizeof(float) * 4 * CHUNK * WIDEST);
    find_decays_between(c);
    for (int64_t k = 0; k < c.runs.count; k++) {
        const int64_t first = c.runs.bounds[k], end = c.runs.bounds[k + 1];
        for_tiles(DWeights{c}, first, end, first / WIDEST * WIDEST, whole(end));
        for_tiles(DInputs{c, first, end}, first, end, 0, p);
        if (s.dz.data) for_tiles(DGates{c, state, first, end <= c.runs.entered}, first, end, 0, p);
    }
    for_tiles(DStarted{c}, 0, c.runs.entered, 0, n);
    for_tiles(Added<false>{w.ended, w.dstate, w.dB, p, n, s.p}, leaving, steps, 0, n);
    sum_spanning(c);
    find_dsteps(c, w.dsteps + c.head % heads_of_group(s) * CHUNK);
    memcpy(c.gradients.sums_of(c.row, c.chunk) + 2 * s.h + c.head * s.p, w.dD, sizeof(float) * s.p);
}

// From the gradients of a group's step sizes, those of what they were before the softplus and the limits.
static void write_ddt(const Chunk &c) {
    const Ssd &s = c.s;
    const int64_t heads = heads_of_group(s), first = c.group * heads;
    float *dbias = c.gradients.sums_of(c.row, c.chunk) + s.h + first;
    memset(dbias, 0, sizeof(float) * heads);
    for (int64_t t = 0; t < c.steps(); t++) {
        const bool masked = c.masked(t);
        for (int64_t k = 0; k < heads; k += WIDTH) {
            const int64_t left = heads - k < WIDTH ? heads - k : WIDTH;
            float lanes[WIDTH] = {};
            for (int64_t j = 0; j < left; j++) lanes[j] = c.w.dsteps[(k + j) * CHUNK + t];
            V value = load(lanes);
            if (masked) {
                value = V{};
            } else {
                const Step step = step_of(s, c.row, c.position(t), first + k);
                value = step.unlimited < s.least ? V{} : value;
                value = step.unlimited > s.most ? V{} : value;
                if (s.dt_softplus) value *= sigmoid(step.raw);
            }
            write(element(s, s.ddt, c.row, c.position(t), first + k), value, left, s.bfloat16);
            write_float(dbias + k, read_float(dbias + k, left) + value, left);
        }
    }
}

static void differentiate(const Gradients &gradients, BackwardWork &w, int64_t row, int64_t chunk, int64_t group) {
    const Span &span = *gradients.span;
    const Ssd &s = *span.ssd;
    const int64_t n = whole(s.n), heads = heads_of_group(s);
    const Runs runs = runs_of(s, row, chunk);
    memset(w.dproducts, 0, sizeof(float) * CHUNK * CHUNK);
    memset(w.dB, 0, sizeof(float) * CHUNK * n);
    memset(w.dC, 0, sizeof(float) * CHUNK * n);
    Chunk c = {gradients, span, s, w, runs, row, chunk, group, 0};
    for (int64_t k = 0; k < heads; k++) {
        c.head = group * heads + k;
        differentiate_head(c);
    }
    for (int64_t k = 0; k < runs.count; k++) {
        const int64_t first = runs.bounds[k], end = runs.bounds[k + 1];
        const Added<true> to_C = {w.dproducts + first * CHUNK, c.B() + first * n, w.dC, CHUNK, n, end - first};
        const Added<false> to_B = {w.dproducts + first, c.C() + first * n, w.dB, CHUNK, n, end - first};
        for_tiles(to_C, first, end, 0, n);
        for_tiles(to_B, first, end, 0, n);
    }
    for (int64_t t = 0; t < c.steps(); t++)
        for (int64_t k = 0; k < s.n; k += WIDTH) {
            const int64_t at = t * n + k, channel = group * s.n + k;
            write(element(s, s.dB, row, c.position(t), channel), load(w.dB + at), s.n - k, s.bfloat16);
            write(element(s, s.dC, row, c.position(t), channel), load(w.dC + at), s.n - k, s.bfloat16);
        }
    write_ddt(c);
}

END_WIDTH

#undef WIDTH

#endif
