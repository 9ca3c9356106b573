// The sum of a residual block and the root mean square norm of the next on CPUs, in one pass over the residual stream:
// what `RMSNorm` computes. A plain C ABI; the file includes itself once a vector width.

#ifndef WIDTH

#include <math.h>

#include "scan.h"
#include "tasks.h"
#include "vectors.h"

// Rows of a task.
constexpr int64_t NORM_ROWS = 16;

#define WIDTH 4
#include "add_norm.cpp"
#ifdef __x86_64__
#define WIDTH 8
#include "add_norm.cpp"
#define WIDTH 16
#include "add_norm.cpp"
#endif

EXPORT int32_t mamba_add_norm(const AddNorm *add_norm) {
    const AddNorm &s = *add_norm;
    const int32_t width = s.width ? s.width : mamba_scan_width();
    auto function = width4::add_norm;
#ifdef __x86_64__
    if (width >= 8) function = width8::add_norm;
    if (width >= 16) function = width16::add_norm;
#endif
    // In float32, for the second pass over a row.
    const size_t row = sizeof(float) * divide_up(s.d, WIDEST) * WIDEST;
    const int64_t threads = threads_worth(s.threads, 1 + (s.rows * s.d >> 17));
    return !run_tasks(function, &s, divide_up(s.rows, NORM_ROWS), threads, row);
}

#else  // What is compiled for each width.

#include "vectors.h"

BEGIN_WIDTH

template <bool BFLOAT16, bool RESIDUAL_BFLOAT16>
static void add_norm_row(const AddNorm &s, int64_t row, float *sums) {
    constexpr int64_t SIZE = BFLOAT16 ? 2 : 4, RESIDUAL_SIZE = RESIDUAL_BFLOAT16 ? 2 : 4;
    const bool adds = s.hidden;
    const char *residual = s.residual + RESIDUAL_SIZE * row * s.d;
    const char *hidden = adds ? s.hidden + SIZE * row * s.d : nullptr;
    char *total = adds ? s.total + RESIDUAL_SIZE * row * s.d : nullptr, *normed = s.normed + SIZE * row * s.d;
    V squares = {};
    for (int64_t i = 0; i < s.d; i += WIDTH) {
        int64_t left = s.d - i;
        V sum = read(residual + RESIDUAL_SIZE * i, left, RESIDUAL_BFLOAT16);
        if (adds) {
            sum += read(hidden + SIZE * i, left, BFLOAT16);
            write(total + RESIDUAL_SIZE * i, sum, left, RESIDUAL_BFLOAT16);
            if (RESIDUAL_BFLOAT16) sum = read(total + RESIDUAL_SIZE * i, left, true);
        }
        store(sums + i, sum);
        squares += sum * sum;
    }
    float square = 0;
    for (int lane = 0; lane < WIDTH; lane++) square += squares[lane];
    const float scale = 1.0f / sqrtf(square / s.d + s.eps);
    for (int64_t i = 0; i < s.d; i += WIDTH) {
        int64_t left = s.d - i;
        write(normed + SIZE * i, load(sums + i) * scale * read(s.weight + SIZE * i, left, BFLOAT16), left, BFLOAT16);
    }
}

static void add_norm(const void *argument, int64_t index, void *work) {
    const AddNorm &s = *(const AddNorm *)argument;
    auto row = s.bfloat16 ? s.residual_bfloat16 ? add_norm_row<true, true> : add_norm_row<true, false>
                          : s.residual_bfloat16 ? add_norm_row<false, true> : add_norm_row<false, false>;
    for (int64_t k = index * NORM_ROWS; k < s.rows && k < (index + 1) * NORM_ROWS; k++) row(s, k, (float *)work);
}

END_WIDTH

#undef WIDTH

#endif
