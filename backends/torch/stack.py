"""A stack of residual blocks: it asks the ways, cuts long sequences, and recomputes blocks in a gradient."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mamba_core.backends.torch import ways
from mamba_core.backends.torch.blocks import Block, RMSNorm
from mamba_core.backends.torch.positions import call_of
from mamba_core.backends.torch.untouched import untouched
from mamba_core.backends.torch.ways import cuda_step, fused
from mamba_core.call import Call
from mamba_core.spec.state import FILLED

# Bytes of a mixer's widest array that are computed at once on a CPU: a longer one leaves the cache, and malloc asks the
# system for its memory each time. And the fewest positions that are computed at once.
PIECE_BYTES, FEWEST = 2**23, 256
# Loaded at import, so that torch.compile does not trace it.
WAYS = ways.ranked()


def run(blocks: Sequence, residual: Tensor, states: Sequence, call: Call, remat=False, piece: int | None = None):
    """(residual, pending, states) after the blocks; pending is still to be added to the residual stream, or None.

    Args:
        residual: (b, l, d). states: of each block.
        remat: a gradient computes each block again from its inputs, and keeps nothing else of it.
        piece: how many positions a block that is computed again takes at once; None for all.
    """
    recomputes = remat and not call.observed and torch.is_grad_enabled()
    pending, after = None, []
    while len(after) < len(blocks):
        first = len(after)
        rest = blocks[first : first + 1] if recomputes else blocks[first:]
        here = call.within(f"layers.{first}.")
        if call.last and first + len(rest) < len(blocks):
            here = here._replace(last=False)
        if recomputes and call.routers is not None:
            function = functools.partial(_with_routers, rest, here)
            residual, pending, new, logits = _recomputed(function, residual, pending, states[first : first + 1])
            call.routers.extend(logits)
            after += new
            continue
        taken = _taken(rest, residual, states[first : first + len(rest)], here)
        compute = _recomputed if recomputes else _called
        # Each piece would keep the whole of a state that grows.
        if piece is not None and not hasattr(states[first], FILLED):
            compute = functools.partial(_piecewise, compute, piece=piece)
        residual, pending, new = compute(taken.run, residual, pending, states[first : first + taken.count])
        after += new
    return residual, pending, tuple(after)


def finish(norm, residual: Tensor, pending: Tensor | None, policy, call: Call, piece: int | None = None) -> Tensor:
    """The final norm of residual + pending; piece: as in `run`."""
    if not call.observed and (normed := fused.norm(norm, residual, pending, policy)) is not None:
        return normed
    residual = residual if pending is None else residual + pending
    if piece is None:
        return call.observe("norm_f", norm(residual))
    return torch.cat([_recomputed(norm, part) for part in residual.split(piece, dim=1)], dim=1)


def in_pieces(backbone, inputs: Tensor, state, call: Call) -> tuple:
    """A backbone's call by its `forward_piece(inputs, state, call, piece)`.

    Where nothing is kept for a gradient, that is called for one piece of a long sequence after the other. Where blocks
    are recomputed in a gradient, it is called once, with the length of the pieces.
    """
    piece = None if call.observed or call.routers is not None else _piece(backbone, inputs)
    if piece is None or torch.is_grad_enabled():
        return backbone.forward_piece(inputs, state, call, piece if call.plain else None)
    outputs, cut = [], (_split(value, piece, inputs) for value in (inputs, call.mask, call.segment_ids))
    for part, *positions in zip(*cut, strict=True):
        fresh = call.fresh and not outputs
        here = call_of(*positions, length=part.shape[1], last=call.last, fresh=fresh)
        output, state = backbone.forward_piece(part, state, here, None)
        outputs.append(output)
    return torch.cat(outputs, dim=1), state


def explain(model, batch: int = 1, length: int = 1) -> list[tuple[int, int, str, dict[str, str]]]:
    """(first layer, last layer, way, {each faster way: why not}) of a call without gradients; nothing is computed."""
    backbone, state = model.inner, model.init_state(batch)
    blocks, weight = list(backbone.layers), backbone.anchor()
    residual = torch.empty(batch, length, model.config.d_model, dtype=backbone.residual_dtype, device=weight.device)
    runs = []
    with torch.no_grad():
        first = 0
        while first < len(blocks):
            refusals = {}
            call = call_of(None, None, length=length, in_place=length == 1 and cuda_step.decodes(model))
            name, taken = _asked(blocks[first:], residual, state.layers[first:], call, refusals)
            if runs and runs[-1][2:] == (name, refusals):
                runs[-1] = (runs[-1][0], first + taken.count - 1, name, refusals)
            else:
                runs.append((first, first + taken.count - 1, name, refusals))
            first += taken.count
    return runs


def _with_routers(blocks, call: Call, residual, pending, states):
    """The first block, and what its routers gave: a result, so that it is computed again with the block."""
    own = []
    taken = _taken(blocks, residual, states, call._replace(routers=own))
    return *taken.run(residual, pending, states), tuple(own)


def _taken(blocks, residual, states, call) -> ways.Taken:
    for _, way in WAYS:
        if type(taken := way.take(blocks, residual, states, call)) is not str:
            return taken
    raise AssertionError("the plain way takes every block")


def _asked(blocks, residual, states, call, refusals: dict) -> tuple[str, ways.Taken]:
    """The way that takes the first block, by name; fills in why those before it do not."""
    for name, way in WAYS:
        if type(taken := way.take(blocks, residual, states, call)) is not str:
            return name, taken
        refusals[name] = taken
    raise AssertionError("the plain way takes every block")


def _piece(backbone, inputs) -> int | None:
    """How many positions are computed at once, one piece after the other; None if all.

    Pieces need that nothing of a block is kept but its inputs, and that nobody watches what modules compute. A compiled
    graph would hold their number.
    """
    kept = torch.is_grad_enabled() and not backbone.remat
    if inputs.device.type != "cpu" or kept or torch.compiler.is_compiling():
        return None
    if inputs.shape[1] <= FEWEST or not backbone.is_untouched():
        return None
    widths = [_width(block) for block in backbone.layers]
    if None in widths:
        return None
    width = max(widths)
    piece = max(FEWEST, PIECE_BYTES // (width * backbone.dtype.itemsize * max(1, len(inputs))))
    return piece if inputs.shape[1] > piece else None


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
    widths = [width(part) if (width := ways.own(part, "width")) else None for part in parts]
    return None if None in widths else max(widths)


def _split(positions: Tensor | None, piece: int, inputs: Tensor) -> Sequence[Tensor | None]:
    return [None] * -(-inputs.shape[1] // piece) if positions is None else positions.split(piece, dim=1)


def _piecewise(compute, function, residual, pending, states, piece: int):
    """Blocks of pieces of the residual stream. Each piece goes on from the states that the one before has left."""
    residuals, pendings = [], []
    parts = residual.split(piece, dim=1)
    for part, added in zip(parts, _split(pending, piece, residual), strict=True):
        part, added, states = compute(function, part, added, states)
        residuals.append(part)
        pendings.append(added)
    pending = None if pendings[0] is None else torch.cat(pendings, dim=1)
    return torch.cat(residuals, dim=1), pending, states


def _called(function, *arguments):
    return function(*arguments)


def _recomputed(function, residual, *arguments):
    """Calls the function again in the backward pass, from its inputs, which are all that is kept of it.

    Random numbers, such as those of an adapter's dropout, are the same again. While a CUDA graph is captured their
    state cannot be read: only models as built are captured.
    """
    captured = residual.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()
    return checkpoint(function, residual, *arguments, use_reentrant=False, preserve_rng_state=not captured)
