"""Mixtures of SwiGLU experts in PyTorch: the choice of experts, a plain form that asks every expert, and kernels."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_core.backends.torch.arrays import at_least_float32, check_devices
from mamba_core.backends.torch.kernels import grouped_experts, sorted_experts
from mamba_core.backends.torch.ops import swiglu
from mamba_core.backends.torch.positions import where_counting
from mamba_core.kernels import choose
from mamba_core.selftest import Trial
from mamba_core.spec.ops.mixture_of_experts import check_experts


def mixture_of_experts(x, logits, gate_up, down, *, top_k, mask=None, kernel="auto"):
    """Gradients of gradients and forward mode need kernel="plain". Under autocast the products are in its dtype."""
    check_experts(x, logits, gate_up, down, top_k, mask)
    check_devices(x, logits=logits, gate_up=gate_up, down=down, mask=mask)
    dtype = _product_dtype(x, gate_up, down)
    available = kernels(x.device, dtype, (x.shape[2], down.shape[2]))
    run = KERNELS[choose(kernel, available, "mixture_of_experts", "torch", x.device)]
    if x.shape[1] == 0:
        return x
    weights, chosen = choice(where_counting(mask, logits), top_k)
    if mask is not None:
        chosen = torch.where(mask[..., None], chosen, len(gate_up))
    given = where_counting(mask, x).flatten(0, 1), weights.flatten(0, 1), chosen.flatten(0, 1), gate_up, down
    y = run(*(value.to(dtype) if value.dtype.is_floating_point and value is not given[1] else value for value in given))
    return where_counting(mask, y.view(x.shape)).to(x.dtype)


def choice(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """(..., top_k) each: the probabilities of the likeliest experts, at least in float32, and which these are."""
    logits = at_least_float32(logits)
    chosen = logits.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    return logits.softmax(-1).gather(-1, chosen), chosen


def kernels(
    device: torch.device, dtype: torch.dtype | None = None, sizes: tuple[int, ...] = ()
) -> dict[str, str | None]:
    """Fastest first, for products of that dtype and rows of those lengths: None for one that runs, else why not."""
    return dict.fromkeys(KERNELS) | {"grouped": grouped_experts.reason(device, dtype, sizes)}


def plain(x, weights, chosen, gate_up, down):
    """Every expert computes every row; differentiable any number of times."""
    y = torch.zeros_like(at_least_float32(x))
    for expert, (first, second) in enumerate(zip(gate_up, down, strict=True)):
        takes = chosen == expert
        weight = torch.where(takes, weights, 0.0).sum(-1, keepdim=True)
        found = at_least_float32(F.linear(swiglu.plain(F.linear(x, first)), second))
        y = y + torch.where(takes.any(-1, keepdim=True), found * weight, 0.0)
    return y.to(x.dtype)


# Fastest first. Each takes x (n, d), weights and chosen (n, top_k), gate_up and down. Of a row that does not count, x
# is zero and chosen is the number of experts.
KERNELS = {"grouped": grouped_experts.grouped, "sorted": sorted_experts.experts, "plain": plain}


def _product_dtype(x, gate_up, down) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return torch.promote_types(torch.promote_types(x.dtype, gate_up.dtype), down.dtype)


def trials(device: str):
    for dtype, length, experts, top_k in (("float32", 9, 4, 2), ("bfloat16", 64, 3, 1), ("bfloat16", 1, 8, 2)):
        rng, d, i = np.random.default_rng(0), 32, 48
        shapes = {"x": (2, length, d), "logits": (2, length, experts)}
        shapes |= {"gate_up": (experts, 2 * i, d), "down": (experts, d, i)}
        arrays = {name: (rng.normal(size=shape) / shape[-1] ** 0.5, dtype) for name, shape in shapes.items()}

        def call(kernel, *given, top_k=top_k):
            return (mixture_of_experts(*given, top_k=top_k, kernel=kernel),)

        yield Trial(f"{dtype}, {length} positions", dtype, arrays, {"y": (shapes["x"], dtype)}, call)
