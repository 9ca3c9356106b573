"""One position of consecutive blocks in one native call on a CPU; a feed-forward ends the call and is called itself.

A mixer for which there is such a call has in its own class a function `native_step(mixer)`. It returns a
`kernels.native_step.Operands`, or why the library cannot compute this mixer.
"""

from mamba_core.backend import LayerState
from mamba_core.backends.torch.blocks import Block, RMSNorm
from mamba_core.backends.torch.kernels import native_step
from mamba_core.backends.torch.untouched import untouched
from mamba_core.backends.torch.ways import Taken, fused, own

RANK = 10


def take(blocks, residual, states, call) -> Taken | str:
    if not (call.one and call.plain) or call.observed:
        return "it computes one position that counts, unobserved"
    if (why := native_step.reason(residual)) is not None:
        return why
    kind, tensors, numbers, count = None, [], [], 0
    for block, state in zip(blocks, states, strict=True):
        if type(operands := _operands(block)) is str:
            why = operands
            break
        norm = block.norm
        found = operands.tensors(norm.weight, state, residual.shape[0])
        if found is None or len(norm.weight) != residual.shape[-1]:
            why = "its parameters or states have another dtype, shape or layout in memory"
            break
        if count and not (type(operands) is kind and native_step.same_sizes(found, tensors)):
            break
        kind = type(operands)
        tensors += found
        numbers += operands.numbers(norm.eps)
        count += 1
        if block.feed_forward is not None:
            break
    if not count:
        return why
    last = blocks[count - 1]

    def run(residual, pending, states):
        residual = residual if pending is None else residual + pending
        residual, *after = kind.blocks(residual, tensors, numbers)
        pending, states = None, tuple(LayerState(*after[k : k + 2]) for k in range(0, len(after), 2))
        if last.feed_forward is not None:
            normed = fused.norm(last.norm2, residual, None, last.mixer.kernels)
            pending = last.feed_forward(last.norm2(residual) if normed is None else normed, call)
        return residual, pending, states

    return Taken(count, run)


def _operands(block) -> native_step.Operands | str:
    if not untouched(Block, block):
        return "the block was changed"
    mixer = block.mixer
    if (read := own(mixer, "native_step")) is None:
        return f"{type(mixer).__name__} was not written for it"
    norms = [block.norm] if block.norm2 is None else [block.norm, block.norm2]
    if not (untouched(type(mixer), mixer) and untouched(RMSNorm, *norms)):
        return "the norm or the mixer was changed"
    if mixer.kernels.of("block_step") not in ("auto", "native"):
        return f"kernels has {mixer.kernels.of('block_step')!r} for block_step"
    return read(mixer)
