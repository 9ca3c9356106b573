"""The scan in C++ on a CPU and its gradient, called through XLA's FFI on XLA's own arrays.

An exported module cannot carry such a call, nor can a gradient be differentiated: there the plain twin takes its place.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mamba_core.backends import native as library

# Of an argument that is not given.
ABSENT = np.zeros(0, np.float32)


def reason(device: str, dtype=None) -> str | None:
    """Why the kernel cannot run on that device, for x of that dtype; None if it can."""
    if device != "cpu":
        return "it runs on a CPU only"
    if dtype is not None and str(dtype) not in library.DTYPES:
        return f"x is {dtype}, and it computes {' and '.join(library.DTYPES)}"
    return library.missing()


def beside(plain: Callable) -> Callable:
    """The kernel with the arguments of the kernel `plain`, its twin, and portable.

    portable: an exported module has the twin in its place. Otherwise that raises a ValueError, as does another device
    than a CPU, when it is compiled for it.
    """

    def run_plain(delta_softplus, *arrays):
        given = (None if value.shape == ABSENT.shape else value for value in arrays)
        return plain(*given, delta_softplus=delta_softplus)

    def plain_forward(*arrays, delta_softplus, keep):
        run = functools.partial(run_plain, delta_softplus)
        # For a gradient to come as it is differentiated: the twin itself would refuse forward mode over reverse.
        y, h = jax.vjp(run, *arrays)[0] if keep else run(*arrays)
        boundaries = _forward_results(*arrays, keep=keep)[2]
        return y, h, jnp.zeros(boundaries.shape, boundaries.dtype)

    def plain_backward(*arrays, delta_softplus):
        *inputs, _, dy, dh = arrays
        return jax.vjp(functools.partial(run_plain, delta_softplus), *inputs)[1]((dy, dh))[:9]

    scan = _differentiable(
        _operator("mamba_scan_forward_xla", _forward_results, plain_forward),
        _operator("mamba_scan_backward_xla", _backward_results, plain_backward),
    )

    def native(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart, *, delta_softplus, portable=False):
        dtype = x.dtype
        if any(value is not None and value.dtype != dtype for value in (delta, B, C, z)):
            x, delta, B, C, z = (None if value is None else value.astype(jnp.float32) for value in (x, delta, B, C, z))
        arguments = (x, delta, A, B, C, D, z, delta_bias, h0, mask, restart)
        y, h = scan(arguments, {"delta_softplus": delta_softplus, "portable": portable})
        return y.astype(dtype), h

    return native


def _differentiable(forward: Primitive, backward: Primitive) -> Callable:
    """scan(arguments, options) -> (y, h), with the states that a gradient needs only where there will be one."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def scan(arguments, options):
        y, h, _ = forward.bind(*_as_arrays(arguments), keep=False, **options)
        return y, h

    def scan_forward(arguments, options):
        y, h, boundaries = forward.bind(*_as_arrays(arguments), keep=True, **options)
        return (y, h), (arguments, boundaries)

    def scan_backward(options, saved, cotangents):
        arguments, boundaries = saved
        gradients = backward.bind(*_as_arrays(arguments), boundaries, *cotangents, **options)
        pairs = zip(arguments, [*gradients, None, None], strict=True)
        return (tuple(None if value is None else gradient for value, gradient in pairs),)

    scan.defvjp(scan_forward, scan_backward)
    return scan


def _operator(target: str, results: Callable, plain: Callable) -> Primitive:
    """An operation that calls that function of the library, and that `plain` stands in for where it cannot be called.

    results(*arrays, **options): shapes and dtypes of what both return.
    """

    def call(*arrays, delta_softplus, **options):
        _register(target)
        attributes = {"delta_softplus": np.int32(delta_softplus), "threads": np.int32(library.threads())}
        return jax.ffi.ffi_call(target, results(*arrays, **options))(*arrays, **attributes)

    def lower(context, *values, portable, **options):
        exported = context.module_context.lowering_parameters.for_export
        if not portable and (exported or tuple(context.module_context.platforms) != ("cpu",)):
            raise ValueError("kernel 'native' runs on a CPU only, and is not exported; take 'auto' or another")
        run = functools.partial(plain if exported else call, **options)
        return mlir.lower_fun(run, multiple_results=True)(context, *values)

    def batch(arrays, axes, **options):
        """One element after another: the gradients of A, D and the bias are sums over the rows of each alone."""
        pairs = list(zip(arrays, axes, strict=True))
        elements = [None if axis is None else jnp.moveaxis(value, axis, 0) for value, axis in pairs]

        def run(element):
            values = (value if own is None else own for value, own in zip(arrays, element, strict=True))
            return operator.bind(*values, **options)

        stacked = lax.map(run, elements)
        return stacked, [0] * len(stacked)

    def jvp(arrays, tangents, portable, **options):
        tangents = tuple(map(ad.instantiate_zeros, tangents))
        return jax.jvp(functools.partial(plain, **options), tuple(arrays), tangents)

    operator = Primitive(target)
    operator.multiple_results = True
    operator.def_impl(lambda *arrays, portable, **options: call(*arrays, **options))
    operator.def_abstract_eval(lambda *arrays, portable, delta_softplus, **options: results(*arrays, **options))
    ad.primitive_jvps[operator] = jvp
    batching.primitive_batchers[operator] = batch
    mlir.register_lowering(operator, lower)
    return operator


@functools.cache
def _register(target: str) -> None:
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library.library(), target)), platform="cpu")


def _as_arrays(arguments):
    return [ABSENT if value is None else value for value in arguments]


def _forward_results(x, delta, A, *_, keep):
    boundaries = library.count_boundaries(*x.shape, A.shape[1]) if keep else 0
    shapes = (x.shape, x.dtype), ((x.shape[0], *A.shape), A.dtype), ((boundaries,), A.dtype)
    return [jax.core.ShapedArray(*shape) for shape in shapes]


def _backward_results(*arrays):
    return [jax.core.ShapedArray(value.shape, value.dtype) for value in arrays[:9]]
