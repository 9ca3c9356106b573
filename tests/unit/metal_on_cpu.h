// The part of Metal that the scan's kernels use, in C++, so that they can be compiled and run where there is no Mac.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#include "fibers.h"

using std::exp2;
using std::fabs;
using std::fma;
using std::max;
using std::min;
// As on GPUs: of NaN and a number, the number.
inline float max(float a, float b) { return std::fmax(a, b); }
inline float min(float a, float b) { return std::fmin(a, b); }

typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef _Float16 half;
struct bfloat16_t {
  uint16_t bits;
};
typedef half float16_t;
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct uint3 {
  uint x, y, z;
};
enum class mem_flags { mem_threadgroup };

template <class To, class From>
To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as Metal has it");
  To other;
  std::memcpy(&other, &value, sizeof other);
  return other;
}

inline float simd_shuffle_xor(float value, ushort mask) { return fibers::shuffle_xor(value, mask); }
inline void threadgroup_barrier(mem_flags) { fibers::barrier(); }

// Words of the language: none of them may be the name of anything.
#define device
#define constant
#define thread
#define threadgroup
#define kernel
