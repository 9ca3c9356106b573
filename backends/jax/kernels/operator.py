"""Kernels as operators of JAX: a kernel is compiled for its own platform, and its plain twin for every other.

The twin also takes the kernel's place in a module for several platforms, and where the operator is differentiated.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mamba_core.backends.native import abi, library

# Stands for an absent argument.
ABSENT = np.zeros(0, np.float32)


class Kernel(NamedTuple):
    """name: as `kernels()` has it. platform: JAX's word for where it runs. where: ours.

    exported: whether an exported module for that platform alone can carry it.
    """

    name: str
    platform: str
    where: str
    exported: bool = False


NATIVE = Kernel("native", "cpu", "a CPU")
# Kernels of one platform -> its devices.
HOMES = {"native": "cpu", "cuda": "gpu", "pallas": "tpu"}


def reason(device: str, dtype=None) -> str | None:
    """Why the kernels cannot run on that device, for x of that dtype; None if they can."""
    if device != "cpu":
        return "it runs on a CPU only"
    if dtype is not None and str(dtype) not in abi.DTYPES:
        return f"x is {dtype}, and it computes {' and '.join(abi.DTYPES)}"
    return library.missing()


def pointing(kind: type[ctypes.Structure], settings: dict, numbers: dict[str, int], arrays) -> tuple:
    """(the struct's words, which of them are pointers). A pointer is the number of an array, by the field's name.

    The fields of a `Matrix` have names such as "in_proj.weight". An array without elements becomes a null pointer.
    """
    words = np.frombuffer(bytes(kind(**settings)), np.int64).copy()
    pointers = []
    for name, number in numbers.items():
        if not arrays[number].size:
            continue
        owner, at = kind, 0
        for key in name.split("."):
            at += getattr(owner, key).offset // 8
            owner = dict(owner._fields_)[key]
        words[at] = number
        pointers.append(at)
        if owner is abi.Sequence:
            _, length, channels = arrays[number].shape
            words[at + 1 : at + 3] = length * channels, channels
    return words, np.array(pointers)


def operator(kernel: Kernel, name: str, results: Callable, call: Callable, plain: Callable) -> Primitive:
    """An operation of that name: `call` computes it, or `plain` where the kernel cannot run.

    results(*arrays, **options): shapes and dtypes of what both return.
    call(results, *arrays, **options), plain(*arrays, **options).
    The operator's option `portable`: whether it may be compiled for where `plain` is all that runs.
    """

    def run(*arrays, **options):
        return call(results(*arrays, **options), *arrays, **options)

    def lower(context, *values, portable, **options):
        module = context.module_context
        here = tuple(module.platforms) == (kernel.platform,)
        here = here and (kernel.exported or not module.lowering_parameters.for_export)
        if not (portable or here):
            exported = "" if kernel.exported else ", and is not exported"
            raise ValueError(f"kernel {kernel.name!r} runs on {kernel.where} only{exported}; take 'auto' or another")
        chosen = functools.partial(run if here else plain, **options)
        return mlir.lower_fun(chosen, multiple_results=True)(context, *values)

    def batch(arrays, axes, **options):
        """One element after another: the gradients of A, D and the bias are sums over the rows of one element."""
        pairs = list(zip(arrays, axes, strict=True))
        elements = [None if axis is None else jnp.moveaxis(value, axis, 0) for value, axis in pairs]

        def run_one(element):
            values = (value if mapped is None else mapped for value, mapped in zip(arrays, element, strict=True))
            return primitive.bind(*values, **options)

        stacked = lax.map(run_one, elements)
        return stacked, [0] * len(stacked)

    def jvp(arrays, tangents, portable, **options):
        tangents = tuple(map(ad.instantiate_zeros, tangents))
        return jax.jvp(functools.partial(plain, **options), tuple(arrays), tangents)

    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(lambda *arrays, portable, **options: run(*arrays, **options))
    primitive.def_abstract_eval(lambda *arrays, portable, **options: results(*arrays, **options))
    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, lower)
    return primitive


def reversible(primitive: Primitive, plain: Callable) -> Callable:
    """run(portable, options, *arrays) of an operator. Its gradient is its twin's."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
    def run(portable, options, *arrays):
        return primitive.bind(*arrays, portable=portable, **options)

    def forward(portable, options, *arrays):
        return jax.vjp(functools.partial(plain, **options), *arrays)

    def backward(portable, options, pullback, cotangents):
        return pullback(cotangents)

    run.defvjp(forward, backward)
    return run


def library_call(target: str, structs: Callable, in_place: Callable = lambda *arrays, **options: {}) -> Callable:
    """`call` of an `operator`: a function of the native library, which XLA's FFI calls on XLA's own arrays.

    structs(*arrays and results, **options): the arguments of the function, each made by `pointing`.
    in_place(*arrays, **options): number of an array -> number of the result that may reuse its memory.
    """

    def call(returned, *arrays, **options):
        _register(target)
        parts = structs(*arrays, *returned, **options)
        starts = np.cumsum([0, *(len(words) for words, _ in parts)])
        attributes = {
            "structs": np.concatenate([words for words, _ in parts]),
            "pointers": np.concatenate([start + places for start, (_, places) in zip(starts, parts, strict=False)]),
            "count": np.array([len(parts)]),
        }
        aliases = in_place(*arrays, **options)
        return jax.ffi.ffi_call(target, returned, input_output_aliases=aliases)(*arrays, **attributes)

    return call


def library_calls(name: str, kind, arguments: tuple[str, ...], settings: Callable, kept=()) -> tuple:
    """`forward` and `backward` of a `differentiable`: mamba_{name}_forward and mamba_{name}_backward.

    kind: of the struct that they take. settings(*shapes, **options): of it, but its threads.
    kept: names of what the forward keeps.
    """

    def structs(names, *arrays, keep=None, **options):
        numbers = {name: number for number, name in enumerate(names)}
        shapes = [value.shape for value in arrays[: len(arguments)]]
        fixed = {"bfloat16": arrays[0].dtype == jnp.bfloat16, "threads": library.threads()}
        return [pointing(kind, fixed | settings(*shapes, **options), numbers, arrays)]

    forward = [*arguments, "y", "final_state", *kept]
    backward = [*arguments, *kept, "dy", "dfinal_state", *(f"d{name}" for name in arguments[:-2])]
    return (
        library_call(f"mamba_{name}_forward_xla", functools.partial(structs, forward)),
        library_call(f"mamba_{name}_backward_xla", functools.partial(structs, backward)),
    )


def differentiable(
    kernel: Kernel,
    name: str,
    forward: Callable,
    backward: Callable,
    arguments: tuple[str, ...],
    plain: Callable,
    kept=(),
) -> Callable:
    """run(*arrays or None, portable=False, **options) -> (y, final state). The kernel computes the gradient too.

    forward: `call` of an operator with the option `keep`. It returns y, the final state and the kept arrays.
    backward: `call` of an operator. Its arrays are the arguments, the kept arrays and the gradients of y and the final
        state; it returns the gradients of all arguments but the last two.
    arguments: their names; the first is x, one is initial_state, the last two are mask and restart.
    plain(*arrays or None, **options): the twin.
    kept: functions of the arrays' shapes, each giving the shape of a float32 array that the forward keeps for the
        backward. The array is empty where there will be no gradient.
    """
    floats = arguments[:-2]
    state = arguments.index("initial_state")

    def forward_results(*arrays, keep, **_):
        shapes = [shape(*(value.shape for value in arrays)) if keep else (0,) for shape in kept]
        kept_arrays = [jax.core.ShapedArray(shape, jnp.float32) for shape in shapes]
        return [_like(arrays[0]), _like(arrays[state]), *kept_arrays]

    def backward_results(*arrays, **_):
        return [_like(value) for value in arrays[: len(floats)]]

    def run_plain(options, *arrays):
        return plain(*map(present, arrays), **options)

    def plain_forward(*arrays, keep, **options):
        run = functools.partial(run_plain, options)
        # Where a gradient will follow, differentiate now: the twin itself would refuse forward mode over reverse.
        y, h = jax.vjp(run, *arrays)[0] if keep else run(*arrays)
        kept_arrays = forward_results(*arrays, keep=keep)[2:]
        return y, h, *(jnp.zeros(value.shape, value.dtype) for value in kept_arrays)

    def plain_backward(*arrays, **options):
        inputs, cotangents = arrays[: len(arguments)], arrays[-2:]
        return jax.vjp(functools.partial(run_plain, options), *inputs)[1](cotangents)[: len(floats)]

    prefix = f"mamba_{kernel.name}_{name}"
    run = _with_gradient(
        operator(kernel, f"{prefix}_forward", forward_results, forward, plain_forward),
        operator(kernel, f"{prefix}_backward", backward_results, backward, plain_backward),
    )
    return lambda *values, portable=False, **options: run(values, {"portable": portable} | options)


def _with_gradient(forward: Primitive, backward: Primitive) -> Callable:
    """run(arguments, options) -> (y, final state). It keeps arrays for a gradient only where there will be one."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def run(arguments, options):
        return tuple(forward.bind(*_as_arrays(arguments), keep=False, **options)[:2])

    def run_forward(arguments, options):
        y, h, *kept = forward.bind(*_as_arrays(arguments), keep=True, **options)
        return (y, h), (arguments, kept)

    def run_backward(options, saved, cotangents):
        arguments, kept = saved
        gradients = backward.bind(*_as_arrays(arguments), *kept, *cotangents, **options)
        pairs = zip(arguments, [*gradients, None, None], strict=True)
        return (tuple(None if value is None else gradient for value, gradient in pairs),)

    run.defvjp(run_forward, run_backward)
    return run


@functools.cache
def _register(target: str) -> None:
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library.loaded(), target)), platform="cpu")


def _as_arrays(arguments):
    return [ABSENT if value is None else value for value in arguments]


def present(value):
    """The array, or None where it stands for an absent argument."""
    return None if value.shape == ABSENT.shape else value


def _like(value):
    return jax.core.ShapedArray(value.shape, value.dtype)
