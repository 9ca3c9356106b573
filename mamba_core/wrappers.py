"""Models inside of what frameworks wrap around them."""

from pathlib import Path
from typing import Any

from mamba_core import tasks
from mamba_core.weights import layouts

# Wrappers of torch that compute what the module inside computes -> where they keep it.
INSIDE = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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


def checked_output(model: Any, output: Any) -> Any:
    """What a model's own call gave.

    Raises:
        TypeError: it lacks the first field of what the task gives, such as logits, or the state.
    """
    expected: Any = tasks.of(model.config).output
    name = expected._fields[0]
    if not (hasattr(output, name) and hasattr(output, "state")):
        raise TypeError(f"a call of {type(model).__name__} gives {type(output).__name__}; expected {name} and state")
    return output


def check_mixers_step(model: Any, use: str) -> None:
    """Check that no mixer of another's is in the way of a use that goes on from a state.

    One that subclasses or holds a mixer of the backend's or an extension's is taken to do as that one does. Another has
    the attribute `steps`, True, where it carries in its layer's state what it needs.

    Raises:
        ValueError: a mixer does not say so.
    """
    for index, block in enumerate(getattr(getattr(model, "backbone", None), "layers", ())):
        mixer = getattr(block, "mixer", None)
        if (
            mixer is not None
            and not getattr(mixer, "steps", False)
            and not _holds_a_mixer(mixer, _package(type(model)))
        ):
            kind = type(mixer).__name__
            raise ValueError(
                f"{use} goes on from a state, and the mixer of layer {index}, {kind}, does not say that it does; give "
                f"{kind} the attribute steps = True if it needs nothing but the state that it returned before"
            )


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _holds_a_mixer(value: Any, package: str, depth: int = 4) -> bool:
    """Whether it is of a class of that package or of mixers of another, or has one inside."""
    if any(_package(kind) == package or ".mixers." in f"{kind.__module__}." for kind in type(value).__mro__):
        return True
    parts = [*getattr(value, "__dict__", {}).values(), *(value.values() if isinstance(value, dict) else ())]
    parts += value if isinstance(value, (list, tuple)) else []
    return depth > 0 and any(
        _holds_a_mixer(part, package, depth - 1)
        for part in parts
        if isinstance(part, (dict, list, tuple)) or (hasattr(part, "__dict__") and not isinstance(part, type))
    )


def _inside(model: Any) -> Any:
    """What the outermost wrapper wraps; None if this is none that is known."""
    if type(model).__name__ == "FullyShardedDataParallel":
        raise TypeError("model is FullyShardedDataParallel, which takes parameters apart; use fully_shard (FSDP2)")
    if (base := getattr(model, "get_base_model", None)) is not None:  # PEFT, whose layers are inside the model
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise TypeError("model is a PEFT model that learns a prompt, which only its own call prepends; call it")
        inner = base()
    elif (name := INSIDE.get(_name(type(model)))) is not None:
        inner = getattr(model, name)
    else:
        return None
    if any(getattr(model, hooks, None) for hooks in HOOKS):
        raise TypeError(f"model is {_name(type(model))} with hooks, which only its own call runs; hook what is inside")
    return inner


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _kind(model: Any) -> str:
    """What it is, and how a model of another package becomes one of this library."""
    if isinstance(model, (str, Path)):
        return f"{str(model)!r}, a name"
    kind = type(model)
    if kind.__module__ == "builtins":
        return kind.__qualname__
    package = kind.__module__.partition(".")[0]
    read = ("transformers", *(layout.replace("-", "_") for layout in layouts.names()))
    advice = f", a model of {package}, which mamba_core.load reads once it is saved" if package in read else ""
    return _name(kind) + advice
