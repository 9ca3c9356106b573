"""Blocks whose norm is one kernel with the sum of the block before it."""

from mamba_core.backends.torch.blocks import Block, RMSNorm
from mamba_core.backends.torch.ops import rms_norm
from mamba_core.backends.torch.untouched import untouched
from mamba_core.backends.torch.ways import Taken, own
from mamba_core.kernels import Kernels

RANK = 50


def take(blocks, residual, states, call) -> Taken | str:
    if call.observed:
        return "an observer sees every node"
    kernels = []
    for block in blocks:
        if (kernel := _kernel(block, residual)) is None:
            break
        kernels.append(kernel)
    if not kernels:
        return "no kernel adds and norms in one pass here, or the block or its norm was changed"

    def run(residual, pending, states):
        after = []
        for block, kernel, state in zip(blocks, kernels, states, strict=False):
            last = call.last and len(after) + 1 == len(blocks)
            normed, residual = _add_norm(block.norm, residual, pending, kernel)
            if last and (compute := own(block.mixer, "last_position")) and block.mixer.can_compute_last_only(normed):
                pending, state = compute(block.mixer, normed, state, call)
                residual = residual[:, -1:]
            else:
                pending, state = block.mixer(normed, state, call)
            after.append(state)
        return residual, pending, tuple(after)

    return Taken(len(kernels), run)


def norm(module, residual, pending, policy: Kernels):
    """The norm of residual + pending by a kernel that adds and norms in one pass; None if there is none here."""
    if not untouched(RMSNorm, module) or (kernel := rms_norm.fused_kernel(policy, residual, module.weight)) is None:
        return None
    return _add_norm(module, residual, pending, kernel)[0]


def _kernel(block, residual) -> str | None:
    if not untouched(Block, block) or block.feed_forward is not None or not untouched(RMSNorm, block.norm):
        return None
    # Any mixer will do, because it is called; a wrapper of one need not know about kernels.
    policy = getattr(block.mixer, "kernels", None)
    return rms_norm.fused_kernel(policy, residual, block.norm.weight) if isinstance(policy, Kernels) else None


def _add_norm(module, residual, pending, kernel):
    return rms_norm.add_norm(residual, pending, module.weight, module.eps, kernel)
