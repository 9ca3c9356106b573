// As harness.cpp, of the kernels for one position.

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <utility>

#include <vector>

#include "steps.h"

static uint32_t seed = 1;
static std::vector<std::vector<char>> arrays;

// An array of exactly its size, so that a sanitizer sees what lies beyond; it lives as long as the program.
static char *drawn(int64_t count, bool bfloat16) {
    const int64_t size = bfloat16 ? 2 : 4;
    std::vector<char> values(count * size);
    for (int64_t k = 0; k < count; k++) {
        seed = seed * 1664525u + 1013904223u;
        float value = (int32_t)seed / 8589934592.0f;
        memcpy(&values[k * size], (char *)&value + 4 - size, size);
    }
    arrays.push_back(std::move(values));
    return arrays.back().data();
}
static float *floats(int64_t count) { return (float *)drawn(count, false); }

// Two blocks, the second in the memory of its states and of the residual stream.
static bool blocks(int width, int threads, bool bfloat16, bool transposed, int64_t b, float selection_eps) {
    const int64_t d = 200, e = 401, n = 21, k = 4, r = 13, state = b * (k - 1) * e;
    auto compute = [=](int64_t count) { return drawn(count, bfloat16); };
    char *residual = drawn(b * d, false), *after = drawn(b * d, false);
    MambaStep steps[2];
    for (int place = 0; place < 2; place++) {
        char *conv = compute(state);
        float *ssm = floats(b * e * n);
        steps[place] = {b, d, e, n, k, r, bfloat16, false, transposed, threads, width, 1e-5f,
                        place ? after : residual, conv, ssm, compute(d),
                        {compute(2 * e * d), compute(2 * e)}, {compute(e * k), compute(e)},
                        {compute((r + 2 * n) * e), nullptr}, {compute(d * e), compute(d)}, compute(e * r),
                        floats(e), floats(e * n), floats(e),
                        after, place ? conv : compute(state), place ? ssm : floats(b * e * n),
                        place ? compute(r) : nullptr, place ? compute(n) : nullptr, place ? compute(n) : nullptr,
                        selection_eps};
    }
    bool done = !mamba_mamba_steps(steps, 2);
    fwrite(after, 4, b * d, stdout);
    for (const MambaStep &step : steps) fwrite(step.new_ssm_state, 4, b * e * n, stdout);
    return done;
}

// The same of blocks whose recurrence is the ssd: with channels beside it, a norm before the gate and D a channel, or
// without a norm.
static bool ssd_blocks(int width, int threads, bool bfloat16, bool transposed, int64_t b, bool normed) {
    const int64_t d = 200, h = 6, p = 35, n = 21, g = 3, k = 4, beside = normed ? 19 : 0;
    const int64_t e = h * p, filters = e + 2 * g * n, outputs = 2 * beside + e + filters + h, inner = beside + e;
    const int64_t state = b * (k - 1) * filters;
    auto compute = [=](int64_t count) { return drawn(count, bfloat16); };
    char *residual = drawn(b * d, false), *after = drawn(b * d, false);
    SsdStep steps[2];
    for (int place = 0; place < 2; place++) {
        char *conv = compute(state);
        float *ssm = floats(b * e * n);
        steps[place] = {b, d, h, p, n, g, k, beside, bfloat16, false, transposed, threads, width, normed, place > 0,
                        1e-5f, 1e-5f, 1e-3f, 0.5f, place ? after : residual, conv, ssm, compute(d),
                        {compute(outputs * d), compute(outputs)}, {compute(filters * k), compute(filters)},
                        {compute(d * inner), compute(d)}, floats(h), floats(h), floats(normed ? e : h),
                        normed ? compute(e) : nullptr,
                        after, place ? conv : compute(state), place ? ssm : floats(b * e * n)};
    }
    bool done = !mamba_ssd_steps(steps, 2);
    fwrite(after, 4, b * d, stdout);
    for (const SsdStep &step : steps) fwrite(step.new_ssm_state, 4, b * e * n, stdout);
    return done;
}

static bool head(int width, int threads, bool bfloat16, bool transposed, int64_t b) {
    const int64_t inputs = 70, outputs = 4501;
    float *y = floats(b * outputs);
    Matrix matrix = {drawn(inputs * outputs, bfloat16), drawn(outputs, bfloat16)};
    LinearStep step = {b, inputs, outputs, bfloat16, transposed, threads, width, drawn(b * inputs, bfloat16), matrix, y};
    bool done = !mamba_linear_step(&step);
    fwrite(y, 4, b * outputs, stdout);
    return done;
}

static bool experts(int width, int threads, bool bfloat16, int64_t b) {
    const int64_t d = 70, i = 33, k = 2, count = 5;
    std::vector<int32_t> chosen(b * k);
    for (int64_t choice = 0; choice < b * k; choice++) chosen[choice] = choice % count;
    float *y = floats(b * d);
    ExpertsStep step = {b, d, i, k, count, bfloat16, threads, width, 0, drawn(b * d, bfloat16), chosen.data(),
                        floats(b * k), drawn(count * 2 * i * d, bfloat16), drawn(count * d * i, bfloat16), y};
    bool done = !mamba_experts_step(&step);
    fwrite(y, 4, b * d, stdout);
    return done;
}

int main(int, char **argv) {
    int width = atoi(argv[1]), threads = atoi(argv[2]);
    for (bool bfloat16 : {false, true})
        for (bool transposed : {false, true})
            for (int64_t b : {1, 15})
                for (bool norms : {false, true})
                    if (!experts(width, threads, bfloat16, b) ||
                        !blocks(width, threads, bfloat16, transposed, b, norms ? 1e-6f : 0.0f) ||
                        !ssd_blocks(width, threads, bfloat16, transposed, b, norms) ||
                        !head(width, threads, bfloat16, transposed, b))
                        return 1;
    return 0;
}
