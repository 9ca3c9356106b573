"""The recurrence of Mamba-2 on an NVIDIA GPU and its gradient: all of the op on the matrix units, in Triton.

The kernels are those of `mamba_core.backends.gpu.ssd_kernels`, compiled when first needed and launched by XLA. The same
inputs give the same bits.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mamba_core.backends.gpu import ssd as gpu
from mamba_core.backends.gpu import triton_image
from mamba_core.backends.jax.kernels.cuda_launch import capability, device, launch, shared_memory, takes_cubin
from mamba_core.backends.jax.kernels.operator import Kernel, differentiable, present

CUDA = Kernel("cuda", "cuda", "an NVIDIA GPU")
ARGUMENTS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state", "mask", "restart")
# Their names in the kernels.
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "bias", "begin", "mask", "restart")
MODULE = "mamba_core.backends.gpu.ssd_kernels"


def reason(platform: str, dtype=None, channels: int | None = None, states: int | None = None) -> str | None:
    """Why the kernels cannot run there, for heads of so many channels and states; None if they can."""
    if platform != "gpu":
        return "it runs on an NVIDIA GPU only"
    try:
        shared = shared_memory()
    except RuntimeError as fault:
        return str(fault)
    return gpu.reason(None if dtype is None else str(dtype), channels, states, shared) or triton_image.missing()


def beside(plain: Callable) -> Callable:
    """The kernel, with the arguments of its twin `plain` and `portable` as the native one has it."""
    ssd = differentiable(CUDA, "ssd", _forward, _backward, ARGUMENTS, plain, kept=[_added, _logs])

    def cuda(x, dt, A, B, C, D, z, dt_bias, h0, mask, restart, *, portable=False, **options):
        if h0 is None:
            h0 = jnp.zeros((x.shape[0], *x.shape[2:], B.shape[3]), jnp.float32)
        if x.shape[1] == 0:
            return x, h0.astype(jnp.float32)
        dtype = x.dtype
        if any(value is not None and value.dtype != dtype for value in (dt, B, C, z)):
            x, dt, B, C, z = (None if value is None else value.astype(jnp.float32) for value in (x, dt, B, C, z))
        A, D, dt_bias, h0 = (None if value is None else value.astype(jnp.float32) for value in (A, D, dt_bias, h0))
        y, h = ssd(x, dt, A, B, C, D, z, dt_bias, h0, mask, restart, portable=portable, **options)
        return y.astype(dtype), h

    return cuda


def _forward(returned, *arrays, keep, dt_softplus, dt_limit):
    named = _named(arrays)
    call = _call(named, dt_softplus, dt_limit)
    found = _launch(call, call.forward(), named)
    absent = jnp.zeros(0, jnp.float32)
    kept = [found.get(name, absent) if keep else absent for name in ("added", "logs")]
    return found["y"], found["final"], *kept


def _backward(returned, *arrays, dt_softplus, dt_limit):
    *arrays, added, logs, dy, dfinal_state = arrays
    named = _named(arrays) | {"last": dfinal_state}
    call = _call(named, dt_softplus, dt_limit)
    named |= {"dy": dy} | ({"added": added, "logs": logs} if call.segments > 1 else {})
    found = _launch(call, call.backward(), named)
    found |= {name: found[name].sum(0) for name in ("dB", "dC")}
    pairs = zip(NAMES, arrays, returned, strict=False)
    # Absent arguments have gradients without elements.
    return [
        found[f"d{name}"].reshape(like.shape).astype(like.dtype) if name in named else array
        for name, array, like in pairs
    ]


def _added(x, dt, A, B, *_):
    return _sizes(x, B).shapes.get("added", (0,))


def _logs(x, dt, A, B, *_):
    return _sizes(x, B).shapes.get("logs", (0,))


def _sizes(x, B) -> gpu.Ssd:
    return gpu.Ssd(*x, *B[2:], "float32", frozenset(), 0, False, (0.0, 0.0), device().core_count)


def _named(arrays) -> dict[str, jax.Array]:
    """Those that there are, by the kernels' names."""
    return {name: value for name, value in zip(NAMES, arrays, strict=True) if present(value) is not None}


def _call(named, dt_softplus, dt_limit) -> gpu.Ssd:
    x, D = named["x"], named.get("D")
    of_D = 0 if D is None else D.size // len(D)
    limits = tuple(map(float, dt_limit))
    sizes = (*x.shape, *named["B"].shape[2:], x.dtype.name)
    return gpu.Ssd(*sizes, frozenset(named), of_D, bool(dt_softplus), limits, device().core_count)


def _launch(call: gpu.Ssd, launches, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The arrays that the kernels write, by name."""
    shapes, found = call.shapes, {}
    results = {name: jax.ShapeDtypeStruct(shape, call.dtype_of(name)) for name, shape in shapes.items()}
    for each in launches:
        known = arrays | found
        written = [name for name in each.writes if name in shapes]
        parameters = [known.get(name) for name in each.reads]
        parameters += [results.get(name) for name in each.writes]
        numbers = [size for value in each.numbers for size in _sizes_of(value, known)]
        # An address that is not followed has any type.
        kinds = ["float32" if value is None else value.dtype.name for value in parameters]
        image = triton_image.compiled(
            MODULE, each.kernel, (*kinds, *numbers), each.constants, each.options, capability()
        )
        code = image.cubin if takes_cubin() else image.ptx
        parameters += [np.int64(size) if size >= triton_image.WIDE else np.int32(size) for size in numbers]
        parameters += [None] * triton_image.HIDDEN
        values = launch(code, image.name, each.grid, image.threads, image.shared, parameters)
        found |= dict(zip(written, values, strict=True))
    return found


def _sizes_of(value: int | str, known) -> tuple[int, ...]:
    """A number, or the strides of a sequence's first two axes."""
    if not isinstance(value, str):
        return (value,)
    if value not in known:
        return 0, 0
    shape = known[value].shape
    row = int(np.prod(shape[2:]))
    return shape[1] * row, row
