"""Models inside of what frameworks wrap around them."""

from pathlib import Path
from typing import Any

# Where wrappers keep what they wrap: torch.compile, then DistributedDataParallel, DataParallel and AveragedModel.
INSIDE = ("_orig_mod", "module")


def unwrap(model: Any, use: str) -> Any:
    """The model of this library inside of a wrapper that computes what the model alone computes.

    use: what it is needed for, for the error.

    Raises:
        TypeError: there is none, or the wrapper computes something else.
    """
    inner = model
    while (found := _inside(inner)) is not None:
        inner = found
    if not all(hasattr(inner, name) for name in ("backend", "config", "init_state")):
        raise TypeError(f"model is {_kind(inner)}; {use} needs a model of this library, of mamba_core.build or load")
    return inner


def _inside(model: Any) -> Any:
    """What the outermost wrapper wraps; None if this is none."""
    if (base := getattr(model, "get_base_model", None)) is not None:  # PEFT, whose layers are inside the model
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise TypeError("model is a PEFT model that learns a prompt, which only its own call prepends; call it")
        return base()
    if type(model).__name__ == "FullyShardedDataParallel":
        raise TypeError("model is FullyShardedDataParallel, which takes parameters apart; use fully_shard (FSDP2)")
    own = vars(model) | vars(model).get("_modules", {}) if hasattr(model, "__dict__") else {}
    return next((own[name] for name in INSIDE if own.get(name) is not None and "backend" not in own), None)


def _kind(model: Any) -> str:
    """What it is, and how a model of another package becomes one of this library."""
    if isinstance(model, (str, Path)):
        return f"{str(model)!r}, a name"
    kind = type(model)
    if kind.__module__ == "builtins":
        return kind.__qualname__
    package = kind.__module__.partition(".")[0]
    advice = f", a model of {package}, which mamba_core.load reads once it is saved"
    return f"{kind.__module__}.{kind.__qualname__}{advice if hasattr(model, 'parameters') else ''}"
