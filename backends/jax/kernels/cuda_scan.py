"""The scan on an NVIDIA GPU and its gradient: inputs as they come, all of the op fused, no (b, l, e, n) in memory.

The kernels are those of `mamba_core.backends.gpu`, compiled when first needed. The same inputs give the same bits.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mamba_core.backends import gpu
from mamba_core.backends.gpu import nvrtc
from mamba_core.backends.jax.kernels.launch import capability, device, launch, takes_cubin
from mamba_core.backends.jax.kernels.operator import Kernel, differentiable, given

CUDA = Kernel("cuda", "cuda", "an NVIDIA GPU")
ARGUMENTS = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state", "mask", "restart")
# Of x's dtype; all others are float32.
ELEMENTS = ("y", "dx", "ddelta", "dz")
# Results that there are with an option only.
OPTIONAL = {"kept": "KEEP", "dz": "HAS_Z", "dD": "HAS_D", "ddelta_bias": "HAS_BIAS"}


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
    """The kernel with the arguments of the kernel `plain`, its twin, and portable, as the native scan has it."""
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
    named = dict(zip(ARGUMENTS, map(given, arrays), strict=True))
    scan = _plan(named, delta_softplus, named["initial_state"], keep=keep)
    found = _run(scan, named | {"begin": _padded(named["initial_state"], scan)})
    kept = found["kept"] if keep else jnp.zeros(0, jnp.float32)
    return found["y"], _unpadded(found["final_state"], scan), kept


def _backward(returned, *arrays, delta_softplus):
    *arrays, kept, dy, dfinal_state = arrays
    named = dict(zip(ARGUMENTS, map(given, arrays), strict=True))
    scan = _plan(named, delta_softplus, dfinal_state, backward=True)
    found = _run(scan, named | {"begin": _padded(dfinal_state, scan), "kept": kept, "dy": dy})
    dBC = found.pop("dBC").sum(1)
    sums = {name: found[name].sum((0, 1)) for name in ("dA", "dD", "ddelta_bias") if name in found}
    gradients = found | sums | {"dA": _unpadded(sums["dA"], scan)}
    gradients |= {"dB": _unpadded(dBC[:, :, 0], scan), "dC": _unpadded(dBC[:, :, 1], scan)}
    gradients["dinitial_state"] = _unpadded(found["dstate"], scan)
    # Of what is not given, of no elements.
    gradients |= {f"d{name}": array for name, array in zip(ARGUMENTS, arrays, strict=True) if named[name] is None}
    pairs = zip(ARGUMENTS, returned, strict=False)
    return [gradients[f"d{name}"].astype(value.dtype) for name, value in pairs]


def _kept(x, delta, A, *_):
    b, l, e = x
    return b, -(-l // gpu.KEEP_EVERY), e, gpu.geometry(A[1]).padded


def _plan(named, delta_softplus, begin, **how) -> gpu.Scan:
    x = named["x"]
    has = {
        "HAS_D": named["D"] is not None,
        "HAS_Z": named["z"] is not None,
        "HAS_BIAS": named["delta_bias"] is not None,
        "SOFTPLUS": delta_softplus,
        "HAS_STATE": begin is not None,
        "HAS_MASK": named["mask"] is not None,
        "HAS_RESTART": named["restart"] is not None,
    }
    e, n = named["A"].shape
    return gpu.Scan(
        *(*x.shape, n, x.dtype.name),
        options=frozenset(name for name, holds in has.items() if holds),
        aligned=e % 8 == 0,
        states_aligned=n % 8 == 0,
        multiprocessors=device().core_count,
        **how,
    )


def _run(scan: gpu.Scan, arrays: dict[str, jax.Array | None]) -> dict[str, jax.Array]:
    """What the scan's kernels compute, by its names."""
    image = nvrtc.compile_source(
        gpu.source(), tuple(scan.defines.items()), f"sm_{capability()}", "CUBIN" if takes_cubin() else "PTX"
    )
    shapes = {name: shape for name, shape in scan.shapes.items() if scan.defines.get(OPTIONAL.get(name), True)}
    dtype, found = arrays["x"].dtype, {}
    strides = [np.int64(stride) for name in gpu.SEQUENCES for stride in _strides(arrays.get(name))]
    for step in scan.launches:
        known = arrays | found
        if step.begins_from_added:
            known["begin"] = found["added"]
        written = [name for name in step.arrays if name in shapes and name not in found]
        results = {
            name: jax.ShapeDtypeStruct(shapes[name], dtype if name in ELEMENTS else jnp.float32) for name in written
        }
        read = [name for name in step.arrays if known.get(name) is not None]
        # combine_chunks turns what each chunk adds into what it begins from.
        updated = ["added"] if "added" in read else []
        parameters = [(known | results).get(name) for name in step.arrays]
        parameters += [np.int32(size) for size in scan.sizes(step)] + (strides if step.strided else [])
        values = launch(
            *(image, step.kernel, step.blocks, step.threads, step.shared, parameters),
            updated=read.index(*updated) if updated else None,
        )
        found |= dict(zip([*updated, *written], values, strict=True))
    return found


def _strides(value: jax.Array | None) -> tuple[int, int]:
    return (0, 0) if value is None else (value.shape[1] * value.shape[2], value.shape[2])


def _padded(state: jax.Array, scan: gpu.Scan) -> jax.Array:
    """(b, e, n) with the states that fill up."""
    return jnp.pad(state, [(0, 0), (0, 0), (0, scan.geometry.padded - scan.states)])


def _unpadded(state: jax.Array, scan: gpu.Scan) -> jax.Array:
    return state[..., : scan.states]
