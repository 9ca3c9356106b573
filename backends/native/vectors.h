// Vectors of floats for each width that a kernel is compiled for, and what is computed in them. A source includes
// itself once a width, with WIDTH defined; between BEGIN_WIDTH and END_WIDTH it may use that width's instructions.

#ifndef BEGIN_WIDTH

#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

constexpr int64_t WIDEST = 16;

static inline int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

#define INLINE_MEMBER inline __attribute__((always_inline))
#define INLINE static INLINE_MEMBER
#define PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define TARGET(names) PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define TARGET(names) PRAGMA(GCC push_options) PRAGMA(GCC target(names))
#define END_TARGET PRAGMA(GCC pop_options)
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (I){__VA_ARGS__})
#endif

#define BEGIN_16 TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#define END_16 END_TARGET
#define ZIP_LOW_16 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define ZIP_HIGH_16 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define BEGIN_8 TARGET("avx2,fma")
#define END_8 END_TARGET
#define ZIP_LOW_8 0, 8, 1, 9, 2, 10, 3, 11
#define ZIP_HIGH_8 4, 12, 5, 13, 6, 14, 7, 15
#define BEGIN_4
#define END_4
#define ZIP_LOW_4 0, 4, 1, 5
#define ZIP_HIGH_4 2, 6, 3, 7

#define JOINED(a, b) a##b
#define OF_WIDTH(name, width) JOINED(name, width)
#define NAMESPACE OF_WIDTH(width, WIDTH)
#define BEGIN_WIDTH OF_WIDTH(BEGIN_, WIDTH) namespace NAMESPACE {
#define END_WIDTH } OF_WIDTH(END_, WIDTH)
#define ZIP_LOW OF_WIDTH(ZIP_LOW_, WIDTH)
#define ZIP_HIGH OF_WIDTH(ZIP_HIGH_, WIDTH)

// A function as it was compiled for vectors of so many lanes.
#ifdef __x86_64__
#define FOR_LANES(lanes, name) ((lanes) >= 16 ? width16::name : (lanes) >= 8 ? width8::name : width4::name)
#else
#define FOR_LANES(lanes, name) ((void)(lanes), width4::name)
#endif

#endif

#ifdef WIDTH

BEGIN_WIDTH

typedef float V __attribute__((vector_size(4 * WIDTH)));
typedef int32_t I __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t U __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t H __attribute__((vector_size(2 * WIDTH)));

INLINE V load(const float *from) {
    V value;
    memcpy(&value, from, sizeof value);
    return value;
}
INLINE void store(float *to, V value) { memcpy(to, &value, sizeof value); }
INLINE V splat(float value) { return value - V{}; }

// `left` values of the compute dtype; lanes beyond them are zero, and are not written.
INLINE V read_whole(const char *from, bool bfloat16) {
    if (!bfloat16) return load((const float *)from);
    H half;
    memcpy(&half, from, sizeof half);
    return (V)(__builtin_convertvector(half, U) << 16);
}
INLINE V read(const char *from, int64_t left, bool bfloat16) {
    if (left >= WIDTH) return read_whole(from, bfloat16);
    char whole[4 * WIDTH] = {};
    memcpy(whole, from, left * (bfloat16 ? 2 : 4));
    return read_whole(whole, bfloat16);
}
INLINE void write_whole(char *to, V value, bool bfloat16) {
    if (!bfloat16) return store((float *)to, value);
    U bits = (U)value, rounded = bits + 0x7fff + (bits >> 16 & 1);
    // Rounding would carry a NaN into infinity.
    bits = value == value ? rounded : bits | 0x400000;
    H half = __builtin_convertvector(bits >> 16, H);
    memcpy(to, &half, sizeof half);
}
INLINE void write(char *to, V value, int64_t left, bool bfloat16) {
    if (left >= WIDTH) return write_whole(to, value, bfloat16);
    char whole[4 * WIDTH];
    write_whole(whole, value, bfloat16);
    memcpy(to, whole, left * (bfloat16 ? 2 : 4));
}

INLINE V read_float(const float *from, int64_t left) { return read((const char *)from, left, false); }
INLINE void write_float(float *to, V value, int64_t left) { write((char *)to, value, left, false); }

// The polynomial is (2^f - 1) / f to 8e-9 for f within 1/2 of 0, so that 2^0 is exactly 1: what a step of almost
// nothing got wrong would add up over the positions.
INLINE V power_of_fraction(V f) {
    V p = 1.5461447767e-4f * f + 1.3390866807e-3f;
    p = p * f + 9.6180569381e-3f;
    p = p * f + 5.5503569543e-2f;
    p = p * f + 2.4022650719e-1f;
    p = p * f + 6.9314718246e-1f;
    return p * f + 1.0f;
}

// 2^power in two steps: `rounded` to whole numbers, which `scaled` makes the exponent of a result.
#if WIDTH == 16
// No limits are needed: these instructions give 0 or infinity beyond a float's.
INLINE V limited(V power) { return power; }
INLINE V rounded(V power) { return power - _mm512_reduce_ps(power, _MM_FROUND_TO_NEAREST_INT); }
INLINE V whole_of(V rounded) { return rounded; }
INLINE V scaled(V value, V rounded) { return _mm512_maskz_scalef_ps(-1, value, rounded); }
#else
// To where a float's exponents end; a NaN stays one.
INLINE V limited(V power) {
#if WIDTH == 8
    return _mm256_min_ps(splat(128.0f), _mm256_max_ps(splat(-127.0f), power));
#elif defined __x86_64__
    return _mm_min_ps(splat(128.0f), _mm_max_ps(splat(-127.0f), power));
#else
    power = power < -127.0f ? splat(-127.0f) : power;
    return power > 128.0f ? splat(128.0f) : power;
#endif
}
// Adding it rounds, and leaves the exponent's bits of that power of two lowest.
static const float MAGIC = 12582912.0f + 127.0f;
INLINE V rounded(V power) { return power + MAGIC; }
INLINE V whole_of(V rounded) { return rounded - MAGIC; }
INLINE V scaled(V value, V rounded) { return value * (V)((I)rounded << 23); }
#endif

// 2^(step A).
INLINE V decay_of(V step, V A) {
#if WIDTH == 16
    V power = step * A, f = _mm512_reduce_ps(power, _MM_FROUND_TO_NEAREST_INT);
    return scaled(power_of_fraction(f), power - f);
#else
    V power = limited(step * A), nearest = rounded(power);
    return scaled(power_of_fraction(power - whole_of(nearest)), nearest);
#endif
}
// Log 2 in two parts, the first with so few digits that its products are exact. A NaN stays one.
INLINE V exponential(V value) {
    // Beyond these it is 0 or infinity, and further out the rest would be neither.
    value = value < -104.0f ? splat(-104.0f) : value;
    value = value > 89.0f ? splat(89.0f) : value;
    V nearest = rounded(limited(value * 1.4426950409f)), whole = whole_of(nearest);
    V rest = (value - whole * 0.693145751953125f) - whole * 1.42860677e-6f;
    return scaled(power_of_fraction(rest * 1.4426950409f), nearest);
}
INLINE V sigmoid(V value) { return 1.0f / (1.0f + exponential(-value)); }
// max(value, 0) + log(1 + exp(-|value|)), the logarithm as 2 atanh(q): to the last digits however small the result.
INLINE V softplus(V value) {
    V size = (V)((I)value & 0x7fffffff), power = exponential(-size), q = power / (2.0f + power), q2 = q * q;
    V series = 0.232390508f * q2 + 0.217033148f;
    series = series * q2 + 0.285925835f;
    series = series * q2 + 0.399997026f;
    series = series * q2 + 0.666666687f;
    return (value < 0.0f ? V{} : value) + (q * q2 * series + 2.0f * q);
}

// Each step brings together what stood half the lanes apart; as many as a lane's index has bits transpose.
INLINE void transpose(V *square) {
    for (int step = 1; step < WIDTH; step *= 2) {
        V next[WIDTH];
        for (int k = 0; k < WIDTH / 2; k++) {
            next[2 * k] = SHUFFLE(square[k], square[k + WIDTH / 2], ZIP_LOW);
            next[2 * k + 1] = SHUFFLE(square[k], square[k + WIDTH / 2], ZIP_HIGH);
        }
        memcpy(square, next, sizeof next);
    }
}

// The sums of WIDTH vectors' lanes, one a lane: at each step the vectors are half as many, and hold the sums of two.
INLINE V sums_of_lanes(V *part) {
    for (int half = WIDTH / 2; half; half /= 2)
        for (int k = 0; k < half; k++)
            part[k] = SHUFFLE(part[k], part[k + half], ZIP_LOW) + SHUFFLE(part[k], part[k + half], ZIP_HIGH);
    return part[0];
}

END_WIDTH

#endif
