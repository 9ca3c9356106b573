"""Which way computes which layers of a model, and why not a faster one."""

from dataclasses import dataclass
from typing import Any

from mamba_core import registry
from mamba_core.backend import Explained
from mamba_core.wrappers import unwrap


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; as text it is a short table.

    Attributes:
        backend, device, dtype: of the model.
        batch, length: of the call that is explained.
        kernels: op -> the kernel that is chosen.
        layers: consecutive layers that one way computes, in order.
    """

    backend: str
    device: str
    dtype: str
    batch: int
    length: int
    kernels: dict[str, str]
    layers: tuple[Explained, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        layers = [part._asdict() | {"passed_over": dict(part.passed_over)} for part in self.layers]
        return {**vars(self), "layers": layers}

    def __str__(self) -> str:
        lines = [f"{self.backend} on {self.device} in {self.dtype}, {self.batch} x {self.length} positions"]
        lines.append("kernels: " + ", ".join(f"{op} {kernel}" for op, kernel in self.kernels.items()))
        for part in self.layers:
            where = f"layer {part.first}" if part.first == part.last else f"layers {part.first} to {part.last}"
            lines.append(f"{where}: {part.way}")
            lines += [f"    not {way}: {reason}" for way, reason in part.passed_over.items()]
        return "\n".join(lines)


def explain(model: Any, batch: int = 1, length: int = 1) -> Explanation:
    """Say which way computes which layers in a call without gradients, and why not a faster one. Nothing is run.

    Args:
        model: of `build` or `load`; may be wrapped by torch.compile, DistributedDataParallel, AveragedModel or PEFT.
        batch, length: the shape of the call; a length of 1 is a step of decoding.

    Raises:
        TypeError: the model is not of `build` or `load`.
        ValueError: batch or length is no integer from 1.
    """
    model = unwrap(model, "explaining")
    if not all(type(size) is int and size > 0 for size in (batch, length)):
        raise ValueError(f"batch is {batch!r} and length {length!r}; expected integers from 1")
    layers = tuple(Explained(*part) for part in registry.get(model.backend).explain(model, batch, length))
    return Explanation(model.backend, model.device, model.dtype, batch, length, dict(model.kernels), layers)
