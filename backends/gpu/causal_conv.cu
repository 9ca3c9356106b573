// The short causal convolution and its SiLU, forward and backward, in CUDA C++; the contract is
// `mamba_core.backend.Backend.causal_conv`, the gradient `mamba_core.spec.recurrence.causal_conv_vjp`.
//
// A thread takes CHANNELS neighbouring channels of a row through a chunk of the positions, with the last K inputs in
// registers and those of the next positions on their way. In the backward it goes on for K - 1 positions, on which the
// gradients of its chunk's last inputs depend. It adds up the gradients of taps and bias over its chunk, and leaves to
// the caller to add them over rows and chunks: no atomics, the same bits every time.
//
// Given by the compiler's command line: ELEMENT (0 float32, 1 bfloat16, 2 float16), E, K, CHANNELS, WARPS, and 0 or 1
// for HAS_BIAS, HAS_RESTART and SILU. What an option leaves out is not read and may be anything.

#define THREADS (WARPS * 32)
// Positions whose inputs are on their way from memory while as many are computed.
#define AT_ONCE 4
#define KERNEL extern "C" __global__ void BOUNDS
#define EACH_CHANNEL UNROLL for (int c = 0; c < CHANNELS; ++c)

// x (b, l, e), taps (k, e), bias (e), state (b, k-1, e), restart (b, l).
#define INPUTS                                                                                              \
  const Element *__restrict__ x, const float *__restrict__ taps, const float *__restrict__ bias,            \
      const Element *__restrict__ state, const byte *__restrict__ restart
#define SIZES int rows, int length, int chunk, int chunks
#define PLACE place(x, state, restart, length, chunk, chunks)

typedef Vector<CHANNELS> Elements;
struct alignas(4 * CHANNELS) Floats {
  float of[CHANNELS];
};

DEVICE int64 after(int positions) { return int64(positions) * E; }
DEVICE Elements load(const Element* from) { return *(const Elements*)from; }
DEVICE void store(Element* to, const float* values) {
  Elements packed;
  packed.pack(values);
  *(Elements*)to = packed;
}

// Where a thread stands: its row, its chunk's positions, its first channel; the row's x and state from that channel on.
struct Place {
  int row, begin, end, length, channel;
  const Element *x, *state;
  const byte* restart;

  // Where an array (b, length, e) has this row's channels from a position on.
  DEVICE int64 in(int length, int position) const { return (int64(row) * length + position) * E + channel; }
  // Of a position, of which those before 0 are the initial state.
  DEVICE Elements input(int position) const {
    return load(position < 0 ? state + after(position + K - 1) : x + after(position));
  }
  DEVICE bool restarts(int position) const { return HAS_RESTART && restart[position]; }
};

// A thread with nothing to do is in a row that there is not.
DEVICE Place place(
    const Element* x, const Element* state, const byte* restart, int length, int chunk, int chunks) {
  int vectors = E / CHANNELS, index = blockIdx.x * THREADS + threadIdx.x;
  int row = index / vectors / chunks, begin = index / vectors % chunks * chunk;
  Place at = {row, begin, min(begin + chunk, length), length, index % vectors * CHANNELS};
  at.x = x + at.in(length, 0), at.state = state + at.in(K - 1, 0), at.restart = restart + int64(row) * length;
  return at;
}

struct Filter {
  Floats taps[K], bias;

  DEVICE Filter(const float* its_taps, const float* its_bias, const Place& at) {
    UNROLL for (int j = 0; j < K; ++j) taps[j] = *(const Floats*)(its_taps + j * E + at.channel);
    EACH_CHANNEL bias.of[c] = 0.0f;
    if (HAS_BIAS) bias = *(const Floats*)(its_bias + at.channel);
  }
};

// The inputs of K positions; the last of them sees as many before it as `reach` says.
struct Window {
  float inputs[K][CHANNELS];
  int reach = K - 1;

  // That of the position before the thread's first.
  DEVICE Window(const Place& at) {
    UNROLL for (int j = 1; j < K; ++j) {
      int position = at.begin - K + j;
      append(at.input(position), position >= 0 && at.restarts(position));
    }
  }
  DEVICE void append(const Elements& input, bool restarts) {
    UNROLL for (int j = 1; j < K; ++j) EACH_CHANNEL inputs[j - 1][c] = inputs[j][c];
    input.unpack(inputs[K - 1]);
    reach = HAS_RESTART && restarts ? 0 : min(reach + 1, K - 1);
  }
  DEVICE bool sees(int back) const { return !HAS_RESTART || back <= reach; }
  DEVICE float seen(int tap, int c) const { return sees(K - 1 - tap) ? inputs[tap][c] : 0.0f; }
  DEVICE float linear(const Filter& filter, int c) const {
    float sum = filter.bias.of[c];
    UNROLL for (int j = 0; j < K; ++j) sum += seen(j, c) * filter.taps[j].of[c];
    return sum;
  }
};

// Takes a run's steps from its place's first position to before `end`, each with what was brought for it.
template <class Run>
DEVICE void walk(Run& run, int end) {
  typename Run::Brought arriving[AT_ONCE], following[AT_ONCE];
  int position = run.at.begin;
  UNROLL for (int i = 0; i < AT_ONCE; ++i) if (position + i < end) following[i] = run.bring(position + i);
  for (; position + AT_ONCE <= end; position += AT_ONCE) {
    UNROLL for (int i = 0; i < AT_ONCE; ++i) arriving[i] = following[i];
    UNROLL for (int i = 0; i < AT_ONCE; ++i)
      if (position + AT_ONCE + i < end) following[i] = run.bring(position + AT_ONCE + i);
    UNROLL for (int i = 0; i < AT_ONCE; ++i) run.step(position + i, arriving[i]);
  }
  UNROLL for (int i = 0; i < AT_ONCE - 1; ++i) if (position + i < end) run.step(position + i, following[i]);
}

struct Forward {
  const Place at;
  const Filter filter;
  Window window;
  Element* y;

  struct Brought {
    Elements x;
    bool restarts;
  };
  DEVICE Brought bring(int position) const { return {load(at.x + after(position)), at.restarts(position)}; }
  DEVICE void step(int position, const Brought& brought) {
    window.append(brought.x, brought.restarts);
    float values[CHANNELS];
    EACH_CHANNEL {
      float linear = window.linear(filter, c);
      values[c] = SILU ? linear * sigmoid(linear) : linear;
    }
    store(y + after(position), values);
  }
};

KERNEL conv_forward(INPUTS, Element* __restrict__ y, Element* __restrict__ final_state, SIZES) {
  Place at = PLACE;
  if (at.row >= rows) return;
  Forward run = {at, Filter(taps, bias, at), Window(at), y + at.in(length, 0)};
  walk(run, at.end);
  if (at.end < length) return;
  UNROLL for (int j = 1; j < K; ++j) {
    float values[CHANNELS];
    EACH_CHANNEL values[c] = run.window.seen(j, c);
    store(final_state + at.in(K - 1, j - 1), values);
  }
}

DEVICE float silu_derivative(float value) {
  float gate = sigmoid(value);
  return gate * (1.0f + value * (1.0f - gate));
}

struct Backward {
  const Place at;
  const Filter filter;
  Window window;
  const Element* dy;
  Element *dx, *dstate;
  // Of the inputs up to so many positions back, as far as the steps so far tell; over the chunk's own outputs.
  float dinputs[K][CHANNELS] = {};
  Floats dtaps[K] = {}, dbias = {};

  struct Brought {
    Elements x, dy;
    bool restarts;
  };
  DEVICE Brought bring(int position) const {
    return {load(at.x + after(position)), load(dy + after(position)), at.restarts(position)};
  }
  DEVICE void step(int position, const Brought& brought) {
    window.append(brought.x, brought.restarts);
    float g[CHANNELS];
    brought.dy.unpack(g);
    EACH_CHANNEL {
      if (SILU) g[c] *= silu_derivative(window.linear(filter, c));
      UNROLL for (int back = K - 1; back >= 0; --back) {
        float before = back ? dinputs[back - 1][c] : 0.0f;
        dinputs[back][c] = before + (window.sees(back) ? g[c] : 0.0f) * filter.taps[K - 1 - back].of[c];
      }
      // The outputs from the end on are another thread's too.
      float own = position < at.end ? g[c] : 0.0f;
      UNROLL for (int j = 0; j < K; ++j) dtaps[j].of[c] += own * window.seen(j, c);
      dbias.of[c] += own;
    }
    give(position, K - 1);
  }
  // The gradient of the input so many positions back, if that is the thread's.
  DEVICE void give(int position, int back) {
    int its = position - back;
    if (its >= at.begin && its < at.end) store(dx + after(its), dinputs[back]);
    if (its < 0 && at.begin == 0) store(dstate + after(its + K - 1), dinputs[back]);
  }
  // Once the last output is known, all of the last inputs' gradients are.
  DEVICE void finish(const Element* dfinal_state) {
    UNROLL for (int back = K - 2; back >= 0; --back) {
      float passed[CHANNELS];
      load(dfinal_state + after(K - 2 - back)).unpack(passed);
      EACH_CHANNEL dinputs[back][c] += window.sees(back) ? passed[c] : 0.0f;
      give(at.length - 1, back);
    }
  }
};

KERNEL conv_backward(
    INPUTS, const Element* __restrict__ dy, const Element* __restrict__ dfinal_state, Element* __restrict__ dx,
    Element* __restrict__ dstate, float* __restrict__ sums, SIZES) {
  Place at = PLACE;
  if (at.row >= rows) return;
  int64 first = at.in(length, 0), state_first = at.in(K - 1, 0);
  Backward run = {at, Filter(taps, bias, at), Window(at), dy + first, dx + first, dstate + state_first};
  int end = min(at.begin + chunk + K - 1, length);
  walk(run, end);
  if (end == length) run.finish(dfinal_state + state_first);
  // (b, chunks, k+1, e): of the taps, and then of the bias.
  sums += (int64(at.row) * chunks + at.begin / chunk) * (K + 1) * E + at.channel;
  UNROLL for (int j = 0; j < K; ++j) *(Floats*)(sums + j * E) = run.dtaps[j];
  *(Floats*)(sums + K * E) = run.dbias;
}
