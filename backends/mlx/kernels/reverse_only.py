"""What a gradient by hand needs in MLX: that other transformations are refused instead of losing it."""

import mlx.core as mx


def reverse_only(function: mx.custom_function) -> None:
    """Forward mode and vmap of a function that computes at once raise."""
    for transform in (function.jvp, function.vmap):
        transform(_refuse)


def _refuse(*_):
    raise NotImplementedError(
        "the kernels but 'sequential' have a first gradient in reverse mode only and no vmap; "
        "pass kernel='sequential', to a model kernels='sequential'"
    )


@mx.custom_function
def first_derivative_only(values, *given):
    """The values, guarded: MLX would take the derivative of how a kernel computed them, or none at all.

    given: what they were made from, where MLX does not see it.
    """
    return values


reverse_only(first_derivative_only)
first_derivative_only.vjp(_refuse)
