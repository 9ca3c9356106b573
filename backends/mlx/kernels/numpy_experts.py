"""Mixtures of experts on a CPU by NumPy, at once: the positions of each expert together, and no others.

MLX's own product of gathered matrices is slow there. The plain twin is `ops.mixture_of_experts.plain`.
"""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from mamba_core.backends.mlx.kernels import numpy_attention, numpy_linear
from mamba_core.backends.mlx.kernels.native_tensors import view, zeros
from mamba_core.backends.mlx.kernels.reverse_only import first_derivative_only, reverse_only

reason = numpy_attention.reason


def mixture(x, experts, weights, gate_up, down, mask):
    """y (rows, d) float32, with one derivative.

    x: (rows, d). experts, weights: (rows, top_k), those of each row and their weights in float32. gate_up: (E, 2 i, d).
    down: (E, d, i). mask: of as many elements as there are rows, those that count; None for all.
    """
    chosen = np.array(experts)
    if mask is not None:
        chosen[~np.array(mask).reshape(-1)] = len(gate_up)

    @mx.custom_function
    def run(x, weights, gate_up, down):
        y = zeros(x.shape)
        mx.eval(y, x, weights)
        out, factors = view(y), view(weights)
        for expert, rows, slots in _choices(chosen, len(gate_up)):
            projected = view(numpy_linear.product(x[mx.array(rows)], gate_up[expert]))
            active = mx.array(_swiglu(projected)).astype(x.dtype)
            out[rows] += factors[rows, slots, None] * view(numpy_linear.product(active, down[expert]))
        return y

    @run.vjp
    def backward(values, dy, y):
        x, weights, gate_up, down = values
        gradients = [zeros(value.shape) for value in values]
        mx.eval(gradients, x, weights, dy)
        given = view(x.astype(mx.float32)), view(weights), view(dy)
        found = [view(value) for value in gradients]
        for choice in _choices(chosen, len(gate_up)):
            matrices = [view(value[choice[0]].astype(mx.float32)) for value in (gate_up, down)]
            _add_gradients(choice, given, matrices, found)
        gradients = [found.astype(value.dtype) for found, value in zip(gradients, values, strict=True)]
        return tuple(first_derivative_only(gradients, values, dy))

    reverse_only(run)
    return run(x, weights, gate_up, down)


def _choices(chosen: np.ndarray, experts: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(expert, its rows, the column of the expert in each row) of the experts that compute anything."""
    for expert in np.unique(chosen):
        if expert < experts:
            yield int(expert), *np.nonzero(chosen == expert)


def _add_gradients(choice, given, matrices, gradients) -> None:
    """Adds those of an expert to the gradients of x, the weights and the experts."""
    expert, rows, slots = choice
    (x, weights, dy), (gate_up, down), (dx, dweights, dgate_up, ddown) = given, matrices, gradients
    x, dy = x[rows], dy[rows]
    projected = x @ gate_up.T
    active, weighted = _swiglu(projected), dy * weights[rows, slots, None]
    dweights[rows, slots] = (dy * (active @ down.T)).sum(axis=-1)
    dprojected = _swiglu_gradient(weighted @ down, projected)
    dx[rows] += dprojected @ gate_up
    np.matmul(dprojected.T, x, out=dgate_up[expert])
    np.matmul(weighted.T, active, out=ddown[expert])


def _sigmoid(value: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-value))


def _swiglu(projected: np.ndarray) -> np.ndarray:
    gate, up = np.split(projected, 2, axis=-1)
    return gate * _sigmoid(gate) * up


def _swiglu_gradient(dy: np.ndarray, projected: np.ndarray) -> np.ndarray:
    gate, up = np.split(projected, 2, axis=-1)
    open_ = _sigmoid(gate)
    return np.concatenate([dy * up * open_ * (1 + gate * (1 - open_)), dy * gate * open_], axis=-1)
