"""What is between a mixer's in_proj and out_proj as one operator, whose gradient computes again what is cheap to.

The convolution's output and the step sizes, (b, l, e) each, are two of the arrays of that size that the mixer would
keep for its gradient, and take little of the time of its gradient to compute again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_core.backends.torch.kernels import cuda_scan, native_scan, triton_conv, triton_norm
from mamba_core.backends.torch.kernels.operator import differentiable, is_float, refuse_tangents
from mamba_core.backends.torch.kernels.triton import product


def inner(
    xz,
    conv_weight,
    conv_bias,
    x_proj,
    dt_proj,
    delta_bias,
    A,
    D,
    conv_state,
    ssm_state,
    restart,
    selection_eps=0.0,
    selection=None,
):
    """(y (b, l, e) before out_proj, conv state, ssm state) from what in_proj gives, (b, l, 2e).

    The weights are cast to the dtype of xz, under autocast too; restart is (b, l) bool for the segments. In plain
    operations:

        x, z = xz.chunk(2, -1)
        x, conv_state = causal_conv(x, conv_weight, conv_bias, activation="silu", initial_state=conv_state)
        dt, B, C = linear(x, x_proj).split((r, n, n), -1)
        dt, B, C = (rms_norm(value, None, selection_eps) for value in (dt, B, C))  # where selection_eps > 0
        dt, B, C = (value * weight for value, weight in ...)                       # where selection is (r + 2n)
        y, ssm_state = selective_scan(x, linear(dt, dt_proj), A, B, C, D, z=z, delta_bias, softplus, ssm_state)
    """
    tensors = (xz, conv_weight, conv_bias, x_proj, dt_proj, delta_bias, A, D, selection, conv_state, ssm_state, restart)
    keep = torch.is_grad_enabled() and any(is_float(value) and value.requires_grad for value in tensors)
    return _inner(*tensors, selection_eps, keep)


class Weights(NamedTuple):
    """Of one direction, as `inner` takes them."""

    conv_weight: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    dt_proj: Tensor
    delta_bias: Tensor
    A: Tensor
    D: Tensor
    selection: Tensor | None = None


def forward(xz, weights: Weights, conv_state, ssm_state, restart, selection_eps, keep, reverse=False):
    """(y, conv state, ssm state, x_proj's output, the scan's kept states).

    reverse: of xz with its positions in reverse order, which all results and `restart` then have.
    """
    with torch.autocast(xz.device.type, enabled=False):
        x, z = xz.chunk(2, dim=-1)
        conv, conv_state = _conv(x, weights, conv_state, restart, reverse)
        dtbc = F.linear(conv, weights.x_proj.to(xz.dtype))
        dt, B, C = _select(dtbc, weights.A, selection_eps, weights.selection)
        delta = F.linear(dt, weights.dt_proj.to(xz.dtype))
        given = (conv, delta, weights.A, B, C, weights.D, z, weights.delta_bias, ssm_state, None, restart, True, keep)
        y, ssm_state, kept = _scans(xz).scan(*given, reverse)
        return y, conv_state, ssm_state, dtbc, kept


def backward(
    dy,
    dconv_state,
    dssm_state,
    dtbc,
    kept,
    xz,
    weights: Weights,
    conv_state,
    ssm_state,
    restart,
    selection_eps,
    keep,
    dxz,
    reverse=False,
    adds=False,
) -> list[Tensor]:
    """The gradients of the weights and of the states that there are; that of xz is put into dxz, or added to it.

    reverse: as in `forward`, but for dy, whose positions lie as those of xz.
    """
    conv_weight, conv_bias, x_proj, dt_proj, delta_bias, A, D, selection = weights
    with torch.autocast(xz.device.type, enabled=False):
        x, z = xz.chunk(2, dim=-1)
        dt, B, C = _select(dtbc, A, selection_eps, selection)
        conv, _ = _conv(x, weights, conv_state, restart, reverse)
        delta = F.linear(dt, dt_proj.to(xz.dtype))
        given = (conv, delta, A, B, C, D, z, delta_bias, ssm_state, None, restart, True, keep)
        found = _scans(xz).scan_backward(dy, dssm_state, kept, *given, reverse)
        dconv, ddelta, dA, dB, dC, dD, dz, ddelta_bias, *dssm_state = found
        ddelta, dt = ddelta.flatten(0, 1), dt.flatten(0, 1)
        ddt = ddelta @ dt_proj.to(xz.dtype)
        ddtbc = torch.cat([ddt, dB.flatten(0, 1), dC.flatten(0, 1)], dim=1)
        dselection = []
        if selection_eps > 0:
            norms = triton_norm.unit_norms_backward_(ddtbc, dtbc, A.shape[1], selection_eps, selection)
            dselection = [] if selection is None else [norms.to(selection.dtype)]
        ddt_proj = product(ddelta.mT, dt)
        del delta, ddelta
        dconv.flatten(0, 1).addmm_(ddtbc, x_proj.to(xz.dtype))
        dx_proj = product(ddtbc.mT, conv.flatten(0, 1))
        del conv
        runs, e = triton_conv.runs_of(restart), x.shape[-1]
        given = (dconv, dconv_state, x, conv_weight, conv_bias, conv_state, runs, True, dxz[..., :e], dz)
        dtaps = triton_conv.conv_backward(*given, reverse, adds)
        states = [] if conv_state is None else [dtaps.pop()]
        return [
            *dtaps,
            *(dx_proj.to(x_proj.dtype), ddt_proj.to(dt_proj.dtype), ddelta_bias, dA, dD),
            *(*dselection, *states, *dssm_state),
        ]


def _forward(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    delta_bias: Tensor,
    A: Tensor,
    D: Tensor,
    selection: Tensor | None,
    conv_state: Tensor,
    ssm_state: Tensor,
    restart: Tensor | None,
    selection_eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, conv state, ssm state, x_proj's output, the scan's kept states)."""
    refuse_tangents(xz, conv_weight, conv_bias, x_proj, dt_proj, delta_bias, A, D, selection, conv_state, ssm_state)
    weights = Weights(conv_weight, conv_bias, x_proj, dt_proj, delta_bias, A, D, selection)
    return forward(xz, weights, conv_state, ssm_state, restart, selection_eps, keep)


_operator = torch.library.custom_op("mamba_core::mixer", mutates_args=())(_forward)


@torch.library.custom_op("mamba_core::mixer_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dconv_state: Tensor | None,
    dssm_state: Tensor | None,
    dtbc: Tensor,
    kept: Tensor,
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    delta_bias: Tensor,
    A: Tensor,
    D: Tensor,
    selection: Tensor | None,
    conv_state: Tensor,
    ssm_state: Tensor,
    restart: Tensor | None,
    selection_eps: float,
    keep: bool,
) -> list[Tensor]:
    weights = Weights(conv_weight, conv_bias, x_proj, dt_proj, delta_bias, A, D, selection)
    given = (dy, dconv_state, dssm_state, dtbc, kept, xz, weights, conv_state, ssm_state, restart, selection_eps, keep)
    dxz = torch.empty_like(xz)
    return [dxz, *backward(*given, dxz)]


def fake(
    xz,
    conv_weight,
    conv_bias,
    x_proj,
    dt_proj,
    delta_bias,
    A,
    D,
    selection,
    conv_state,
    ssm_state,
    restart,
    selection_eps,
    keep,
):
    b, l, _ = xz.shape
    x, z = xz.chunk(2, dim=-1)
    B = xz.new_empty(b, l, A.shape[1])
    y, ssm_state, kept = _scans(xz)._scan(x, x, A, B, B, D, z, delta_bias, ssm_state, None, restart, True, keep)
    return y, xz.new_empty(conv_state.shape), ssm_state, xz.new_empty(b, l, len(x_proj)), kept


_operator.register_fake(fake)


@_backward.register_fake
def _(dy, dconv_state, dssm_state, dtbc, kept, *inputs):
    return [value.new_empty(value.shape) for value in inputs if is_float(value)]


_inner = differentiable(_operator, _backward, results=3, kept=(3, 4), function=_forward)


def _scans(xz):
    """The operators of the scan on that device: those of a CPU are for the interpreter."""
    return cuda_scan if xz.is_cuda else native_scan


def _conv(x, weights: Weights, state, restart, reverse):
    runs = triton_conv.runs_of(restart)
    return triton_conv.conv(x, weights.conv_weight, weights.conv_bias, state, runs, True, reverse)


def _select(dtbc, A, selection_eps, selection):
    """dt, B and C, normed where selection_eps is above 0."""
    n = A.shape[1]
    if selection_eps > 0:
        dtbc = triton_norm.unit_norms(dtbc, n, selection_eps, selection)
    return dtbc.split((dtbc.shape[-1] - 2 * n, n, n), dim=-1)
