"""A block whose norms are one kernel each with the sum before them."""

from mamba_core.backends.torch.blocks import Block, RMSNorm
from mamba_core.backends.torch.ops import rms_norm
from mamba_core.backends.torch.untouched import untouched
from mamba_core.backends.torch.ways import Taken, own
from mamba_core.kernels import Kernels

RANK = 50


def take(blocks, residual, states, call) -> Taken | str:
    if call.observed:
        return "an observer sees every node"
    block = blocks[0]
    if (kernel := _kernel(block, residual)) is None:
        return "no kernel adds and norms in one pass here, or the block or its norm was changed"
    only_last = call.last and len(blocks) == 1

    def run(residual, pending, states):
        normed, residual = _add_norm(block.norm, residual, pending, kernel)
        mixer = block.mixer
        if only_last and (compute := own(mixer, "last_position")) and mixer.can_compute_last_only(normed):
            pending, state = compute(mixer, normed, states[0], call)
            residual = residual[:, -1:]
        else:
            pending, state = mixer(normed, states[0], call)
        if block.feed_forward is not None:
            normed, residual = _add_norm(block.norm2, residual, pending, kernel)
            pending = block.feed_forward(normed, call)
        return residual, pending, (state,)

    # One block, because a faster way may take the next.
    return Taken(1, run)


def norm(module, residual, pending, policy: Kernels):
    """The norm of residual + pending by a kernel that adds and norms in one pass; None if there is none here."""
    if not untouched(RMSNorm, module) or (kernel := rms_norm.fused_kernel(policy, residual, module.weight)) is None:
        return None
    return _add_norm(module, residual, pending, kernel)[0]


def _kernel(block, residual) -> str | None:
    norms = [block.norm] if block.feed_forward is None else [block.norm, block.norm2]
    if not untouched(Block, block) or not untouched(RMSNorm, *norms):
        return None
    # Any mixer will do, because it is called; a wrapper of one need not know about kernels.
    policy = getattr(block.mixer, "kernels", None)
    if not isinstance(policy, Kernels):
        return None
    kernels = {rms_norm.fused_kernel(policy, residual, norm.weight) for norm in norms}
    return kernels.pop() if len(kernels) == 1 else None


def _add_norm(module, residual, pending, kernel):
    return rms_norm.add_norm(residual, pending, module.weight, module.eps, kernel)
