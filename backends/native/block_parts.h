// What the steps of all residual blocks begin and end with: the norm, the short convolution, the sum. The functions take
// any step with the fields that `MambaStep` and `SsdStep` share.

#ifndef BLOCK_PARTS_H
#define BLOCK_PARTS_H

#include <math.h>
#include <string.h>

#include "products.h"

// The most channels of a task that has some channels of every row.
constexpr int64_t CHANNELS = 384;

// How many of so many channels a task has.
template <class Step> static int64_t channels_of(const Step &s, int64_t channels) {
    int64_t share = divide_up(divide_up(channels, s.threads < 1 ? 1 : s.threads), WIDEST) * WIDEST;
    return share < CHANNELS ? share : CHANNELS;
}

// Copies the filters (channels, k) to `taps` (k, channels), one number at a time because a channel's taps lie side by
// side.
template <class Step> static void load_taps(const Step &s, float *taps, int64_t channels, Range some) {
    for (int64_t c = some.first; c < some.first + some.count; c++)
        for (int64_t j = 0; j < s.k; j++) {
            int64_t at = s.transposed ? j * channels + c : c * s.k + j;
            uint32_t bits = s.bfloat16 ? (uint32_t)((const uint16_t *)s.conv.weight)[at] << 16
                                       : ((const uint32_t *)s.conv.weight)[at];
            memcpy(taps + j * channels + c, &bits, sizeof bits);
        }
}

#endif

#ifdef WIDTH

#include "products.h"

BEGIN_WIDTH

// What a root mean square norm multiplies `count` numbers by; `squares` are the sums of their squares, lane by lane.
INLINE float norm_scale(V squares, int64_t count, float eps) {
    float sum = 0;
    for (int lane = 0; lane < WIDTH; lane++) sum += squares[lane];
    return 1.0f / sqrtf(sum / count + eps);
}

// The root mean square norm of one row of the residual stream.
template <class Step> static void norm_residual(const Step &s, float *hidden, int64_t row) {
    const char *residual = s.residual + (s.residual_bfloat16 ? 2 : 4) * row * s.d;
    hidden += row * s.d;
    V squares = {};
    for (int64_t i = 0; i < s.d; i += WIDTH) {
        V value = read(residual + (s.residual_bfloat16 ? 2 : 4) * i, s.d - i, s.residual_bfloat16);
        write_float(hidden + i, value, s.d - i);
        squares += value * value;
    }
    const float scale = norm_scale(squares, s.d, s.eps);
    for (int64_t i = 0; i < s.d; i += WIDTH) {
        V weight = read(s.norm + (s.bfloat16 ? 2 : 4) * i, s.d - i, s.bfloat16);
        write_float(hidden + i, read_float(hidden + i, s.d - i) * scale * weight, s.d - i);
    }
}

// The short convolution of `left` channels from c on, whose input here is x, with its SiLU. Writes the window that the
// next position sees.
template <class Step>
INLINE V convolved(const Step &s, const float *taps, V x, int64_t channels, int64_t row, int64_t c, int64_t left) {
    const int64_t size = s.bfloat16 ? 2 : 4;
    int64_t window = row * (s.k - 1) * channels + c;
    V sum = {};
    if (s.conv.bias) sum = read(s.conv.bias + size * c, left, s.bfloat16);
    for (int64_t j = 0; j < s.k; j++, window += channels) {
        V input = j + 1 < s.k ? read(s.conv_state + size * window, left, s.bfloat16) : x;
        sum += input * read_float(taps + j * channels + c, left);
        if (j) write(s.new_conv_state + size * (window - channels), input, left, s.bfloat16);
    }
    return sum * sigmoid(sum);
}

// Adds the block's output, the sums of out_proj, to one row of the residual stream.
template <class Step> static void add_to_residual(const Step &s, const float *sums, int64_t row) {
    const int64_t size = s.residual_bfloat16 ? 2 : 4, parts = tiling_of(s, s.d).parts;
    for (int64_t c = 0; c < s.d; c += WIDTH) {
        int64_t left = s.d - c, at = size * (row * s.d + c);
        V sum = read(s.residual + at, left, s.residual_bfloat16);
        sum += collected(s, sums, s.out_proj, parts, s.d, row, c, left);
        write(s.new_residual + at, sum, left, s.residual_bfloat16);
    }
}

END_WIDTH

#endif
