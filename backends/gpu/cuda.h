// What selective_scan.h needs, in CUDA C++ as NVRTC compiles it: no header of the toolkit.

#define DEVICE __device__ __forceinline__
#define GLOBAL
#define SHARED
#define UNROLL _Pragma("unroll")

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
#endif

DEVICE float fast_exp2(float value) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value));
  return power;
}
DEVICE float exact_exp(float value) { return expf(value); }
DEVICE float exact_log1p(float value) { return log1pf(value); }
DEVICE float quotient(float above, float below) { return __fdividef(above, below); }
DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE void barrier() { __syncthreads(); }
DEVICE float infinity() { return __int_as_float(0x7f800000); }
