// Products of a few rows with matrices that are read once, how they are shared out in tasks, and how their sums are
// collected. The functions take any step with `b`, `bfloat16`, `transposed` and `threads`. A source that includes itself
// once a width includes this file there too.

#ifndef PRODUCTS_H
#define PRODUCTS_H

#include "steps.h"
#include "vectors.h"

// The most outputs of one task. They are few, so that no thread waits long for another's last task, and enough to read
// long stretches of memory. Where `transposed`, they are those whose sums the first cache holds. The inputs are then
// shared out as well, and the sums over each part of them are added up afterwards. The number of parts depends on the
// sizes only, and so does the order of sums.
constexpr int64_t OUTPUTS = 96, OUTPUTS_TRANSPOSED = 4096, FEWEST_PARTS = 4, MOST_PARTS = 16;

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

#endif

#ifdef WIDTH

#include "vectors.h"

BEGIN_WIDTH

// p.y is where the first output goes. `inputs` are all inputs unless the matrix is transposed.
void multiply_parts(const Product &p, Range outputs, Range inputs);

// One task of a product. `collected` then adds up its sums.
template <class Step>
static void project_task(const Step &s, float *sums, const Matrix &matrix, const float *x, int64_t x_stride,
                         int64_t inputs, int64_t outputs, int64_t task) {
    const Tiling tiling = tiling_of(s, outputs);
    const int64_t part = task / tiling.columns;
    const int64_t size = divide_up(inputs, tiling.parts);
    const Range its_outputs = range_of(outputs, tiling.outputs, task % tiling.columns);
    const Range its_inputs = tiling.parts > 1 ? range_of(inputs, size, part) : Range{0, inputs};
    float *y = sums + part * s.b * outputs + its_outputs.first;
    multiply_parts({matrix, s.b, inputs, outputs, !!s.bfloat16, !!s.transposed, x, x_stride, y, outputs}, its_outputs,
                   its_inputs);
}

// A product's sums over all parts, and its bias: `left` of the outputs, from `first` on.
template <class Step>
INLINE V collected(const Step &s, const float *sums, const Matrix &matrix, int64_t parts, int64_t outputs, int64_t row,
                   int64_t first, int64_t left) {
    const float *from = sums + row * outputs + first;
    V total = read_float(from, left);
    for (int64_t part = 1; part < parts; part++) total += read_float(from + part * s.b * outputs, left);
    if (matrix.bias) total += read(matrix.bias + (s.bfloat16 ? 2 : 4) * first, left, s.bfloat16);
    return total;
}

END_WIDTH

#endif
