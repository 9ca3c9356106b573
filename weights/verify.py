"""Whether a checkpoint that was written is the one that was read: its bytes, and what the model computes."""

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mamba_core import registry, tasks
from mamba_core.spec.init import random_stream
from mamba_core.spec.params import parameter_count, parameter_table
from mamba_core.spec.reference import ReferenceModel
from mamba_core.tasks.base import EMBEDS
from mamba_core.weights.formats import DTYPES, CheckpointError, blocks
from mamba_core.weights.io import Checkpoint
from mamba_core.weights.opening import OpenedModel

LENGTH = 16
# Without a framework the float64 reference runs: a minute, and 400 MB, at most.
REFERENCE_PARAMETERS = 50_000_000


@dataclass(frozen=True)
class Verification:
    """tensors: how many were read again and had the right checksum.

    backend: what ran the forward, "reference" for the NumPy one, None if nothing could; dtype: its compute dtype.
    positions: how many were run, and agreed bit for bit.
    """

    tensors: int
    backend: str | None
    dtype: str | None
    positions: int


def verify_bytes(target: str | Path, checkpoint: Checkpoint, checksums: dict[str, str]) -> None:
    """Read every tensor again. Raises CheckpointError if one has not the checksum of what was written."""
    for name in checkpoint:
        checksum = 0
        for block in blocks(checkpoint[name]):
            checksum = zlib.crc32(block.view(np.uint8).data, checksum)
        if f"{checksum:08x}" != checksums[name]:
            raise CheckpointError(f"{target}: the verification failed: {name} was read otherwise than it was written")


def verify_forward(target: str | Path, source: OpenedModel, result: OpenedModel) -> Verification:
    """Run both, one after the other, in the compute dtype of the result, where equal weights give equal bits.

    Raises:
        CheckpointError: what they compute differs.
    """
    backend = _runner(source.config)
    if backend is None:
        return Verification(len(result.checkpoint), None, None, 0)
    before, after = (_forward(opened, backend, result.dtype) for opened in (source, result))
    if not np.array_equal(before, after, equal_nan=True):
        raise CheckpointError(f"{target}: the verification failed: on {backend} it computes something else than before")
    dtype = "float64" if backend == "reference" else result.dtype
    return Verification(len(result.checkpoint), backend, dtype, LENGTH)


def _runner(config) -> str | None:
    try:
        return registry.default_name()
    except ImportError:
        return "reference" if parameter_count(config) <= REFERENCE_PARAMETERS else None


def _forward(opened: OpenedModel, backend: str, dtype: str) -> np.ndarray:
    task = tasks.of(opened.config)
    inputs = task.draw(opened.config, random_stream(0, "verify"), 1, LENGTH)
    if backend == "reference":
        # The values that a framework would have: those of the compute dtype.
        table = parameter_table(opened.config)
        values = {name: value.astype(DTYPES[table[name].dtype(dtype)].numpy) for name, value in opened.tensors()}
        return ReferenceModel(opened.config, values)(inputs)[0]
    framework = registry.get(backend)
    model = framework.build(opened.config, opened.tensors(), dtype=dtype)
    out = model(framework.from_numpy(inputs, dtype=dtype if task.inputs == EMBEDS else None, device=model.device))[0]
    return framework.to_numpy(out).astype(np.float32)
