"""The norm of Mamba-2 between its recurrence and its output projection, with the gate (Dao and Gu 2024, section 7.2).

The channels are normed in groups of equal width, each by itself, so that a group can lie on a device of its own.
"""

import numpy as np

from mamba_core.spec.ops.base import silu, silu_derivative, stateless
from mamba_core.spec.ops.norms import NODES as NORMS

_UNIT = NORMS["unit_rms_norm"]


def _gated(inputs, settings) -> np.ndarray:
    """What is normed: y * silu(z), or y where the norm comes before the gate."""
    y, z = inputs
    return y if settings["norm_before_gate"] else y * silu(z)


def _grouped(value: np.ndarray, settings) -> np.ndarray:
    groups = settings["groups"]
    return value.reshape(*value.shape[:-1], groups, value.shape[-1] // groups)


def _gated_rms_norm(inputs, parameters, settings):
    """RMSNorm(y * silu(z)) * weight, or RMSNorm(y) * weight * silu(z), over each group of channels."""
    normed, _ = _UNIT.forward([_grouped(_gated(inputs, settings), settings)], {}, settings, (), None)
    normed = normed.reshape(inputs[0].shape) * parameters["weight"]
    return normed * silu(inputs[1]) if settings["norm_before_gate"] else normed


def _gated_rms_norm_vjp(dy, inputs, parameters, settings):
    y, z = inputs
    given = [_grouped(_gated(inputs, settings), settings)]
    normed = _UNIT.forward(given, {}, settings, (), None)[0].reshape(y.shape)
    before = settings["norm_before_gate"]
    dz = dy * normed * parameters["weight"] * silu_derivative(z) if before else None
    dy = dy * silu(z) if before else dy
    dweight = (dy * normed).sum(tuple(range(dy.ndim - 1)))
    (dgated,), _, _ = _UNIT.vjp(_grouped(dy * parameters["weight"], settings), (), given, {}, settings, (), None)
    dgated = dgated.reshape(y.shape)
    if before:
        return [dgated, dz], {"weight": dweight}
    return [dgated * silu(z), dgated * y * silu_derivative(z)], {"weight": dweight}


NODES = {"gated_rms_norm": stateless(_gated_rms_norm, _gated_rms_norm_vjp)}
