"""The models of the tasks, a file each, which exports `Model`: see `mamba_core.backend.Backend.build`."""

from mamba_core import discovery


def model_class(task: str) -> type:
    return discovery.find("backends.jax.heads", task).Model
