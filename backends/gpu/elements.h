// What the kernels need of elements, in what CUDA C++ and Metal have in common: several read and written at once, the
// gate, and the step size.

#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f
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

// exp(-|value|) to a few units in the last place: what its product with log2(e) loses is put back. Beyond 110 it is zero,
// and no infinity comes into its way; of NaN it is zero too, which its users must keep.
DEVICE float exp_of_minus(float value) {
  float negative = max(-fabs(value), -110.0f);
  float exponent = negative * LOG2_E;
  float lost = multiply_add(exponent, -LN_2, negative);
  float power = fast_exp2(exponent);
  return multiply_add(power, lost, power);
}

// From small = exp(-|value|).
DEVICE float sigmoid_of(float value, float small) { return (value < 0.0f ? small : 1.0f) * reciprocal(1.0f + small); }

// max(value, 0) + log(1 + small) by the polynomial for log(1 + s) / s of degree 8 that is best on [0, 1], to 3e-8.
DEVICE float softplus_of(float value, float small) {
  const float coefficients[] = {
      0.005516879726201296f, -0.030668428167700768f, 0.08017196506261826f, -0.1383429765701294f, 0.191904678940773f,
      -0.24866169691085815f, 0.3332236707210541f,    -0.4999969005584717f, 1.0f};
  float sum = coefficients[0];
  UNROLL for (int i = 1; i < 9; ++i) sum = multiply_add(sum, small, coefficients[i]);
  return multiply_add(sum, small, positive_part(value));
}
