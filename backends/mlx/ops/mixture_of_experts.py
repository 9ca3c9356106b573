"""Mixtures of experts in MLX: which experts compute a position, the plain form, and the choice of a kernel."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mamba_core.backends.mlx.arrays import default_device, keep_float32
from mamba_core.backends.mlx.kernels import numpy_experts
from mamba_core.backends.mlx.positions import where_counting
from mamba_core.call import Call
from mamba_core.kernels import choose
from mamba_core.selftest import Trial
from mamba_core.spec.ops.mixture_of_experts import check_experts

# Positions times experts from which it pays to bring those of an expert together.
SORTED = 64


def mixture_of_experts(x, logits, gate_up, down, *, top_k, mask=None, kernel="auto"):
    """Computed in the dtype of x, but probabilities and the sum over experts in float32."""
    check_experts(x, logits, gate_up, down, top_k, mask)
    return mix(Call(mask=mask), x, logits, gate_up, down, top_k=top_k, kernel=kernel)


def mix(call: Call, x, logits, gate_up, down, *, top_k, kernel="auto"):
    """`mixture_of_experts` within a call."""
    keep_float32()
    if x.size == 0:
        return x
    mask = call.mask
    run = KERNELS[chosen(kernel, (x, logits, gate_up, down, mask))]
    # A value that does not count may be NaN, and 0 * NaN is not 0.
    x, logits = where_counting(mask, x), where_counting(mask, logits)
    experts, weights = route(logits, top_k)
    rows = x.reshape(-1, x.shape[-1])
    experts, weights = experts.reshape(-1, top_k), where_counting(mask, weights).reshape(-1, top_k)
    y = run(rows, experts, weights, gate_up.astype(x.dtype), down.astype(x.dtype), mask)
    return y.astype(x.dtype).reshape(x.shape)


def route(logits: mx.array, top_k: int) -> tuple[mx.array, mx.array]:
    """The experts of each position, the likeliest first, and their probabilities in float32, both (b, l, top_k)."""
    logits = logits.astype(mx.float32)
    # MLX's sort is stable on every device: among equals the lower number comes first.
    experts = mx.argsort(-mx.stop_gradient(logits), axis=-1)[..., :top_k]
    return experts, mx.take_along_axis(mx.softmax(logits, axis=-1), experts, axis=-1)


def kernels(device: str | None = None, dtype: mx.Dtype | None = None) -> dict[str, str | None]:
    return dict.fromkeys(KERNELS) | {"numpy": numpy_experts.reason(device or default_device())}


def chosen(kernel: str, arrays) -> str:
    """The kernel of that name, or for "auto" the fastest, for these arrays on MLX's default device.

    Raises:
        ValueError: there is no such kernel, or not for them.
    """
    arrays = [value for value in arrays if value is not None] if kernel in ("auto", "numpy") else ()
    available = dict.fromkeys(KERNELS) | {"numpy": numpy_experts.reason(default_device(), arrays)}
    return choose(kernel, available, "mixture_of_experts", "mlx", default_device())


def gathered(x, experts, weights, gate_up, down, mask):
    """Of the experts those alone that compute a position, by MLX's product of gathered matrices."""
    top_k, together = experts.shape[1], experts.size >= SORTED
    experts = experts.flatten()
    order = mx.argsort(experts) if together else mx.arange(experts.size)
    if default_device() == "cpu":  # MLX gathers matrices of float32 alone there
        x, gate_up, down = (value.astype(mx.float32) for value in (x, gate_up, down))
    how = {"rhs_indices": experts[order], "sorted_indices": together}
    projected = mx.gather_mm(x[order // top_k][:, None], gate_up.swapaxes(1, 2), **how)
    y = mx.gather_mm(swiglu(projected), down.swapaxes(1, 2), **how)[:, 0]
    if together:
        y = y[mx.argsort(order)]
    return (weights[..., None] * y.reshape(-1, top_k, y.shape[-1]).astype(mx.float32)).sum(axis=1)


def plain(x, experts, weights, gate_up, down, mask):
    """Each expert computes every position, and those that did not choose it take nothing of it."""
    total = mx.zeros(x.shape, mx.float32)
    for expert in range(len(gate_up)):
        taken = experts == expert
        own = mx.where(taken.any(axis=1)[:, None], x, mx.array(0, x.dtype))
        y = swiglu(own @ gate_up[expert].T) @ down[expert].T
        y = mx.where(taken.any(axis=1)[:, None], y.astype(mx.float32), 0.0)
        total = total + mx.where(taken, weights, 0.0).sum(axis=1, keepdims=True) * y
    return total


def swiglu(projected: mx.array) -> mx.array:
    """silu(gate) * up, of gate | up (..., 2 i), in float32 and returned in its dtype."""
    return _swiglu(projected)


@mx.compile
def _swiglu(projected):
    gate, up = mx.split(projected.astype(mx.float32), 2, axis=-1)
    return (nn.silu(gate) * up).astype(projected.dtype)


# Fastest first, the plain one last.
KERNELS = {"numpy": numpy_experts.mixture, "gathered": gathered, "plain": plain}


def trials(device: str):
    for dtype, length in (("float32", 3), ("float32", 67), ("bfloat16", 67)):
        yield Trial(f"{dtype}, {length} positions", dtype, *_trial(dtype, length))


def _trial(dtype, length):
    """Arrays, outputs and the call of a trial. The logits lie apart, so that rounding chooses no other experts."""
    rng = np.random.default_rng(0)
    logits = np.argsort(rng.random((2, length, 5)), axis=-1) + rng.random((2, length, 5)) / 2
    arrays = {"x": rng.normal(size=(2, length, 32)), "logits": logits}
    arrays |= {"gate_up": rng.normal(size=(5, 48, 32)) / 6, "down": rng.normal(size=(5, 32, 24)) / 5}
    mask = rng.random((2, length)) < 0.7

    def call(kernel, *given):
        return (mixture_of_experts(*given, top_k=2, mask=mx.array(mask), kernel=kernel),)

    return {name: (value, dtype) for name, value in arrays.items()}, {"y": ((2, length, 32), dtype)}, call
