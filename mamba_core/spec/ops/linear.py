"""Products with a weight, and the embedding."""

import numpy as np

from mamba_core.spec.ops.base import NodeOp, stateless, summed
from mamba_core.spec.ops.elementwise import where_counting


def _linear(inputs, parameters, settings):
    """x (..., in) times the transpose of weight (out, in), plus the bias where there is one."""
    return inputs[0] @ parameters["weight"].T + parameters.get("bias", 0.0)


def _linear_vjp(dy, inputs, parameters, settings):
    x = inputs[0]
    gradients = {"weight": dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])}
    if "bias" in parameters:
        gradients["bias"] = summed(dy, 1)
    return [dy @ parameters["weight"]], gradients


def _head(inputs, parameters, settings, carried, positions):
    """Logits: a product that is zero at masked positions."""
    return where_counting(_linear(inputs, parameters, settings), positions.mask), ()


def _head_vjp(dy, dcarried, inputs, parameters, settings, carried, positions):
    return *_linear_vjp(where_counting(dy, positions.mask), inputs, parameters, settings), ()


def _embedding(inputs, parameters, settings):
    """Rows of weight (v, d) at integer positions."""
    return parameters["weight"][inputs[0]]


def _embedding_vjp(dy, inputs, parameters, settings):
    gradient = np.zeros_like(parameters["weight"])
    np.add.at(gradient, inputs[0], dy)
    return [None], {"weight": gradient}


NODES = {
    "linear": stateless(_linear, _linear_vjp),
    "head": NodeOp(_head, _head_vjp),
    "embedding": stateless(_embedding, _embedding_vjp),
}
