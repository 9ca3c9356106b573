"""One position of residual blocks: which kernel may compute it. `ways.native_step` decides for which blocks."""

from mamba_core.backends.jax.kernels import native_step
from mamba_core.backends.jax.kernels.operator import reason

# "plain" is to call the blocks.
KERNELS = {"native": native_step.blocks_beside, "plain": None}


def kernels(device: str, dtype=None) -> dict[str, str | None]:
    return dict.fromkeys(KERNELS) | {"native": reason(device, dtype)}
