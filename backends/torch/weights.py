"""Canonical names <-> the module tree. They are the same names, so this is only construction and iteration."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from mamba_core.backends.torch import ops
from mamba_core.backends.torch.arrays import devices, dtype_of, from_numpy, keep_freed_memory, to_numpy
from mamba_core.backends.torch.heads import model_class
from mamba_core.backends.torch.model import Model
from mamba_core.backends.torch.quantization import QuantizedLinear
from mamba_core.kernels import Kernels
from mamba_core.spec.checks import choose_device
from mamba_core.spec.params import Values, checked


def build(config, parameters: Iterable[tuple[str, np.ndarray]], *, dtype="float32", device=None, kernels="auto"):
    """The module is made on the meta device, so that its values exist once."""
    # One of several GPUs is named as torch names it, "cuda:1".
    indexed = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    device = choose_device(None if device is None else str(device), [*devices(), *indexed])
    # "auto" stays "auto" in the policy: the model may be moved to where another kernel is the fastest.
    policy = Kernels.read(kernels, ops.available_kernels(device, dtype_of(dtype)))
    if torch.device(device).type == "cpu":
        keep_freed_memory()
    with torch.device("meta"):
        model = model_class(config.task)(config, policy)
    for parameter, value in checked(config, parameters):
        owner, _, leaf = parameter.name.rpartition(".")
        tensor = from_numpy(value, dtype=parameter.dtype(dtype), device=device)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))
    return model


def parameters(model: Model) -> Values:
    """Raises ValueError for a quantised model, which does not hold the values of its table."""
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError("the model is quantised, for inference only; save or train the model that it was made from")
    return Values(model.config, lambda name: to_numpy(model.get_parameter(name)))
