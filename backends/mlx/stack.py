"""The blocks of a model, one after the other: by the fastest way that takes them, in pieces, computed again or not."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mamba_core import discovery
from mamba_core.backends.mlx import ops
from mamba_core.backends.mlx.arrays import kind_of, random_key, set_random_key
from mamba_core.backends.mlx.blocks import Block, RMSNorm
from mamba_core.backends.mlx.kernels.native_tensors import detached_copies
from mamba_core.backends.mlx.kernels.reverse_only import first_derivative_only, reverse_only
from mamba_core.backends.mlx.ops import causal_conv, selective_scan, ssd
from mamba_core.backends.mlx.positions import call_of
from mamba_core.backends.mlx.untouched import untouched
from mamba_core.backends.mlx.ways import Taken, own, ranked
from mamba_core.call import Call
from mamba_core.kernels import Kernels

# Bytes of a mixer's widest array that are computed at once on a CPU: a much larger array leaves the cache, and the
# system hands out its memory anew each time. And the fewest positions of a piece.
PIECE_BYTES, FEWEST = 2**23, 256
# What draws random numbers in training, of MLX's own layers.
DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.Dropout3d)
# Parts into which MLX splits an array by an operation of its own.
SPLIT = 8


def run(
    blocks: Sequence, residual: mx.array, states: Sequence[tuple], call: Call, remat: bool
) -> tuple[mx.array, mx.array | None, tuple]:
    """The residual stream after the blocks, what is still to be added to it or None, and the blocks' new states.

    With `call.last` the residual stream may be that of the last position only, (b, 1, d).
    """
    done, pending, after = 0, None, []
    while done < len(blocks):
        here = call.within(f"layers.{done}.") if call.observed else call
        taken = _take(blocks[done:], residual, states[done:], here, remat and not call.observed)
        residual, pending, left = taken.run(residual, pending, states[done : done + taken.count])
        after += left
        done += taken.count
    return residual, pending, tuple(after)


def explain(model, batch: int, length: int) -> list[tuple[int, int, str, dict[str, str]]]:
    """(first layer, last layer, way, {faster way: why it does not take them}) of each run of layers.

    For a call without a gradient on inputs of that shape, all of whose positions count. Nothing is computed.
    """
    with model.on_device():
        backbone, states = model.inner_backbone("to explain it"), model.init_state(batch).layers
        dtype = mx.float32 if backbone.residual_in_fp32 else backbone.dtype
        residual, call = mx.zeros((batch, length, model.config.d_model), dtype), call_of(None, None, length=length)
        found, done = [], 0
        while done < len(backbone.layers):
            name, taken, reasons = _ask(backbone.layers[done:], residual, states[done:], call)
            if found and found[-1][2:] == (name, reasons):
                found[-1] = (found[-1][0], done + taken.count - 1, name, reasons)
            else:
                found.append((done, done + taken.count - 1, name, reasons))
            done += taken.count
    return found


def _ask(blocks, residual, states, call) -> tuple[str, Taken, dict[str, str]]:
    """The first way that takes the first block, and why those before it do not."""
    reasons = {}
    for name, way in ranked():
        taken = way.take(blocks, residual, states, call)
        if not isinstance(taken, str):
            return name, taken, reasons
        reasons[name] = taken
    raise AssertionError("the plain way takes every block")


def _take(blocks, residual, states, call, remat) -> Taken:
    piece = _piece(blocks[0], residual, call)
    if not remat and piece is None:
        return _ask(blocks, residual, states, call)[1]
    # Of every piece, and of what a gradient computes again, all positions are wanted. A piece goes on from another.
    run_block = partial(_called, blocks[0], call._replace(last=False, fresh=call.fresh and piece is None))
    if remat:
        run_block = partial(_recomputed, blocks[0], run_block)
    if piece is not None:
        run_block = partial(_piecewise, run_block, piece)

    def run(residual, pending, states):
        residual, state, routers = run_block(residual if pending is None else residual + pending, states[0])
        if call.routers is not None:
            call.routers.extend(routers)
        return residual, None, (state,)

    return Taken(1, run)


def _called(block, call, residual, state):
    """The residual stream after the block, its state, and what it added to `call.routers`, which is left alone."""
    call = call._replace(routers=None if call.routers is None else [])
    _, taken, _ = _ask([block], residual, [state], call)
    residual, pending, (state,) = taken.run(residual, None, [state])
    return residual if pending is None else residual + pending, state, call.routers or []


# --- in pieces -----------------------------------------------------------------------------------


def _piece(block, residual, call) -> int | None:
    """The positions that a block on a CPU computes at once, one piece after the other; None for all.

    Only with the native kernels, which compute when they are called: MLX would order lazy operations by itself.
    """
    batch, length, _ = residual.shape
    if length <= FEWEST or not call.plain or call.observed or (width := _width(block)) is None:
        return None
    dtype = _compute_dtype(block, residual)
    piece = max(FEWEST, PIECE_BYTES // (width * dtype.size * max(1, batch)))
    if length <= piece:
        return None
    op = own(block.mixer, "recurrence") or "selective_scan"
    chosen = getattr(discovery.find(ops.FOLDER, op), "chosen", None)
    if chosen is None:
        return None
    return piece if chosen(block.mixer.kernels.of(op), dtype, (residual,)) == "native" else None


def _width(block) -> int | None:
    """Elements of the widest array of a block for each position; None where a part may look along the sequence."""
    if not untouched(Block, block):
        return None
    norms, parts = [block.norm], [block.mixer]
    if "feed_forward" in block:
        norms, parts = [*norms, block.norm2], [*parts, block.feed_forward]
    if not untouched(RMSNorm, *norms):
        return None
    # A part without a width does not say that it goes on exactly from a state.
    widths = [width(part) if (width := own(part, "width")) else None for part in parts]
    return None if None in widths else max(widths)


def _piecewise(run_block, piece, residual, state):
    """A block, piece by piece of the residual stream: each goes on from the state that the one before has left."""
    pieces, routers = [], []
    for part in _split(residual, piece):
        part, state, logits = run_block(part, state)
        mx.eval(part, logits)
        pieces.append(part)
        routers.append(logits)
    together = [mx.concatenate(logits, axis=1) for logits in zip(*routers, strict=True)]
    return mx.concatenate(pieces, axis=1), state, together


def _split(values, piece: int) -> list[mx.array]:
    """In two or three steps: a slice has a gradient as long as the whole, and into many parts MLX splits by slices."""
    count = -(-values.shape[1] // piece)
    if count == 1:
        return [values]
    size = -(-count // SPLIT) * piece
    parts = mx.split(values, range(size, values.shape[1], size), axis=1)
    return [part for several in parts for part in _split(several, piece)]


# --- computed again in the gradient --------------------------------------------------------------


def recomputed(
    run: Callable, kernels: Kernels, dtype: mx.Dtype, values: Sequence[mx.array], copied: int = 0
) -> Sequence[mx.array]:
    """run(*values), a tuple, called again in the backward pass: of it nothing is kept but the values.

    Args:
        kernels, dtype: the model's.
        copied: native kernels get copies of so many of the values, the first. While MLX differentiates it goes over all
            that a value was computed from, each time that something is computed from the value.
    """
    run = _with_the_same_random_numbers(run)
    if _computes_at_once(kernels, dtype, values):
        return _checkpoint_at_once(run, copied)(list(values))
    return mx.checkpoint(run)(*values)


def _with_the_same_random_numbers(run):
    """The function, which is given in every later call the random numbers of its first."""
    key, calls = random_key(), count()

    def repeated(*values):
        if next(calls) == 0:
            return run(*values)
        now = random_key()
        set_random_key(key)
        try:
            return run(*values)
        finally:
            set_random_key(now)

    return repeated


def recomputed_module(module, run: Callable, kernels: Kernels, dtype: mx.Dtype, *values, copied=0):
    """`recomputed`, with the gradients of the module's parameters."""
    _check_repeats(module)
    trained = dict(tree_flatten(module.trainable_parameters()))

    def run_with(*arguments):
        # MLX differentiates in a function's arguments only: the parameters are passed as arguments and put back into
        # the module, which then holds the arrays that are differentiated.
        module.update(tree_unflatten(list(zip(trained, arguments[len(values) :], strict=True))))
        return run(*arguments[: len(values)])

    return recomputed(run_with, kernels, dtype, (*values, *trained.values()), copied)


def _check_repeats(module) -> None:
    """Check that nothing in the module draws random numbers where nobody can draw the same ones again."""
    if random_key() is not None:
        return
    for name, inner in module.named_modules():
        if isinstance(inner, DROPOUTS) and inner.training and inner._p_1 < 1:
            raise TypeError(
                f"{name} is {kind_of(inner)}, which draws another mask where a block is computed again inside "
                "mx.compile; set model.remat = False, or do not compile with mx.random.state as an input"
            )


def _recomputed(block, run_block, residual, state):
    # The positions come by closure: MLX would differentiate in a mask that is an argument.
    def run(residual, *values):
        residual, after, routers = run_block(residual, _like(state, values))
        return residual, *after, *routers

    # A wrapper of a block or of a mixer need not know about kernels.
    values, kernels = (residual, *state), getattr(getattr(block, "mixer", None), "kernels", None)
    kernels = kernels if isinstance(kernels, Kernels) else Kernels()
    dtype = _compute_dtype(block, residual)
    residual, *after = recomputed_module(block, run, kernels, dtype, *values, copied=len(values))
    return residual, _like(state, after[: len(state)]), after[len(state) :]


def _like(state, values):
    """The values as a layer's state of the same kind."""
    return type(state)(*values) if hasattr(state, "_fields") else type(state)(values)


def _compute_dtype(block, residual) -> mx.Dtype:
    """The dtype that the mixer computes in; another norm may give it any."""
    norm = getattr(block, "norm", None)
    return norm.weight.dtype if untouched(RMSNorm, norm) else residual.dtype


def _computes_at_once(kernels, dtype, values) -> bool:
    """Whether a native kernel computes here, which takes arrays that are computed."""
    chosen = (
        selective_scan.chosen(kernels.of("selective_scan"), dtype, values),
        ssd.chosen(kernels.of("ssd"), dtype, values),
        causal_conv.chosen(kernels.of("causal_conv"), dtype, values),
    )
    return "native" in chosen


def _checkpoint_at_once(run, copied):
    """While MLX differentiates it keeps what an array was computed from, also of one that is computed already."""

    def with_copies(values):
        return [*detached_copies(values[:copied]), *values[copied:]]

    @mx.custom_function
    def forward(values):
        return tuple(detached_copies(run(*with_copies(values))))

    @forward.vjp
    def backward(values, cotangents, _):
        _, gradients = mx.vjp(run, with_copies(values), detached_copies(cotangents))
        return first_derivative_only(detached_copies(gradients), values, cotangents)

    reverse_only(forward)
    return forward
