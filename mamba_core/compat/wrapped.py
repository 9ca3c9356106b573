"""What the classes of both packages share: a model of ours inside, whose state dict has their names."""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from mamba_core import factory
from mamba_core.backend import State
from mamba_core.config import BaseConfig
from mamba_core.weights.configs import scheme_to_write
from mamba_core.weights.names import EMBEDDING, HEAD, Scheme, stored_tensors
from mamba_core.weights.transforms import SAME


class Wrapped(nn.Module):
    """core: the model of ours; its parameters are this module's, under their own names."""

    core: Any

    def __init__(self, core: nn.Module, layout: str, scheme: Scheme | None = None):
        super().__init__()
        self.core = core
        config: Any = core.config
        scheme = scheme_to_write(config, layout) if scheme is None else scheme
        self._stored = stored_tensors(config, scheme)
        self._tied = None
        if config.tie_embeddings and config.task == "lm" and (head := scheme.name(HEAD)) is not None:
            self._tied = head, self._stored[EMBEDDING].pieces[0].name
        assert all(piece.transform is SAME for stored in self._stored.values() for piece in stored.pieces)
        self.register_state_dict_post_hook(_to_theirs)
        self.register_load_state_dict_pre_hook(_to_ours)


def seeded(config: BaseConfig) -> nn.Module:
    """A model of ours with initial values that depend on PyTorch's generator, as theirs do."""
    return factory.build(config, backend="torch", device="cpu", seed=drawn_seeds(1)[0])


def drawn_seeds(count: int) -> list[int]:
    """Of PyTorch's generator, so that `torch.manual_seed` decides."""
    return torch.randint(2**31 - 1, (count,)).tolist()


def detached(state: State) -> State:
    """The state without what a gradient would need."""
    return State(tuple(type(layer)(*(value.detach() for value in layer)) for layer in state.layers), state.segment)


def refuse(module: str, missing: Mapping[str, str]) -> Callable[[str], NoReturn]:
    """A module's __getattr__ that says what to use in the place of names that it does not have."""

    def found(name: str) -> NoReturn:
        if name in missing:
            raise ImportError(f"{module} has no {name}: {missing[name]}")
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return found


def _to_theirs(module: Wrapped, tensors: dict[str, Any], prefix: str, _) -> None:
    for canonical, stored in module._stored.items():
        value = tensors.pop(f"{prefix}core.{canonical}")
        for piece in stored.pieces:
            tensors[prefix + piece.name] = value[piece.where] if piece.where else value
    if module._tied is not None:
        head, embedding = module._tied
        tensors[prefix + head] = tensors[prefix + embedding]


def _to_ours(module: Wrapped, tensors: dict[str, Any], prefix: str, _, strict, missing, unexpected, faults) -> None:
    if module._tied is not None:
        head, embedding = (prefix + name for name in module._tied)
        if (value := tensors.pop(head, None)) is not None and not torch.equal(
            value, tensors.setdefault(embedding, value)
        ):
            faults.append(f"{head} differs from {embedding}, to which the config ties it")
    for canonical, stored in module._stored.items():
        names = [prefix + piece.name for piece in stored.pieces]
        absent = [name for name in names if name not in tensors]
        given = [tensors.pop(name) for name in names if name in tensors]
        if given and absent:
            faults.append(f"{len(given)} of the {len(names)} tensors of {canonical} are given; {absent[0]} is missing")
        elif given:
            tensors[f"{prefix}core.{canonical}"] = _joined(module, canonical, stored.pieces, given)


def _joined(module: Wrapped, canonical: str, pieces, given: list[Tensor]) -> Tensor:
    if not pieces[0].where:
        return given[0]
    whole = given[0].new_empty(module.core.get_parameter(canonical).shape)
    for piece, value in zip(pieces, given, strict=True):
        whole[piece.where] = value
    return whole
