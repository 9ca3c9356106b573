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
// TILE and KEEP_EVERY (positions between kept states), and 0 or 1 for ALIGNED and STATES_ALIGNED (whether the rows of the
// sequences over channels, and of B and C, can be read by vectors),
// HAS_D, HAS_Z, HAS_BIAS, SOFTPLUS, HAS_STATE (of what the run begins from), CHUNKED, HAS_MASK, HAS_RESTART and KEEP.

// Whether what is there can be read by vectors, for a framework that does not vouch for it.
#ifndef ALIGNED_AT
#define ALIGNED_AT(address) true
#endif

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
// Positions from one to the next.
#define VECTOR_STRIDE (VECTOR * S / K)
// The same of a tile of B or C.
#define STATE_VECTOR (PADDED < 8 ? PADDED : 8)
#define STATE_VECTORS ((TILE * PADDED / STATE_VECTOR + THREADS - 1) / THREADS)
#define STATE_VECTOR_STRIDE (THREADS * STATE_VECTOR / PADDED)
// Rows of shared memory, padded so that threads of different positions meet in different banks.
#define ROW (BLOCK_CHANNELS + 8)

typedef Vector<VECTOR> Brought;

// (b, l, channels or states), the last axis contiguous; `position` is a stride that fits 32 bits.
struct Sequence {
  const GLOBAL Element* data;
  int64 row;
  int position;

  // Of a position after the one that it stands at.
  DEVICE const GLOBAL Element* at(int after) const { return data + int64(after) * position; }
  DEVICE void advance(int positions) { data += int64(positions) * position; }
};

struct Inputs {
  Sequence x, delta, B, C, z, dy;
  const GLOBAL float *A, *D, *delta_bias;
  // (b, chunks, e, PADDED): what each chunk begins from, at its first position, or in the backward at its last.
  const GLOBAL float* begin;
  const GLOBAL byte *mask, *restart;  // (b, l)
  int length, channels, states, chunk, chunks;

  DEVICE void advance(int positions) {
    x.advance(positions), delta.advance(positions), z.advance(positions), dy.advance(positions);
    B.advance(positions), C.advance(positions);
  }
};

struct Place {
  int rank, block, chunk, row;
};

DEVICE float silu_derivative(float value, float gate) { return gate * (1.0f + value * (1.0f - gate)); }

// N floats of shared memory that lie together.
template <int N>
DEVICE void read(const SHARED float* from, LOCAL float* values) {
  if (N % 4 == 0) {
    UNROLL for (int i = 0; i + 3 < N; i += 4) {
      float4 four = *(const SHARED float4*)(from + i);
      values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
    }
  } else {
    UNROLL for (int i = 0; i < N; ++i) values[i] = from[i];
  }
}

template <int N>
DEVICE void write(SHARED float* to, const LOCAL float* values) {
  if (N % 4 == 0) {
    UNROLL for (int i = 0; i + 3 < N; i += 4)
        *(SHARED float4*)(to + i) = float4{values[i], values[i + 1], values[i + 2], values[i + 3]};
  } else {
    UNROLL for (int i = 0; i < N; ++i) to[i] = values[i];
  }
}

// Where a channel's pair stands in a row of steps: threads write 8 channels each, four floats at a time, and those of
// other threads meant for the same banks change places.
DEVICE int pair_place(int channel) { return channel ^ (channel / 8 % 4 * 2); }

#define PAIRS_AT_ONCE (VECTOR < 2 ? VECTOR : 2)

DEVICE void read_pairs(const SHARED float* row, int channel, LOCAL float* pairs) {
  UNROLL for (int c = 0; c < VECTOR; c += PAIRS_AT_ONCE)
      read<2 * PAIRS_AT_ONCE>(row + 2 * pair_place(channel + c), pairs + 2 * c);
}

DEVICE void write_pairs(SHARED float* row, int channel, const LOCAL float* pairs) {
  UNROLL for (int c = 0; c < VECTOR; c += PAIRS_AT_ONCE)
      write<2 * PAIRS_AT_ONCE>(row + 2 * pair_place(channel + c), pairs + 2 * c);
}

// Where a thread stands, what it computes and what it brings.
struct Thread {
  Place place;
  int lane;
  int states, first_channel;  // the first of its NS, and of its K, which are CHANNEL_LANES apart
  int flip;                   // its j-th state is states + (j ^ flip): so the backward's sums begin without choices
  int start, end;             // of the chunk
  int brought_channel;        // the first of the VECTOR that it brings, in the block and in all; all are of the same
  int brought_global;
  int brought_first;          // the position in a tile of the first that it brings
  int state, state_first;     // the same of B and C

  DEVICE Thread(Place at, const Inputs in, bool flips) {
    place = at;
    lane = at.rank % LANES;
    states = lane % S * NS;
    flip = flips ? lane / S % 2 * (NS / 2) : 0;
    first_channel = at.rank / LANES * CHANNEL_LANES * K + lane / S;
    start = at.chunk * in.chunk;
    end = min(start + in.chunk, in.length);
    brought_channel = at.rank * VECTOR % BLOCK_CHANNELS;
    brought_global = at.block * BLOCK_CHANNELS + brought_channel;
    brought_first = at.rank * VECTOR / BLOCK_CHANNELS;
    state = at.rank * STATE_VECTOR % PADDED;
    state_first = at.rank * STATE_VECTOR / PADDED;
  }
  DEVICE int channel(int k) const { return first_channel + k * CHANNEL_LANES; }
  DEVICE int global_channel(int k) const { return place.block * BLOCK_CHANNELS + channel(k); }
  // In a tile, of the i-th vector that it brings.
  DEVICE int brought_position(int i) const { return brought_first + i * VECTOR_STRIDE; }
  DEVICE int state_position(int i) const { return state_first + i * STATE_VECTOR_STRIDE; }
};

// Whether it is known of a tile that all its positions count; of most, where none is masked.
DEVICE bool all_count(const Inputs in, int first) { return !HAS_MASK && first + TILE <= in.length; }

DEVICE bool counts(const Inputs in, int row, int position) {
  return position < in.length && !(HAS_MASK && !in.mask[int64(row) * in.length + position]);
}

// N elements at source, of which `given` are there; zero for the others.
template <int N, bool WHOLE>
DEVICE Vector<N> load(const GLOBAL Element* source, int given) {
  Vector<N> loaded;
  loaded.clear();
  if (WHOLE && ALIGNED_AT(source)) {
    if (given > 0) loaded = *(const GLOBAL Vector<N>*)source;
  } else {
    float values[N];
    UNROLL for (int i = 0; i < N; ++i) values[i] = i < given ? to_float(source[i]) : 0.0f;
    loaded.pack(values);
  }
  return loaded;
}

// The sequences as the thread reads them: each stands at the first vector that it brings of the tile from `first` on.
DEVICE Inputs seen_from(const Inputs in, const Thread at, int first) {
  Inputs seen = in;
  int64 row = at.place.row;
  seen.x.data += row * in.x.row + at.brought_global, seen.delta.data += row * in.delta.row + at.brought_global;
  seen.z.data += row * in.z.row + at.brought_global, seen.dy.data += row * in.dy.row + at.brought_global;
  seen.B.data += row * in.B.row + at.state, seen.C.data += row * in.C.row + at.state;
  int position = first + at.brought_first;
  seen.x.advance(position), seen.delta.advance(position), seen.z.advance(position), seen.dy.advance(position);
  seen.B.advance(first + at.state_first), seen.C.advance(first + at.state_first);
  return seen;
}

// The i-th vector of the tile from `first` on, at which `from` stands.
DEVICE Brought bring(const Sequence from, const Inputs in, const Thread at, int first, int i) {
  bool given = first + at.brought_position(i) < in.length;
  return load<VECTOR, ALIGNED>(from.at(i * VECTOR_STRIDE), given ? in.channels - at.brought_global : 0);
}

// The results as the thread writes them, from its row and the channels that it brings.
DEVICE GLOBAL Element* written_by(GLOBAL Element* to, const Inputs in, const Thread at) {
  return to + int64(at.place.row) * in.length * in.channels + at.brought_global;
}

DEVICE void put(GLOBAL Element* to, const Inputs in, const Thread at, int position, const LOCAL float* values) {
  if (position >= in.length) return;
  // Neither is negative, and to say so makes it one multiplication.
  GLOBAL Element* target = to + int64(unsigned(position)) * unsigned(in.channels);
  if (ALIGNED) {
    Brought packed;
    packed.pack(values);
    if (at.brought_global < in.channels) *(GLOBAL Brought*)target = packed;
  } else {
    UNROLL for (int c = 0; c < VECTOR; ++c)
      if (at.brought_global + c < in.channels) target[c] = to_element(values[c]);
  }
}

// Of (e), for the channels that the thread brings.
DEVICE void bring_channels(const GLOBAL float* from, const Inputs in, const Thread at, LOCAL float* values) {
  if (ALIGNED && VECTOR % 4 == 0 && ALIGNED_AT(from)) {
    UNROLL for (int c = 0; c + 3 < VECTOR; c += 4) {
      bool given = at.brought_global < in.channels;
      float4 four = given ? *(const GLOBAL float4*)(from + at.brought_global + c) : float4{0.0f, 0.0f, 0.0f, 0.0f};
      values[c] = four.x, values[c + 1] = four.y, values[c + 2] = four.z, values[c + 3] = four.w;
    }
  } else {
    UNROLL for (int c = 0; c < VECTOR; ++c)
      values[c] = at.brought_global + c < in.channels ? from[at.brought_global + c] : 0.0f;
  }
}

// B or C of a tile, zero where a position does not count.
struct States {
  Vector<STATE_VECTOR> brought[STATE_VECTORS];

  DEVICE void bring(const Sequence from, const Inputs in, const Thread at, int first) {
    UNROLL for (int i = 0; i < STATE_VECTORS; ++i) {
      int position = at.state_position(i);
      bool given = position < TILE && counts(in, at.place.row, first + position);
      const GLOBAL Element* source = from.at(i * STATE_VECTOR_STRIDE);
      brought[i] = load<STATE_VECTOR, STATES_ALIGNED>(source, given ? in.states - at.state : 0);
    }
  }
  // Into (TILE, PADDED).
  DEVICE void lay(SHARED Element* to, const Thread at) const {
    UNROLL for (int i = 0; i < STATE_VECTORS; ++i) {
      int position = at.state_position(i);
      if (position < TILE) *(SHARED Vector<STATE_VECTOR>*)(to + position * PADDED + at.state) = brought[i];
    }
  }
};

// The thread's NS of a position's B or C, in its order, whose pairs are whole where NS is a multiple of 4.
#define STATES_AT_ONCE (NS % 4 == 0 ? 2 : 1)

DEVICE void read_states(const SHARED Element* from, const Thread at, LOCAL float* values) {
  UNROLL for (int j = 0; j < NS; j += STATES_AT_ONCE) {
    Vector<STATES_AT_ONCE> own = *(const SHARED Vector<STATES_AT_ONCE>*)(from + at.states + (j ^ at.flip));
    own.unpack(values + j);
  }
}

// The states of the thread's channels from (e, PADDED).
DEVICE void load_state(const GLOBAL float* from, const Inputs in, const Thread at, LOCAL float (*h)[NS]) {
  UNROLL for (int k = 0; k < K; ++k) {
    const GLOBAL float* source = from + int64(at.global_channel(k)) * PADDED + at.states;
    bool given = at.global_channel(k) < in.channels;
    if (NS % 4 == 0 && ALIGNED_AT(from)) {
      UNROLL for (int j = 0; j + 1 < NS; j += 2) {
        float2 two = given ? *(const GLOBAL float2*)(source + (j ^ at.flip)) : float2{0.0f, 0.0f};
        h[k][j] = two.x, h[k][j + 1] = two.y;
      }
    } else {
      UNROLL for (int j = 0; j < NS; ++j) h[k][j] = given ? source[j ^ at.flip] : 0.0f;
    }
  }
}

DEVICE void store_state(GLOBAL float* to, const Inputs in, const Thread at, const LOCAL float (*h)[NS]) {
  UNROLL for (int k = 0; k < K; ++k) {
    GLOBAL float* target = to + int64(at.global_channel(k)) * PADDED + at.states;
    if (at.global_channel(k) >= in.channels) continue;
    if (NS % 4 == 0) {
      UNROLL for (int j = 0; j + 1 < NS; j += 2) *(GLOBAL float2*)(target + (j ^ at.flip)) = float2{h[k][j], h[k][j + 1]};
    } else {
      UNROLL for (int j = 0; j < NS; ++j) target[j ^ at.flip] = h[k][j];
    }
  }
}

DEVICE void clear(LOCAL float (*h)[NS]) {
  UNROLL for (int k = 0; k < K; ++k) UNROLL for (int j = 0; j < NS; ++j) h[k][j] = 0.0f;
}

// A log2(e), so that decays are powers of 2. Finite: a step of size zero, that of a position that does not count, times
// -inf would be NaN.
DEVICE float rate_of(float a) {
  float rate = a * LOG2_E;
  return rate < LEAST ? LEAST : rate;
}

// The rates; zero for the states that fill up.
DEVICE void load_rates(const Inputs in, const Thread at, LOCAL float (*rates)[NS]) {
  UNROLL for (int k = 0; k < K; ++k) UNROLL for (int j = 0; j < NS; ++j) {
      int state = at.states + (j ^ at.flip);
      bool given = at.global_channel(k) < in.channels && state < in.states;
      rates[k][j] = given ? rate_of(in.A[int64(at.global_channel(k)) * in.states + state]) : 0.0f;
    }
}

// Of (b, chunks, e, PADDED), or with another count of chunks.
DEVICE int64 state_offset(const Inputs in, const Thread at, int chunk, int chunks) {
  return (int64(at.place.row) * chunks + chunk) * in.channels * PADDED;
}

// The sum over the S threads of a channel, of TOGETHER positions at once: a thread has that of position lane % 4.
DEVICE float sum_states(const LOCAL float* sums, int lane) {
  bool odd = lane & 1, high = lane & 2;
  float even_half = (odd ? sums[1] : sums[0]) + shuffle_xor(odd ? sums[0] : sums[1], 1);
  float odd_half = (odd ? sums[3] : sums[2]) + shuffle_xor(odd ? sums[2] : sums[3], 1);
  float sum = (high ? odd_half : even_half) + shuffle_xor(high ? even_half : odd_half, 2);
  UNROLL for (int mask = TOGETHER; mask < S; mask *= 2) sum += shuffle_xor(sum, mask);
  return sum;
}

DEVICE float decay(float step, float rate) { return fast_exp2(step * rate); }

// What goes over a restart: nothing, not even what is not finite.
DEVICE float passing(float value, bool restarts) { return HAS_RESTART && restarts ? 0.0f : value; }

// What a thread brings of a tile of x, delta, z and dy: VECTORS vectors of each that is given.
struct Bundle {
  Brought x[VECTORS], delta[VECTORS], z[VECTORS], dy[VECTORS];

  DEVICE void bring(const Inputs in, const Thread at, int first, bool with_z, bool with_dy) {
    UNROLL for (int i = 0; i < VECTORS; ++i) {
      x[i] = ::bring(in.x, in, at, first, i), delta[i] = ::bring(in.delta, in, at, first, i);
      if (HAS_Z && with_z) z[i] = ::bring(in.z, in, at, first, i);
      if (with_dy) dy[i] = ::bring(in.dy, in, at, first, i);
    }
  }
  // The steps and steps * x of vector i into (TILE, ROW) pairs, zero where the position does not count; slopes: of the
  // steps by delta.
  DEVICE void lay_steps(
      SHARED float* steps, const Thread at, int i, const LOCAL float* bias, bool counting, LOCAL float* slopes) const {
    float values[VECTOR], raw[VECTOR], pairs[2 * VECTOR];
    x[i].unpack(values), delta[i].unpack(raw);
    UNROLL for (int c = 0; c < VECTOR; ++c) {
      float step = HAS_BIAS ? raw[c] + bias[c] : raw[c];
      slopes[c] = 1.0f;
      if (SOFTPLUS) {
        float small = exp_of_minus(step);
        slopes[c] = sigmoid_of(step, small), step = softplus_of(step, small);
      }
      pairs[2 * c] = step, pairs[2 * c + 1] = step * values[c];
    }
    SHARED float* row = steps + 2 * at.brought_position(i) * ROW;
    write_pairs(row, at.brought_channel, pairs);
    if (!counting) {  // seldom: so nothing is chosen where all count
      UNROLL for (int c = 0; c < 2 * VECTOR; ++c) pairs[c] = 0.0f;
      write_pairs(row, at.brought_channel, pairs);
    }
  }
};

// Whether each position of a tile restarts.
DEVICE void lay_restarts(SHARED byte* restarting, const Inputs in, const Thread at, int first) {
  for (int t = at.place.rank; HAS_RESTART && t < TILE; t += THREADS)
    restarting[t] = counts(in, at.place.row, first + t) && in.restart[int64(at.place.row) * in.length + first + t];
}

struct ForwardResults {
  GLOBAL Element* y;
  GLOBAL float* final_state;  // (b, e, PADDED)
  GLOBAL float* kept;         // (b, ceil(l / KEEP_EVERY), e, PADDED), the state before every KEEP_EVERY positions
  GLOBAL float* added;        // (b, chunks, e, PADDED), of a first run: what each chunk adds
  GLOBAL float* total;        // (b, chunks, e), of a first run: the sum of steps, infinite where the state restarts
};

#define FORWARD_SHARED (3 * TILE * ROW + 2 * TILE * PADDED + TILE)

// y of a tile from `linear`, the sums over states.
DEVICE void finish_forward(
    const Inputs in, GLOBAL Element* y, const Thread at, int first, const Bundle bundle, const SHARED float* linear,
    const LOCAL float* D) {
  UNROLL for (int i = 0; i < VECTORS; ++i) {
    int position = at.brought_position(i);
    bool counting = counts(in, at.place.row, first + position);
    float values[VECTOR], x[VECTOR], z[VECTOR];
    read<VECTOR>(linear + position * ROW + at.brought_channel, values);
    if (HAS_D) bundle.x[i].unpack(x);
    if (HAS_Z) bundle.z[i].unpack(z);
    UNROLL for (int c = 0; c < VECTOR; ++c) {
      if (HAS_D) values[c] = multiply_add(D[c], x[c], values[c]);
      if (HAS_Z) values[c] *= z[c] * sigmoid(z[c]);
      if (HAS_MASK && !counting) values[c] = 0.0f;
    }
    put(y, in, at, first + position, values);
  }
}

// FIRST: the run that only adds up what each chunk adds.
template <bool FIRST>
DEVICE void scan_forward(const Inputs given, const ForwardResults out, const Place place, SHARED float* shared) {
  SHARED float *steps = shared, *linear = steps + 2 * TILE * ROW;
  SHARED Element *B = (SHARED Element*)(linear + TILE * ROW), *C = B + TILE * PADDED;
  SHARED byte* restarting = (SHARED byte*)(C + TILE * PADDED);
  const Thread at(place, given, false);
  Inputs in = seen_from(given, at, at.start);
  GLOBAL Element* y = written_by(out.y, in, at);

  float rates[K][NS], h[K][NS], total[K], bias[VECTOR], D[VECTOR];
  load_rates(in, at, rates);
  if (HAS_BIAS) bring_channels(in.delta_bias, in, at, bias);
  if (HAS_D) bring_channels(in.D, in, at, D);
  if (!FIRST && (HAS_STATE || CHUNKED))
    load_state(in.begin + state_offset(in, at, place.chunk, in.chunks), in, at, h);
  else
    clear(h);
  UNROLL for (int k = 0; k < K; ++k) total[k] = 0.0f;

  Bundle next;
  States next_B, next_C;
  next.bring(in, at, at.start, !FIRST, false);
  next_B.bring(in.B, in, at, at.start);
  if (!FIRST) next_C.bring(in.C, in, at, at.start);
  for (int first = at.start; first < at.end; first += TILE) {
    const Bundle bundle = next;
    UNROLL for (int i = 0; i < VECTORS; ++i) {
      float slopes[VECTOR];
      bool counting = counts(in, place.row, first + at.brought_position(i));
      bundle.lay_steps(steps, at, i, bias, counting, slopes);
    }
    next_B.lay(B, at);
    if (!FIRST) next_C.lay(C, at);
    lay_restarts(restarting, in, at, first);
    barrier();
    in.advance(TILE);
    next.bring(in, at, first + TILE, !FIRST, false);
    next_B.bring(in.B, in, at, first + TILE);
    if (!FIRST) next_C.bring(in.C, in, at, first + TILE);

    for (int from = 0; from < TILE; from += KEEP_EVERY) {
      if (KEEP && !FIRST && first + from < in.length)
        store_state(
            out.kept + state_offset(in, at, (first + from) / KEEP_EVERY, (in.length + KEEP_EVERY - 1) / KEEP_EVERY), in,
            at, h);
      UNROLL_TWO for (int t = from; t < from + KEEP_EVERY; t += TOGETHER) {
        float sums[K][TOGETHER];
        UNROLL for (int u = 0; u < TOGETHER; ++u) {
          float B_t[NS], C_t[NS];
          read_states(B + (t + u) * PADDED, at, B_t);
          if (!FIRST) read_states(C + (t + u) * PADDED, at, C_t);
          bool restarts = HAS_RESTART && restarting[t + u];
          UNROLL for (int k = 0; k < K; ++k) {
            float2 step = ((SHARED float2*)steps)[(t + u) * ROW + pair_place(at.channel(k))];
            if (FIRST) total[k] = restarts ? infinity() : total[k] + step.x;
            float sum = 0.0f;
            UNROLL for (int j = 0; j < NS; ++j) {
              h[k][j] = multiply_add(decay(step.x, rates[k][j]), passing(h[k][j], restarts), step.y * B_t[j]);
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
    }
    barrier();
    if (!FIRST) finish_forward(in, y, at, first, bundle, linear, D);
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
  float rate = n < in.states ? rate_of(in.A[int64(channel) * in.states + n]) : 0.0f;
  float h = HAS_STATE ? in.begin[index] : 0.0f;
  for (int i = 0; i < in.chunks; ++i) {
    int64 chunk = row * in.chunks + (backwards ? in.chunks - 1 - i : i);
    float own = added[chunk * states + state], sum = total[chunk * in.channels + channel];
    added[chunk * states + state] = h;
    bool restarts = sum == infinity();
    h = multiply_add(restarts ? 0.0f : fast_exp2(sum * rate), restarts ? 0.0f : h, own);
  }
}

struct BackwardResults {
  GLOBAL Element *dx, *ddelta, *dz;
  // (b, blocks, l, 2, PADDED): dB and dC of each block of channels.
  GLOBAL float* dBC;
  // (b, chunks, e, PADDED), (b, chunks, e), (b, chunks, e): of each row and chunk.
  GLOBAL float *dA, *dD, *ddelta_bias;
  GLOBAL float* dstate;         // (b, e, PADDED), of the initial state
  GLOBAL float *added, *total;  // of a first run, as in ForwardResults
};

#define HISTORY (TILE * K * NS * THREADS)
#define CHANNEL_SUMS (2 * THREADS * VECTOR)
#define BACKWARD_SHARED \
  (HISTORY + CHANNEL_SUMS + 6 * TILE * ROW + 2 * TILE * PADDED + TILE * WARPS * 2 * PADDED + TILE)
// A first run keeps less, and so more blocks run at a time.
#define BACKWARD_FIRST_SHARED (3 * TILE * ROW + TILE * PADDED + TILE)

// A thread's states before each position of a tile, where no other thread looks: NS floats a slot.
struct History {
  SHARED float* memory;
  int rank;

  DEVICE void put(int slot, const LOCAL float* values) const {
    if (NS % 4 == 0) {
      UNROLL for (int j = 0; j + 3 < NS; j += 4)
          write<4>(memory + ((slot * (NS / 4) + j / 4) * THREADS + rank) * 4, values + j);
    } else {
      UNROLL for (int j = 0; j < NS; ++j) memory[(slot * NS + j) * THREADS + rank] = values[j];
    }
  }
  DEVICE void get(int slot, LOCAL float* values) const {
    if (NS % 4 == 0) {
      UNROLL for (int j = 0; j + 3 < NS; j += 4)
          read<4>(memory + ((slot * (NS / 4) + j / 4) * THREADS + rank) * 4, values + j);
    } else {
      UNROLL for (int j = 0; j < NS; ++j) values[j] = memory[(slot * NS + j) * THREADS + rank];
    }
  }
};

// The sums over the warp's channels of dB's and dC's NS values each into (2, PADDED): at every step a thread hands over
// half of what it still has, first the half that the thread beside it has in front, then the higher half or the lower.
DEVICE void sum_channels(LOCAL float* dB, LOCAL float* dC, const Thread at, SHARED float* to) {
  const int front = NS > 1 && CHANNEL_LANES > 1 ? NS / 2 : NS;
  float values[2 * front];
  UNROLL for (int i = 0; i < front; ++i) {
    values[i] = front < NS ? dB[i] + shuffle_xor(dB[NS - front + i], S) : dB[i];
    values[front + i] = front < NS ? dC[i] + shuffle_xor(dC[NS - front + i], S) : dC[i];
  }
  int count = 2 * front, offset = 0;
  bool writes = true;
  UNROLL for (int mask = front < NS ? 2 * S : S; mask < LANES; mask *= 2) {
    bool high = at.lane & mask;
    if (count > 1) {
      count /= 2;
      UNROLL for (int i = 0; i < front; ++i)
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
  UNROLL for (int i = 0; i < 2 * front; ++i) {
    int which = (offset + i) / front, j = (offset + i) % front;
    if (i < count && writes) to[which * PADDED + at.states + (j ^ at.flip)] = values[i];
  }
}

// The arrays of a tile in shared memory, (TILE, ROW) each but the steps, which are pairs.
struct Tile {
  SHARED float *steps, *gated, *linear, *gB, *rated;  // gated: dy silu(z)
};

// dx, ddelta and dz of a tile; adds to the thread's sums for dD and, THREADS * VECTOR later, for ddelta_bias.
DEVICE void finish_backward(
    const Inputs in, const BackwardResults out, const Thread at, int first, const Bundle bundle, const Tile tile,
    const LOCAL float (*slopes)[VECTOR], const LOCAL float (*gates)[VECTOR], SHARED float* own_sums) {
  float D[VECTOR], dD[VECTOR], dbias[VECTOR];
  if (HAS_BIAS) read<VECTOR>(own_sums + THREADS * VECTOR, dbias);
  if (HAS_D) bring_channels(in.D, in, at, D), read<VECTOR>(own_sums, dD);
  UNROLL for (int i = 0; i < VECTORS; ++i) {
    int position = at.brought_position(i), there = position * ROW + at.brought_channel;
    bool counting = counts(in, at.place.row, first + position);
    bool whole = all_count(in, first);
    float x[VECTOR], steps[2 * VECTOR], gated[VECTOR], gB[VECTOR], rated[VECTOR];
    float dx[VECTOR], ddelta[VECTOR];
    bundle.x[i].unpack(x);
    read_pairs(tile.steps + 2 * position * ROW, at.brought_channel, steps), read<VECTOR>(tile.gated + there, gated);
    read<VECTOR>(tile.gB + there, gB), read<VECTOR>(tile.rated + there, rated);
    UNROLL for (int c = 0; c < VECTOR; ++c) {
      dx[c] = HAS_D ? multiply_add(gB[c], steps[2 * c], D[c] * gated[c]) : gB[c] * steps[2 * c];
      ddelta[c] = multiply_add(gB[c], x[c], LN_2 * rated[c]) * slopes[i][c];
      if (!whole && !counting) dx[c] = ddelta[c] = 0.0f;
      if (HAS_D) dD[c] += whole || counting ? gated[c] * x[c] : 0.0f;
      if (HAS_BIAS) dbias[c] += ddelta[c];
    }
    put(out.dx, in, at, first + position, dx);
    put(out.ddelta, in, at, first + position, ddelta);
    if (HAS_Z) {
      float z[VECTOR], dy[VECTOR], linear[VECTOR], dz[VECTOR];
      bundle.z[i].unpack(z), bundle.dy[i].unpack(dy), read<VECTOR>(tile.linear + there, linear);
      UNROLL for (int c = 0; c < VECTOR; ++c) {
        float sum = HAS_D ? multiply_add(D[c], x[c], linear[c]) : linear[c];
        dz[c] = dy[c] * sum * silu_derivative(z[c], gates[i][c]);
        if (HAS_MASK && !counting) dz[c] = 0.0f;
      }
      put(out.dz, in, at, first + position, dz);
    }
  }
  if (HAS_BIAS) write<VECTOR>(own_sums + THREADS * VECTOR, dbias);
  if (HAS_D) write<VECTOR>(own_sums, dD);
}

// FIRST: the run that only adds up what each chunk hands to the one before it.
template <bool FIRST>
DEVICE void scan_backward(
    const Inputs given, const GLOBAL float* kept, const BackwardResults results, const Place place, SHARED float* shared) {
  // What a first run uses comes first.
  SHARED float *rows = shared, *after_rows = rows + 3 * TILE * ROW;
  SHARED Element* C = (SHARED Element*)after_rows;
  SHARED byte* restarting = (SHARED byte*)(after_rows + TILE * PADDED);
  SHARED float *others = after_rows + TILE * PADDED + TILE, *after_others = others + 3 * TILE * ROW;
  SHARED Element* B = (SHARED Element*)after_others;
  SHARED float* dBC = after_others + TILE * PADDED;
  SHARED float *channel_sums = dBC + TILE * WARPS * 2 * PADDED, *own_sums = channel_sums + place.rank * VECTOR;
  const Tile tile = {rows, rows + 2 * TILE * ROW, others, others + TILE * ROW, others + 2 * TILE * ROW};
  const Thread at(place, given, true);
  const int last = at.start + (at.end - 1 - at.start) / TILE * TILE;
  Inputs in = seen_from(given, at, last);
  BackwardResults out = results;
  out.dx = written_by(out.dx, in, at), out.ddelta = written_by(out.ddelta, in, at);
  out.dz = written_by(out.dz, in, at);
  const History history = {channel_sums + CHANNEL_SUMS, place.rank};
  const int tiles = (in.length + KEEP_EVERY - 1) / KEEP_EVERY;

  float rates[K][NS], passed[K][NS], dA[K][NS], before[K][NS], total[K];
  load_rates(in, at, rates);
  if (!FIRST && (HAS_STATE || CHUNKED))
    load_state(in.begin + state_offset(in, at, place.chunk, in.chunks), in, at, passed);
  else
    clear(passed);
  clear(dA);
  UNROLL for (int k = 0; k < K; ++k) total[k] = 0.0f;
  UNROLL for (int c = 0; !FIRST && c < VECTOR; ++c) own_sums[c] = own_sums[THREADS * VECTOR + c] = 0.0f;

  Bundle next;
  States next_B, next_C;
  next.bring(in, at, last, true, true);
  next_C.bring(in.C, in, at, last);
  if (!FIRST) {
    next_B.bring(in.B, in, at, last);
    load_state(kept + state_offset(in, at, last / KEEP_EVERY, tiles), in, at, before);
  }
  for (int first = last; first >= at.start; first -= TILE) {
    const Bundle bundle = next;
    float slopes[VECTORS][VECTOR], gates[VECTORS][VECTOR], bias[VECTOR];
    if (HAS_BIAS) bring_channels(in.delta_bias, in, at, bias);  // for each tile: registers are scarcer
    UNROLL for (int i = 0; i < VECTORS; ++i) {
      int position = at.brought_position(i);
      bool counting = counts(in, place.row, first + position);
      bundle.lay_steps(tile.steps, at, i, bias, counting, slopes[i]);
      float gated[VECTOR], z[VECTOR];
      bundle.dy[i].unpack(gated);
      if (HAS_Z) bundle.z[i].unpack(z);
      UNROLL for (int c = 0; c < VECTOR; ++c) {
        if (HAS_Z) gates[i][c] = sigmoid(z[c]), gated[c] *= z[c] * gates[i][c];
        if (HAS_MASK && !counting) gated[c] = 0.0f;
      }
      write<VECTOR>(tile.gated + position * ROW + at.brought_channel, gated);
    }
    if (!FIRST) next_B.lay(B, at);
    next_C.lay(C, at);
    lay_restarts(restarting, in, at, first);
    float h[K][NS];
    if (!FIRST) UNROLL for (int k = 0; k < K; ++k) UNROLL for (int j = 0; j < NS; ++j) h[k][j] = before[k][j];
    barrier();
    if (first > at.start) {  // the next tile lies before this one
      in.advance(-TILE);
      next.bring(in, at, first - TILE, true, true);
      next_C.bring(in.C, in, at, first - TILE);
      if (!FIRST) {
        next_B.bring(in.B, in, at, first - TILE);
        load_state(kept + state_offset(in, at, (first - TILE) / KEEP_EVERY, tiles), in, at, before);
      }
    }

    for (int t = 0; t < (FIRST ? 0 : TILE); t += TOGETHER) {  // the tile's states once more
      float sums[K][TOGETHER];
      UNROLL for (int u = 0; u < TOGETHER; ++u) {
        float B_t[NS], C_t[NS];
        read_states(B + (t + u) * PADDED, at, B_t);
        if (HAS_Z) read_states(C + (t + u) * PADDED, at, C_t);
        bool restarts = HAS_RESTART && restarting[t + u];
        UNROLL for (int k = 0; k < K; ++k) {
          float2 step = ((SHARED float2*)tile.steps)[(t + u) * ROW + pair_place(at.channel(k))];
          history.put((t + u) * K + k, h[k]);
          float sum = 0.0f;
          UNROLL for (int j = 0; j < NS; ++j) {
            h[k][j] = multiply_add(decay(step.x, rates[k][j]), passing(h[k][j], restarts), step.y * B_t[j]);
            if (HAS_Z) sum = multiply_add(C_t[j], h[k][j], sum);
          }
          sums[k][u] = sum;
        }
      }
      if (HAS_Z) {
        UNROLL for (int k = 0; k < K; ++k) {
          float sum = sum_states(sums[k], at.lane);
          if (at.lane % S < TOGETHER) tile.linear[(t + at.lane % TOGETHER) * ROW + at.channel(k)] = sum;
        }
      }
    }
    for (int t = TILE - TOGETHER; t >= 0; t -= TOGETHER) {
      float gB_sums[K][TOGETHER], rated_sums[K][TOGETHER];
      UNROLL for (int u = TOGETHER - 1; u >= 0; --u) {
        float B_t[NS], C_t[NS], dB[NS], dC[NS];
        if (!FIRST) read_states(B + (t + u) * PADDED, at, B_t);
        read_states(C + (t + u) * PADDED, at, C_t);
        bool restarts = HAS_RESTART && restarting[t + u];
        UNROLL for (int j = 0; j < NS; ++j) dB[j] = dC[j] = 0.0f;
        UNROLL for (int k = 0; k < K; ++k) {
          float2 step = ((SHARED float2*)tile.steps)[(t + u) * ROW + pair_place(at.channel(k))];
          float gated = tile.gated[(t + u) * ROW + at.channel(k)], gB_sum = 0.0f, rated_sum = 0.0f, previous[NS];
          if (FIRST)
            total[k] = restarts ? infinity() : total[k] + step.x;
          else
            history.get((t + u) * K + k, previous);
          UNROLL for (int j = 0; j < NS; ++j) {
            float g = multiply_add(C_t[j], gated, passed[k][j]);
            passed[k][j] = passing(g * decay(step.x, rates[k][j]), restarts);
            if (!FIRST) {
              float dlog_decay = passed[k][j] * passing(previous[j], restarts);
              dB[j] = multiply_add(g, step.y, dB[j]);
              dC[j] = multiply_add(gated, h[k][j], dC[j]);
              dA[k][j] = multiply_add(dlog_decay, step.x, dA[k][j]);
              gB_sum = multiply_add(g, B_t[j], gB_sum);
              rated_sum = multiply_add(dlog_decay, rates[k][j], rated_sum);
              h[k][j] = previous[j];
            }
          }
          gB_sums[k][u] = gB_sum, rated_sums[k][u] = rated_sum;
        }
        if (!FIRST)
          sum_channels(dB, dC, at, dBC + ((t + u) * WARPS + place.rank / LANES) * 2 * PADDED);
      }
      if (!FIRST) {
        UNROLL for (int k = 0; k < K; ++k) {
          float gB_sum = sum_states(gB_sums[k], at.lane), rated_sum = sum_states(rated_sums[k], at.lane);
          int there = (t + at.lane % TOGETHER) * ROW + at.channel(k);
          if (at.lane % S < TOGETHER) tile.gB[there] = gB_sum, tile.rated[there] = rated_sum;
        }
      }
    }
    barrier();
    if (FIRST) continue;
    finish_backward(in, out, at, first, bundle, tile, slopes, gates, own_sums);
    const int blocks = (in.channels + BLOCK_CHANNELS - 1) / BLOCK_CHANNELS;
    GLOBAL float* sums = out.dBC + ((int64(place.row) * blocks + place.block) * in.length + first) * 2 * PADDED;
    const int inside = min(TILE, in.length - first) * 2 * PADDED;
    for (int index = 4 * place.rank; index < inside; index += 4 * THREADS) {
      float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f}, own[4];
      UNROLL for (int warp = 0; warp < WARPS; ++warp) {
        read<4>(dBC + (index / (2 * PADDED) * WARPS + warp) * 2 * PADDED + index % (2 * PADDED), own);
        UNROLL for (int i = 0; i < 4; ++i) sum[i] += own[i];
      }
      *(GLOBAL float4*)(sums + index) = float4{sum[0], sum[1], sum[2], sum[3]};
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
  barrier();
  // Over the threads that brought the same channels.
  const int sharing = THREADS * VECTOR / BLOCK_CHANNELS;
  for (int channel = place.rank; channel < BLOCK_CHANNELS; channel += THREADS) {
    int global = place.block * BLOCK_CHANNELS + channel;
    float dD_sum = 0.0f, dbias_sum = 0.0f;
    for (int i = 0; i < sharing; ++i)
      dD_sum += channel_sums[i * BLOCK_CHANNELS + channel],
          dbias_sum += channel_sums[THREADS * VECTOR + i * BLOCK_CHANNELS + channel];
    if (global < in.channels) {
      if (HAS_D) out.dD[own * in.channels + global] = dD_sum;
      if (HAS_BIAS) out.ddelta_bias[own * in.channels + global] = dbias_sum;
    }
  }
}

// What blocks, rows and chunks left to be added: dB and dC (b, l, n), dA (e, n), dD and ddelta_bias (e).
struct Sums {
  GLOBAL Element *dB, *dC;
  GLOBAL float *dA, *dD, *ddelta_bias;
};

DEVICE float sum_rows(const GLOBAL float* from, int64 rows, int64 stride) {
  float sum = 0.0f;
  for (int64 row = 0; row < rows; ++row) sum += from[row * stride];
  return sum;
}

// A thread's share: four states of a position, or one of a channel's sums.
DEVICE void add_up(const Inputs in, const BackwardResults parts, const Sums out, int rows, int64 index) {
  const int64 tile = int64(in.length) * 2 * PADDED, quads = rows * tile / 4, parts_of_channels = int64(rows) * in.chunks;
  if (index < quads) {
    int64 row = index * 4 / tile, within = index * 4 % tile;
    int position = within / (2 * PADDED), which = within % (2 * PADDED) / PADDED, state = within % PADDED;
    int blocks = (in.channels + BLOCK_CHANNELS - 1) / BLOCK_CHANNELS;
    const GLOBAL float* from = parts.dBC + row * blocks * tile + within;
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    UNROLL_FOUR for (int block = 0; block < blocks; ++block) {
      float4 four = *(const GLOBAL float4*)(from + block * tile);
      sum[0] += four.x, sum[1] += four.y, sum[2] += four.z, sum[3] += four.w;
    }
    GLOBAL Element* to = (which ? out.dC : out.dB) + (row * in.length + position) * in.states + state;
    UNROLL for (int i = 0; i < 4; ++i)
      if (state + i < in.states) to[i] = to_element(sum[i]);
    return;
  }
  index -= quads;
  const int64 states = int64(in.channels) * PADDED;
  if (index < states) {
    int state = index % PADDED;
    if (state < in.states)
      out.dA[index / PADDED * in.states + state] = sum_rows(parts.dA + index, parts_of_channels, states);
  } else if (index < states + in.channels) {
    index -= states;
    if (HAS_D) out.dD[index] = sum_rows(parts.dD + index, parts_of_channels, in.channels);
  } else if (index < states + 2 * in.channels) {
    index -= states + in.channels;
    if (HAS_BIAS) out.ddelta_bias[index] = sum_rows(parts.ddelta_bias + index, parts_of_channels, in.channels);
  }
}
