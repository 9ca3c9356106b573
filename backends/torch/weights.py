"""Canonical names <-> the module tree. They are the same names, so this is only construction and iteration."""

from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from torch import nn

from mamba_core.backend import Foreign
from mamba_core.backends.torch import ops, private
from mamba_core.backends.torch.arrays import devices, dtype_of, from_numpy, keep_freed_memory, to_numpy
from mamba_core.backends.torch.heads import model_class
from mamba_core.backends.torch.model import METHODS, Backbone, Model
from mamba_core.backends.torch.ops.causal_conv import by_module
from mamba_core.backends.torch.quantization import QuantizedLinear
from mamba_core.backends.torch.untouched import untouched
from mamba_core.call import Call
from mamba_core.kernels import Kernels
from mamba_core.merging import check_held, merged
from mamba_core.spec.checks import choose_device
from mamba_core.spec.params import Values, checked, parameter_table

# What changes the function of a layer beside its parameters.
SETTINGS = ("eps", "stride", "dilation", "padding_mode", "groups", "max_norm")


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
    model.built = type(model)
    model.backbone.is_untouched()  # looks at all classes before a compiler does
    return model


def parameters(model: Model, merge: bool = False) -> Values:
    """Raises ValueError also for a quantised model, and for one that is sharded over processes."""
    check_stored(model, offloaded=True)
    found, read = foreign(model), partial(_read, model)
    if merge:
        return merged(model.config, found, read, partial(layer, model), model.dtype)
    check_held(model.config, found)
    return Values(model.config, read)


def foreign(model: Model) -> Foreign:
    with torch.device("meta"):
        built = dict(model_class(model.config.task)(model.config, model.policy).named_modules())
    changed, hooked, modules = {}, {}, dict(model.named_modules(remove_duplicate=False))
    for path, expected in built.items():
        if _is_inside(path, changed):
            continue
        module = modules.get(path)
        if change := _change(module, expected):
            changed[path] = change
            continue
        changed |= {_joined(path, name): _kind(added) for name, added in _added(module, expected)}
        # accelerate's hook brings the parameters, and changes nothing.
        if not untouched(type(module), module) and not hasattr(module, "_hf_hook"):
            hooked[path] = "with hooks" if private.hooked(module) else "patched"
        elif any(getattr(type(module), name, None) is not getattr(type(expected), name, None) for name in METHODS):
            hooked[path] = f"{_kind(module)}, with a call of its own"
    # One that is shared has the name of its first place.
    names = [name for name, _ in model.named_parameters()]
    names += [name for name, _ in model.named_buffers() if _is_persistent(model, name)]
    table = parameter_table(model.config)
    return Foreign(
        tuple(name for name in names if name not in table and not _is_inside(name, changed)), changed, hooked
    )


def layer(model: Model, path: str, inputs: np.ndarray) -> np.ndarray:
    module = model.get_submodule(path)
    given = from_numpy(inputs, device=model.device)
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad():
            if not given.is_floating_point():
                return to_numpy(module(given.long()).float())
            given = given.to(dtype_of(model.dtype))
            weight = parameter_table(model.config)[f"{path}.weight"]
            if len(weight.shape) == 3:
                state = given.new_zeros(len(given), weight.shape[2] - 1, given.shape[2])
                return to_numpy(by_module(module, given, state, Call())[0].float())
            return to_numpy(module(given).float())
    finally:
        for part in training:
            part.training = True


def check_stored(model: Model, offloaded: bool = False) -> None:
    """Check that the model itself holds its parameters.

    offloaded: those that hooks bring where they are used will do.

    Raises:
        ValueError: it does not.
    """
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError("the model is quantised, for inference only; save or train the model that it was made from")
    # A module that is sharded by PyTorch may hold all of its parameters between two calls.
    if any(kind.__name__ == "FSDPModule" for module in model.modules() for kind in type(module).__mro__):
        raise ValueError(
            "the model is sharded by fully_shard, so that each process holds a part; gather its parameters with "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options="
            "StateDictOptions(full_state_dict=True)), load them into a model of mamba_core.build, and use that"
        )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "full_tensor"):
            raise ValueError(f"{name} is a DTensor; expected a tensor of this process, such as its full_tensor()")
        if parameter.is_meta and not offloaded:
            raise ValueError(f"{name} is on the device 'meta', without values; move the model to a device first")


def _read(model, name: str) -> np.ndarray:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    value = getattr(module, leaf)
    if value.is_meta:
        kept = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if kept is None:
            raise ValueError(f"{name} is on the device 'meta', without values")
        value = kept[leaf]
    return to_numpy(value)


def _change(module: nn.Module | None, expected: nn.Module) -> str | None:
    """What stands in the place of a module that was built; None if it is of the same class with the same parameters.

    A model and its backbone may be of a subclass. What else a module with others inside holds is left out.
    """
    kind = _kind(module)
    is_model = isinstance(expected, (Model, Backbone))
    if not (isinstance(module, type(expected)) if is_model else type(module) is type(expected)):
        return "nothing" if module is None else kind
    own = {name: value.shape for name, value in expected.named_parameters(recurse=False)}
    held = {name: value.shape for name, value in module.named_parameters(recurse=_is_layer(expected))}
    held |= {name: value.shape for name, value in module.named_buffers(recurse=_is_layer(expected))}
    if missing := [name for name, shape in own.items() if held.get(name) != shape]:
        return f"{kind} without {', '.join(missing)} of the same shape"
    if not _is_layer(expected):
        return None
    if more := sorted(set(held) - set(own)):
        return f"{kind} with {', '.join(more)}"
    others = [name for name in SETTINGS if getattr(module, name, None) != getattr(expected, name, None)]
    return f"{kind} with {others[0]}={getattr(module, others[0])}" if others else None


def _kind(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _added(module: nn.Module, expected: nn.Module) -> list[tuple[str, object]]:
    """Modules without parameters where the one that was built has nothing, though it may have a head or the like."""
    names = [name for name, value in vars(expected).items() if value is None and not name.startswith("_")]
    found = [(name, getattr(module, name, None)) for name in names]
    return [(name, added) for name, added in found if isinstance(added, nn.Module) and not list(added.parameters())]


def _is_layer(module: nn.Module) -> bool:
    return not any(True for _ in module.children())


def _is_persistent(model: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf not in model.get_submodule(path)._non_persistent_buffers_set


def _is_inside(path: str, changed: Iterable[str]) -> bool:
    return any(path == outer or path.startswith(f"{outer}.") or outer == "" for outer in changed)
