"""The scan on an NVIDIA GPU, as an operator: inputs as they come, all of the op fused, no (b, l, e, n) in memory.

The kernels are those of `mamba_core.backends.gpu`, compiled when first needed. The same inputs give the same bits.
"""

import functools
import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_core.backends.gpu import driver, nvrtc
from mamba_core.backends.gpu import launch as gpu
from mamba_core.backends.torch.kernels.native_tensors import rows
from mamba_core.backends.torch.kernels.operator import differentiable, is_float, refuse_tangents
from mamba_core.backends.torch.kernels.triton import launching

DTYPES = tuple(getattr(torch, name) for name in gpu.ELEMENTS)


def reason(device: torch.device, dtype: torch.dtype | None, states: int | None = None) -> str | None:
    """Why these kernels cannot run on that device, for x of that dtype and so many states; None if they can."""
    if device.type != "cuda" or torch.version.cuda is None:
        return "it runs on an NVIDIA GPU only"
    if dtype is not None and dtype not in DTYPES:
        return f"x is {str(dtype).removeprefix('torch.')}, and it computes {', '.join(gpu.ELEMENTS)}"
    if states is not None and states > gpu.LARGEST_STATE:
        return f"d_state is {states}, and it holds at most {gpu.LARGEST_STATE}"
    return _missing()


# A constant for torch.compile, which never traces it.
_missing = torch.compiler.assume_constant_result(nvrtc.missing)


def cuda(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart, delta_softplus):
    """(y, final state)."""
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
    return scan(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart, delta_softplus, keep)


def scan(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart, delta_softplus, keep, reverse=False):
    """`_scan` outside of the dispatcher. reverse: z lies in memory with its positions in reverse order."""
    if x.shape[1] == 0:
        h = A.new_zeros(len(x), *A.shape) if h0 is None else h0.clone()
        return torch.empty_like(x), h, A.new_empty(_kept_shape(x, A, keep))
    named = _named(x, delta, A, B, C, D, z, delta_bias, mask, restart)
    plan = _plan(named, delta_softplus, h0, keep=keep)
    found = _run(plan, named | {"begin": _padded(h0, plan)}, ("z",) if reverse else ())
    return found["y"], _unpadded(found["final_state"], plan), found["kept"]


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
    given = (x, delta, A, B, C, D, z, delta_bias, h0, mask, restart, delta_softplus, keep)
    return scan_backward(dy, dfinal_state, kept, *given)


def scan_backward(
    dy, dfinal_state, kept, x, delta, A, B, C, D, z, delta_bias, h0, mask, restart, delta_softplus, keep, reverse=False
) -> list[Tensor]:
    """`_scan_backward` outside of the dispatcher. reverse: z and dy lie with their positions in reverse order."""
    if x.shape[1] == 0:
        inputs = (x, delta, A, B, C, D, z, delta_bias)
        gradients = [torch.zeros_like(value) for value in inputs if value is not None]
        if h0 is not None:
            gradients.append(torch.zeros_like(h0) if dfinal_state is None else dfinal_state.clone())
        return gradients
    if not keep:  # torch.func may ask for the gradient of tensors that did not say that they require one
        kept = scan(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart, delta_softplus, True, reverse)[2]
    named = _named(x, delta, A, B, C, D, z, delta_bias, mask, restart) | {"dy": rows(dy)}
    plan = _plan(named, delta_softplus, dfinal_state, backward=True)
    found = _run(plan, named | {"begin": _padded(dfinal_state, plan), "kept": kept}, ("z", "dy") if reverse else ())
    names = ["dx", "ddelta", "dA_sum", "dB_sum", "dC_sum", "dD_sum", "dz", "ddelta_bias_sum"]
    gradients = [found[name] for name in names if name in found]
    return gradients if h0 is None else [*gradients, _unpadded(found["dstate"], plan)]


@_scan.register_fake
def _(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart, delta_softplus, keep):
    return x.new_empty(x.shape), A.new_empty(len(x), *A.shape), A.new_empty(_kept_shape(x, A, keep))


@_scan_backward.register_fake
def _(dy, dfinal_state, kept, *inputs):
    return [value.new_empty(value.shape) for value in inputs if is_float(value)]


def _kept_shape(x, A, keep):
    b, l, e = x.shape
    return (b, -(-l // gpu.KEEP_EVERY), e, gpu.geometry(A.shape[1]).padded) if keep else (0,)


_cuda = differentiable(_scan, _scan_backward)


def _named(x, delta, A, B, C, D, z, delta_bias, mask, restart) -> dict[str, Tensor | None]:
    """By the kernels' names, in memory as they want them."""
    sequences = {"x": x, "delta": delta, "B": B, "C": C, "z": z}
    others = {"A": A, "D": D, "delta_bias": delta_bias, "mask": mask, "restart": restart}
    named = {name: None if value is None else rows(value) for name, value in sequences.items()}
    return named | {name: None if value is None else value.contiguous() for name, value in others.items()}


def _plan(named, delta_softplus, begin, **how) -> gpu.Scan:
    x = named["x"]
    return gpu.Scan(
        *(*x.shape, named["A"].shape[1], str(x.dtype).removeprefix("torch.")),
        options=gpu.options(named | {"begin": begin}, delta_softplus),
        aligned=_aligned(named.get(name) for name in ("x", "delta", "z", "dy", "D", "delta_bias")),
        states_aligned=_aligned(named[name] for name in ("B", "C")),
        multiprocessors=_properties(x.device).multi_processor_count,
        **how,
    )


def _run(scan: gpu.Scan, arrays: dict[str, Tensor | None], turned: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """What the scan's kernels compute, by its names. turned: sequences that are read from their last position on."""
    x = arrays["x"]
    prepared = _prepare(scan, x.device)
    found = {
        name: torch.empty(shape, dtype=x.dtype if own else torch.float32, device=x.device)
        for name, shape, own in prepared.results
    }
    stream, given = torch.cuda.current_stream(x.device).cuda_stream, arrays | found
    pointers = {name: 0 if value is None else value.data_ptr() for name, value in given.items()}
    strides = {name: _strides(arrays.get(name)) for name in gpu.SEQUENCES}
    for name in turned:
        row, position = strides[name]
        pointers[name] += (x.shape[1] - 1) * position * x.element_size()
        strides[name] = row, -position
    with launching(x):
        for kernel, launch, sizes in prepared.calls:
            if launch.begins_from_added:
                pointers["begin"] = pointers["added"]
            numbers = itertools.chain(*strides.values()) if launch.strided else ()
            kernel.launch(
                x.device.index,
                stream,
                launch.blocks,
                *[pointers.get(name, 0) for name in launch.arrays],
                *sizes,
                *numbers,
            )
    return found


class _Prepared(NamedTuple):
    """What is the same for all scans of a kind.

    results: name, shape, whether of x's dtype. calls: kernel, launch, sizes.
    """

    results: list[tuple[str, tuple[int, ...], bool]]
    calls: list[tuple[driver.Kernel, gpu.Launch, tuple[int, ...]]]


@functools.lru_cache(maxsize=256)
def _prepare(scan: gpu.Scan, device: torch.device) -> _Prepared:
    properties = _properties(device)
    defines, architecture = tuple(scan.defines.items()), f"sm_{properties.major}{properties.minor}"
    launches, shapes = scan.launches, scan.shapes
    if scan.backward:
        launches, shapes = [*launches, scan.adding_up], shapes | scan.sums
    own = ("y", "dx", "ddelta", "dz", "dB_sum", "dC_sum")
    unused = {"dz": "HAS_Z", "dD": "HAS_D", "dD_sum": "HAS_D", "ddelta_bias": "HAS_BIAS", "ddelta_bias_sum": "HAS_BIAS"}
    results = [
        (name, shape, name in own)
        for name, shape in shapes.items()
        if unused.get(name, "HAS_D") in scan.options or name not in unused
    ]
    calls = [
        (_kernel(defines, architecture, launch.kernel, launch.threads, launch.shared), launch, scan.sizes(launch))
        for launch in launches
    ]
    return _Prepared(results, calls)


@functools.cache
def _kernel(defines, architecture: str, name: str, threads: int, shared: int) -> driver.Kernel:
    cubin = nvrtc.compile_source(gpu.source(), defines, architecture)
    return driver.Kernel(cubin, name, gpu.parameters(name), threads, shared)


@functools.cache
def _properties(device: torch.device):
    return torch.cuda.get_device_properties(device)


def _aligned(values) -> bool:
    return all(
        value.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in value.stride()[:-1])
        for value in values
        if value is not None
    )


def _strides(value: Tensor | None) -> tuple[int, int]:
    return (0, 0) if value is None else (value.stride(0), value.stride(1))


def _padded(state: Tensor | None, scan: gpu.Scan) -> Tensor | None:
    """(b, e, n) with the states that fill up."""
    if state is None:
        return None
    state = F.pad(state, (0, scan.geometry.padded - scan.states)).contiguous()
    return state if state.data_ptr() % 16 == 0 else state.clone()


def _unpadded(state: Tensor, scan: gpu.Scan) -> Tensor:
    return state[..., : scan.states].contiguous()
