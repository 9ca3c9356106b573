// What selective_scan.h needs, in Metal as `mx.fast.metal_kernel` compiles it, whose own prelude opens namespace metal.

#define DEVICE inline
#define GLOBAL device
#define SHARED threadgroup
#define LOCAL thread
#define UNROLL _Pragma("clang loop unroll(full)")
#define UNROLL_TWO _Pragma("clang loop unroll_count(2)")
#define UNROLL_FOUR _Pragma("clang loop unroll_count(4)")

typedef long int64;
typedef uchar byte;

#if ELEMENT == 0  // float32
typedef float Element;
DEVICE float to_float(Element value) { return value; }
DEVICE Element to_element(float value) { return value; }
#elif ELEMENT == 1  // bfloat16, which not every Metal knows
typedef ushort Element;
DEVICE float to_float(Element value) { return as_type<float>(uint(value) << 16); }
DEVICE Element to_element(float value) {
  uint bits = as_type<uint>(value);
  return value != value ? 0x7fc0 : Element((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#else  // float16
typedef ushort Element;
DEVICE float to_float(Element value) { return float(as_type<half>(value)); }
DEVICE Element to_element(float value) { return as_type<ushort>(half(value)); }
#endif

#if ELEMENT != 0
// Two elements in a word, the first in its low half.
DEVICE float first_of(uint pair) { return to_float(Element(pair)); }
DEVICE float second_of(uint pair) { return to_float(Element(pair >> 16)); }
DEVICE uint pair_of(float first, float second) { return to_element(first) | uint(to_element(second)) << 16; }
#endif

DEVICE float fast_exp2(float value) { return exp2(value); }
DEVICE float reciprocal(float value) { return 1.0f / value; }
// max(value, 0), which keeps NaN.
DEVICE float positive_part(float value) { return value < 0.0f ? 0.0f : value; }
DEVICE float multiply_add(float a, float b, float c) { return fma(a, b, c); }
DEVICE float shuffle_xor(float value, int mask) { return simd_shuffle_xor(value, ushort(mask)); }
DEVICE void barrier() { threadgroup_barrier(mem_flags::mem_threadgroup); }
DEVICE float infinity() { return INFINITY; }
