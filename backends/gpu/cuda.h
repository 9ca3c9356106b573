// What the kernels need, in CUDA C++ as NVRTC compiles it: no header of the toolkit.

#define DEVICE __device__ __forceinline__
#define GLOBAL
#define SHARED
#define LOCAL
#define UNROLL _Pragma("unroll")
// Of a kernel: as many warps on a multiprocessor at a time, and so many registers a thread.
#define BOUNDS __launch_bounds__(THREADS, 12 / WARPS)
#define UNROLL_TWO _Pragma("unroll 2")
#define UNROLL_FOUR _Pragma("unroll 4")

typedef long long int64;
typedef unsigned char byte;

#if ELEMENT == 0  // float32
typedef float Element;
DEVICE float to_float(Element value) { return value; }
DEVICE Element to_element(float value) { return value; }
#elif ELEMENT == 1  // bfloat16
typedef unsigned short Element;
DEVICE float to_float(Element value) { return __uint_as_float(unsigned(value) << 16); }
DEVICE Element to_element(float value) {
  Element rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
  return rounded;
}
// Two elements in a word, the first in its low half.
DEVICE float first_of(unsigned pair) { return __uint_as_float(pair << 16); }
DEVICE float second_of(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }
DEVICE unsigned pair_of(float first, float second) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
#else  // float16
typedef unsigned short Element;
DEVICE float to_float(Element value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value));
  return wide;
}
DEVICE Element to_element(float value) {
  Element rounded;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
  return rounded;
}
DEVICE float first_of(unsigned pair) { return to_float(Element(pair)); }
DEVICE float second_of(unsigned pair) { return to_float(Element(pair >> 16)); }
DEVICE unsigned pair_of(float first, float second) { return to_element(first) | unsigned(to_element(second)) << 16; }
#endif

DEVICE float fast_exp2(float value) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value));
  return power;
}
DEVICE float reciprocal(float value) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(value));
  return inverse;
}
// max(value, 0), which keeps NaN.
DEVICE float positive_part(float value) {
  float part;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(part) : "f"(value));
  return part;
}
DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE void barrier() { __syncthreads(); }
DEVICE float infinity() { return __int_as_float(0x7f800000); }
