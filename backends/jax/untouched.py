"""Whether modules are as this library or flax made them: the one test, which every way asks."""

import functools

from flax import nnx
from jax import lax


def untouched(kind: type, *modules: nnx.Module) -> bool:
    """Whether nobody has replaced, subclassed or changed a module, so that its weights are all that must be read.

    It is of exactly that class, multiplies as JAX does, and has no variables but parameters.
    """
    return all(type(module) is kind and _has_no_other_variables(module) and _multiplies(module) for module in modules)


def _has_no_other_variables(module):
    return not any(_is_other_variable(type(value)) for value in vars(module).values())


# Every token asks it of every module.
@functools.cache
def _is_other_variable(kind: type) -> bool:
    return issubclass(kind, nnx.Variable) and not issubclass(kind, nnx.Param)


def _multiplies(module):
    return getattr(module, "dot_general", lax.dot_general) is lax.dot_general
