"""One position of many blocks in one native call on a CPU.

A mixer for which it was written has in its own class a function `native_step(mixer)`. It returns a
`kernels.native_step.MixerStep`, or why the library cannot compute this mixer.
"""

import functools

import jax.numpy as jnp
from flax import nnx

from mamba_core.backend import LayerState
from mamba_core.backends.jax.blocks import Block, RMSNorm
from mamba_core.backends.jax.kernels import native_step
from mamba_core.backends.jax.untouched import untouched
from mamba_core.backends.jax.ways import Taken, own
from mamba_core.call import Call

RANK = 20
# What an explanation names instead of asking on another device. A program knows its device only when it is lowered.
DEVICE = "cpu"


def take(blocks, residual, states, call) -> Taken | str:
    if not (call.one and call.plain):
        return "it computes one position, without a mask or segments"
    if call.observed:
        return "the nodes are observed"
    if (why := _why_not_first(blocks[0], residual)) is not None:
        return why
    dtype, kernel = blocks[0].norm.scale.dtype, blocks[0].mixer.kernels.of("block_step")
    kind, sizes, operands, twins, settings = None, None, [], [], []
    for block, state in zip(blocks, states, strict=True):
        step = _step_of(block)
        if isinstance(step, str) or block.mixer.kernels.of("block_step") != kernel:
            break
        if (kind := kind or step.kind) is not step.kind:
            break
        paths = _paths(step)
        graph, parameters = nnx.split(block)
        named, names = dict(nnx.to_flat_state(parameters)), {path: name for name, path in paths}
        if not set(named) <= set(names):
            break
        of_block = {names[path]: value[...] for path, value in named.items()}
        of_block |= {"conv_state": state.conv, "ssm_state": state.ssm}
        sizes = sizes or kind.sizes(residual, of_block)
        if not native_step.fits(step, of_block, sizes, dtype):
            break
        operands.append(of_block)
        twins.append((graph, paths))
        settings.append((("eps", block.norm.eps), *step.settings))
    if not operands:
        return "its parameters or its state are not those of the library's block"
    options = {"twins": tuple(twins), "sizes": sizes, "settings": tuple(settings), "portable": kernel == "auto"}
    native = native_step.blocks_beside(_plain, kind)
    return Taken(len(operands), functools.partial(_run, native, operands, options))


def _why_not_first(block, residual) -> str | None:
    """Why the library does not compute this block of this residual stream, as far as can be told without its arrays."""
    if isinstance(step := _step_of(block), str):
        return step
    dtype = block.norm.scale.dtype
    if residual.dtype not in ("float32", dtype):
        return f"the residual stream is {residual.dtype}"
    return native_step.why_not(block.mixer.kernels.of("block_step"), residual, dtype)


def _run(native, operands, options, residual, pending, states):
    residual = residual if pending is None else residual + pending
    residual, states = native(residual, operands, **options)
    return residual, None, tuple(LayerState(*state) for state in states)


def _step_of(block) -> native_step.MixerStep | str:
    """How the library computes the block's mixer, or why it does not compute this block."""
    if not untouched(Block, block) or block.feed_forward is not None:
        return "the block is not norm and mixer alone"
    if not untouched(RMSNorm, block.norm):
        return "the norm was replaced"
    if jnp.dtype(block.norm.dtype) != block.norm.scale.dtype:
        return "the norm was given another dtype"
    if (step_of := own(block.mixer, "native_step")) is None:
        return f"it was not written for {type(block.mixer).__name__}"
    return step_of(block.mixer)


def _paths(step) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(name in the library, path in the block) of each parameter."""
    return (("norm", ("norm", "scale")), *((name, ("mixer", *path)) for name, path in step.paths.items()))


def _plain(residual, operands, twins):
    """The blocks themselves, made of their operands again."""
    after = []
    for (graph, paths), arrays in zip(twins, operands, strict=True):
        parameters = [(path, nnx.Param(arrays[name])) for name, path in paths if name in arrays]
        block = nnx.merge(graph, nnx.from_flat_state(parameters))
        residual, state = block(residual, LayerState(arrays["conv_state"], arrays["ssm_state"]), Call(one=True))
        after.extend(state)
    return [residual, *after]
