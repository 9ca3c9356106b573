"""Gradients by hand in MLX: other transformations would lose them, and are refused."""

import mlx.core as mx


def reverse_only(function: mx.custom_function) -> None:
    """Have forward mode and vmap of the function raise."""
    for transform in (function.jvp, function.vmap):
        transform(_refuse)


def _refuse(*_):
    raise NotImplementedError(
        "all kernels but the plain ones have a first gradient in reverse mode only, and no vmap; "
        "pass kernel='plain', to a model kernels='plain'"
    )


@mx.custom_function
def first_derivative_only(values, *given):
    """The values, of which a derivative raises: MLX's own would be that of how a kernel computed them, or none.

    given: what the values were made from, where MLX does not see it.
    """
    return values


reverse_only(first_derivative_only)
first_derivative_only.vjp(_refuse)
