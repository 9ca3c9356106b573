// The scan's arithmetic without its memory, for benchmarks: an exponential and three multiply-adds a position, channel
// and state, in registers.

#ifndef WIDTH

#include "scan.h"
#include "tasks.h"
#include "vectors.h"

struct Floor {
    int64_t l, n;
    // Keeps the compiler from leaving out what nobody reads.
    volatile float result;
};

// Channels of a task, as the scan's.
constexpr int64_t FLOOR_BLOCK = 64;

#define WIDTH 4
#include "scan_floor.cpp"
#ifdef __x86_64__
#define WIDTH 8
#include "scan_floor.cpp"
#define WIDTH 16
#include "scan_floor.cpp"
#endif

EXPORT int32_t mamba_scan_floor(int64_t b, int64_t l, int64_t e, int64_t n, int32_t threads) {
    Floor floor = {l, n, 0.0f};
    auto function = width4::arithmetic;
#ifdef __x86_64__
    if (mamba_scan_width() >= 8) function = width8::arithmetic;
    if (mamba_scan_width() >= 16) function = width16::arithmetic;
#endif
    return !run_tasks(function, &floor, b * divide_up(e, FLOOR_BLOCK), threads, 0);
}

#else  // What is compiled for each width.

#include "vectors.h"

BEGIN_WIDTH

static void arithmetic(const void *argument, int64_t, void *) {
    // Four states at a time keep every unit busy while one waits for its last result.
    constexpr int64_t STATES = 4;
    Floor &floor = *(Floor *)argument;
    V total = V{};
    for (int64_t c = 0; c < FLOOR_BLOCK; c += WIDTH)
        for (int64_t k = 0; k < floor.n; k += STATES) {
            V A[STATES], h[STATES], step = splat(1e-3f), u = splat(1e-3f);
            for (int j = 0; j < STATES; j++) A[j] = splat(-1.0f - j - k), h[j] = V{};
            for (int64_t t = 0; t < floor.l; t++) {
                step += 1e-6f;
                for (int j = 0; j < STATES; j++) {
                    h[j] = decay_of(step, A[j]) * h[j] + u * step;
                    total += h[j] * u;
                }
            }
        }
    floor.result = total[0];
}

END_WIDTH

#undef WIDTH

#endif
