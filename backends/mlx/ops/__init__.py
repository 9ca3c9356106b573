"""The ops, a file each: the contract's functions, the plain form, and the choice between it and `kernels/`.

An op's file exports `KERNELS`, its kernels by name, the fastest first and the plain one last, and
`kernels(device, dtype) -> {name: None | why it does not run}`.
"""

from mamba_core import discovery
from mamba_core.backends.mlx.arrays import check_device

FOLDER = "backends.mlx.ops"


def available_kernels(device: str | None = None, dtype=None) -> dict[str, dict[str, str | None]]:
    """Those but "native", "numpy", "cuda" and "metal" are made of MLX's own operations and run on every device.

    dtype: of the arrays, where it is known.
    """
    check_device(device)
    return {name: op.kernels(device, dtype) for name, op in discovery.modules(FOLDER).items()}
