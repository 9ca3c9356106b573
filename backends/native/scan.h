// The arguments of the operations on sequences and what is called with them: a plain C ABI.

#ifndef SCAN_H
#define SCAN_H

#include <stdint.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

// An array (b, l, channels) of the compute dtype, or absent; strides in elements, channels side by side.
struct Sequence {
    char *data;
    int64_t batch, position;
};

// The arguments of every function below. Shapes and names as in mamba_core.backend; A, D, delta_bias and all states
// are float32 and contiguous, mask and restart (b, l) bytes. What is optional there may be null here.
struct Scan {
    int64_t b, l, e, n;
    int32_t bfloat16, delta_softplus, threads, width;
    Sequence x, delta, z, B, C;
    const float *A, *D, *delta_bias, *initial_state;
    const uint8_t *mask, *restart;
    // Results. boundaries: mamba_scan_boundaries() floats that the gradient needs, null where there will be none.
    Sequence y;
    float *final_state, *boundaries;
    // Gradients, each null exactly where its argument is. dfinal_state null is zero; dinitial_state may be null.
    Sequence dy;
    const float *dfinal_state;
    Sequence dx, ddelta, dz, dB, dC;
    float *dA, *dD, *ddelta_bias, *dinitial_state;
};

// Lanes of the widest vectors that run here: 16 is AVX-512, 8 AVX2, 4 NEON or plain C.
EXPORT int32_t mamba_scan_width();

// How many floats the boundaries of a scan of these sizes are.
EXPORT int64_t mamba_scan_boundaries(int64_t b, int64_t l, int64_t e, int64_t n);

// Each of the two returns 0, or 1 where there is not the memory.
EXPORT int32_t mamba_scan_forward(const Scan *scan);
EXPORT int32_t mamba_scan_backward(const Scan *scan);

// The arguments of the ssd, the recurrence of Mamba-2. x, z and y are (b, l, h p), B and C (b, l, g n), dt (b, l, h);
// D is (h,), or (h, p) where `D_per_channel`; states are (b, h, p, n). All else is as in `Scan`.
struct Ssd {
    int64_t b, l, h, p, n, g;
    int32_t bfloat16, dt_softplus, D_per_channel, threads, width;
    // A step size is at least `least` and at most `most`.
    float least, most;
    Sequence x, dt, z, B, C;
    const float *A, *D, *dt_bias, *initial_state;
    const uint8_t *mask, *restart;
    // Results. boundaries: mamba_ssd_boundaries() floats that the gradient needs, null where there will be none.
    Sequence y;
    float *final_state, *boundaries;
    // Gradients, each null exactly where its argument is. dfinal_state null is zero; dinitial_state may be null.
    Sequence dy;
    const float *dfinal_state;
    Sequence dx, ddt, dz, dB, dC;
    float *dA, *dD, *ddt_bias, *dinitial_state;
};

// How many floats the boundaries of an ssd of these sizes are.
EXPORT int64_t mamba_ssd_boundaries(int64_t b, int64_t l, int64_t h, int64_t p, int64_t n);

// Each of the two returns 0, or 1 where there is not the memory.
EXPORT int32_t mamba_ssd_forward(const Ssd *ssd);
EXPORT int32_t mamba_ssd_backward(const Ssd *ssd);

// The arguments of a causal convolution. Arrays (b, l, e) in the compute dtype by rows, with strides in elements and
// channels side by side; weight (k, e) and bias (e) float32, states (b, k-1, e) in the compute dtype and contiguous,
// mask and restart (b, l) bytes. What is optional may be null.
struct Conv {
    int64_t b, l, e, k;
    int32_t bfloat16, silu, threads, width;
    Sequence x;
    const float *weight, *bias;
    const char *initial_state;
    const uint8_t *mask, *restart;
    Sequence y;
    char *final_state;
    // Gradients, each null exactly where its argument is; dfinal_state null is zero, dinitial_state may be null.
    Sequence dy;
    const char *dfinal_state;
    Sequence dx;
    float *dweight, *dbias;
    char *dinitial_state;
};

EXPORT int32_t mamba_conv_forward(const Conv *conv);
EXPORT int32_t mamba_conv_backward(const Conv *conv);

// The arguments of a sum and its root mean square norm, rows (rows, d), all contiguous: hidden, weight (d,) and normed
// in the compute dtype, the residual stream in its own, to which the sum is rounded before it is normed. hidden may be
// null: then the residual stream is normed, and total not written.
struct AddNorm {
    int64_t rows, d;
    int32_t bfloat16, residual_bfloat16, threads, width;
    float eps;
    const char *residual, *hidden, *weight;
    char *normed, *total;
};

EXPORT int32_t mamba_add_norm(const AddNorm *add_norm);

#endif
