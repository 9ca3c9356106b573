// The selective scan, forward and backward, in what CUDA C++ and Metal have in common; the contract is
// `mamba_core.backend.Backend.selective_scan`, the gradient `mamba_core.spec.recurrence.selective_scan_vjp`.
//
// A block of threads takes BLOCK_CHANNELS channels of a row through a chunk of the sequence. The states of a channel are
// spread over S threads of a warp, NS each; a thread has K channels. A tile of the sequence is brought to shared memory,
// while the next is on its way to registers, and walked position by position with the states in registers.
//
// Where rows and channels alone do not fill the GPU the sequence is cut into chunks: a first run from zero gives what
// each chunk adds, `combine` the state that each begins from, and the main run goes on from there. A chunk's decay is
// exp(A * sum of its steps).
//
// The backward walks tiles and positions in reverse. It begins a tile from the state before it, which the forward kept,
// and holds the tile's states in shared memory. Sums over channels (dB, dC) are added up within the block in a fixed
// order and left to the caller to add over blocks, as those over rows and chunks (dA, dD, ddelta_bias): no atomics, the
// same bits every time.
//
// Given by the compiler's command line: ELEMENT (of x, delta, B, C, z: 0 float32, 1 bfloat16, 2 float16), NS, S, K, WARPS,
// TILE and KEEP_EVERY (positions between kept states), ALIGNED (whether rows can be read by vectors), and 0 or 1 for
// HAS_D, HAS_Z, HAS_BIAS, SOFTPLUS, HAS_STATE (of what the run begins from), CHUNKED, HAS_MASK, HAS_RESTART and KEEP.

#define LANES 32
#define THREADS (WARPS * LANES)
#define CHANNEL_LANES (LANES / S)
#define BLOCK_CHANNELS (WARPS * CHANNEL_LANES * K)
// States with those that only fill up; theirs are zero.
#define PADDED (NS * S)
// Positions whose sums over states are formed together, one for each of as many threads.
#define TOGETHER 4
// A tile's elements that a thread brings, and how many of them at a time.
#define BROUGHT (TILE * K / S)
#define VECTOR (BROUGHT < 8 ? BROUGHT : 8)
#define VECTORS (BROUGHT / VECTOR)
#define STATES_BROUGHT ((TILE * PADDED + THREADS - 1) / THREADS)
// Rows of shared memory, padded so that threads of different positions meet in different banks.
#define ROW (BLOCK_CHANNELS + 8)

#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f

#define VECTOR_BYTES (sizeof(Element) * VECTOR)
// No GPU reads more than 16 bytes at a time.
struct alignas(VECTOR_BYTES < 16 ? VECTOR_BYTES : 16) Vector {
  Element at[VECTOR];
};

// (b, l, channels or states), the last axis contiguous.
struct Sequence {
  const GLOBAL Element* data;
  int64 row, position;
};

struct Inputs {
  Sequence x, delta, B, C, z, dy;
  const GLOBAL float *A, *D, *delta_bias;
  // (b, chunks, e, PADDED): what each chunk begins from, at its first position, or in the backward at its last.
  const GLOBAL float* begin;
  const GLOBAL byte *mask, *restart;  // (b, l)
  int length, channels, states, chunk, chunks;
};

struct Place {
  int thread, block, chunk, row;
};

DEVICE float sigmoid(float value) { return quotient(1.0f, 1.0f + exact_exp(-value)); }
DEVICE float softplus(float value) { return max(value, 0.0f) + exact_log1p(exact_exp(-fabs(value))); }
// Of a silu: at -inf and far below it is 0, as the exponential is inf there.
DEVICE float silu_derivative(float value) {
  float gate = sigmoid(value);
  return gate * (1.0f + value * (1.0f - gate));
}

// Where a thread stands, and the tile elements and states that it brings and computes.
struct Thread {
  Place place;
  int lane, states, first_channel;  // `states` and `first_channel`: the first of its NS, and of its K, which are CHANNEL_LANES apart
  int start, end;                   // of the chunk

  DEVICE Thread(Place at, const Inputs in) {
    place = at;
    lane = at.thread % LANES;
    states = lane % S * NS;
    first_channel = at.thread / LANES * CHANNEL_LANES * K + lane / S;
    start = at.chunk * in.chunk;
    end = min(start + in.chunk, in.length);
  }
  DEVICE int channel(int k) const { return first_channel + k * CHANNEL_LANES; }
  DEVICE int global_channel(int k) const { return place.block * BLOCK_CHANNELS + channel(k); }
  // Of the i-th vector that it brings.
  DEVICE int brought_position(int i) const { return (i * THREADS + place.thread) * VECTOR / BLOCK_CHANNELS; }
  DEVICE int brought_channel(int i) const { return (i * THREADS + place.thread) * VECTOR % BLOCK_CHANNELS; }
};

DEVICE bool counts(const Inputs in, int row, int position) {
  return position < in.length && !(HAS_MASK && !in.mask[int64(row) * in.length + position]);
}

DEVICE Vector bring(const Sequence from, const Inputs in, const Thread at, int position, int i) {
  Vector brought;
  int channel = at.place.block * BLOCK_CHANNELS + at.brought_channel(i);
  const GLOBAL Element* source = from.data + at.place.row * from.row + position * from.position + channel;
  bool inside = position < in.length;
  if (ALIGNED && inside && channel < in.channels) {
    brought = *(const GLOBAL Vector*)source;
  } else {
    UNROLL for (int c = 0; c < VECTOR; ++c)
      brought.at[c] = !ALIGNED && inside && channel + c < in.channels ? source[c] : to_element(0.0f);
  }
  return brought;
}

DEVICE void put(GLOBAL Element* to, const Inputs in, const Thread at, int position, int i, const Vector values) {
  int channel = at.place.block * BLOCK_CHANNELS + at.brought_channel(i);
  if (position >= in.length) return;
  GLOBAL Element* target = to + (int64(at.place.row) * in.length + position) * in.channels + channel;
  if (ALIGNED) {
    if (channel < in.channels) *(GLOBAL Vector*)target = values;
  } else {
    UNROLL for (int c = 0; c < VECTOR; ++c)
      if (channel + c < in.channels) target[c] = values.at[c];
  }
}

// B or C of a tile: (TILE, PADDED), zero where a position does not count.
DEVICE void bring_states(const Sequence from, const Inputs in, const Thread at, int first, float brought[STATES_BROUGHT]) {
  UNROLL for (int i = 0; i < STATES_BROUGHT; ++i) {
    int index = i * THREADS + at.place.thread;
    int position = first + index / PADDED, state = index % PADDED;
    bool given = index < TILE * PADDED && state < in.states && counts(in, at.place.row, position);
    brought[i] = given ? to_float(from.data[at.place.row * from.row + position * from.position + state]) : 0.0f;
  }
}

DEVICE void lay_states(SHARED float* to, const Thread at, const float brought[STATES_BROUGHT]) {
  UNROLL for (int i = 0; i < STATES_BROUGHT; ++i) {
    int index = i * THREADS + at.place.thread;
    if (index < TILE * PADDED) to[index] = brought[i];
  }
}

// NS floats that lie together, of a position's states.
DEVICE void read_states(const SHARED float* from, float values[NS]) {
  if (NS % 4 == 0) {
    UNROLL for (int j = 0; j < NS; j += 4) {
      float4 four = *(const SHARED float4*)(from + j);
      values[j] = four.x, values[j + 1] = four.y, values[j + 2] = four.z, values[j + 3] = four.w;
    }
  } else {
    UNROLL for (int j = 0; j < NS; ++j) values[j] = from[j];
  }
}

// The states of the thread's channels from (e, PADDED), zero where `from` has none.
DEVICE void load_state(const GLOBAL float* from, const Inputs in, const Thread at, float h[K][NS]) {
  UNROLL for (int k = 0; k < K; ++k) UNROLL for (int j = 0; j < NS; ++j) {
      bool given = at.global_channel(k) < in.channels;
      h[k][j] = given ? from[int64(at.global_channel(k)) * PADDED + at.states + j] : 0.0f;
    }
}

DEVICE void store_state(GLOBAL float* to, const Inputs in, const Thread at, const float h[K][NS]) {
  UNROLL for (int k = 0; k < K; ++k) UNROLL for (int j = 0; j < NS; ++j)
      if (at.global_channel(k) < in.channels) to[int64(at.global_channel(k)) * PADDED + at.states + j] = h[k][j];
}

DEVICE void clear(float h[K][NS]) {
  UNROLL for (int k = 0; k < K; ++k) UNROLL for (int j = 0; j < NS; ++j) h[k][j] = 0.0f;
}

// A log2(e), and so decays as powers of 2; zero for the states that fill up.
DEVICE void load_rates(const Inputs in, const Thread at, float rates[K][NS]) {
  UNROLL for (int k = 0; k < K; ++k) UNROLL for (int j = 0; j < NS; ++j) {
      bool given = at.global_channel(k) < in.channels && at.states + j < in.states;
      rates[k][j] = given ? in.A[int64(at.global_channel(k)) * in.states + at.states + j] * LOG2_E : 0.0f;
    }
}

// Of (b, chunks, e, PADDED), or with another count of chunks.
DEVICE int64 state_offset(const Inputs in, const Thread at, int chunk, int chunks) {
  return (int64(at.place.row) * chunks + chunk) * in.channels * PADDED;
}

// The step size of a brought element, zero where the position does not count.
DEVICE float step_size(const Inputs in, float delta, int channel, bool counting) {
  float raw = HAS_BIAS && channel < in.channels ? delta + in.delta_bias[channel] : delta;
  return counting ? (SOFTPLUS ? softplus(raw) : raw) : 0.0f;
}

// The sum over the S threads of a channel, of TOGETHER positions at once: a thread has that of position lane % 4.
DEVICE float sum_states(const float sums[TOGETHER], int lane) {
  bool odd = lane & 1, high = lane & 2;
  float even_half = (odd ? sums[1] : sums[0]) + shuffle_xor(odd ? sums[0] : sums[1], 1);
  float odd_half = (odd ? sums[3] : sums[2]) + shuffle_xor(odd ? sums[2] : sums[3], 1);
  float sum = (high ? odd_half : even_half) + shuffle_xor(high ? even_half : odd_half, 2);
  UNROLL for (int mask = TOGETHER; mask < S; mask *= 2) sum += shuffle_xor(sum, mask);
  return sum;
}

DEVICE float decay(float step, float rate, bool restarts) {
  return HAS_RESTART && restarts ? 0.0f : fast_exp2(step * rate);
}

struct Steps {  // of a tile, in shared memory
  SHARED float2* at;       // (TILE, ROW): the step, and step * x
  SHARED byte* restarting; // (TILE)
};

DEVICE void lay_restarts(SHARED byte* restarting, const Inputs in, const Thread at, int first) {
  if (HAS_RESTART && at.place.thread < TILE) {
    int position = first + at.place.thread;
    restarting[at.place.thread] = counts(in, at.place.row, position) && in.restart[int64(at.place.row) * in.length + position];
  }
}

struct ForwardResults {
  GLOBAL Element* y;
  GLOBAL float* final_state;  // (b, e, PADDED)
  GLOBAL float* kept;         // (b, ceil(l / KEEP_EVERY), e, PADDED), the state before every KEEP_EVERY positions
  GLOBAL float* added;        // (b, chunks, e, PADDED), of a first run: what each chunk adds
  GLOBAL float* total;        // (b, chunks, e), of a first run: the sum of steps, infinite where the state restarts
};

#define FORWARD_SHARED (3 * TILE * ROW + 2 * TILE * PADDED + TILE)

// FIRST: the run that only adds up what each chunk adds.
template <bool FIRST>
DEVICE void scan_forward(const Inputs in, const ForwardResults out, const Place place, SHARED float* shared) {
  SHARED float2* steps = (SHARED float2*)shared;
  SHARED float* linear = shared + 2 * TILE * ROW;
  SHARED float *B = linear + TILE * ROW, *C = B + TILE * PADDED;
  SHARED byte* restarting = (SHARED byte*)(C + TILE * PADDED);
  const Thread at(place, in);

  float rates[K][NS], h[K][NS], total[K];
  load_rates(in, at, rates);
  if (!FIRST && (HAS_STATE || CHUNKED))
    load_state(in.begin + state_offset(in, at, place.chunk, in.chunks), in, at, h);
  else
    clear(h);
  UNROLL for (int k = 0; k < K; ++k) total[k] = 0.0f;

  Vector x[VECTORS], delta[VECTORS], z[VECTORS];
  float next_B[STATES_BROUGHT], next_C[STATES_BROUGHT];
  for (int first = at.start; first < at.end; first += TILE) {
    if (first == at.start) {
      UNROLL for (int i = 0; i < VECTORS; ++i) {
        int position = first + at.brought_position(i);
        x[i] = bring(in.x, in, at, position, i), delta[i] = bring(in.delta, in, at, position, i);
        if (HAS_Z && !FIRST) z[i] = bring(in.z, in, at, position, i);
      }
      bring_states(in.B, in, at, first, next_B);
      if (!FIRST) bring_states(in.C, in, at, first, next_C);
    }
    UNROLL for (int i = 0; i < VECTORS; ++i) {
      int position = at.brought_position(i), channel = at.brought_channel(i);
      bool counting = counts(in, place.row, first + position);
      UNROLL for (int c = 0; c < VECTOR; ++c) {
        float step = step_size(in, to_float(delta[i].at[c]), place.block * BLOCK_CHANNELS + channel + c, counting);
        steps[position * ROW + channel + c] = float2{step, counting ? step * to_float(x[i].at[c]) : 0.0f};
      }
    }
    lay_states(B, at, next_B);
    if (!FIRST) lay_states(C, at, next_C);
    lay_restarts(restarting, in, at, first);
    barrier();

    Vector this_x[VECTORS], this_z[VECTORS];
    UNROLL for (int i = 0; i < VECTORS; ++i) {
      this_x[i] = x[i], this_z[i] = z[i];
      int position = first + TILE + at.brought_position(i);
      x[i] = bring(in.x, in, at, position, i), delta[i] = bring(in.delta, in, at, position, i);
      if (HAS_Z && !FIRST) z[i] = bring(in.z, in, at, position, i);
    }
    bring_states(in.B, in, at, first + TILE, next_B);
    if (!FIRST) bring_states(in.C, in, at, first + TILE, next_C);

    for (int t = 0; t < TILE; t += TOGETHER) {
      if (KEEP && !FIRST && (first + t) % KEEP_EVERY == 0 && first + t < in.length)
        store_state(
            out.kept + state_offset(in, at, (first + t) / KEEP_EVERY, (in.length + KEEP_EVERY - 1) / KEEP_EVERY), in,
            at, h);
      float sums[K][TOGETHER];
      UNROLL for (int u = 0; u < TOGETHER; ++u) {
        float B_t[NS], C_t[NS];
        read_states(B + (t + u) * PADDED + at.states, B_t);
        if (!FIRST) read_states(C + (t + u) * PADDED + at.states, C_t);
        bool restarts = HAS_RESTART && restarting[t + u];
        UNROLL for (int k = 0; k < K; ++k) {
          float2 step = steps[(t + u) * ROW + at.channel(k)];
          if (FIRST) total[k] = restarts ? infinity() : total[k] + step.x;
          float sum = 0.0f;
          UNROLL for (int j = 0; j < NS; ++j) {
            h[k][j] = multiply_add(decay(step.x, rates[k][j], restarts), h[k][j], step.y * B_t[j]);
            if (!FIRST) sum = multiply_add(C_t[j], h[k][j], sum);
          }
          sums[k][u] = sum;
        }
      }
      if (!FIRST) {
        UNROLL for (int k = 0; k < K; ++k) {
          float sum = sum_states(sums[k], at.lane);
          if (at.lane % S < TOGETHER) linear[(t + at.lane % TOGETHER) * ROW + at.channel(k)] = sum;
        }
      }
    }
    barrier();

    if (!FIRST) {
      UNROLL for (int i = 0; i < VECTORS; ++i) {
        int position = at.brought_position(i), channel = at.brought_channel(i);
        bool counting = counts(in, place.row, first + position);
        Vector y;
        UNROLL for (int c = 0; c < VECTOR; ++c) {
          int global = place.block * BLOCK_CHANNELS + channel + c;
          float value = linear[position * ROW + channel + c];
          if (HAS_D && global < in.channels) value = multiply_add(in.D[global], to_float(this_x[i].at[c]), value);
          if (HAS_Z) value *= to_float(this_z[i].at[c]) * sigmoid(to_float(this_z[i].at[c]));
          y.at[c] = to_element(counting ? value : 0.0f);
        }
        put(out.y, in, at, first + position, i, y);
      }
    }
  }
  if (FIRST) {
    store_state(out.added + state_offset(in, at, place.chunk, in.chunks), in, at, h);
    UNROLL for (int k = 0; k < K; ++k)
      if (at.lane % S == 0 && at.global_channel(k) < in.channels)
        out.total[(int64(place.row) * in.chunks + place.chunk) * in.channels + at.global_channel(k)] = total[k];
  } else if (at.end == in.length) {
    store_state(out.final_state + state_offset(in, at, 0, 1), in, at, h);
  }
}

// (b, chunks, e, PADDED) of a first run becomes what each chunk begins from, forwards or backwards in the sequence; one
// thread a state of a row. `begin` (b, e, PADDED) is what the first chunk on that way begins from, where given.
DEVICE void combine(const Inputs in, GLOBAL float* added, const GLOBAL float* total, bool backwards, int64 index) {
  int64 states = int64(in.channels) * PADDED, row = index / states, state = index % states;
  int channel = state / PADDED, n = state % PADDED;
  float rate = n < in.states ? in.A[int64(channel) * in.states + n] * LOG2_E : 0.0f;
  float h = HAS_STATE ? in.begin[index] : 0.0f;
  for (int i = 0; i < in.chunks; ++i) {
    int64 chunk = row * in.chunks + (backwards ? in.chunks - 1 - i : i);
    float own = added[chunk * states + state], sum = total[chunk * in.channels + channel];
    added[chunk * states + state] = h;
    h = multiply_add(sum == infinity() ? 0.0f : fast_exp2(sum * rate), h, own);
  }
}

struct BackwardResults {
  GLOBAL Element *dx, *ddelta, *dz;
  // (b, blocks, l, 2, PADDED): dB and dC of each block of channels.
  GLOBAL float* dBC;
  // (b, chunks, e, PADDED), (b, chunks, e), (b, chunks, e): of each row and chunk.
  GLOBAL float *dA, *dD, *ddelta_bias;
  GLOBAL float* dstate;       // (b, e, PADDED), of the initial state
  GLOBAL float *added, *total;  // of a first run, as in ForwardResults
};

#define HISTORY (TILE * K * NS * THREADS)
#define BACKWARD_SHARED (HISTORY + 6 * TILE * ROW + 2 * TILE * PADDED + TILE * WARPS * 2 * PADDED + TILE)

// A thread's states before a position, where no other thread looks.
DEVICE void write_history(SHARED float* history, const Thread at, int slot, const float values[NS]) {
  if (NS % 4 == 0) {
    UNROLL for (int j = 0; j < NS; j += 4)
        ((SHARED float4*)history)[(slot * (NS / 4) + j / 4) * THREADS + at.place.thread] =
            float4{values[j], values[j + 1], values[j + 2], values[j + 3]};
  } else {
    UNROLL for (int j = 0; j < NS; ++j) history[(slot * NS + j) * THREADS + at.place.thread] = values[j];
  }
}

DEVICE void read_history(const SHARED float* history, const Thread at, int slot, float values[NS]) {
  if (NS % 4 == 0) {
    UNROLL for (int j = 0; j < NS; j += 4) {
      float4 four = ((const SHARED float4*)history)[(slot * (NS / 4) + j / 4) * THREADS + at.place.thread];
      values[j] = four.x, values[j + 1] = four.y, values[j + 2] = four.z, values[j + 3] = four.w;
    }
  } else {
    UNROLL for (int j = 0; j < NS; ++j) values[j] = history[(slot * NS + j) * THREADS + at.place.thread];
  }
}

// The sums over the warp's channels of 2 NS values, dB's and then dC's of the thread's states, into (2, PADDED): at every
// step a thread hands over half of what it still has.
DEVICE void sum_channels(float values[2 * NS], int lane, int state, SHARED float* to) {
  int count = 2 * NS, offset = 0;
  bool writes = true;
  UNROLL for (int mask = S; mask < LANES; mask *= 2) {
    bool high = lane & mask;
    if (count > 1) {
      count /= 2;
      UNROLL for (int i = 0; i < NS; ++i)
        if (i < count) {
          float kept = high ? values[i + count] : values[i], sent = high ? values[i] : values[i + count];
          values[i] = kept + shuffle_xor(sent, mask);
        }
      offset += high ? count : 0;
    } else {
      values[0] += shuffle_xor(values[0], mask);
      writes = writes && !high;
    }
  }
  UNROLL for (int i = 0; i < 2 * NS; ++i)
    if (i < count && writes) to[(offset + i) / NS * PADDED + state + (offset + i) % NS] = values[i];
}

// FIRST: the run that only adds up what each chunk hands to the one before it.
template <bool FIRST>
DEVICE void scan_backward(
    const Inputs in, const GLOBAL float* kept, const BackwardResults out, const Place place, SHARED float* shared) {
  SHARED float* history = shared;
  SHARED float2* steps = (SHARED float2*)(history + HISTORY);
  SHARED float* gated = (SHARED float*)(steps + TILE * ROW);  // dy silu(z)
  SHARED float *linear = gated + TILE * ROW, *gB = linear + TILE * ROW, *rated = gB + TILE * ROW;
  SHARED float *B = rated + TILE * ROW, *C = B + TILE * PADDED, *dBC = C + TILE * PADDED;
  SHARED byte* restarting = (SHARED byte*)(dBC + TILE * WARPS * 2 * PADDED);
  const Thread at(place, in);
  const int tiles = (in.length + KEEP_EVERY - 1) / KEEP_EVERY;

  float rates[K][NS], passed[K][NS], dA[K][NS], total[K];
  load_rates(in, at, rates);
  if (!FIRST && (HAS_STATE || CHUNKED))
    load_state(in.begin + state_offset(in, at, place.chunk, in.chunks), in, at, passed);
  else
    clear(passed);
  clear(dA);
  UNROLL for (int k = 0; k < K; ++k) total[k] = 0.0f;
  float dD[VECTORS][VECTOR], dbias[VECTORS][VECTOR];
  UNROLL for (int i = 0; i < VECTORS; ++i) UNROLL for (int c = 0; c < VECTOR; ++c) dD[i][c] = dbias[i][c] = 0.0f;

  Vector x[VECTORS], delta[VECTORS], z[VECTORS], dy[VECTORS];
  float next_B[STATES_BROUGHT], next_C[STATES_BROUGHT], before[K][NS];
  const int last = at.start + (at.end - 1 - at.start) / TILE * TILE;
  for (int first = last + TILE; first >= at.start; first -= TILE) {
    Vector this_x[VECTORS], this_delta[VECTORS], this_z[VECTORS], this_dy[VECTORS];
    float h[K][NS];
    if (first <= last) {
      UNROLL for (int i = 0; i < VECTORS; ++i) {
        int position = at.brought_position(i), channel = at.brought_channel(i);
        bool counting = counts(in, place.row, first + position);
        UNROLL for (int c = 0; c < VECTOR; ++c) {
          int there = position * ROW + channel + c;
          float step = step_size(in, to_float(delta[i].at[c]), place.block * BLOCK_CHANNELS + channel + c, counting);
          float gradient = to_float(dy[i].at[c]);
          if (HAS_Z) gradient *= to_float(z[i].at[c]) * sigmoid(to_float(z[i].at[c]));
          steps[there] = float2{step, counting ? step * to_float(x[i].at[c]) : 0.0f};
          gated[there] = counting ? gradient : 0.0f;
        }
        this_x[i] = x[i], this_delta[i] = delta[i], this_z[i] = z[i], this_dy[i] = dy[i];
      }
      if (!FIRST) lay_states(B, at, next_B);
      lay_states(C, at, next_C);
      lay_restarts(restarting, in, at, first);
      UNROLL for (int k = 0; k < K; ++k) UNROLL for (int j = 0; j < NS; ++j) h[k][j] = before[k][j];
      barrier();
    }
    if (first > at.start) {  // the next tile, which lies before this one
      UNROLL for (int i = 0; i < VECTORS; ++i) {
        int position = first - TILE + at.brought_position(i);
        x[i] = bring(in.x, in, at, position, i), delta[i] = bring(in.delta, in, at, position, i);
        dy[i] = bring(in.dy, in, at, position, i);
        if (HAS_Z) z[i] = bring(in.z, in, at, position, i);
      }
      bring_states(in.C, in, at, first - TILE, next_C);
      if (!FIRST) {
        bring_states(in.B, in, at, first - TILE, next_B);
        load_state(kept + state_offset(in, at, (first - TILE) / KEEP_EVERY, tiles), in, at, before);
      }
    }
    if (first > last) continue;

    if (!FIRST) {
      for (int t = 0; t < TILE; t += TOGETHER) {  // the tile's states once more
        float sums[K][TOGETHER];
        UNROLL for (int u = 0; u < TOGETHER; ++u) {
          float B_t[NS], C_t[NS];
          read_states(B + (t + u) * PADDED + at.states, B_t);
          if (HAS_Z) read_states(C + (t + u) * PADDED + at.states, C_t);
          bool restarts = HAS_RESTART && restarting[t + u];
          UNROLL for (int k = 0; k < K; ++k) {
            float2 step = steps[(t + u) * ROW + at.channel(k)];
            write_history(history, at, (t + u) * K + k, h[k]);
            float sum = 0.0f;
            UNROLL for (int j = 0; j < NS; ++j) {
              h[k][j] = multiply_add(decay(step.x, rates[k][j], restarts), h[k][j], step.y * B_t[j]);
              if (HAS_Z) sum = multiply_add(C_t[j], h[k][j], sum);
            }
            sums[k][u] = sum;
          }
        }
        if (HAS_Z) {
          UNROLL for (int k = 0; k < K; ++k) {
            float sum = sum_states(sums[k], at.lane);
            if (at.lane % S < TOGETHER) linear[(t + at.lane % TOGETHER) * ROW + at.channel(k)] = sum;
          }
        }
      }
    }
    for (int t = TILE - TOGETHER; t >= 0; t -= TOGETHER) {
      float gB_sums[K][TOGETHER], rated_sums[K][TOGETHER];
      UNROLL for (int u = TOGETHER - 1; u >= 0; --u) {
        float B_t[NS], C_t[NS], values[2 * NS];
        if (!FIRST) read_states(B + (t + u) * PADDED + at.states, B_t);
        read_states(C + (t + u) * PADDED + at.states, C_t);
        bool restarts = HAS_RESTART && restarting[t + u];
        UNROLL for (int j = 0; j < 2 * NS; ++j) values[j] = 0.0f;
        UNROLL for (int k = 0; k < K; ++k) {
          int there = (t + u) * ROW + at.channel(k);
          float2 step = steps[there];
          float gradient = gated[there], gB_sum = 0.0f, rated_sum = 0.0f, previous[NS];
          if (FIRST)
            total[k] = restarts ? infinity() : total[k] + step.x;
          else
            read_history(history, at, (t + u) * K + k, previous);
          UNROLL for (int j = 0; j < NS; ++j) {
            float g = multiply_add(C_t[j], gradient, passed[k][j]);
            passed[k][j] = g * decay(step.x, rates[k][j], restarts);
            if (!FIRST) {
              float dlog_decay = passed[k][j] * previous[j];
              values[j] = multiply_add(g, step.y, values[j]);
              values[NS + j] = multiply_add(gradient, h[k][j], values[NS + j]);
              dA[k][j] = multiply_add(dlog_decay, step.x, dA[k][j]);
              gB_sum = multiply_add(g, B_t[j], gB_sum);
              rated_sum = multiply_add(dlog_decay, rates[k][j], rated_sum);
              h[k][j] = previous[j];
            }
          }
          gB_sums[k][u] = gB_sum, rated_sums[k][u] = rated_sum;
        }
        if (!FIRST)
          sum_channels(values, at.lane, at.states, dBC + ((t + u) * WARPS + place.thread / LANES) * 2 * PADDED);
      }
      if (!FIRST) {
        UNROLL for (int k = 0; k < K; ++k) {
          float gB_sum = sum_states(gB_sums[k], at.lane), rated_sum = sum_states(rated_sums[k], at.lane);
          if (at.lane % S < TOGETHER) {
            int there = (t + at.lane % TOGETHER) * ROW + at.channel(k);
            gB[there] = gB_sum, rated[there] = rated_sum;
          }
        }
      }
    }
    barrier();

    if (FIRST) continue;
    UNROLL for (int i = 0; i < VECTORS; ++i) {
      int position = at.brought_position(i), channel = at.brought_channel(i);
      bool counting = counts(in, place.row, first + position);
      Vector dx, ddelta, dz;
      UNROLL for (int c = 0; c < VECTOR; ++c) {
        int there = position * ROW + channel + c, global = place.block * BLOCK_CHANNELS + channel + c;
        float D = HAS_D && global < in.channels ? in.D[global] : 0.0f, value = to_float(this_x[i].at[c]);
        float gradient = gated[there], of_step = multiply_add(gB[there], value, LN_2 * rated[there]);
        if (SOFTPLUS) {
          float raw = to_float(this_delta[i].at[c]);
          of_step *= sigmoid(HAS_BIAS && global < in.channels ? raw + in.delta_bias[global] : raw);
        }
        if (HAS_Z) {
          float gate = to_float(this_z[i].at[c]), sum = multiply_add(D, value, linear[there]);
          dz.at[c] = to_element(counting ? to_float(this_dy[i].at[c]) * sum * silu_derivative(gate) : 0.0f);
        }
        dx.at[c] = to_element(counting ? multiply_add(gB[there], steps[there].x, D * gradient) : 0.0f);
        ddelta.at[c] = to_element(counting ? of_step : 0.0f);
        dD[i][c] += counting ? gradient * value : 0.0f;
        dbias[i][c] += counting ? of_step : 0.0f;
      }
      put(out.dx, in, at, first + position, i, dx);
      put(out.ddelta, in, at, first + position, i, ddelta);
      if (HAS_Z) put(out.dz, in, at, first + position, i, dz);
    }
    for (int index = place.thread; index < TILE * 2 * PADDED; index += THREADS) {
      int position = index / (2 * PADDED), state = index % (2 * PADDED);
      float sum = 0.0f;
      UNROLL for (int warp = 0; warp < WARPS; ++warp) sum += dBC[(position * WARPS + warp) * 2 * PADDED + state];
      int blocks = (in.channels + BLOCK_CHANNELS - 1) / BLOCK_CHANNELS;
      if (first + position < in.length)
        out.dBC[((int64(place.row) * blocks + place.block) * in.length + first + position) * 2 * PADDED + state] = sum;
    }
  }

  const int64 own = int64(place.row) * in.chunks + place.chunk;
  if (FIRST) {
    store_state(out.added + own * in.channels * PADDED, in, at, passed);
    UNROLL for (int k = 0; k < K; ++k)
      if (at.lane % S == 0 && at.global_channel(k) < in.channels)
        out.total[own * in.channels + at.global_channel(k)] = total[k];
    return;
  }
  store_state(out.dA + own * in.channels * PADDED, in, at, dA);
  if (place.chunk == 0) store_state(out.dstate + state_offset(in, at, 0, 1), in, at, passed);
  // Over the positions of a tile, whose memory is free now: a row for each.
  SHARED float *dD_rows = gated, *dbias_rows = linear;
  barrier();
  UNROLL for (int i = 0; i < VECTORS; ++i) UNROLL for (int c = 0; c < VECTOR; ++c) {
      int there = at.brought_position(i) * ROW + at.brought_channel(i) + c;
      dD_rows[there] = dD[i][c], dbias_rows[there] = dbias[i][c];
    }
  barrier();
  for (int channel = place.thread; channel < BLOCK_CHANNELS; channel += THREADS) {
    int global = place.block * BLOCK_CHANNELS + channel;
    float dD_sum = 0.0f, dbias_sum = 0.0f;
    for (int t = 0; t < TILE; ++t) dD_sum += dD_rows[t * ROW + channel], dbias_sum += dbias_rows[t * ROW + channel];
    if (global < in.channels) {
      if (HAS_D) out.dD[own * in.channels + global] = dD_sum;
      if (HAS_BIAS) out.ddelta_bias[own * in.channels + global] = dbias_sum;
    }
  }
}
