"""Sums and products of arrays of the same shape, and the mask."""

import numpy as np

from mamba_core.spec.ops.base import NodeOp, silu, silu_derivative, stateless


def _add(inputs, parameters, settings):
    return inputs[0] + inputs[1]


def _add_vjp(dy, inputs, parameters, settings):
    return [dy, dy], {}


def _scaled_sum(inputs, parameters, settings):
    return settings["factor"] * (inputs[0] + inputs[1])


def _scaled_sum_vjp(dy, inputs, parameters, settings):
    return [settings["factor"] * dy] * 2, {}


def _multiply(inputs, parameters, settings):
    return inputs[0] * inputs[1]


def _multiply_vjp(dy, inputs, parameters, settings):
    return [dy * inputs[1], dy * inputs[0]], {}


def _silu(inputs, parameters, settings):
    return silu(inputs[0])


def _silu_vjp(dy, inputs, parameters, settings):
    return [dy * silu_derivative(inputs[0])], {}


def where_counting(value: np.ndarray, mask) -> np.ndarray:
    """(b, l, ...) with zeros at masked positions."""
    return value if mask is None else np.where(mask.reshape(*mask.shape, *(1,) * (value.ndim - 2)), value, 0.0)


def _masked(inputs, parameters, settings, carried, positions):
    """(b, l, ...) with zeros where the position does not count."""
    return where_counting(inputs[0], positions.mask), ()


def _masked_vjp(dy, dcarried, inputs, parameters, settings, carried, positions):
    return [where_counting(dy, positions.mask)], {}, ()


NODES = {
    "add": stateless(_add, _add_vjp),
    "scaled_sum": stateless(_scaled_sum, _scaled_sum_vjp),
    "multiply": stateless(_multiply, _multiply_vjp),
    "silu": stateless(_silu, _silu_vjp),
    "masked": NodeOp(_masked, _masked_vjp),
}
