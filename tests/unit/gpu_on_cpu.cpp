// The kernels of backends/gpu/selective_scan.cu, or with CONV those of causal_conv.cu, on a CPU, one block after
// another: their source unchanged, CUDA's words for where a thread stands given another meaning.

#include "gpu_on_cpu.h"

#define __device__ inline
#define __global__
#define __shared__
#define blockIdx (Index{block.number})
#define threadIdx (Index{block.current})

// More than a GPU has.
alignas(16) float4 shared_memory[1 << 16];

#include "elements.h"

#if CONV
#include "causal_conv.cu"
#else
#include "selective_scan.h"

#include "selective_scan.cu"
#endif

template <class Argument>
static Argument read(const uint64_t* word) {
  Argument argument;
  std::memcpy(&argument, word, sizeof argument);
  return argument;
}

template <class... Arguments, size_t... number>
static void call(void (*kernel)(Arguments...), const uint64_t* words, std::index_sequence<number...>) {
  kernel(read<Arguments>(words + number)...);
}

// A kernel's arguments as 64-bit words.
template <class... Arguments>
static void launch(void (*kernel)(Arguments...), const uint64_t* words, int blocks) {
  for (block.number = 0; block.number < blocks; ++block.number) {
    // What nobody wrote must not matter.
    std::memset(shared_memory, 0xff, sizeof shared_memory);
    run_block(THREADS, [=] { call(kernel, words, std::index_sequence_for<Arguments...>()); });
  }
}

extern "C" void launch(const char* name, const uint64_t* words, int blocks) {
  std::string wanted = name;
#if CONV
  if (wanted == "conv_forward") launch(conv_forward, words, blocks);
  if (wanted == "conv_backward") launch(conv_backward, words, blocks);
#elif BACKWARD
  if (wanted == "backward_first") launch(backward_first, words, blocks);
  if (wanted == "backward") launch(backward, words, blocks);
  if (wanted == "add_up_sums") launch(add_up_sums, words, blocks);
#else
  if (wanted == "forward_first") launch(forward_first, words, blocks);
  if (wanted == "forward") launch(forward, words, blocks);
#endif
#if !CONV
  if (wanted == "combine_chunks") launch(combine_chunks, words, blocks);
#endif
}
