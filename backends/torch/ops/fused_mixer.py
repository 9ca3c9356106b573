"""A Mamba-1 mixer between in_proj and out_proj as one operator. Its plain form is the mixer's own lines."""

import functools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_core.backends.torch.kernels import triton_conv, triton_mixer
from mamba_core.backends.torch.ops import causal_conv, selective_scan
from mamba_core.backends.torch.ops.rms_norm import rms_norm
from mamba_core.backends.torch.positions import call_of
from mamba_core.kernels import Kernels, takes
from mamba_core.selftest import Trial


def kernels(
    device: torch.device, dtype: torch.dtype | None = None, width: int | None = None, states: int | None = None
) -> dict[str, str | None]:
    """Fastest first, for a filter of that width and so many states: None for a kernel that runs there, else why not."""
    return {"triton": _reason(device, dtype, width, states), "plain": None}


def is_fused(policy: Kernels, xz: Tensor, width: int, states: int) -> bool:
    """Whether the operator computes it. Chosen by "auto", it leaves alone who asks for another scan or convolution."""
    asked, scan, conv = policy.of("fused_mixer"), policy.of("selective_scan"), policy.of("causal_conv")
    if asked not in ("auto", "triton") or (asked == "auto" and not {scan, conv} <= {"auto", "cuda", "native"}):
        return False
    if _reason(xz.device, xz.dtype, width, states) is not None:
        return False
    return takes(asked, "triton", "fused_mixer", "torch", xz.device)


def _reason(device, dtype, width, states) -> str | None:
    if (why := triton_conv.reason(device, dtype, width)) is not None:
        return why
    # Triton's interpreter, on a CPU, goes with the native scan.
    return selective_scan.kernels(device, dtype, states)["native" if device.type == "cpu" else "cuda"]


# Fastest first.
KERNELS = {"triton": triton_mixer.inner, "plain": None}
# A call each to try the kernel with: dtype, length, channels, states, whether with segments, and the eps of the norms.
TRIALS = (("float32", 257, 24, 16, True, 0.0), ("float32", 7, 9, 8, False, 1e-6), ("bfloat16", 257, 40, 16, True, 0.0))


def trials(device: str):
    for dtype, l, e, n, has_segments, eps in TRIALS:
        rng, k, r = np.random.default_rng(0), 4, 3
        stored = {"xz": (2, l, 2 * e), "conv_weight": (e, k), "conv_bias": (e,), "x_proj": (r + 2 * n, e)}
        stored |= {"dt_proj": (e, r), "conv_state": (2, k - 1, e)}
        float32 = {"delta_bias": (e,), "A": (e, n), "D": (e,), "ssm_state": (2, e, n)}
        drawn = {name: (rng.normal(size=shape), dtype) for name, shape in stored.items()}
        drawn |= {name: (rng.normal(size=shape), "float32") for name, shape in float32.items()}
        drawn |= {"A": (-np.exp(drawn["A"][0]), "float32"), "x_proj": (drawn["x_proj"][0] / e**0.5, dtype)}
        outputs = {"y": ((2, l, e), dtype), "conv_state": ((2, k - 1, e), dtype), "ssm_state": ((2, e, n), "float32")}
        segments = np.cumsum(rng.random((2, l)) < 0.15, 1) if has_segments else None
        call = _Call(tuple(drawn), None if segments is None else torch.from_numpy(segments).to(device), eps)
        yield Trial(f"{dtype}, length {l}, {e} channels, {n} states", dtype, drawn, outputs, call)


class _Call(NamedTuple):
    names: tuple[str, ...]
    segment_ids: Tensor | None
    eps: float

    def __call__(self, kernel: str, *values: Tensor):
        named = dict(zip(self.names, values, strict=True))
        call = call_of(None, self.segment_ids, length=named["xz"].shape[1])
        run = _plain if kernel == "plain" else functools.partial(triton_mixer.inner, restart=call.restart)
        return run(**named, selection_eps=self.eps, **({"call": call} if kernel == "plain" else {}))


def _plain(xz, conv_weight, conv_bias, x_proj, dt_proj, delta_bias, A, D, conv_state, ssm_state, selection_eps, call):
    """As the mixer's own lines compute it."""
    x, z = xz.chunk(2, dim=-1)
    fixed = {"activation": "silu", "kernel": "plain"}
    x, conv_state = causal_conv.conv(call, x, conv_weight, conv_bias, initial_state=conv_state, **fixed)
    parts = F.linear(x, x_proj).split((dt_proj.shape[1], A.shape[1], A.shape[1]), dim=-1)
    dt, B, C = (rms_norm(part, None, selection_eps) if selection_eps > 0 else part for part in parts)
    options = {"z": z, "delta_bias": delta_bias, "delta_softplus": True, "initial_state": ssm_state, "kernel": "plain"}
    y, ssm_state = selective_scan.scan(call, x, F.linear(dt, dt_proj), A, B, C, D, **options)
    return y, conv_state, ssm_state
