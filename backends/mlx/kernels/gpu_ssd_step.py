"""One position of Mamba-2's recurrence on a GPU, NVIDIA's or Apple's: one pass over the state.

The algorithm is `mamba_core.backends.gpu`'s `ssd_step.h`. Gradients, forward mode and vmap are those of the plain twin.
"""

import functools
from collections.abc import Callable

import mlx.core as mx

from mamba_core.backends.gpu import launch as gpu
from mamba_core.backends.mlx.arrays import dtype_name
from mamba_core.backends.mlx.kernels import gpu_language
from mamba_core.backends.mlx.kernels.gpu_language import Language
from mamba_core.spec.ops.ssd import NO_LIMIT

ELEMENTS, FLOATS = ("x", "dt", "B", "C", "z"), ("A", "D", "dt_bias", "state")
HAS = {"HAS_D": "D", "HAS_Z": "z", "HAS_BIAS": "dt_bias"}
WARPS, MOST_ROWS = 4, 4


def step(language: Language, plain: Callable):
    """The kernel in that language, with the arguments of its twin `plain`: (y, new state)."""

    def kernel(*, dt_softplus, dt_limit, **arrays):
        given = {name: value for name, value in arrays.items() if value is not None}
        run = _differentiable(language, plain, tuple(given), bool(dt_softplus), tuple(map(float, dt_limit)))
        return run(*given.values())

    return kernel


@functools.cache
def _differentiable(language: Language, plain: Callable, names: tuple[str, ...], dt_softplus: bool, dt_limit):
    """A function of the arrays of these names."""
    options = {"dt_softplus": dt_softplus, "dt_limit": dt_limit}

    def twin(*values):
        return plain(**dict.fromkeys((*ELEMENTS, *FLOATS)) | dict(zip(names, values, strict=True)), **options)

    @mx.custom_function
    def fused(*values):
        return _run(language, dict(zip(names, values, strict=True)), dt_softplus, dt_limit)

    @fused.vjp
    def fused_vjp(values, cotangents, outputs):
        return mx.vjp(twin, list(values), list(cotangents))[1]

    @fused.jvp
    def fused_jvp(values, tangents):
        pairs = zip(values, tangents, strict=True)
        tangents = [mx.zeros_like(value) if tangent is None else tangent for value, tangent in pairs]
        return mx.jvp(twin, list(values), tangents)[1]

    @fused.vmap
    def fused_vmap(values, axes):
        return mx.vmap(twin, in_axes=tuple(axes))(*values), (0, 0)

    return fused


def _run(language: Language, given: dict[str, mx.array], dt_softplus: bool, dt_limit):
    x, state, dtype = given["x"], given["state"], given["x"].dtype
    stored = dtype if all(given[name].dtype == dtype for name in ELEMENTS if name in given) else mx.float32
    arrays = {name: value.astype(stored if name in ELEMENTS else mx.float32) for name, value in given.items()}
    defines = _defines(arrays, dt_softplus, dt_limit)
    threads = 32 * WARPS
    used = x.size // defines["ROWS"] * defines["LANES_OF_ROW"]
    y, after = _kernel(language, tuple(defines.items()), tuple(arrays))(
        inputs=list(arrays.values()),
        output_shapes=[x.shape, state.shape],
        output_dtypes=[stored, mx.float32],
        grid=(-(-used // threads) * threads, 1, 1),
        threadgroup=(threads, 1, 1),
    )
    return y.astype(dtype), after


def _defines(arrays, dt_softplus: bool, dt_limit) -> dict[str, int | str]:
    """What `ssd_step.h` is made for."""
    (_, heads, channels), (groups, states) = arrays["x"].shape, arrays["B"].shape[1:]
    sizes = {"HEADS": heads, "CHANNELS": channels, "STATES": states, "GROUPS": groups, "WARPS": WARPS}
    sizes |= {"ELEMENT": gpu.ELEMENTS[dtype_name(arrays["x"].dtype)]}
    sizes |= {"ROWS": max(rows for rows in (1, 2, MOST_ROWS) if channels % rows == 0)}
    sizes |= {"LANES_OF_ROW": min(32, 1 << (states - 1).bit_length())}
    switches = {option: int(name in arrays) for option, name in HAS.items()}
    switches |= {"D_PER_CHANNEL": int("D" in arrays and arrays["D"].ndim == 2), "SOFTPLUS": int(dt_softplus)}
    switches |= {"LIMITED": int(not (dt_softplus and dt_limit == NO_LIMIT))}
    least, most = (f"{limit!r}f" if limit < float("inf") else "infinity()" for limit in dt_limit)
    return sizes | switches | {"LEAST_STEP": least, "MOST_STEP": most}


@functools.cache
def _kernel(language: Language, defines, reads: tuple[str, ...]):
    def pointers(names, kind):
        return ", ".join(gpu_language.pointer(name, reads, kind) for name in names)

    body = f"""
  const ::Inputs in = {{{pointers(ELEMENTS, "Element")}, {pointers(FLOATS, "float")}}};
  const int64 index = int64({language.block}) * THREADS + {language.thread};
  ::ssd_step(in, (GLOBAL Element*)y, (GLOBAL float*)after, x_shape[0], index);
"""
    before = gpu_language.header(language, defines, "ssd_step.h")
    return gpu_language.compiled(language, "ssd_step", before, body, reads, ("y", "after"))
