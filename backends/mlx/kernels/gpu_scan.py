"""The scan on a GPU, NVIDIA's or Apple's: all of the op in one pass over its inputs, no (b, l, e, n) in memory.

The algorithm is that of `mamba_core.backends.gpu`. The same inputs give the same bits.
"""

import functools

import mlx.core as mx

from mamba_core.backends.gpu import driver
from mamba_core.backends.gpu import launch as gpu
from mamba_core.backends.mlx.arrays import dtype_name
from mamba_core.backends.mlx.kernels import gpu_language
from mamba_core.backends.mlx.kernels.gpu_language import CUDA, METAL, Language, header
from mamba_core.backends.mlx.kernels.reverse_only import first_derivative_only, reverse_only

# Of x's dtype; all others are float32.
ELEMENTS = ("y", "dx", "ddelta", "dz", "dB_sum", "dC_sum")
# Results that there are with an option only.
OPTIONAL = {"dz": "HAS_Z", "dD": "HAS_D", "dD_sum": "HAS_D", "ddelta_bias": "HAS_BIAS", "ddelta_bias_sum": "HAS_BIAS"}
# What combine_chunks makes of "added": a kernel of MLX changes no array that it is given.
COMBINED = "begun"
# No API tells how many cores an Apple GPU has. Enough for most; more chunks than needed cost a third of the time.
APPLE_CORES = 40


def reason(
    language: Language, device: str, dtype: mx.Dtype | None = None, states: int | None = None, arrays=()
) -> str | None:
    """Why the kernels cannot run on that device, for x of that dtype and these arrays; None if they can.

    states: of a scan; without, the kernel is only the name of one.
    """
    why = gpu_language.reason(language, device, dtype, arrays if states is not None else ())
    largest = gpu.LARGEST_SMALL_STATE if language.is_metal else gpu.LARGEST_STATE
    if why is None and states is not None and states > largest:
        return f"d_state is {states}, and it holds at most {largest}"
    return why


def scan(language: Language):
    """The kernel in that language, as `ops.selective_scan.sequential`."""

    @mx.custom_function
    def fused(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart, delta_softplus):
        """(y, final state, kept states): MLX does not tell whether there will be a gradient."""
        named = _named(x, delta, A, B, C, D, z, delta_bias, mask, restart)
        plan = _plan(language, named, delta_softplus, h0, keep=True)
        found = _run(language, plan, named | {"begin": _padded(h0, plan)})
        return found["y"], _unpadded(found["final_state"], plan), found["kept"]

    @fused.vjp
    def fused_vjp(inputs, cotangents, outputs):
        *arrays, delta_softplus = inputs
        x, delta, A, B, C, D, z, delta_bias, _, mask, restart = arrays
        dy, dfinal_state, _ = cotangents
        named = _named(x, delta, A, B, C, D, z, delta_bias, mask, restart) | {"dy": dy, "kept": outputs[2]}
        plan = _plan(language, named, delta_softplus, dfinal_state, backward=True)
        found = _run(language, plan, named | {"begin": _padded(dfinal_state, plan)})
        sums = {f"d{name}": found.get(f"d{name}_sum") for name in ("A", "B", "C", "D", "delta_bias")}
        names = ("dx", "ddelta", "dA", "dB", "dC", "dD", "dz", "ddelta_bias", "dstate")
        # Of those that were given; the last of the arrays have none.
        there = [name for name, value in zip(names, arrays, strict=False) if value is not None]
        gradients = found | sums | {"dstate": _unpadded(found["dstate"], plan)}
        gradients = first_derivative_only({name: gradients[name] for name in there}, arrays, cotangents)
        return *(gradients.get(name) for name in names), None, None, None

    reverse_only(fused)

    def kernel(call, x, delta, A, B, C, D, z, delta_bias, h0, delta_softplus):
        dtype = x.dtype
        if x.shape[1] == 0:
            return x, mx.zeros((x.shape[0], *A.shape)) if h0 is None else _float32(h0)
        if any(value is not None and value.dtype != dtype for value in (delta, B, C, z)):
            x, delta, B, C, z = (_float32(value) for value in (x, delta, B, C, z))
        A, D, delta_bias, h0 = (_float32(value) for value in (A, D, delta_bias, h0))
        y, h, _ = fused(x, delta, A, B, C, D, z, delta_bias, h0, call.mask, call.restart, bool(delta_softplus))
        return y.astype(dtype), h

    return kernel


def _named(x, delta, A, B, C, D, z, delta_bias, mask, restart) -> dict[str, mx.array | None]:
    """By the kernels' names."""
    named = {"x": x, "delta": delta, "B": B, "C": C, "z": z, "A": A, "D": D, "delta_bias": delta_bias}
    return named | {"mask": mask, "restart": restart}


def _plan(language, named, delta_softplus, begin, **how) -> gpu.Scan:
    x, (e, n) = named["x"], named["A"].shape
    return gpu.Scan(
        *(*x.shape, n, dtype_name(x.dtype)),
        options=gpu.options(named | {"begin": begin}, delta_softplus),
        # An array may begin anywhere in memory, and only the kernel learns where; ours for Metal does not ask.
        aligned=not language.is_metal and e % 8 == 0,
        states_aligned=not language.is_metal and n % 8 == 0,
        multiprocessors=driver.multiprocessors() if not language.is_metal else APPLE_CORES,
        small=language.is_metal,
        **how,
    )


def _run(language: Language, plan: gpu.Scan, arrays: dict[str, mx.array | None]) -> dict[str, mx.array]:
    """What the plan's kernels compute, by its names; after a backward the sums too."""
    known = {name: value for name, value in arrays.items() if value is not None}
    shapes = plan.shapes | (plan.sums if plan.backward else {}) | {COMBINED: plan.shapes.get("added")}
    absent = {name for name, option in OPTIONAL.items() if option not in plan.options}
    for step in [*plan.launches, *([plan.adding_up] if plan.backward else [])]:
        if step.begins_from_added:
            known["begin"] = known[COMBINED]
        names = [name for name in step.arrays if name not in absent]
        reads = tuple(name for name in names if name in known)
        writes = tuple(name for name in names if name not in known and name in shapes)
        if step.kernel == "combine_chunks":
            writes = (COMBINED,)
        defines = plan.defines | {"STATES": plan.states}
        run = _kernel(language, step.kernel, step.shared, tuple(defines.items()), reads, writes)
        values = run(
            inputs=[known[name] for name in reads],
            output_shapes=[shapes[name] for name in writes],
            output_dtypes=[arrays["x"].dtype if name in ELEMENTS else mx.float32 for name in writes],
            grid=(step.blocks * step.threads, 1, 1),
            threadgroup=(step.threads, 1, 1),
        )
        known |= dict(zip(writes, values, strict=True))
    return known


@functools.cache
def _kernel(language: Language, name: str, shared: int, defines, reads: tuple[str, ...], writes: tuple[str, ...]):
    before = header(language, defines, "selective_scan.h")
    body = _body(language, name, shared, reads, writes)
    return gpu_language.compiled(language, name, before, body, reads, writes, shared)


def _body(language: Language, name: str, shared: int, reads: tuple[str, ...], writes: tuple[str, ...]) -> str:
    """A kernel's, in terms of the names of its arrays and of what MLX calls their shapes."""

    def pointer(array, kind="float", const="const "):
        return gpu_language.pointer(array, reads + writes, kind, const)

    def sequence(array):
        shape = f"{array}_shape"
        if array not in reads:
            return "{nullptr, 0, 0}"
        return f"{{{pointer(array, 'Element')}, int64({shape}[1]) * {shape}[2], int({shape}[2])}}"

    def results(*arrays):
        pairs = [(array, "Element" if array in ELEMENTS else "float") for array in arrays]
        return ", ".join(pointer(array, kind, "") for array, kind in pairs)

    index = f"int64({language.block}) * THREADS + {language.thread}"
    if name == "combine_chunks":
        return f"""
  const int64 index = {index}, states = int64(added_shape[2]) * PADDED;
  const int rows = added_shape[0], chunks = added_shape[1];
  if (index >= rows * states) return;
  GLOBAL float* own = {COMBINED} + index / states * chunks * states + index % states;
  for (int chunk = 0; chunk < chunks; ++chunk)
    own[chunk * states] = added[(index / states * chunks + chunk) * states + index % states];
  ::Inputs in = {{}};
  in.A = {pointer("A")}, in.begin = {pointer("begin")};
  in.channels = added_shape[2], in.states = A_shape[1], in.chunks = chunks;
  ::combine(in, {COMBINED}, {pointer("total")}, BACKWARD, index);
"""
    if name == "add_up_sums":
        return f"""
  ::Inputs in = {{}};
  in.length = dBC_shape[2], in.channels = dA_shape[2], in.states = STATES, in.chunks = dA_shape[1];
  ::BackwardResults parts = {{}};
  parts.dBC = {pointer("dBC", const="")}, parts.dA = {pointer("dA", const="")};
  parts.dD = {pointer("dD", const="")}, parts.ddelta_bias = {pointer("ddelta_bias", const="")};
  ::Sums sums = {{{results(*gpu.SUMS)}}};
  ::add_up(in, parts, sums, dBC_shape[0], {index});
"""
    sequences = ", ".join(map(sequence, gpu.SEQUENCES))
    others = ", ".join(map(pointer, ("A", "D", "delta_bias", "begin")))
    flags = ", ".join(pointer(array, "byte") for array in ("mask", "restart"))
    way, _, first = name.partition("_")
    if way == "forward":
        out = f"::ForwardResults out = {{{results('y', 'final_state', 'kept', 'added', 'total')}}};"
        call = f"::scan_forward<{str(bool(first)).lower()}>(in, out, place, shared);"
    else:
        out = f"::BackwardResults out = {{{results(*gpu.BACKWARD_RESULTS, 'added', 'total')}}};"
        call = f"::scan_backward<{str(bool(first)).lower()}>(in, {pointer('kept')}, out, place, shared);"
    memory = (
        f"threadgroup float4 memory[{-(-shared // 16)}]" if language.is_metal else "extern __shared__ float4 memory[]"
    )
    return f"""
  {memory};
  SHARED float* shared = (SHARED float*)memory;
  const int length = x_shape[1], channels = x_shape[2], blocks = (channels + BLOCK_CHANNELS - 1) / BLOCK_CHANNELS;
  const int chunks = int({language.blocks}) / (blocks * x_shape[0]), step = 2 * KEEP_EVERY;
  // As `Scan.chunk` has it, or less where as many are as good.
  const int chunk = chunks > 1 ? ((length + chunks - 1) / chunks + step - 1) / step * step : length;
  const ::Inputs in = {{
      {sequences},
      {others},
      {flags}, length, channels, int(A_shape[1]), chunk, chunks}};
  const int number = {language.block};
  const ::Place place = {{int({language.thread}), number % blocks, number / blocks % chunks, number / blocks / chunks}};
  {out}
  {call}
"""


def _padded(state: mx.array | None, plan: gpu.Scan) -> mx.array | None:
    """(b, e, n) with the states that fill up."""
    return None if state is None else mx.pad(state, [(0, 0), (0, 0), (0, plan.geometry.padded - plan.states)])


def _unpadded(state: mx.array, plan: gpu.Scan) -> mx.array:
    return state[..., : plan.states]


def _float32(value):
    return None if value is None else value.astype(mx.float32)


cuda, metal = scan(CUDA), scan(METAL)
