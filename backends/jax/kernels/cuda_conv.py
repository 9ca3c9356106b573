"""The causal convolution and its SiLU on an NVIDIA GPU, and its gradient: one pass over inputs as they come.

The kernels are those of `mamba_core.backends.gpu.causal_conv`, compiled when first needed. The same inputs give the
same bits.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mamba_core.backends.gpu import nvrtc
from mamba_core.backends.gpu.causal_conv import WIDEST, Conv, conv_source, options
from mamba_core.backends.jax.kernels.cuda_launch import capability, device, launch, takes_cubin
from mamba_core.backends.jax.kernels.cuda_scan import CUDA
from mamba_core.backends.jax.kernels.operator import differentiable, present

ARGUMENTS = ("x", "taps", "bias", "initial_state", "mask", "restart")


def beside(plain: Callable) -> Callable:
    """The kernel, with the arguments of its twin `plain` and `portable` as the scan's kernel has it.

    The twin computes masked rows, and filters that are too wide for the kernel.
    """

    def run_plain(x, taps, bias, state, mask, restart, *, silu):
        return plain(x, taps.T, bias, state, mask, restart, activation="silu" if silu else None)

    conv = differentiable(CUDA, "conv", _forward, _backward, ARGUMENTS, run_plain)

    def cuda(x, weight, bias, state, mask, restart, order=None, inverse=None, *, activation, portable=False):
        if mask is not None or not 2 <= weight.shape[1] <= WIDEST or x.size == 0:
            return plain(x, weight, bias, state, mask, restart, order, inverse, activation=activation)
        taps, bias = weight.T.astype(jnp.float32), None if bias is None else bias.astype(jnp.float32)
        return conv(x, taps, bias, state, None, restart, silu=activation == "silu", portable=portable)

    return cuda


def _forward(returned, x, taps, bias, state, _, restart, *, silu, keep):
    arrays = {"x": x, "taps": taps, "bias": present(bias), "state": state, "restart": present(restart)}
    found = _run(_plan(arrays, silu), arrays)
    return found["y"], found["final_state"]


def _backward(returned, x, taps, bias, state, _, restart, dy, dfinal_state, *, silu):
    arrays = {"x": x, "taps": taps, "bias": present(bias), "state": state, "restart": present(restart)}
    plan = _plan(arrays, silu, backward=True)
    found = _run(plan, arrays | {"dy": dy, "dfinal_state": dfinal_state})
    sums = found["sums"].sum((0, 1))
    dbias = bias if present(bias) is None else sums[plan.width]
    return found["dx"], sums[: plan.width], dbias, found["dstate"]


def _plan(arrays, silu, **how) -> Conv:
    x = arrays["x"]
    return Conv(
        *(*x.shape, len(arrays["taps"]), x.dtype.name),
        options=options(arrays, silu),
        multiprocessors=device().core_count,
        **how,
    )


def _run(plan: Conv, arrays: dict[str, jax.Array | None]) -> dict[str, jax.Array]:
    """The arrays that the kernel computes, by name."""
    form = "CUBIN" if takes_cubin() else "PTX"
    image = nvrtc.compile_source(conv_source(), tuple(plan.defines.items()), f"sm_{capability()}", form)
    results = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32 if name == "sums" else arrays["x"].dtype)
        for name, shape in plan.shapes.items()
    }
    step = plan.launch
    written = [name for name in step.arrays if name in results]
    parameters = [(results | arrays)[name] for name in step.arrays]
    parameters += [np.int32(size) for size in plan.sizes]
    values = launch(image, step.kernel, step.blocks, step.threads, step.shared, parameters)
    return dict(zip(written, values, strict=True))
