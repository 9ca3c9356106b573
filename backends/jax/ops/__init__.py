"""The ops: a file has the function of the contract, the plain form, and the choice of kernel of one op."""

from mamba_core import discovery
from mamba_core.backends.jax.arrays import devices


def kernels(device: str | None = None) -> dict[str, dict[str, str | None]]:
    """The kernels of each op, the fastest on that device first and the plain one last: None, or why it cannot run."""
    return available(device or devices()[0])


def available(device: str, dtype=None) -> dict[str, dict[str, str | None]]:
    """The same for arrays of that dtype."""
    return {name: op.kernels(device, dtype) for name, op in discovery.modules("backends.jax.ops").items()}
