"""What a gradient computes again instead of keeping it: `mx.checkpoint`, and its like for the native kernels."""

from collections.abc import Callable, Sequence

import mlx.core as mx

from mamba_core.backends.mlx.kernels.memory import alone
from mamba_core.backends.mlx.kernels.reverse_only import first_derivative_only, reverse_only
from mamba_core.backends.mlx.scan import kernel_for


def recomputed(
    run: Callable, kernels: str, dtype: mx.Dtype, values: Sequence[mx.array], apart: int = 0
) -> Sequence[mx.array]:
    """run(*values), a tuple, called again in the backward pass: values are all that is kept of it.

    kernels, dtype: the model's. apart: of how many of the values, the first, native kernels are given copies: while it
    differentiates, MLX goes over all that a value was computed from whenever something is computed from it.
    """
    if kernel_for(kernels, dtype, values) == "native":
        return _checkpoint_at_once(run, apart)(list(values))
    return mx.checkpoint(run)(*values)


def _checkpoint_at_once(run, apart):
    """While MLX differentiates it keeps what an array was computed from, also of one that is computed already."""

    def copied(values):
        return [*alone(values[:apart]), *values[apart:]]

    @mx.custom_function
    def forward(values):
        return tuple(alone(run(*copied(values))))

    @forward.vjp
    def backward(values, cotangents, _):
        _, gradients = mx.vjp(run, copied(values), alone(cotangents))
        return first_derivative_only(alone(gradients), values, cotangents)

    reverse_only(forward)
    return forward
