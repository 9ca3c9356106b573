"""One position of all residual blocks, and the head of one position, each in one native call on a CPU.

With few rows such a step is as long as its weights take to be read; in XLA's operations it is much longer.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from mamba_core.backend import LayerState
from mamba_core.backends.jax.kernels.operator import NATIVE, library_call, operator, pointing, reason, reversible
from mamba_core.backends.jax.layers import Block, MambaMixer, RMSNorm, precision, through
from mamba_core.backends.native import abi, library
from mamba_core.observe import unobserved

# More rows take longer to compute than their weights to be read.
MOST_ROWS = 8
# A block's parameters -> their names in the library.
PARAMETERS = {
    ("norm", "scale"): "norm",
    ("mixer", "in_proj", "kernel"): "in_proj.weight",
    ("mixer", "in_proj", "bias"): "in_proj.bias",
    ("mixer", "conv1d", "kernel"): "conv.weight",
    ("mixer", "conv1d", "bias"): "conv.bias",
    ("mixer", "x_proj", "kernel"): "x_proj.weight",
    ("mixer", "dt_proj", "kernel"): "dt_proj",
    ("mixer", "dt_proj", "bias"): "delta_bias",
    ("mixer", "A_log"): "A_log",
    ("mixer", "D"): "D",
    ("mixer", "out_proj", "kernel"): "out_proj.weight",
    ("mixer", "out_proj", "bias"): "out_proj.bias",
}
PATHS = {name: path for path, name in PARAMETERS.items()}
OPTIONAL = {"in_proj.bias", "conv.bias", "out_proj.bias"}
FLOAT32 = {"delta_bias", "A_log", "D", "ssm_state"}


def blocks(layers, residual: jax.Array, states) -> tuple[jax.Array, tuple[LayerState, ...]] | None:
    """The residual stream (b, 1, d) and the states after all blocks; None where plain operations are to compute it."""
    dtype, kernels = layers[0].norm.scale.dtype, layers[0].mixer.kernels
    if not (_runs(kernels, residual, dtype) and residual.dtype in (jnp.float32, dtype)):
        return None
    if not all(map(_as_built, layers)):
        return None
    operands, graphs = [], []
    for block, state in zip(layers, states, strict=True):
        graph, values = nnx.split(block)
        flat = nnx.to_flat_state(values)
        if not {path for path, _ in flat} <= set(PARAMETERS):
            return None
        own = {PARAMETERS[path]: value[...] for path, value in flat}
        operands.append(own | {"conv_state": state.conv, "ssm_state": state.ssm})
        graphs.append(graph)
    sizes = _sizes(residual, operands[0])
    if not all(_fits(own, sizes, dtype) for own in operands):
        return None
    eps = tuple(block.norm.eps for block in layers)
    return _step(residual, operands, graphs=tuple(graphs), sizes=sizes, eps=eps, portable=kernels == "auto")


def head(kernels: str, hidden: jax.Array, weight: jax.Array, *, transposed: bool) -> jax.Array | None:
    """`product` for hidden (b, d) or (b, 1, d); None where plain operations are to compute it."""
    one = hidden.ndim == 2 or (hidden.ndim == 3 and hidden.shape[1] == 1)
    fits = hidden.shape[-1] == weight.shape[0 if transposed else 1]
    if not (one and fits and weight.dtype == hidden.dtype and _runs(kernels, hidden, weight.dtype)):
        return None
    logits = _linear_step(hidden.reshape(hidden.shape[0], -1), weight, transposed, portable=kernels == "auto")
    return logits.reshape(*hidden.shape[:-1], -1)


def product(x: jax.Array, weight: jax.Array, *, transposed: bool) -> jax.Array:
    """x (b, ..., in) times the transpose of weight (out, in), or weight (in, out) where transposed, in float32."""
    weight = weight if transposed else weight.T
    return jnp.matmul(x, weight, precision=precision(str(x.dtype)), preferred_element_type=jnp.float32)


def is_linear(module: nnx.Module) -> bool:
    """Whether it computes as `nnx.Linear` does, and none that an adapter or a quantiser put in its place."""
    return type(module) is nnx.Linear and module.dot_general is lax.dot_general


def _runs(kernels: str, x: jax.Array, dtype) -> bool:
    # An exported program may be for any batch.
    few = isinstance(x.shape[0], int) and x.shape[0] <= MOST_ROWS
    return few and kernels in ("auto", "native") and reason("cpu", dtype) is None


def _as_built(block: nnx.Module) -> bool:
    if type(block) is not Block or type(block.norm) is not RMSNorm or type(block.mixer) is not MambaMixer:
        return False
    mixer = block.mixer
    # Of the others nothing is called: their parameters are all that the mixer takes.
    return not mixer.minimamba and all(map(is_linear, (mixer.in_proj, mixer.x_proj, mixer.out_proj)))


def _sizes(residual, own) -> tuple[tuple[str, int], ...]:
    (b, _, d), (e, n), k, r = residual.shape, own["A_log"].shape, own["conv.weight"].shape[0], own["dt_proj"].shape[0]
    return (("b", b), ("d", d), ("e", e), ("n", n), ("k", k), ("r", r))


def _fits(own: dict, sizes, dtype) -> bool:
    """Whether a block's arrays are what the library reads."""
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
    found = {name: (value.shape, value.dtype) for name, value in own.items()}
    wanted = {name: (shape, jnp.dtype("float32") if name in FLOAT32 else dtype) for name, shape in shapes.items()}
    return wanted | found == wanted and set(wanted) - set(found) <= OPTIONAL


@functools.partial(jax.jit, static_argnames=("graphs", "sizes", "eps", "portable"))
def _step(residual, operands, *, portable, **options):
    arrays, tree = jax.tree.flatten((residual, operands))
    after, *states = _mamba_steps(portable, options | {"tree": tree}, *arrays)
    return after, tuple(LayerState(*pair) for pair in zip(states[::2], states[1::2], strict=True))


def _block_results(*arrays, tree, **_):
    residual, operands = jax.tree.unflatten(tree, arrays)
    states = (own[name] for own in operands for name in ("conv_state", "ssm_state"))
    return [jax.core.ShapedArray(value.shape, value.dtype) for value in (residual, *states)]


def _block_structs(*arrays, tree, sizes, eps, **_):
    before, operands = jax.tree.unflatten(tree, range(tree.num_leaves))
    after = tree.num_leaves
    residual, dtype = arrays[before], arrays[operands[0]["norm"]].dtype
    fixed = dict(sizes) | {"transposed": True, "threads": library.threads()}
    fixed |= {"bfloat16": dtype == jnp.bfloat16, "residual_bfloat16": residual.dtype == jnp.bfloat16}
    structs = []
    for k, own in enumerate(operands):
        results = {"new_residual": after, "new_conv_state": after + 2 * k + 1, "new_ssm_state": after + 2 * k + 2}
        numbers = own | {"residual": before} | results
        structs.append(pointing(abi.MambaStep, fixed | {"eps": eps[k]}, numbers, arrays))
        before = after
    return structs


def _block_states(*arrays, tree, **_):
    """XLA copies those that are needed afterwards, and no others."""
    _, operands = jax.tree.unflatten(tree, range(tree.num_leaves))
    states = [own[name] for own in operands for name in ("conv_state", "ssm_state")]
    return {state: 1 + number for number, state in enumerate(states)}


def _plain_blocks(*arrays, tree, graphs, **_):
    residual, operands = jax.tree.unflatten(tree, arrays)
    layers, states = [], []
    for graph, own in zip(graphs, operands, strict=True):
        parameters = [(PATHS[name], nnx.Param(value)) for name, value in own.items() if name in PATHS]
        layers.append(nnx.merge(graph, nnx.from_flat_state(parameters)))
        states.append(LayerState(own["conv_state"], own["ssm_state"]))
    return jax.tree.leaves(through(layers, residual, states, None, None, unobserved))


def _linear_results(x, weight, *, transposed):
    return [jax.core.ShapedArray((x.shape[0], weight.shape[1 if transposed else 0]), jnp.float32)]


def _linear_structs(x, weight, y, *, transposed):
    sizes = {"b": x.shape[0], "inputs": x.shape[1], "outputs": y.shape[1], "transposed": transposed}
    settings = sizes | {"bfloat16": x.dtype == jnp.bfloat16, "threads": library.threads()}
    return [pointing(abi.LinearStep, settings, {"x": 0, "matrix.weight": 1, "y": 2}, (x, weight, y))]


def _plain_linear(*arrays, **options):
    return [product(*arrays, **options)]


@functools.partial(jax.jit, static_argnames=("transposed", "portable"))
def _linear_step(x, weight, transposed, portable):
    return _linear(portable, {"transposed": transposed}, x, weight)[0]


def _operator(name, results, structs, plain, **options):
    call = library_call(f"mamba_{name}_xla", structs, **options)
    return reversible(operator(NATIVE, f"mamba_{name}", results, call, plain), plain)


_mamba_steps = _operator("mamba_steps", _block_results, _block_structs, _plain_blocks, in_place=_block_states)
_linear = _operator("linear_step", _linear_results, _linear_structs, _plain_linear)
