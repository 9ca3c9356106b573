// One position of Mamba-2's recurrence, in what CUDA C++ and Metal have in common; the contract is
// `mamba_core.backend.Backend.ssd_step`.
//
// The state is read and written once, and all else is small beside it. LANES_OF_ROW neighbouring threads of a warp take
// ROWS neighbouring channels of a head, each thread every LANES_OF_ROW-th state of them.
//
// Given by the compiler's command line: ELEMENT (of x, dt, B, C, z: 0 float32, 1 bfloat16, 2 float16), HEADS, CHANNELS,
// STATES, GROUPS, ROWS (which divides CHANNELS), LANES_OF_ROW (a power of two up to 32), WARPS, LEAST_STEP and MOST_STEP,
// and 0 or 1 for HAS_D, D_PER_CHANNEL, HAS_Z, HAS_BIAS, SOFTPLUS and LIMITED.

#define THREADS (WARPS * 32)
// A rate below it forgets as fast, and its product with a step of zero is a number.
#define LEAST_RATE -1e30f
#define EACH_ROW UNROLL for (int r = 0; r < ROWS; ++r)

// x, z (b, h, p); dt (b, h); B, C (b, g, n); A, dt_bias (h); D (h) or (h, p); state (b, h, p, n).
struct Inputs {
  const GLOBAL Element *x, *dt, *B, *C, *z;
  const GLOBAL float *A, *D, *dt_bias, *state;
};

// exp(value) for values of either sign; NaN stays.
DEVICE float exp_of(float value) {
  if (value != value) return value;
  float small = exp_of_minus(value);
  return value <= 0.0f ? small : reciprocal(small);
}

DEVICE float step_of(Inputs in, int64 of_row, int head) {
  float step = to_float(in.dt[of_row]);
  if (HAS_BIAS) step += in.dt_bias[head];
  if (SOFTPLUS) step = softplus_of(step, exp_of_minus(step));
  if (LIMITED) step = step < LEAST_STEP ? LEAST_STEP : step > MOST_STEP ? MOST_STEP : step;
  return step;
}

// index: the thread's number in the grid. Threads beyond the last row compute the first one's, and write nothing.
DEVICE void ssd_step(Inputs in, GLOBAL Element* y, GLOBAL float* state, int batch, int64 index) {
  int lane = int(index % LANES_OF_ROW);
  int64 first = index / LANES_OF_ROW * ROWS;
  bool there = first < int64(batch) * HEADS * CHANNELS;
  first = there ? first : 0;
  int64 of_head = first / CHANNELS;
  int head = int(of_head % HEADS), channel = int(first % CHANNELS);
  int64 group = of_head / HEADS * GROUPS + head / (HEADS / GROUPS);
  float step = step_of(in, of_head, head);
  // Not by `max`, which loses NaN on a GPU.
  float rate = in.A[head] < LEAST_RATE ? LEAST_RATE : in.A[head];
  float decay = exp_of(step * rate);
  float inputs[ROWS], sums[ROWS];
  EACH_ROW inputs[r] = to_float(in.x[first + r]), sums[r] = 0.0f;
  UNROLL_FOUR for (int k = lane; k < STATES; k += LANES_OF_ROW) {
    float b = to_float(in.B[group * STATES + k]), c = to_float(in.C[group * STATES + k]);
    EACH_ROW {
      int64 at = (first + r) * STATES + k;
      float h = multiply_add(decay, in.state[at], step * inputs[r] * b);
      if (there) state[at] = h;
      sums[r] = multiply_add(h, c, sums[r]);
    }
  }
  EACH_ROW {
    for (int mask = LANES_OF_ROW / 2; mask > 0; mask /= 2) sums[r] += shuffle_xor(sums[r], mask);
    if (!there || lane != r % LANES_OF_ROW) continue;
    float value = sums[r];
    if (HAS_D) value = multiply_add(in.D[D_PER_CHANNEL ? head * CHANNELS + channel + r : head], inputs[r], value);
    if (HAS_Z) {
      float gate = to_float(in.z[first + r]);
      value *= gate * sigmoid(gate);
    }
    y[first + r] = to_element(value);
  }
}
