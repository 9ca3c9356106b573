"""One position of residual blocks, and the product of one position, each in one native call on a CPU.

For small batches a step is bound by reading the weights; as XLA's operations it takes much longer.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mamba_core.backends.jax.kernels.operator import NATIVE, library_call, operator, pointing, reason, reversible
from mamba_core.backends.native import abi, library

# Computing more rows takes longer than reading their weights.
MOST_ROWS = 8
# A block's operands as the library names them: those that may be absent, and those that are always float32.
OPTIONAL = {"in_proj.bias", "conv.bias", "out_proj.bias"}
FLOAT32 = {"delta_bias", "A_log", "D", "ssm_state"}


class MixerStep(NamedTuple):
    """How the library computes a mixer.

    paths: of its parameters, by their names in the library.
    selection_eps: of the norms without weight that dt, B and C pass before dt_proj; 0 where there are none.
    """

    paths: dict[str, tuple[str, ...]]
    selection_eps: float = 0.0


def why_not(kernel: str, x: jax.Array, dtype) -> str | None:
    """Why no native call computes these rows with weights of that dtype, where the policy says `kernel`; else None."""
    if kernel not in ("auto", "native"):
        return f"the policy has {kernel!r} for block_step"
    # An exported program may be for any batch.
    if not isinstance(x.shape[0], int) or x.shape[0] > MOST_ROWS:
        return f"there are {x.shape[0]} rows, and it computes at most {MOST_ROWS}"
    return reason("cpu", dtype)


def sizes_of(residual: jax.Array, operands: dict) -> tuple[tuple[str, int], ...]:
    """The sizes of a block with these operands, for `fits` and for the call."""
    (b, _, d), (e, n) = residual.shape, operands["A_log"].shape
    return (
        ("b", b),
        ("d", d),
        ("e", e),
        ("n", n),
        ("k", len(operands["conv.weight"])),
        ("r", len(operands["dt_proj"])),
    )


def fits(operands: dict, sizes, dtype) -> bool:
    """Whether a block's arrays are of the shapes and dtypes that the library reads."""
    b, d, e, n, k, r = (size for _, size in sizes)
    shapes = {
        "norm": (d,),
        "in_proj.weight": (d, 2 * e),
        "in_proj.bias": (2 * e,),
        "conv.weight": (k, 1, e),
        "conv.bias": (e,),
        "x_proj.weight": (e, r + 2 * n),
        "dt_proj": (r, e),
        "delta_bias": (e,),
        "A_log": (e, n),
        "D": (e,),
        "out_proj.weight": (e, d),
        "out_proj.bias": (d,),
        "conv_state": (b, k - 1, e),
        "ssm_state": (b, e, n),
    }
    found = {name: (value.shape, value.dtype) for name, value in operands.items()}
    wanted = {name: (shape, jnp.dtype("float32") if name in FLOAT32 else dtype) for name, shape in shapes.items()}
    return wanted | found == wanted and set(wanted) - set(found) <= OPTIONAL


def blocks_beside(plain: Callable) -> Callable:
    """run(residual, operands, *, twins, sizes, eps, selection_eps, portable) -> (residual, states of each block).

    plain(residual, operands, twins): the twin, which gives the residual stream and a list of all states.
    operands: of each block, named as the library names them, the states included.
    twins: a hashable value that the twin is given.
    eps: of each block's norm. selection_eps: of each block, as in `MixerStep`.
    A block's states are the convolution's and the recurrence's.
    """

    def run_plain(*arrays, tree, twins, **_):
        return plain(*jax.tree.unflatten(tree, arrays), twins)

    blocks = _operator("mamba_steps", _block_results, _block_structs, run_plain, in_place=_block_states)

    @functools.partial(jax.jit, static_argnames=("twins", "sizes", "eps", "selection_eps", "portable"))
    def run(residual, operands, *, portable, **options):
        arrays, tree = jax.tree.flatten((residual, operands))
        after, *states = blocks(portable, options | {"tree": tree}, *arrays)
        return after, list(zip(states[::2], states[1::2], strict=True))

    return run


def product_beside(plain: Callable) -> Callable:
    """run(x, weight, transposed=, portable=) for x (b, in), with the arguments of its twin `plain` and `portable`."""

    def run_plain(*arrays, **options):
        return [plain(*arrays, **options)]

    linear = _operator("linear_step", _linear_results, _linear_structs, run_plain)

    @functools.partial(jax.jit, static_argnames=("transposed", "portable"))
    def run(x, weight, *, transposed, portable):
        return linear(portable, {"transposed": transposed}, x, weight)[0]

    return run


def _block_results(*arrays, tree, **_):
    residual, operands = jax.tree.unflatten(tree, arrays)
    states = (block[name] for block in operands for name in ("conv_state", "ssm_state"))
    return [jax.core.ShapedArray(value.shape, value.dtype) for value in (residual, *states)]


def _block_structs(*arrays, tree, sizes, eps, selection_eps, **_):
    before, operands = jax.tree.unflatten(tree, range(tree.num_leaves))
    after = tree.num_leaves
    residual, dtype = arrays[before], arrays[operands[0]["norm"]].dtype
    fixed = dict(sizes) | {"transposed": True, "threads": library.threads()}
    fixed |= {"bfloat16": dtype == jnp.bfloat16, "residual_bfloat16": residual.dtype == jnp.bfloat16}
    structs = []
    for k, block in enumerate(operands):
        results = {"new_residual": after, "new_conv_state": after + 2 * k + 1, "new_ssm_state": after + 2 * k + 2}
        numbers = block | {"residual": before} | results
        settings = fixed | {"eps": eps[k], "selection_eps": selection_eps[k]}
        structs.append(pointing(abi.MambaStep, settings, numbers, arrays))
        before = after
    return structs


def _block_states(*arrays, tree, **_):
    """XLA copies the states that are needed afterwards, and no others."""
    _, operands = jax.tree.unflatten(tree, range(tree.num_leaves))
    states = [block[name] for block in operands for name in ("conv_state", "ssm_state")]
    return {state: 1 + number for number, state in enumerate(states)}


def _linear_results(x, weight, *, transposed):
    return [jax.core.ShapedArray((x.shape[0], weight.shape[1 if transposed else 0]), jnp.float32)]


def _linear_structs(x, weight, y, *, transposed):
    sizes = {"b": x.shape[0], "inputs": x.shape[1], "outputs": y.shape[1], "transposed": transposed}
    settings = sizes | {"bfloat16": x.dtype == jnp.bfloat16, "threads": library.threads()}
    return [pointing(abi.LinearStep, settings, {"x": 0, "matrix.weight": 1, "y": 2}, (x, weight, y))]


def _operator(name, results, structs, plain, **options):
    call = library_call(f"mamba_{name}_xla", structs, **options)
    return reversible(operator(NATIVE, f"mamba_{name}", results, call, plain), plain)
