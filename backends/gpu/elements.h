// What the kernels need of elements, in what CUDA C++ and Metal have in common: several read and written at once, and
// the gate.

#define LOG2_E 1.4426950408889634f
#define LEAST -3.402823466e38f

// N elements as they are read and written at once; no GPU reads more than 16 bytes.
template <int N>
struct alignas(sizeof(Element) * N < 16 ? sizeof(Element) * N : 16) Vector {
#if ELEMENT == 0
  float words[N];
  DEVICE void unpack(LOCAL float* values) const { UNROLL for (int i = 0; i < N; ++i) values[i] = words[i]; }
  DEVICE void pack(const LOCAL float* values) { UNROLL for (int i = 0; i < N; ++i) words[i] = values[i]; }
#else
  unsigned words[N / 2];
  DEVICE void unpack(LOCAL float* values) const {
    UNROLL for (int i = 0; i < N; i += 2) values[i] = first_of(words[i / 2]), values[i + 1] = second_of(words[i / 2]);
  }
  DEVICE void pack(const LOCAL float* values) {
    UNROLL for (int i = 0; i < N; i += 2) words[i / 2] = pair_of(values[i], values[i + 1]);
  }
#endif
  DEVICE void clear() { UNROLL for (int i = 0; i < int(sizeof(words) / sizeof(words[0])); ++i) words[i] = 0; }
};

#if ELEMENT != 0
template <>
struct Vector<1> {
  Element word;
  DEVICE void unpack(LOCAL float* values) const { values[0] = to_float(word); }
  DEVICE void pack(const LOCAL float* values) { word = to_element(values[0]); }
  DEVICE void clear() { word = Element(0); }
};
#endif

// For gates: where it is small its relative error grows as |value| does, 5e-7 at -8; the infinity below -88 gives zero.
DEVICE float sigmoid(float value) { return reciprocal(1.0f + fast_exp2(value * -LOG2_E)); }
