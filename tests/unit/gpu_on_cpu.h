// What the kernels need, in C++, so that it can be run and tested where there is no GPU.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "fibers.h"

using std::fabs;
using std::max;
using std::min;
// As on GPUs: of NaN and a number, the number.
inline float max(float a, float b) { return std::fmax(a, b); }
inline float min(float a, float b) { return std::fmin(a, b); }

#define DEVICE inline
#define GLOBAL
#define SHARED
#define LOCAL
#define UNROLL
#define BOUNDS
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
inline float reciprocal(float value) { return 1 / value; }
inline float positive_part(float value) { return value < 0 ? 0 : value; }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float infinity() { return std::numeric_limits<float>::infinity(); }
using namespace fibers;
