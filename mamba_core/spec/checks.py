"""Checks of a model's arguments, shared by the reference and every backend. Those of an op stand in the op's file."""

from collections.abc import Sequence
from typing import Any

from mamba_core import architectures
from mamba_core.spec import state as states


def check_targets(tokens: Any) -> None:
    """Check that tokens (b, l + 1) have something to predict.

    Raises:
        ValueError: fewer than two positions, or another number of axes.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(
            f"tokens has shape {tuple(tokens.shape)}; expected (b, l + 1) with two positions at least: "
            "the loss is of each token given those before it"
        )


def check_state(config: Any, batch: int, state: Any) -> None:
    """Check the state that a model's call goes on from.

    Raises:
        TypeError: it is no `State`.
        ValueError: the architecture carries no state, the state is of another depth or batch, or a layer carries other
            arrays than the config says.
    """
    if not architectures.traits(config).steps:
        raise ValueError(f"{config.architecture} carries no state; give none{_why_no_state(config)}")
    layers, segment = getattr(state, "layers", None), getattr(state, "segment", None)
    if segment is None or not isinstance(layers, tuple):
        raise TypeError(f"state is {type(state).__name__}; expected a State of {config.n_layer} layers")
    if len(layers) != config.n_layer:
        raise ValueError(f"state has {len(layers)} layers; expected {config.n_layer}")
    # No set of shapes: torch.export's symbolic sizes have no hash.
    if any(shape != (batch,) for shape in (segment.shape, *(value.shape[:1] for layer in layers for value in layer))):
        raise ValueError(f"state is of another batch than input_ids, {batch}; its segment has shape {segment.shape}")
    for layer, (own, kind) in enumerate(zip(layers, states.layer_types(config), strict=True)):
        if type(own) is not kind:
            found, wanted = (", ".join(fields) or "nothing" for fields in (getattr(own, "_fields", ()), kind._fields))
            raise ValueError(f"layer {layer} of the state carries {found}; expected {wanted}")


def check_steps(config: Any, use: str) -> None:
    """Check that a model goes on from a state, position by position, for a use that needs it.

    Raises:
        ValueError: it does not.
    """
    if not architectures.traits(config).steps:
        raise ValueError(
            f"{use} goes on from a state, and {config.architecture} carries none{_why_no_state(config)}; call the "
            "model on the whole sequence"
        )


def _why_no_state(config: Any) -> str:
    return "" if architectures.traits(config).causal else ": each position sees those after it"


def choose_device(device: str | None, available: Sequence[str]) -> str:
    """The device of that name, or for None the first of `Backend.devices`.

    Raises:
        ValueError: there is no such device here.
    """
    if device is None:
        return available[0]
    if device not in available:
        raise ValueError(f"device is {str(device)!r}; here there is {', '.join(available)}")
    return device
