// Products of a few rows with matrices that are read once, straight through the memory and past the caches.

#ifndef WIDTH

#include <string.h>

#include "products.h"

// Weights are asked for so many bytes before they are read.
constexpr int64_t AHEAD = 2048;

#define WIDTH 4
#include "products.cpp"
#ifdef __x86_64__
#define WIDTH 8
#include "products.cpp"
#define WIDTH 16
#include "products.cpp"
#endif

#else  // Compiled once for each width.

#include "products.h"

BEGIN_WIDTH

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

void multiply_parts(const Product &p, Range outputs, Range inputs) {
    (p.bfloat16 ? product_of_all<true> : product_of_all<false>)(p, outputs, inputs);
}

END_WIDTH

#undef WIDTH

#endif
