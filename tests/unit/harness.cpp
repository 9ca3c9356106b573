// Runs the native kernels on drawn numbers and writes every result to stdout: ./harness WIDTH THREADS. For sanitizers,
// and to compare machines.

#include <stdio.h>
#include <stdlib.h>

#include <vector>

#include "scan.h"

static uint32_t seed = 1;
static float draw() {
    seed = seed * 1664525u + 1013904223u;
    return (int32_t)seed / 2147483648.0f;
}

// Arrays that live as long as the program, each of exactly its size, so that a sanitizer sees what lies beyond.
static std::vector<std::vector<float>> arrays;
static std::vector<std::vector<uint8_t>> bytes;
static float *floats(int64_t count, float scale, float shift) {
    std::vector<float> values(count);
    for (float &value : values) value = draw() * scale + shift;
    arrays.push_back(std::move(values));
    return arrays.back().data();
}
static uint8_t *flags(int64_t count, float above) {
    std::vector<uint8_t> values(count);
    for (uint8_t &value : values) value = draw() > above;
    bytes.push_back(std::move(values));
    return bytes.back().data();
}
static void print(const void *data, int64_t count) { fwrite(data, sizeof(float), count, stdout); }

constexpr int64_t b = 2, l = 70, e = 67, n = 5, k = 4;
static Sequence sequence(int64_t channels, float scale, float shift) {
    return {(char *)floats(b * l * channels, scale, shift), l * channels, channels};
}
static void print(const Sequence &of, int64_t channels) { print(of.data, b * l * channels); }

static int scan(int width, int threads, uint8_t *mask, uint8_t *restart) {
    Scan s = {};
    s.b = b, s.l = l, s.e = e, s.n = n, s.delta_softplus = 1, s.threads = threads, s.width = width;
    s.x = sequence(e, 1, 0), s.delta = sequence(e, 4, -2), s.z = sequence(e, 2, 0);
    s.B = sequence(n, 1, 0), s.C = sequence(n, 1, 0);
    s.A = floats(e * n, 1, -1.2f), s.D = floats(e, 1, 0), s.delta_bias = floats(e, 1, 0);
    s.initial_state = floats(b * e * n, 1, 0), s.mask = mask, s.restart = restart;
    s.y = sequence(e, 0, 0), s.final_state = floats(b * e * n, 0, 0);
    s.boundaries = floats(mamba_scan_boundaries(b, l, e, n), 0, 0);
    s.dy = sequence(e, 1, 0), s.dfinal_state = floats(b * e * n, 1, 0);
    s.dx = sequence(e, 0, 0), s.ddelta = sequence(e, 0, 0), s.dz = sequence(e, 0, 0);
    s.dB = sequence(n, 0, 0), s.dC = sequence(n, 0, 0);
    s.dA = floats(e * n, 0, 0), s.dD = floats(e, 0, 0), s.ddelta_bias = floats(e, 0, 0);
    s.dinitial_state = floats(b * e * n, 0, 0);
    if (mamba_scan_forward(&s) || mamba_scan_backward(&s)) return 1;
    for (const Sequence &of : {s.y, s.dx, s.ddelta, s.dz}) print(of, e);
    for (const Sequence &of : {s.dB, s.dC}) print(of, n);
    print(s.final_state, b * e * n), print(s.dinitial_state, b * e * n);
    print(s.dA, e * n), print(s.dD, e), print(s.ddelta_bias, e);
    return 0;
}

static int ssd(int width, int threads, uint8_t *mask, uint8_t *restart) {
    const int64_t h = 6, p = 19, g = 3;
    Ssd s = {};
    s.b = b, s.l = l, s.h = h, s.p = p, s.n = n, s.g = g, s.dt_softplus = 1, s.threads = threads, s.width = width;
    s.D_per_channel = 1, s.least = 1e-3f, s.most = 1;
    s.x = sequence(h * p, 1, 0), s.dt = sequence(h, 4, -2), s.z = sequence(h * p, 2, 0);
    s.B = sequence(g * n, 1, 0), s.C = sequence(g * n, 1, 0);
    s.A = floats(h, 1, -1.2f), s.D = floats(h * p, 1, 0), s.dt_bias = floats(h, 1, 0);
    s.initial_state = floats(b * h * p * n, 1, 0), s.mask = mask, s.restart = restart;
    s.y = sequence(h * p, 0, 0), s.final_state = floats(b * h * p * n, 0, 0);
    s.boundaries = floats(mamba_ssd_boundaries(b, l, h, p, n), 0, 0);
    s.dy = sequence(h * p, 1, 0), s.dfinal_state = floats(b * h * p * n, 1, 0);
    s.dx = sequence(h * p, 0, 0), s.ddt = sequence(h, 0, 0), s.dz = sequence(h * p, 0, 0);
    s.dB = sequence(g * n, 0, 0), s.dC = sequence(g * n, 0, 0);
    s.dA = floats(h, 0, 0), s.dD = floats(h * p, 0, 0), s.ddt_bias = floats(h, 0, 0);
    s.dinitial_state = floats(b * h * p * n, 0, 0);
    if (mamba_ssd_forward(&s) || mamba_ssd_backward(&s)) return 1;
    for (const Sequence &of : {s.y, s.dx, s.dz}) print(of, h * p);
    for (const Sequence &of : {s.dB, s.dC}) print(of, g * n);
    print(s.ddt, h);
    print(s.final_state, b * h * p * n), print(s.dinitial_state, b * h * p * n);
    print(s.dA, h), print(s.dD, h * p), print(s.ddt_bias, h);
    return 0;
}

static int conv(int width, int threads, uint8_t *mask, uint8_t *restart) {
    Conv s = {};
    s.b = b, s.l = l, s.e = e, s.k = k, s.silu = 1, s.threads = threads, s.width = width;
    s.x = sequence(e, 1, 0), s.weight = floats(k * e, 1, 0), s.bias = floats(e, 1, 0);
    s.initial_state = (char *)floats(b * (k - 1) * e, 1, 0), s.mask = mask, s.restart = restart;
    s.y = sequence(e, 0, 0), s.final_state = (char *)floats(b * (k - 1) * e, 0, 0);
    s.dy = sequence(e, 1, 0), s.dfinal_state = (char *)floats(b * (k - 1) * e, 1, 0);
    s.dx = sequence(e, 0, 0), s.dweight = floats(k * e, 0, 0), s.dbias = floats(e, 0, 0);
    s.dinitial_state = (char *)floats(b * (k - 1) * e, 0, 0);
    if (mamba_conv_forward(&s) || mamba_conv_backward(&s)) return 1;
    for (const Sequence &of : {s.y, s.dx}) print(of, e);
    print(s.final_state, b * (k - 1) * e), print(s.dinitial_state, b * (k - 1) * e);
    print(s.dweight, k * e), print(s.dbias, e);
    return 0;
}

// Of both dtypes; d is no multiple of a vector's lanes, but even, as floats are allocated.
static int norm(int width, int threads) {
    const int64_t rows = 37, d = 202;
    for (int bfloat16 : {0, 1})
        for (int residual_bfloat16 : {0, 1}) {
            // As many bytes as an array has, so that a sanitizer sees what lies beyond.
            auto array = [&](int64_t count, int half) { return (char *)floats(half ? count / 2 : count, 1, 0); };
            AddNorm s = {rows, d, bfloat16, residual_bfloat16, threads, width, 1e-5f,
                         array(rows * d, residual_bfloat16), array(rows * d, bfloat16), array(d, bfloat16),
                         array(rows * d, bfloat16), array(rows * d, residual_bfloat16)};
            if (mamba_add_norm(&s)) return 1;
            print(s.normed, rows * d * (bfloat16 ? 2 : 4) / 4);
            s.hidden = nullptr, s.total = nullptr;
            if (mamba_add_norm(&s)) return 1;
        }
    return 0;
}

int main(int, char **argv) {
    int width = atoi(argv[1]), threads = atoi(argv[2]);
    uint8_t *mask = flags(b * l, -0.3f), *restart = flags(b * l, 0.8f);
    for (int64_t t = 0; t < b * l; t++) restart[t] &= mask[t];
    return scan(width, threads, mask, restart) || ssd(width, threads, mask, restart) ||
           conv(width, threads, mask, restart) || norm(width, threads);
}
