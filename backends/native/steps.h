// The arguments of the operations on one position: a plain C ABI that needs C's library and its threads only.
// Reading the weights is what such a step costs, so each is read once and straight through, and all else stays in the
// cache. Whatever the weights are, a step computes in float32 and rounds to bfloat16 only the results that it writes:
// the states of the convolution and the residual stream. The plain operations round each projection's output as well.

#ifndef STEPS_H
#define STEPS_H

#include "scan.h"

// A weight and a bias of the compute dtype. The weight is (outputs, inputs) as torch stores it, or (inputs, outputs)
// where the step says `transposed`. bias may be null.
struct Matrix {
    const char *weight, *bias;
};

// A residual block with a Mamba-1 mixer. Arrays are contiguous. Those of char are of the compute dtype, bfloat16 or
// float32; the residual stream has its own.
struct MambaStep {
    int64_t b, d, e, n, k, r;
    int32_t bfloat16, residual_bfloat16, transposed, threads, width;
    float eps;
    // (b, d), (b, k-1, e) and (b, e, n).
    const char *residual, *conv_state;
    const float *ssm_state;
    // (d,); conv is (e, k), or (k, e) where `transposed`.
    const char *norm;
    Matrix in_proj, conv, x_proj, out_proj;
    const char *dt_proj;
    // (e,), (e, n) and (e,).
    const float *delta_bias, *A_log, *D;
    // Results. Each has memory of its own or that of the array which it replaces.
    char *new_residual, *new_conv_state;
    float *new_ssm_state;
    // Weights (r,), (n,) and (n,) of the norms that `selection_eps` asks for; null for norms without.
    const char *dt_norm, *B_norm, *C_norm;
    // Where it is above 0, dt (r,), B and C (n,) are each divided by sqrt(its mean square + selection_eps), between
    // x_proj and dt_proj. The plain operations round them to bfloat16 before that norm and after it; the step never
    // does.
    float selection_eps;
};

// A residual block whose mixer's recurrence is the ssd: h heads of p channels, which share B and C of n states in g
// groups. Arrays are as in `MambaStep`. in_proj's outputs are, in this order: gate and gated (`beside` each), z (h p),
// x (h p), B and C (g n each), dt (h). The convolution goes over x, B and C. out_proj's inputs are silu(gate) * gated
// and then the recurrence's h p channels.
struct SsdStep {
    int64_t b, d, h, p, n, g, k, beside;
    int32_t bfloat16, residual_bfloat16, transposed, threads, width;
    // Whether D is (h, p) and not (h,), and whether the norm comes before the gate.
    int32_t D_per_channel, norm_before_gate;
    // gated_eps is that of the norm before or after the gate. A step size is at least `least` and at most `most`.
    float eps, gated_eps, least, most;
    // (b, d), (b, k-1, h p + 2 g n) and (b, h, p, n).
    const char *residual, *conv_state;
    const float *ssm_state;
    // (d,); conv is (h p + 2 g n, k), or its transpose where `transposed`.
    const char *norm;
    Matrix in_proj, conv, out_proj;
    // (h,), (h,), and (h,) or (h, p).
    const float *dt_bias, *A_log, *D;
    // (h p,); null where there is the gate alone. The channels of each of g groups are normed together.
    const char *gated_norm;
    // Results, as in `MambaStep`.
    char *new_residual, *new_conv_state;
    float *new_ssm_state;
};

// y (b, outputs) float32 from x (b, inputs) of the compute dtype.
struct LinearStep {
    int64_t b, inputs, outputs;
    int32_t bfloat16, transposed, threads, width;
    const char *x;
    Matrix matrix;
    float *y;
};

// y (b, d) float32: of each row of x (b, d) the sum over its k choices (b, k) of an expert e, counted from 0, of that
// choice's probability (b, k) times down_e (silu(gate_e x) * up_e x). gate_up is (experts, 2 i, d), the gate's rows
// before the others, and down (experts, d, i).
struct ExpertsStep {
    int64_t b, d, i, k, experts;
    int32_t bfloat16, threads, width, unused;
    const char *x;
    const int32_t *chosen;
    const float *probability;
    const char *gate_up, *down;
    float *y;
};

// Each computes blocks of the same sizes and dtypes one after another. A block may read what the one before it writes.
// These functions and the next two return 0, or 1 if there is not the memory.
EXPORT int32_t mamba_mamba_steps(const MambaStep *steps, int64_t count);
EXPORT int32_t mamba_ssd_steps(const SsdStep *steps, int64_t count);
EXPORT int32_t mamba_linear_step(const LinearStep *step);
EXPORT int32_t mamba_experts_step(const ExpertsStep *step);

#endif
