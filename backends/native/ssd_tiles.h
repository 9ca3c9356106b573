// What the gradient of the ssd computes of one chunk and head, by tiles of matrices. A source that includes itself once a
// width includes this file there too.

#ifndef SSD_TILES_H
#define SSD_TILES_H

#include "ssd_chunk.h"

// The gradients of the states of a span: after chunk k at k, and before the first chunk at -1, in `carried`.
struct Gradients {
    const Span *span;
    float *states, *carried;
    // Of each row and chunk: dA (h,), ddt_bias (h,) and dD (h, p).
    float *sums;

    float *after(int64_t row, int64_t chunk, int64_t head) const {
        const Ssd &s = *span->ssd;
        if (chunk < span->first) return carried + (row * s.h + head) * state_size(s);
        return states + (span->index(row, chunk) * s.h + head) * state_size(s);
    }
    float *sums_of(int64_t row, int64_t chunk) const { return sums + span->index(row, chunk) * sums_size(*span->ssd); }
    static int64_t sums_size(const Ssd &s) { return s.h * (2 + s.p); }
};

// What a thread computes in. (CHUNK, p): x, u and what is left of it at the chunk's end, the gradient of y before the
// gate, and its part that reaches the state before the chunk. (CHUNK, CHUNK), rows of j and columns of i: decays,
// weights, the gradients of products and of logarithms between positions. (CHUNK, n): dB, dC. (n, p) transposed: a
// state and a gradient. A position's sums lane by lane: `spanning`, `started`, `stepped`, `ended`.
struct BackwardWork {
    float *x, *u, *ended, *dlinear, *started, *dlinear_transposed;
    float *decays, *weights, *dproducts, *dlogs;
    float *dB, *dC, *state, *dstate;
    float *spanning, *entering, *leaving, *stepping;
    float *dsteps, *D, *dD;
    Decays of_head;
};

#endif

#ifdef WIDTH

#include "ssd_chunk.h"

BEGIN_WIDTH

// The gradient of y before its gate: `left` channels of a position that counts.
INLINE V dlinear_of(const Ssd &s, int64_t row, int64_t t, int64_t channel, int64_t left) {
    V value = read(element(s, s.dy, row, t, channel), left, s.bfloat16);
    if (s.z.data) {
        const V gate = read(element(s, s.z, row, t, channel), left, s.bfloat16);
        value *= gate * sigmoid(gate);
    }
    return value;
}

// One chunk and group of a row; `head` changes.
struct Chunk {
    const Gradients &gradients;
    const Span &span;
    const Ssd &s;
    BackwardWork &w;
    const Runs &runs;
    int64_t row, chunk, group, head;

    int64_t position(int64_t t) const { return chunk * CHUNK + t; }
    int64_t steps() const { return runs.bounds[runs.count]; }
    bool masked(int64_t t) const { return is_masked(s, row, position(t)); }
    const float *B() const { return span.B + span.operand(row, chunk, group); }
    const float *C() const { return span.C + span.operand(row, chunk, group); }
    const float *products() const { return span.products_of(row, chunk, group); }
    const float *step() const { return span.steps_of(row, chunk, head); }
};

static void load_head(const Chunk &c) {
    const Ssd &s = c.s;
    BackwardWork &w = c.w;
    const int64_t p = whole(s.p);
    memset(w.dD, 0, sizeof(float) * p);
    load_D(s, w.D, c.head);
    for (int64_t t = 0; t < c.steps(); t++) {
        const float start = w.of_head.start[t], end = w.of_head.end[t];
        const bool masked = c.masked(t);
        for (int64_t k = 0; k < p; k += WIDTH) {
            const int64_t at = t * p + k, channel = c.head * s.p + k;
            V x = {}, dlinear = {};
            if (!masked && k < s.p) {
                x = read(element(s, s.x, c.row, c.position(t), channel), s.p - k, s.bfloat16);
                dlinear = dlinear_of(s, c.row, c.position(t), channel, s.p - k);
            }
            const V u = c.step()[t] * x;
            store(w.x + at, x);
            store(w.u + at, u);
            store(w.ended + at, end == 0.0f ? V{} : end * u);
            store(w.dlinear + at, dlinear);
            store(w.started + at, start * dlinear);
            store(w.dD + k, load(w.dD + k) + dlinear * x);
        }
    }
    transpose_into(w.dlinear_transposed, CHUNK, w.dlinear, p, c.steps(), p);
}

// What passes from each j to each later i, and the weights that this gives u_j in y_i, of its run; else zero.
static void find_decays_between(const Chunk &c) {
    const Decays &d = c.w.of_head;
    for (int64_t k = 0; k < c.runs.count; k++)
        for (int64_t j = c.runs.bounds[k]; j < c.runs.bounds[k + 1]; j++) {
            const V on_grid = splat(d.on_grid[j]), off_grid = splat(d.off_grid[j]);
            const float first = (float)j, end = (float)c.runs.bounds[k + 1];
            for (int64_t i = c.runs.bounds[k] / WIDEST * WIDEST; i < CHUNK; i += WIDTH) {
                const V number = numbers_from(i), zero = {};
                const V decay = power_of_2((load(d.on_grid + i) - on_grid) + (load(d.off_grid + i) - off_grid));
                const V weight = decay * load(c.products() + j * CHUNK + i);
                store(c.w.decays + j * CHUNK + i, number < first ? zero : decay);
                store(c.w.weights + j * CHUNK + i, number < first ? zero : number < end ? weight : zero);
            }
        }
}

// From the gradients of the weights, those of the products B C^T and of the logarithms between two positions.
struct DWeights {
    const Chunk &c;
    template <int ROWS, int VECS> void at(int64_t j, int64_t column) const {
        if (column + VECS * WIDTH <= j) return;
        BackwardWork &w = c.w;
        const int64_t p = whole(c.s.p);
        V sums[ROWS][VECS] = {};
        multiply<false>(sums, w.u + j * p, p, w.dlinear_transposed + column, CHUNK, c.s.p);
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECS; v++) {
                const int64_t at = (j + r) * CHUNK + column + v * WIDTH;
                const V weight = load(w.weights + at), zero = {};
                store(w.dproducts + at, load(w.dproducts + at) + sums[r][v] * load(w.decays + at));
                // What is not of one run passes nothing on, be it Inf or NaN.
                store(w.dlogs + at, weight == zero ? zero : sums[r][v] * weight);
            }
    }
};

// The gradient of u, and from it those of x and of the step sizes.
struct DInputs {
    const Chunk &c;
    int64_t first, end;
    template <int ROWS, int VECS> void at(int64_t j, int64_t column) const {
        const BackwardWork &w = c.w;
        const int64_t n = whole(c.s.n), p = whole(c.s.p);
        V sums[ROWS][VECS] = {};
        if (j >= c.runs.leaving) {
            const float *dstate = c.gradients.after(c.row, c.chunk, c.head);
            multiply<false>(sums, c.B() + j * n, n, dstate + column, p, c.s.n);
            for (int r = 0; r < ROWS; r++) {
                V total = load(w.leaving + (j + r) * WIDEST);
                for (int v = 0; v < VECS; v++) {
                    sums[r][v] *= w.of_head.end[j + r];
                    total += sums[r][v] * load(w.u + (j + r) * p + column + v * WIDTH);
                }
                store(w.leaving + (j + r) * WIDEST, total);
            }
        }
        multiply<false>(sums, w.weights + j * CHUNK + j, CHUNK, w.dlinear + j * p + column, p, end - j);
        for (int r = 0; r < ROWS; r++) {
            V total = load(w.stepping + (j + r) * WIDEST);
            for (int v = 0; v < VECS; v++) {
                const int64_t k = column + v * WIDTH, at = (j + r) * p + k;
                total += sums[r][v] * load(w.x + at);
                write_dx(j + r, k, sums[r][v] * c.step()[j + r] + load(w.dlinear + at) * load(w.D + k));
            }
            store(w.stepping + (j + r) * WIDEST, total);
        }
    }
    INLINE_MEMBER void write_dx(int64_t j, int64_t column, V value) const {
        const int64_t left = c.s.p - column;
        if (left <= 0) return;
        char *to = element(c.s, c.s.dx, c.row, c.position(j), c.head * c.s.p + column);
        write(to, c.masked(j) ? V{} : value, left, c.s.bfloat16);
    }
};

// What a head's state before the chunk gives dC, and the logarithms up to each position.
struct DStarted {
    const Chunk &c;
    template <int ROWS, int VECS> void at(int64_t i, int64_t column) const {
        const BackwardWork &w = c.w;
        const int64_t n = whole(c.s.n), p = whole(c.s.p);
        V sums[ROWS][VECS] = {};
        multiply<false>(sums, w.started + i * p, p, w.state + column, n, c.s.p);
        for (int r = 0; r < ROWS; r++) {
            V total = load(w.entering + (i + r) * WIDEST);
            for (int v = 0; v < VECS; v++) {
                const int64_t at = (i + r) * n + column + v * WIDTH;
                total += sums[r][v] * load(c.C() + at);
                store(w.dC + at, load(w.dC + at) + sums[r][v]);
            }
            store(w.entering + (i + r) * WIDEST, total);
        }
    }
};

// Adds left times right to a matrix of rows of n.
template <bool TRANSPOSED> struct Added {
    const float *left, *right;
    float *to;
    int64_t left_stride, n, count;
    template <int ROWS, int VECS> void at(int64_t row, int64_t column) const {
        V sums[ROWS][VECS];
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECS; v++) sums[r][v] = load(to + (row + r) * n + column + v * WIDTH);
        const float *from = TRANSPOSED ? left + row : left + row * left_stride;
        multiply<TRANSPOSED>(sums, from, left_stride, right + column, n, count);
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECS; v++) store(to + (row + r) * n + column + v * WIDTH, sums[r][v]);
    }
};

// y before its gate, for the gate's gradient.
struct DGates {
    const Chunk &c;
    const float *state;
    int64_t first;
    bool entered;
    template <int ROWS, int VECS> void at(int64_t i, int64_t column) const {
        const BackwardWork &w = c.w;
        const int64_t n = whole(c.s.n), p = whole(c.s.p);
        V sums[ROWS][VECS] = {};
        if (entered) {
            multiply<false>(sums, c.C() + i * n, n, state + column, p, c.s.n);
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < VECS; v++) sums[r][v] *= w.of_head.start[i + r];
        }
        multiply<true>(sums, w.weights + first * CHUNK + i, CHUNK, w.u + first * p + column, p, i + ROWS - first);
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECS; v++) {
                const int64_t k = column + v * WIDTH;
                write_dz(i + r, k, sums[r][v] + load(w.D + k) * load(w.x + (i + r) * p + k));
            }
    }
    INLINE_MEMBER void write_dz(int64_t i, int64_t column, V linear) const {
        const Ssd &s = c.s;
        const int64_t left = s.p - column, channel = c.head * s.p + column;
        if (left <= 0) return;
        V value = {};
        if (!c.masked(i)) {
            const V z = read(element(s, s.z, c.row, c.position(i), channel), left, s.bfloat16), gate = sigmoid(z);
            value = linear * read(element(s, s.dy, c.row, c.position(i), channel), left, s.bfloat16);
            value *= gate * (1.0f + z * (1.0f - gate));
        }
        write(element(s, s.dz, c.row, c.position(i), channel), value, left, s.bfloat16);
    }
};

END_WIDTH

#endif
