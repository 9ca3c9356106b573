"""How the laws run on JAX: each call of a route is compiled by itself, and calls of one shape are compiled once.

`backend.vjp` compiles its function as a whole. Seventeen steps would be seventeen copies of the model in one program,
and its compilation most of the test's time. A user compiles a call too.
"""

import numpy as np


def compiled(backend, function):
    """The function as the framework is used: on JAX in `jax.jit`, where the first argument is a constant."""
    if backend.name != "jax":
        return function
    import jax

    return jax.jit(function, static_argnums=0)


def vjp(backend, function, arguments, cotangents) -> tuple[list, list]:
    """`backend.vjp` of a function of such calls."""
    if backend.name != "jax":
        return backend.vjp(function, arguments, cotangents)
    import jax

    outputs, pullback = jax.vjp(function, *arguments)
    given = tuple(jax.numpy.asarray(value, out.dtype) for value, out in zip(cotangents, outputs, strict=True))
    return [np.asarray(out) for out in outputs], [np.asarray(gradient) for gradient in pullback(given)]
