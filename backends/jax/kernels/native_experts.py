"""The experts of a few positions in one native call on a CPU, which reads the weights of the chosen ones only."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mamba_core.backends.jax.kernels.native_step import MOST_ROWS
from mamba_core.backends.jax.kernels.operator import NATIVE, library_call, operator, pointing, reason, reversible
from mamba_core.backends.native import abi, library

ARGUMENTS = ("x", "chosen", "probability", "gate_up", "down", "y")


def why_not(x, gate_up, down) -> str | None:
    """Why the library does not compute these rows (m, d); None if it does."""
    if not isinstance(x.shape[0], int) or x.shape[0] > MOST_ROWS:
        return f"there are {x.shape[0]} rows, and it computes at most {MOST_ROWS}"
    if not x.dtype == gate_up.dtype == down.dtype:
        return "x and the weights are of several dtypes"
    return reason("cpu", x.dtype)


def beside(plain: Callable) -> Callable:
    """run(x, chosen, probability, gate_up, down, *, portable) -> (m, d) float32, with the arguments of its twin."""

    def run_plain(*arrays):
        return [plain(*arrays)]

    call = library_call("mamba_experts_step_xla", _structs)
    experts = reversible(operator(NATIVE, "mamba_experts_step", _results, call, run_plain), run_plain)

    @functools.partial(jax.jit, static_argnames="portable")
    def run(x, chosen, probability, gate_up, down, *, portable):
        return experts(portable, {}, x, chosen.astype(jnp.int32), probability, gate_up, down)[0]

    return run


def _results(x, *_):
    return [jax.core.ShapedArray(x.shape, jnp.float32)]


def _structs(x, chosen, probability, gate_up, down, y):
    (rows, width), (experts, both, _) = x.shape, gate_up.shape
    sizes = {"b": rows, "d": width, "i": both // 2, "k": chosen.shape[1], "experts": experts}
    settings = sizes | {"bfloat16": x.dtype == jnp.bfloat16, "threads": library.threads()}
    numbers = {name: number for number, name in enumerate(ARGUMENTS)}
    return [pointing(abi.ExpertsStep, settings, numbers, (x, chosen, probability, gate_up, down, y))]
