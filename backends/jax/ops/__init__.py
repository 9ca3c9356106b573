"""The ops: a file has the function of the contract, the plain form, and the choice of kernel of one op."""

from mamba_core import discovery
from mamba_core.backends.jax.arrays import devices

FOLDER = "backends.jax.ops"


def available_kernels(device: str | None = None, dtype=None) -> dict[str, dict[str, str | None]]:
    """The kernels of each op, the fastest on that device first and the plain one last: None, or why it cannot run.

    dtype: of the arrays, where it is known.
    """
    device = device or devices()[0]
    return {name: op.kernels(device, dtype) for name, op in discovery.modules(FOLDER).items()}
