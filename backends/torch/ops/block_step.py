"""One position of a residual block at once. Its kernels are the ways `native_step` and `cuda_step`."""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from mamba_core.backend import LayerState
from mamba_core.backends.torch.kernels import (
    native_mamba_step,
    native_ssd_step,
    native_step,
    native_tensors,
    triton_norm,
    triton_product,
    triton_ssd_step,
    triton_step,
)
from mamba_core.backends.torch.ops.causal_conv import causal_conv_step
from mamba_core.backends.torch.ops.gated_norm import gated_norm
from mamba_core.backends.torch.ops.rms_norm import rms_norm
from mamba_core.backends.torch.ops.selective_scan import selective_step
from mamba_core.backends.torch.ops.ssd import ssd_step
from mamba_core.kernels import takes
from mamba_core.selftest import CannotRunError, Trial

EPS = 1e-5


def kernels(device: torch.device, dtype: torch.dtype | None = None, size: int = 0) -> dict[str, str | None]:
    """Fastest first, for weights of that dtype: None for a kernel that runs there, else why not."""
    reasons = {"native": native_tensors.reason(device, dtype), "cuda": triton_norm.reason(device, dtype, size)}
    return dict.fromkeys(KERNELS) | reasons


def takes_cuda(asked: str, device: torch.device) -> bool:
    """Whether a policy takes the kernel "cuda" on a device where it runs."""
    return takes(asked, "cuda", "block_step", "torch", device)


# Fastest first.
KERNELS = {"native": native_mamba_step.steps, "cuda": triton_step.block, "plain": None}
# A call each to try the kernels with: dtype, rows, width, and the eps of the norms of dt, B and C. With more rows the
# products are other kernels.
TRIALS = (("float32", 2, 24, 0.0), ("float32", 5, 20, 1e-6), ("bfloat16", 1, 24, 0.0), ("bfloat16", 24, 32, 0.0))


# Of a block whose recurrence is the ssd: dtype, rows, groups, channels beside it, and whether the norm comes before the
# gate.
SSD_TRIALS = (("float32", 2, 2, 7, True), ("bfloat16", 5, 2, 7, False), ("bfloat16", 1, 1, 0, False))
D, HEADS, HEADDIM, STATES, K = 24, 4, 5, 16, 4
LIMIT = (0.01, 0.5)


def trials(device: str):
    yield from _mamba_trials()
    yield from _ssd_trials()


def _mamba_trials():
    for dtype, b, d, eps in TRIALS:
        rng, (e, n, k, r) = np.random.default_rng(0), (2 * d, 16, 4, 3)
        stored = {"residual": (b, d), "norm": (d,), "in_proj": (2 * e, d), "in_bias": (2 * e,), "conv": (e, k)}
        stored |= {"conv_bias": (e,), "x_proj": (r + 2 * n, e), "dt_proj": (e, r), "out_proj": (d, e)}
        stored |= {"out_bias": (d,), "conv_state": (b, k - 1, e)}
        float32 = {"dt_bias": (e,), "A_log": (e, n), "D": (e,), "ssm_state": (b, e, n)}
        drawn = {name: (rng.normal(size=shape) / shape[-1] ** 0.5, dtype) for name, shape in stored.items()}
        drawn |= {name: (rng.normal(size=shape), "float32") for name, shape in float32.items()}
        drawn |= {"residual": (rng.normal(size=(b, d)), "float32")}
        outputs = {name: (drawn[name][0].shape, drawn[name][1]) for name in ("residual", "conv_state", "ssm_state")}
        call = partial(_step, names=tuple(drawn), selection_eps=eps)
        yield Trial(f"{dtype}, {b} rows", dtype, drawn, outputs, call, forward_only=tuple(KERNELS))


@torch.no_grad()
def _step(kernel: str, *values, names, selection_eps: float):
    """The residual stream after a block, and the block's states."""
    named = dict(zip(names, values, strict=True))
    residual, conv_state, ssm_state, norm = (named.pop(n) for n in ("residual", "conv_state", "ssm_state", "norm"))
    if kernel == "native":
        if len(residual) > native_step.MOST_ROWS:
            raise CannotRunError(f"it computes at most {native_step.MOST_ROWS} rows")
        operands = native_mamba_step.Operands(**named | {"conv": named["conv"][:, None]}, selection_eps=selection_eps)
        tensors = [conv_state, ssm_state, norm, *operands[:-1]]
        residual, conv_state, ssm_state = operands.blocks(residual[:, None], tensors, operands.numbers(EPS))
        return residual[:, 0], conv_state, ssm_state
    if kernel == "cuda":
        layer = triton_step.Layer(norm=norm, eps=EPS, **named, selection_eps=selection_eps)
        return _in_place(triton_step.block, layer, residual, conv_state, ssm_state)
    return _plain(residual, conv_state, ssm_state, norm, selection_eps, **named)


def _ssd_trials():
    e = HEADS * HEADDIM
    for dtype, b, groups, beside, before_gate in SSD_TRIALS:
        rng, filters = np.random.default_rng(0), e + 2 * groups * STATES
        rows = 2 * beside + e + filters + HEADS
        stored = {"norm": (D,), "in_proj": (rows, D), "in_bias": (rows,), "conv": (filters, K), "conv_bias": (filters,)}
        stored |= {"gated_norm": (e,), "out_proj": (D, beside + e), "out_bias": (D,), "conv_state": (b, K - 1, filters)}
        float32 = {"residual": (b, D), "dt_bias": (HEADS,), "A_log": (HEADS,), "D": (e,)}
        float32 |= {"ssm_state": (b, HEADS, HEADDIM, STATES)}
        drawn = {name: (rng.normal(size=shape) / shape[-1] ** 0.5, dtype) for name, shape in stored.items()}
        drawn |= {name: (rng.normal(size=shape), "float32") for name, shape in float32.items()}
        outputs = {name: (drawn[name][0].shape, drawn[name][1]) for name in ("residual", "conv_state", "ssm_state")}
        call = partial(_ssd_step, names=tuple(drawn), groups=groups, before_gate=before_gate)
        yield Trial(f"ssd, {dtype}, {b} rows", dtype, drawn, outputs, call, forward_only=tuple(KERNELS))


@torch.no_grad()
def _ssd_step(kernel: str, *values, names, groups: int, before_gate: bool):
    """As `_step`, of a block whose recurrence is the ssd."""
    named = dict(zip(names, values, strict=True))
    residual, conv_state, ssm_state, norm = (named.pop(n) for n in ("residual", "conv_state", "ssm_state", "norm"))
    settings = {"headdim": HEADDIM, "groups": groups, "dt_limit": LIMIT, "gated_eps": EPS}
    settings |= {"norm_before_gate": before_gate}
    if kernel == "cuda":
        layer = triton_ssd_step.Layer(norm=norm, eps=EPS, **named, **settings)
        return _in_place(triton_ssd_step.block, layer, residual, conv_state, ssm_state)
    if kernel == "native":
        operands = native_ssd_step.Operands(**named | {"conv": named["conv"][:, None]}, **settings)
        tensors = operands.tensors(norm, LayerState(conv_state, ssm_state), len(residual))
        residual, conv_state, ssm_state = operands.blocks(residual[:, None], tensors, operands.numbers(EPS))
        return residual[:, 0], conv_state, ssm_state
    return _plain_ssd(residual, conv_state, ssm_state, norm, groups, before_gate, **named)


def _in_place(block, layer, residual, conv_state, ssm_state):
    """(residual, conv_state, ssm_state) by a block's kernels, in memory of its own."""
    after, counters = (conv_state.clone(), ssm_state.clone()), triton_product.new_counters(residual.device)
    residual, hidden = block(layer, residual, None, conv_state, ssm_state, after, counters)
    return residual if hidden is None else residual + hidden, *after


def _plain_ssd(residual, conv_state, ssm_state, norm, groups, before_gate, **w):
    e, states = HEADS * HEADDIM, groups * STATES
    beside = w["out_proj"].shape[1] - e
    projected = F.linear(rms_norm(residual, norm, EPS), w["in_proj"], w["in_bias"])
    gate, gated, z, xBC, dt = projected.split((beside, beside, e, e + 2 * states, HEADS), dim=-1)
    xBC, conv_state = causal_conv_step(xBC, w["conv"], w["conv_bias"], activation="silu", state=conv_state)
    x, B, C = xBC.split((e, states, states), dim=-1)
    x, B, C = x.unflatten(-1, (HEADS, -1)), B.unflatten(-1, (groups, -1)), C.unflatten(-1, (groups, -1))
    of_step = {"dt_bias": w["dt_bias"], "dt_softplus": True, "dt_limit": LIMIT, "state": ssm_state}
    y, ssm_state = ssd_step(x, dt, -torch.exp(w["A_log"]), B, C, w["D"].unflatten(0, (HEADS, -1)), **of_step)
    y = gated_norm(y.flatten(-2), z, w["gated_norm"], groups, EPS, before_gate, "plain")
    y = torch.cat((F.silu(gate) * gated, y), dim=-1)
    return residual + F.linear(y, w["out_proj"], w["out_bias"]), conv_state, ssm_state


def _plain(residual, conv_state, ssm_state, norm, selection_eps, **w):
    normed = rms_norm(residual, norm, EPS)
    x, z = F.linear(normed, w["in_proj"], w["in_bias"]).chunk(2, dim=-1)
    x, conv_state = causal_conv_step(x, w["conv"], w["conv_bias"], activation="silu", state=conv_state)
    A, r = -torch.exp(w["A_log"]), w["dt_proj"].shape[1]
    parts = F.linear(x, w["x_proj"]).split((r, A.shape[1], A.shape[1]), dim=-1)
    dt, B, C = (rms_norm(part, None, selection_eps) if selection_eps > 0 else part for part in parts)
    fixed = {"z": z, "delta_bias": w["dt_bias"], "delta_softplus": True, "state": ssm_state}
    y, ssm_state = selective_step(x, F.linear(dt, w["dt_proj"]), A, B, C, w["D"], **fixed)
    return residual + F.linear(y, w["out_proj"], w["out_bias"]), conv_state, ssm_state
