"""The scan on an NVIDIA GPU and its gradient: inputs as they come, all of the op fused, no (b, l, e, n) in memory.

The kernels are those of `mamba_core.backends.gpu`, compiled when first needed. The same inputs give the same bits.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mamba_core.backends.gpu import launch as gpu
from mamba_core.backends.gpu import nvrtc
from mamba_core.backends.jax.kernels.cuda_launch import capability, device, launch, takes_cubin
from mamba_core.backends.jax.kernels.operator import Kernel, differentiable, present

CUDA = Kernel("cuda", "cuda", "an NVIDIA GPU")
ARGUMENTS = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state", "mask", "restart")
# Of x's dtype; all others are float32.
ELEMENTS = ("y", "dx", "ddelta", "dz", "dB_sum", "dC_sum")
# Results that exist only with an option.
OPTIONAL = {"kept": "KEEP", "dz": "HAS_Z", "dD": "HAS_D", "dD_sum": "HAS_D"}
OPTIONAL |= {"ddelta_bias": "HAS_BIAS", "ddelta_bias_sum": "HAS_BIAS"}


def reason(platform: str, dtype=None, states: int | None = None) -> str | None:
    """Why the kernels cannot run there, for x of that dtype and so many states; None if they can."""
    if platform != "gpu":
        return "it runs on an NVIDIA GPU only"
    if dtype is not None and str(dtype) not in gpu.ELEMENTS:
        return f"x is {dtype}, and it computes {', '.join(gpu.ELEMENTS)}"
    if states is not None and states > gpu.LARGEST_STATE:
        return f"d_state is {states}, and it holds at most {gpu.LARGEST_STATE}"
    try:
        device()
    except RuntimeError as fault:
        return str(fault)
    return nvrtc.missing()


def beside(plain: Callable) -> Callable:
    """The kernel, with the arguments of its twin `plain` and `portable` as the native scan has it."""
    scan = differentiable(CUDA, "scan", _forward, _backward, ARGUMENTS, plain, kept=[_kept])

    def cuda(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart, *, portable=False, **options):
        if x.shape[1] == 0:
            return x, h0
        dtype = x.dtype
        if any(value is not None and value.dtype != dtype for value in (delta, B, C, z)):
            x, delta, B, C, z = (None if value is None else value.astype(jnp.float32) for value in (x, delta, B, C, z))
        y, h = scan(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart, portable=portable, **options)
        return y.astype(dtype), h

    return cuda


def _forward(returned, *arrays, keep, delta_softplus):
    named = dict(zip(ARGUMENTS, map(present, arrays), strict=True))
    scan = _plan(named, delta_softplus, named["initial_state"], keep=keep)
    found = _run(scan, named | {"begin": _padded(named["initial_state"], scan)})
    kept = found["kept"] if keep else jnp.zeros(0, jnp.float32)
    return found["y"], _unpadded(found["final_state"], scan), kept


def _backward(returned, *arrays, delta_softplus):
    *arrays, kept, dy, dfinal_state = arrays
    named = dict(zip(ARGUMENTS, map(present, arrays), strict=True))
    scan = _plan(named, delta_softplus, dfinal_state, backward=True)
    found = _run(scan, named | {"begin": _padded(dfinal_state, scan), "kept": kept, "dy": dy})
    sums = {name: found[f"{name}_sum"] for name in ("dA", "dB", "dC", "dD", "ddelta_bias") if f"{name}_sum" in found}
    # Absent arguments have gradients without elements.
    absent = {f"d{name}": array for name, array in zip(ARGUMENTS, arrays, strict=True) if named[name] is None}
    gradients = found | sums | absent | {"dinitial_state": _unpadded(found["dstate"], scan)}
    pairs = zip(ARGUMENTS, returned, strict=False)
    return [gradients[f"d{name}"].astype(value.dtype) for name, value in pairs]


def _kept(x, delta, A, *_):
    b, l, e = x
    geometry = gpu.geometry(A[1], backward=True)
    return b, -(-l // geometry.TILE), e, geometry.padded


def _plan(named, delta_softplus, begin, **how) -> gpu.Scan:
    x = named["x"]
    e, n = named["A"].shape
    return gpu.Scan(
        *(*x.shape, n, x.dtype.name),
        options=gpu.options(named | {"begin": begin}, delta_softplus),
        aligned=e % 8 == 0,
        states_aligned=n % 8 == 0,
        multiprocessors=device().core_count,
        **how,
    )


def _run(scan: gpu.Scan, arrays: dict[str, jax.Array | None]) -> dict[str, jax.Array]:
    """The arrays that the scan's kernels compute, by name; after a backward the sums too."""
    form = "CUBIN" if takes_cubin() else "PTX"
    image = nvrtc.compile_source(gpu.source(), tuple(scan.defines.items()), f"sm_{capability()}", form)
    dtype, found = arrays["x"].dtype, {}
    results = {
        name: jax.ShapeDtypeStruct(shape, dtype if name in ELEMENTS else jnp.float32)
        for name, shape in (scan.shapes | (scan.sums if scan.backward else {})).items()
        if scan.defines.get(OPTIONAL.get(name), True)
    }
    for step in [*scan.launches, *([scan.adding_up] if scan.backward else [])]:
        begins = {"begin": found["added"]} if step.begins_from_added else {}
        found |= _launch(image, scan, step, arrays | found | begins, results)
    return found


def _launch(image, scan, step: gpu.Launch, known: dict, results: dict) -> dict[str, jax.Array]:
    """The arrays that a kernel writes. known: those that exist already."""
    read = [name for name in step.arrays if known.get(name) is not None]
    written = [name for name in step.arrays if name in results and name not in known]
    # combine_chunks turns the state that each chunk adds into the state from which it begins.
    updated = [name for name in read if name == "added"]
    parameters = [(results | known).get(name) for name in step.arrays]
    parameters += [np.int32(size) for size in scan.sizes(step)]
    if step.strided:
        parameters += [np.int64(stride) for name in gpu.SEQUENCES for stride in _strides(known.get(name))]
    update = read.index(*updated) if updated else None
    values = launch(image, step.kernel, step.blocks, step.threads, step.shared, parameters, update)
    return dict(zip([*updated, *written], values, strict=True))


def _strides(value: jax.Array | None) -> tuple[int, int]:
    return (0, 0) if value is None else (value.shape[1] * value.shape[2], value.shape[2])


def _padded(state: jax.Array, scan: gpu.Scan) -> jax.Array:
    """(b, e, n), filled up to the states that the kernel computes."""
    return jnp.pad(state, [(0, 0), (0, 0), (0, scan.geometry.padded - scan.states)])


def _unpadded(state: jax.Array, scan: gpu.Scan) -> jax.Array:
    return state[..., : scan.states]
