// The kernels of selective_scan.h as CUDA launches them. Pointers first, inputs before results, then sizes and strides;
// what an option leaves out is not read and may be anything.

#define INPUTS                                                                                                  \
  const Element *x, const Element *delta, const Element *B, const Element *C, const Element *z, const Element *dy, \
      const float *A, const float *D, const float *delta_bias, const float *begin, const byte *mask,             \
      const byte *restart
#define SIZES                                                                                                      \
  int length, int channels, int states, int chunk, int chunks, int64 x_row, int64 x_position, int64 delta_row,     \
      int64 delta_position, int64 B_row, int64 B_position, int64 C_row, int64 C_position, int64 z_row,             \
      int64 z_position, int64 dy_row, int64 dy_position
#define GIVEN                                                                                                   \
  Inputs {                                                                                                      \
    {x, x_row, int(x_position)}, {delta, delta_row, int(delta_position)}, {B, B_row, int(B_position)}, {C, C_row, int(C_position)}, \
        {z, z_row, int(z_position)}, {dy, dy_row, int(dy_position)}, A, D, delta_bias, begin, mask, restart, length,      \
        channels, states, chunk, chunks                                                                         \
  }
// So few registers a thread that twelve warps find room on a multiprocessor.
#define KERNEL extern "C" __global__ void BOUNDS

extern __shared__ float4 shared_memory[];

__device__ Place place(int channels, int chunks) {
  int blocks = (channels + BLOCK_CHANNELS - 1) / BLOCK_CHANNELS, index = blockIdx.x;
  return {int(threadIdx.x), index % blocks, index / blocks % chunks, index / blocks / chunks};
}

#if BACKWARD

KERNEL backward_first(INPUTS, float* added, float* total, SIZES) {
  BackwardResults results = {};
  results.added = added, results.total = total;
  scan_backward<true>(GIVEN, nullptr, results, place(channels, chunks), (float*)shared_memory);
}

KERNEL backward(
    INPUTS, const float* kept, Element* dx, Element* ddelta, Element* dz, float* dBC, float* dA, float* dD,
    float* ddelta_bias, float* dstate, SIZES) {
  BackwardResults results = {dx, ddelta, dz, dBC, dA, dD, ddelta_bias, dstate, nullptr, nullptr};
  scan_backward<false>(GIVEN, kept, results, place(channels, chunks), (float*)shared_memory);
}

KERNEL add_up_sums(
    const float* dBC, const float* dA, const float* dD, const float* ddelta_bias, Element* dB_sum, Element* dC_sum,
    float* dA_sum, float* dD_sum, float* ddelta_bias_sum, int rows, int length, int channels, int states, int chunks) {
  Inputs in = {};
  in.length = length, in.channels = channels, in.states = states, in.chunks = chunks;
  BackwardResults parts = {};
  // They are only read.
  parts.dBC = (float*)dBC, parts.dA = (float*)dA, parts.dD = (float*)dD, parts.ddelta_bias = (float*)ddelta_bias;
  add_up(in, parts, {dB_sum, dC_sum, dA_sum, dD_sum, ddelta_bias_sum}, rows, int64(blockIdx.x) * THREADS + threadIdx.x);
}

#else

KERNEL forward_first(INPUTS, float* added, float* total, SIZES) {
  scan_forward<true>(GIVEN, {nullptr, nullptr, nullptr, added, total}, place(channels, chunks), (float*)shared_memory);
}

KERNEL forward(INPUTS, Element* y, float* final_state, float* kept, SIZES) {
  scan_forward<false>(GIVEN, {y, final_state, kept, nullptr, nullptr}, place(channels, chunks), (float*)shared_memory);
}

#endif

// One thread a state of a row, over all blocks.
KERNEL combine_chunks(const float* A, const float* begin, const float* total, float* added, int rows, int channels, int states, int chunks) {
  int64 index = int64(blockIdx.x) * THREADS + threadIdx.x;
  Inputs in = {};
  in.A = A, in.begin = begin, in.channels = channels, in.states = states, in.chunks = chunks;
  if (index < int64(rows) * channels * PADDED) combine(in, added, total, BACKWARD, index);
}
