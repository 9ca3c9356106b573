"""The stack of blocks: which way computes which, in pieces of long sequences, and again for a gradient."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from mamba_core.backends.jax.blocks import Block, RMSNorm
from mamba_core.backends.jax.positions import call_of
from mamba_core.backends.jax.programs import after_call, divided, put_back, whole
from mamba_core.backends.jax.untouched import untouched
from mamba_core.backends.jax.ways import Taken, own, plain, ranked
from mamba_core.call import Call

# Bytes of a mixer's widest array that are computed at once on a CPU: much more leaves the cache, and is taken from the
# system anew each time. And the fewest positions of a row.
PIECE_BYTES, FEWEST = 2**23, 256


def run(blocks, residual: jax.Array, states: tuple, call: Call, remat: bool = False) -> tuple:
    """(residual stream, what is still to be added to it or None, states) after all blocks.

    remat: a gradient keeps only the inputs of a block, and computes the block again.
    """
    blocks, after, pending = list(blocks), [], None
    while (first := len(after)) < len(blocks):
        taken, _, _ = _asked(blocks[first:], residual, states[first:], call)
        if taken is None:
            block = _prepared(blocks[first], residual, call, remat, is_last=first + 1 == len(blocks))
            taken = plain.take([block], residual, states[first:], call.within(f"layers.{first}."))
        residual, pending, new = taken.run(residual, pending, states[first : first + taken.count])
        after.extend(new)
    return residual, pending, tuple(after)


def explain(model, batch: int, length: int) -> list[tuple[int, int, str, dict[str, str]]]:
    """(first layer, last layer, way, {faster way: why not}) of each run of layers, in a call of that shape."""
    backbone = model.backbone
    if not hasattr(backbone, "layers"):
        raise TypeError(f"the backbone is {type(backbone).__name__}, which computes its layers itself")
    blocks, states = list(backbone.layers), jax.eval_shape(lambda: model.init_state(batch)).layers
    dtype = "float32" if model.config.residual_in_fp32 else model.dtype
    residual = jax.ShapeDtypeStruct((batch, length, model.config.d_model), dtype)
    call, found, first = call_of(None, None, length=length), [], 0
    while first < len(blocks):
        taken, way, reasons = _asked(blocks[first:], residual, states[first:], call, model.device)
        end, before = first + (1 if taken is None else taken.count), found[-1] if found else None
        if before is not None and before[2:] == (way, reasons):
            found[-1] = (before[0], end - 1, way, reasons)
        else:
            found.append((first, end - 1, way, reasons))
        first = end
    return found


def _asked(blocks, residual, states, call, device=None) -> tuple[Taken | None, str, dict[str, str]]:
    """What the fastest way takes, its name, and why faster ones take nothing; None and "plain" where no way does.

    device: where known, the one that the program will run on.
    """
    reasons = {}
    for name, way in ranked():
        if way is plain:
            break
        if device is not None and getattr(way, "DEVICE", device) != device:
            reasons[name] = f"it runs on a {way.DEVICE} only"
            continue
        taken = way.take(blocks, residual, states, call)
        if isinstance(taken, Taken):
            return taken, name, reasons
        reasons[name] = taken
    return None, "plain", reasons


# --- the plain way's blocks ------------------------------------------------------------------------


def _prepared(block, residual, call, remat, is_last):
    """The block, or a function in its place that calls it in pieces, again for a gradient, or for the last position."""
    run = _recomputed if remat and not call.observed else _called
    # What a scan over the pieces appends to a list, nobody outside of it may read.
    in_pieces = call.plain and not call.observed and call.routers is None
    if in_pieces and (piece := _piece(block, residual)):
        run = functools.partial(_piecewise, run, piece=piece)
    elif is_last and call.last and not call.observed and run is _called:
        run = _last_only
    return functools.partial(run, block)


def _called(block, *arguments):
    return block(*arguments)


def _last_only(block, residual, state, call):
    """Like the block, but where its mixer can, the residual stream of the last position only, (b, 1, d)."""
    is_built = untouched(Block, block) and untouched(type(block.mixer), block.mixer)
    of_last = own(block.mixer, "last_position") if is_built else None
    if of_last is not None and block.feed_forward is None and _has_only_parameters(block):
        found = of_last(block.mixer, block.normed(block.norm, residual), state, call)
        if found is not None:
            return residual[:, -1:] + found[0], found[1]
    return _called(block, residual, state, call)


def _has_only_parameters(block) -> bool:
    """Whether a call changes nothing in the block or in what is inside it, such as a count of draws."""
    return not jax.tree.leaves(nnx.state(block, nnx.Not(nnx.Param)))


def _piece(block, residual) -> int | None:
    """How many positions the block is given at once on a CPU, one piece after the other; None if all."""
    batch, length, _ = residual.shape
    # An exported program may be for any length.
    if not (isinstance(batch, int) and isinstance(length, int)) or length <= FEWEST:
        return None
    if (width := _width(block)) is None or not _has_only_parameters(block):
        return None
    piece = max(FEWEST, PIECE_BYTES // (width * residual.dtype.itemsize * max(1, batch)))
    return piece if length > piece else None


def _width(block) -> int | None:
    """Elements of the widest array of a block for each position; None where a part may look along the sequence."""
    if not untouched(Block, block):
        return None
    norms, parts = [block.norm], [block.mixer]
    if block.feed_forward is not None:
        norms, parts = [*norms, block.norm2], [*parts, block.feed_forward]
    if not untouched(RMSNorm, *norms):
        return None
    # A part without a width does not say that it goes on exactly from a state.
    widths = [width(part) if (width := own(part, "width")) and untouched(type(part), part) else None for part in parts]
    return None if None in widths else max(widths)


def _piecewise(run, block, residual, state, call, *, piece):
    """On a CPU the block of each piece of the residual stream, going on from the state that the piece before left."""
    definition, parameters = nnx.split(block)

    def whole(parameters, residual, state):
        return run(nnx.merge(definition, parameters), residual, state, call)

    def in_pieces(parameters, residual, state):
        batch, length, width = residual.shape
        count = length // piece
        parts = residual[:, : count * piece].reshape(batch, count, piece, width).swapaxes(0, 1)
        state, parts = lax.scan(lambda state, part: whole(parameters, part, state)[::-1], state, parts)
        done = parts.swapaxes(0, 1).reshape(batch, count * piece, width)
        if count * piece < length:
            rest, state = whole(parameters, residual[:, count * piece :], state)
            done = jnp.concatenate([done, rest], axis=1)
        return done, state

    if run is _called:  # A gradient then keeps much of the block, and more of it in pieces.
        in_pieces = jax.custom_jvp(in_pieces)
        in_pieces.defjvp(functools.partial(jax.jvp, whole))
    return lax.platform_dependent(parameters, residual, state, cpu=in_pieces, default=whole)


def _recomputed(block, residual, state, call):
    """The block, called again in the backward pass from its inputs, which are all that is kept of it.

    It then draws the same random numbers, because what it held is an input too. What it gives to `call.routers` is a
    result of it, so that the gradients of that run through it too.
    """
    definition, parameters, others = divided(block)

    def run(parameters, others, residual, state):
        called, routers = whole(definition, parameters, others), None if call.routers is None else []
        found = called(residual, state, call._replace(routers=routers))
        return found, after_call(called, definition, parameters), routers

    def backward(inputs, cotangents):
        parameters, others, residual, state = inputs
        # Zero, but XLA cannot know. It would compute all blocks again at once, or share what the forward computed,
        # because on a CPU it drops the barriers of jax.checkpoint.
        after = jnp.minimum(jnp.abs(cotangents[0][0].ravel()[:1].sum()), 0)
        residual = residual + after.astype(residual.dtype)
        return jax.vjp(run, parameters, others, residual, state)[1](cotangents)

    recomputed = jax.custom_vjp(run)
    recomputed.defvjp(lambda *inputs: (run(*inputs), inputs), backward)
    found, others, routers = recomputed(parameters, others, residual, state)
    put_back(block, others)
    if routers is not None:
        call.routers.extend(routers)
    return found
