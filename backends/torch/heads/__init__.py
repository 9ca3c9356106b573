"""The models of the tasks, a file each.

A file exports `Model`: see `mamba_core.backend.Backend.build`. Where its task is labelled it exports
`loss(task, output, targets, mask)`. Where the targets are the inputs one position later, it exports
`loss_of_inputs(model, inputs, mask)`, the mean, and `summed_loss_of_inputs(model, inputs, counts)`.
"""

from types import ModuleType

from mamba_core import discovery


def find(task: str) -> ModuleType:
    return discovery.find("backends.torch.heads", task)


def model_class(task: str) -> type:
    return find(task).Model
