// A GPU's block of threads on a CPU, so that selective_scan.h can be run and tested where there is no GPU: every thread
// is a fiber, and the fibers take turns at barriers and shuffles.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

using std::max;
using std::min;

#define DEVICE inline
#define GLOBAL
#define SHARED
#define LOCAL
#define UNROLL
#define UNROLL_TWO
#define UNROLL_FOUR

typedef int64_t int64;
typedef unsigned char byte;
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

#if ELEMENT == 0
typedef float Element;
inline float to_float(Element value) { return value; }
inline Element to_element(float value) { return value; }
#elif ELEMENT == 1
typedef uint16_t Element;
inline float to_float(Element value) {
  uint32_t bits = uint32_t(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}
inline Element to_element(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return 0x7fc0;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
#else
typedef _Float16 Element;
inline float to_float(Element value) { return value; }
inline Element to_element(float value) { return value; }
#endif

#if ELEMENT != 0
inline Element half_of(unsigned pair, int which) {
  Element halves[2];
  std::memcpy(halves, &pair, sizeof halves);
  return halves[which];
}
inline float first_of(unsigned pair) { return to_float(half_of(pair, 0)); }
inline float second_of(unsigned pair) { return to_float(half_of(pair, 1)); }
inline unsigned pair_of(float first, float second) {
  Element halves[2] = {to_element(first), to_element(second)};
  unsigned pair;
  std::memcpy(&pair, halves, sizeof pair);
  return pair;
}
#endif

inline float fast_exp2(float value) { return std::exp2(value); }
inline float small_exp2(float value) { return std::exp2(value); }
inline float reciprocal(float value) { return 1 / value; }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float infinity() { return std::numeric_limits<float>::infinity(); }

struct Index {
  int x;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 17);
  bool done = false;
};

// The block that runs: its number, its fibers, which of them, and what each last offered to a shuffle.
struct Block {
  int number, current;
  std::vector<Fiber> fibers;
  std::vector<float> offered;
  std::function<void()> body;
  ucontext_t scheduler;
};
static Block block;

// All go on from here together: each is let run up to it before any goes on.
inline void barrier() { swapcontext(&block.fibers[block.current].context, &block.scheduler); }

inline float shuffle_xor(float value, int mask) {
  int self = block.current;
  block.offered[self] = value;
  barrier();
  float received = block.offered[self ^ mask];
  barrier();
  return received;
}

inline void enter() {
  block.body();
  block.fibers[block.current].done = true;
  barrier();
}

inline void run_block(int threads, std::function<void()> body) {
  block.fibers.resize(threads), block.offered.resize(threads), block.body = body;
  for (Fiber& fiber : block.fibers) {
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data(), fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (bool going = true; going;) {
    going = false;
    for (block.current = 0; block.current < threads; ++block.current)
      if (!block.fibers[block.current].done) {
        going = true;
        swapcontext(&block.scheduler, &block.fibers[block.current].context);
      }
  }
}
