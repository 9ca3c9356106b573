"""Norms over the last axis."""

import numpy as np

from mamba_core.spec.ops.base import stateless, summed


def _scale(x, settings):
    return 1.0 / np.sqrt(np.mean(x * x, -1, keepdims=True) + settings["eps"])


def _rms_norm(inputs, parameters, settings):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, arXiv:1910.07467)."""
    return inputs[0] * _scale(inputs[0], settings) * parameters["weight"]


def _rms_norm_vjp(dy, inputs, parameters, settings):
    x, scale = inputs[0], _scale(inputs[0], settings)
    scaled = dy * parameters["weight"]
    dx = scale * (scaled - x * scale**2 * np.mean(scaled * x, -1, keepdims=True))
    return [dx], {"weight": summed(dy * x * scale, 1)}


def _unit_rms_norm(inputs, parameters, settings):
    """The same without a weight."""
    return _rms_norm(inputs, {"weight": 1.0}, settings)


def _unit_rms_norm_vjp(dy, inputs, parameters, settings):
    gradients, _ = _rms_norm_vjp(dy, inputs, {"weight": 1.0}, settings)
    return gradients, {}


NODES = {
    "rms_norm": stateless(_rms_norm, _rms_norm_vjp),
    "unit_rms_norm": stateless(_unit_rms_norm, _unit_rms_norm_vjp),
}
