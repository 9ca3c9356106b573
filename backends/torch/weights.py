"""Canonical names <-> the module tree. They are the same names, so this is only construction and iteration."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from mamba_core.backends.torch.arrays import devices, dtype_of, from_numpy, to_numpy
from mamba_core.backends.torch.kernels.quantized import QuantizedLinear
from mamba_core.backends.torch.model import MODELS, Model
from mamba_core.backends.torch.scan import kernel_for
from mamba_core.spec.checks import choose_device
from mamba_core.spec.params import Values, checked


def build(config, parameters: Iterable[tuple[str, np.ndarray]], *, dtype="float32", device=None, kernels="auto"):
    """The module is made on the meta device, so that its values exist once."""
    # Of several GPUs one is named as torch does, "cuda:1".
    indexed = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    device = choose_device(None if device is None else str(device), [*devices(), *indexed])
    kernel_for(kernels, torch.device(device), dtype_of(dtype))
    with torch.device("meta"):  # "auto" stays so: the model may be moved to where another kernel is the fastest
        model = MODELS[config.task](config, kernels)
    for parameter, value in checked(config, parameters):
        owner, _, leaf = parameter.name.rpartition(".")
        tensor = from_numpy(value, dtype=parameter.dtype(dtype), device=device)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))
    return model


def parameters(model: Model) -> Values:
    """Raises ValueError for a quantised model, whose values are not those of its table."""
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError("the model is quantised, for inference alone; save, or train, the model that it was made of")
    return Values(model.config, lambda name: to_numpy(model.get_parameter(name)))
