"""What is between a mixer's in_proj and out_proj as one operator, whose gradient computes again what is cheap to.

The convolution's output and the step sizes, (b, l, e) each, are two of the arrays of that size that the mixer would
keep for its gradient, and take little of the time of its gradient to compute again.
"""

from __future__ import annotations

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


@torch.library.custom_op("mamba_core::mixer", mutates_args=())
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
    with torch.autocast(xz.device.type, enabled=False):
        x, z = xz.chunk(2, dim=-1)
        conv, conv_state = _conv(x, conv_weight, conv_bias, conv_state, restart)
        dtbc = F.linear(conv, x_proj.to(xz.dtype))
        dt, B, C = _select(dtbc, A, selection_eps, selection)
        delta = F.linear(dt, dt_proj.to(xz.dtype))
        scan = _scans(xz)._scan
        y, ssm_state, kept = scan(conv, delta, A, B, C, D, z, delta_bias, ssm_state, None, restart, True, keep)
        return y, conv_state, ssm_state, dtbc, kept


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
    with torch.autocast(xz.device.type, enabled=False):
        x, z = xz.chunk(2, dim=-1)
        e = x.shape[-1]
        dt, B, C = _select(dtbc, A, selection_eps, selection)
        conv, _ = _conv(x, conv_weight, conv_bias, conv_state, restart)
        delta = F.linear(dt, dt_proj.to(xz.dtype))
        given = (conv, delta, A, B, C, D, z, delta_bias, ssm_state, None, restart, True, keep)
        found = _scans(xz)._scan_backward(dy, dssm_state, kept, *given)
        dconv, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dssm_state = found
        ddelta, dt = ddelta.flatten(0, 1), dt.flatten(0, 1)
        ddt = ddelta @ dt_proj.to(xz.dtype)
        ddtbc = torch.cat([ddt, dB.flatten(0, 1), dC.flatten(0, 1)], dim=1)
        dselection = None
        if selection_eps > 0:
            dselection = triton_norm.unit_norms_backward_(ddtbc, dtbc, A.shape[1], selection_eps, selection)
        ddt_proj = product(ddelta.mT, dt)
        del delta, ddelta
        dconv.flatten(0, 1).addmm_(ddtbc, x_proj.to(xz.dtype))
        dx_proj = product(ddtbc.mT, conv.flatten(0, 1))
        del conv
        dxz = torch.empty_like(xz)
        runs = triton_conv.runs_of(restart)
        dconv_weight, *others = triton_conv.conv_backward(
            dconv, dconv_state, x, conv_weight, conv_bias, conv_state, runs, True, dxz[..., :e], dz
        )
        dconv_bias = others[:-1]
        weights = [dx_proj.to(x_proj.dtype), ddt_proj.to(dt_proj.dtype), ddelta_bias, dA, dD]
        if selection is not None:
            weights.append(dselection.to(selection.dtype))
        return [dxz, dconv_weight, *dconv_bias, *weights, others[-1], dssm_state]


@_forward.register_fake
def _(
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


@_backward.register_fake
def _(dy, dconv_state, dssm_state, dtbc, kept, *inputs):
    return [value.new_empty(value.shape) for value in inputs if is_float(value)]


_inner = differentiable(_forward, _backward, results=3, kept=(3, 4))


def _scans(xz):
    """The operators of the scan on that device: those of a CPU are for the interpreter."""
    return cuda_scan if xz.is_cuda else native_scan


def _conv(x, weight, bias, state, restart):
    return triton_conv.conv(x, weight, bias, state, triton_conv.runs_of(restart), True)


def _select(dtbc, A, selection_eps, selection):
    """dt, B and C, normed where selection_eps is above 0."""
    n = A.shape[1]
    if selection_eps > 0:
        dtbc = triton_norm.unit_norms(dtbc, n, selection_eps, selection)
    return dtbc.split((dtbc.shape[-1] - 2 * n, n, n), dim=-1)
