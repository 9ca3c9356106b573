"""The scan on an NVIDIA GPU, as an operator: inputs as they come, all of the op fused, no (b, l, e, n) in memory.

The kernels are those of `mamba_core.backends.gpu`, compiled when first needed. The same inputs give the same bits.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_core.backends import gpu
from mamba_core.backends.gpu import driver, nvrtc
from mamba_core.backends.torch.kernels.memory import rows
from mamba_core.backends.torch.kernels.operator import differentiable, is_float, refuse_tangents

DTYPES = tuple(getattr(torch, name) for name in gpu.ELEMENTS)
# What stands for a number in the kernels' parameters: a pointer, 32 bits, 64 bits.
POINTER, SIZE, STRIDE = "P", "i", "q"


def reason(device: torch.device, dtype: torch.dtype | None, states: int | None = None) -> str | None:
    """Why these kernels cannot run on that device, for x of that dtype and so many states; None if they can."""
    if device.type != "cuda" or torch.version.cuda is None:
        return "it runs on an NVIDIA GPU only"
    if dtype is not None and dtype not in DTYPES:
        return f"x is {str(dtype).removeprefix('torch.')}, and it computes {', '.join(gpu.ELEMENTS)}"
    if states is not None and states > gpu.LARGEST_STATE:
        return f"d_state is {states}, and it holds at most {gpu.LARGEST_STATE}"
    return nvrtc.missing()


def cuda(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart, delta_softplus):
    """The arguments as `selective_scan` is given them, but restart (b, l) bool for the segments."""
    dtype = x.dtype
    if any(value is not None and value.dtype != dtype for value in (delta, B, C, z)):
        x, delta, B, C, z = (None if value is None else value.float() for value in (x, delta, B, C, z))
    A, D, delta_bias, h0 = (None if value is None else value.float() for value in (A, D, delta_bias, h0))
    tensors = (x, delta, A, B, C, D, z, delta_bias, h0, mask, restart)
    keep = torch.is_grad_enabled() and any(is_float(value) and value.requires_grad for value in tensors)
    y, h = _cuda(*tensors, bool(delta_softplus), keep)
    return y.to(dtype), h


@torch.library.custom_op("mamba_core::cuda_scan", mutates_args=(), device_types="cuda")
def _scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    h0: Tensor | None,
    mask: Tensor | None,
    restart: Tensor | None,
    delta_softplus: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final state, kept states), the last empty unless they are to be kept for a gradient."""
    refuse_tangents(x, delta, A, B, C, D, z, delta_bias, h0)
    named = _named(x, delta, A, B, C, D, z, delta_bias, mask, restart)
    scan = _plan(named, delta_softplus, h0, keep=keep)
    found = _run(scan, named | {"begin": _padded(h0, scan)})
    return found["y"], _unpadded(found["final_state"], scan), found["kept"]


@torch.library.custom_op("mamba_core::cuda_scan_backward", mutates_args=(), device_types="cuda")
def _scan_backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    kept: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    h0: Tensor | None,
    mask: Tensor | None,
    restart: Tensor | None,
    delta_softplus: bool,
    keep: bool,
) -> list[Tensor]:
    if not keep:  # torch.func may ask for the gradient of tensors that did not say that they require one
        _, _, kept = _scan(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart, delta_softplus, True)
    named = _named(x, delta, A, B, C, D, z, delta_bias, mask, restart) | {"dy": rows(dy)}
    scan = _plan(named, delta_softplus, dfinal_state, backward=True)
    found = _run(scan, named | {"begin": _padded(dfinal_state, scan), "kept": kept})
    # Each in memory of its own, as an operator's results must be.
    dB, dC = (found["dBC"][:, :, :, which, : scan.states].sum(1).to(x.dtype) for which in (0, 1))
    dA = _unpadded(found["dA"].sum((0, 1)), scan)
    gradients = [found["dx"], found["ddelta"], dA, dB, dC]
    gradients += [found["dD"].sum((0, 1))] if D is not None else []
    gradients += [found["dz"]] if z is not None else []
    gradients += [found["ddelta_bias"].sum((0, 1))] if delta_bias is not None else []
    gradients += [_unpadded(found["dstate"], scan)] if h0 is not None else []
    return gradients


@_scan.register_fake
def _(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart, delta_softplus, keep):
    b, l, e = x.shape
    kept = (b, -(-l // gpu.KEEP_EVERY), e, gpu.geometry(A.shape[1]).padded) if keep else (0,)
    return x.new_empty(x.shape), A.new_empty(b, *A.shape), A.new_empty(kept)


@_scan_backward.register_fake
def _(dy, dfinal_state, kept, *inputs):
    return [value.new_empty(value.shape) for value in inputs if is_float(value)]


_cuda = differentiable(_scan, _scan_backward)


def _named(x, delta, A, B, C, D, z, delta_bias, mask, restart) -> dict[str, Tensor | None]:
    """By the kernels' names, in memory as they want them."""
    sequences = {"x": x, "delta": delta, "B": B, "C": C, "z": z}
    others = {"A": A, "D": D, "delta_bias": delta_bias, "mask": mask, "restart": restart}
    named = {name: None if value is None else rows(value) for name, value in sequences.items()}
    return named | {name: None if value is None else value.contiguous() for name, value in others.items()}


def _plan(named, delta_softplus, begin, **how) -> gpu.Scan:
    x = named["x"]
    given = {
        "HAS_D": named["D"] is not None,
        "HAS_Z": named["z"] is not None,
        "HAS_BIAS": named["delta_bias"] is not None,
        "SOFTPLUS": delta_softplus,
        "HAS_STATE": begin is not None,
        "HAS_MASK": named["mask"] is not None,
        "HAS_RESTART": named["restart"] is not None,
    }
    return gpu.Scan(
        *(*x.shape, named["A"].shape[1], str(x.dtype).removeprefix("torch.")),
        options=frozenset(name for name, holds in given.items() if holds),
        aligned=_aligned(named.get(name) for name in ("x", "delta", "z", "dy")),
        states_aligned=_aligned(named[name] for name in ("B", "C")),
        multiprocessors=_properties(x.device).multi_processor_count,
        **how,
    )


def _run(scan: gpu.Scan, arrays: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """What the scan's kernels compute, by its names."""
    x = arrays["x"]
    elements = ("y", "dx", "ddelta", "dz")
    found = {
        name: torch.empty(shape, dtype=x.dtype if name in elements else torch.float32, device=x.device)
        for name, shape in scan.shapes.items()
    }
    strides = [number for name in gpu.SEQUENCES for number in _strides(arrays.get(name))]
    stream, device = torch.cuda.current_stream(x.device).cuda_stream, x.device.index
    with torch.cuda.device(x.device):
        for launch in scan.launches:
            given = arrays | found
            if launch.begins_from_added:
                given["begin"] = found["added"]
            pointers = [0 if given.get(name) is None else given[name].data_ptr() for name in launch.arrays]
            sizes = scan.sizes(launch)
            numbers = strides if launch.strided else []
            layout = POINTER * len(pointers) + SIZE * len(sizes) + STRIDE * len(numbers)
            kernel = _kernel(tuple(scan.defines.items()), launch._replace(blocks=0), layout, device)
            kernel.launch(device, stream, launch.blocks, *pointers, *sizes, *numbers)
    return found


@functools.cache
def _kernel(defines, launch: gpu.Launch, layout: str, device: int) -> driver.Kernel:
    properties = _properties(torch.device("cuda", device))
    cubin = nvrtc.compile_source(gpu.source(), defines, f"sm_{properties.major}{properties.minor}")
    return driver.Kernel(cubin, launch.kernel, layout, launch.threads, launch.shared)


@functools.cache
def _properties(device: torch.device):
    return torch.cuda.get_device_properties(device)


def _aligned(values) -> bool:
    return all(
        value.data_ptr() % 16 == 0 and value.stride(0) % 8 == 0 == value.stride(1) % 8
        for value in values
        if value is not None
    )


def _strides(value: Tensor | None) -> tuple[int, int]:
    return (0, 0) if value is None else (value.stride(0), value.stride(1))


def _padded(state: Tensor | None, scan: gpu.Scan) -> Tensor | None:
    """(b, e, n) with the states that fill up."""
    return None if state is None else F.pad(state, (0, scan.geometry.padded - scan.states)).contiguous()


def _unpadded(state: Tensor, scan: gpu.Scan) -> Tensor:
    return state[..., : scan.states].contiguous()
