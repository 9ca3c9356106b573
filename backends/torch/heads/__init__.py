"""The models, a file a task, each of which exports `Model`."""

from mamba_core import discovery


def model_class(task: str) -> type:
    return discovery.find("backends.torch.heads", task).Model
