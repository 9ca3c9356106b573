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


class Kind(NamedTuple):
    """A kind of blocks that one function of the library computes.

    name: of that function, without the library's prefix. struct: what it takes, one for each block.
    sizes(residual, operands): the struct's sizes, ((name, size), ...), of a block with these operands.
    shapes(sizes): the shape of each operand, by the library's name.
    optional: operands that may be absent. float32: those that are not of the compute dtype.
    """

    name: str
    struct: type
    sizes: Callable
    shapes: Callable
    optional: frozenset[str]
    float32: frozenset[str]


class MixerStep(NamedTuple):
    """How the library computes a mixer.

    paths: of its parameters, by their names in the library.
    settings: fields of the struct that are no arrays, ((name, value), ...). A size must be that of the arrays.
    """

    kind: Kind
    paths: dict[str, tuple[str, ...]]
    settings: tuple[tuple[str, float], ...] = ()


def why_not(kernel: str, x: jax.Array, dtype) -> str | None:
    """Why no native call computes these rows with weights of that dtype, where the policy says `kernel`; else None."""
    if kernel not in ("auto", "native"):
        return f"the policy has {kernel!r} for block_step"
    # An exported program may be for any batch.
    if not isinstance(x.shape[0], int) or x.shape[0] > MOST_ROWS:
        return f"there are {x.shape[0]} rows, and it computes at most {MOST_ROWS}"
    return reason("cpu", dtype)


def fits(step: MixerStep, operands: dict, sizes, dtype) -> bool:
    """Whether a block's arrays are of the shapes and dtypes that the library reads, for a mixer of these sizes."""
    kind, sizes = step.kind, dict(sizes)
    if any(sizes.get(name, value) != value for name, value in step.settings):
        return False
    found = {name: (value.shape, value.dtype) for name, value in operands.items()}
    wanted = {
        name: (shape, jnp.dtype("float32") if name in kind.float32 else dtype)
        for name, shape in kind.shapes(**sizes).items()
    }
    return wanted | found == wanted and set(wanted) - set(found) <= kind.optional


@functools.cache
def blocks_beside(plain: Callable, kind: Kind) -> Callable:
    """run(residual, operands, *, twins, sizes, settings, portable) -> (residual, states of each block).

    plain(residual, operands, twins): the twin, which gives the residual stream and a list of all states.
    operands: of each block, named as the library names them, the states included.
    twins: a hashable value that the twin is given.
    settings: of each block, as in `MixerStep`, with the eps of its norm.
    A block's states are the convolution's and the recurrence's.
    """

    def run_plain(*arrays, tree, twins, **_):
        return plain(*jax.tree.unflatten(tree, arrays), twins)

    structs = functools.partial(_block_structs, kind.struct)
    blocks = _operator(kind.name, _block_results, structs, run_plain, in_place=_block_states)

    @functools.partial(jax.jit, static_argnames=("twins", "sizes", "settings", "portable"))
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


def _block_structs(struct, *arrays, tree, sizes, settings, **_):
    before, operands = jax.tree.unflatten(tree, range(tree.num_leaves))
    after = tree.num_leaves
    residual, dtype = arrays[before], arrays[operands[0]["norm"]].dtype
    fixed = dict(sizes) | {"transposed": True, "threads": library.threads()}
    fixed |= {"bfloat16": dtype == jnp.bfloat16, "residual_bfloat16": residual.dtype == jnp.bfloat16}
    structs = []
    for k, block in enumerate(operands):
        results = {"new_residual": after, "new_conv_state": after + 2 * k + 1, "new_ssm_state": after + 2 * k + 2}
        numbers = block | {"residual": before} | results
        structs.append(pointing(struct, fixed | dict(settings[k]), numbers, arrays))
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
