"""mlx-lm's quantised checkpoints, read as the values that they stand for.

A quantised weight is three tensors. "weight" holds whole numbers of `bits` bits as words of 32: those of a row lie one
after the other in its bytes, the lowest bits first. "scales" and "biases" have one entry for each group of a row's
columns, and an entry is number * scale + bias, in their dtype.
https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.dequantize.html
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mamba_core.weights.formats import FLOATS, CheckpointError, Header, StoredTensor, blocks, count_bytes
from mamba_core.weights.formats.base import BLOCK_BYTES
from mamba_core.weights.io import Checkpoint

SCALES, BIASES, WEIGHT = ".scales", ".biases", ".weight"
# Fields of config.json. The second is a copy of the first, for transformers.
FIELDS = ("quantization", "quantization_config")
BITS = (2, 3, 4, 5, 6, 8)
MODE = "affine"
_RUN = 8  # numbers, which fill as many bytes as one has bits
_ADVICE = "dequantise it first: mlx_lm.convert --hf-path PATH --mlx-path NEW --dequantize"


class _Quantised(NamedTuple):
    """The parts of a weight. shape: of its values. bits: of a number. group: how many columns share a scale."""

    words: StoredTensor
    scales: StoredTensor
    biases: StoredTensor
    shape: tuple[int, ...]
    bits: int
    group: int

    def header(self) -> Header:
        return Header(self.shape, self.scales.dtype, count_bytes(self.shape, self.scales.dtype))

    def array(self) -> np.ndarray:
        """The values, computed in the dtype of the scales, some rows at a time."""
        columns = self.shape[-1]
        words = self.words.array().reshape(-1, columns * self.bits // 32)
        groups = len(words), columns // self.group
        scales, biases = (part.array().reshape(groups) for part in (self.scales, self.biases))
        values = np.empty((len(words), columns), scales.dtype)
        step = max(1, BLOCK_BYTES // (8 * columns))
        for begin in range(0, len(words), step):
            rows = slice(begin, begin + step)
            numbers = unpacked(words[rows], self.bits).astype(scales.dtype).reshape(-1, scales.shape[1], self.group)
            with np.errstate(all="ignore"):  # what is not finite stays so
                found = numbers * scales[rows, :, None] + biases[rows, :, None]
            values[rows] = found.reshape(-1, columns)
        return values.reshape(self.shape)

    def same_bytes(self, other: "_Quantised") -> bool:
        pairs = zip((self.words, self.scales, self.biases), (other.words, other.scales, other.biases), strict=True)
        return self.bits == other.bits and all(_same(one.array(), two.array()) for one, two in pairs)


class Dequantised(Checkpoint):
    """A checkpoint whose quantised weights are computed when they are asked for, one at a time."""

    def __init__(self, stored: Checkpoint, quantised: Mapping[str, _Quantised]) -> None:
        parts = {name.removesuffix(WEIGHT) + end for name in quantised for end in (SCALES, BIASES)}
        tensors = {name: tensor for name, tensor in stored.tensors.items() if name not in parts}
        # MLX alone writes these.
        super().__init__(tensors, stored.files, stored.metadata | {"format": "mlx"}, stored.skipped)
        self._quantised = dict(quantised)

    def __getitem__(self, name: str) -> np.ndarray:
        stored = super().__getitem__(name)
        return self._quantised[name].array() if name in self._quantised else stored

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        return blocks(self[name]) if name in self._quantised else super().blocks(name)

    def header(self, name: str) -> Header:
        return self._quantised[name].header() if name in self._quantised else super().header(name)

    def have_same_bytes(self, first: str, second: str) -> bool:
        found = [self._quantised.get(name) for name in (first, second)]
        if found[0] is not None and found[1] is not None:
            return found[0].same_bytes(found[1])
        if found == [None, None]:
            return super().have_same_bytes(first, second)
        return self.header(first) == self.header(second) and _same(np.array(self[first]), np.array(self[second]))


def dequantised(path: Path, fields: dict | None, checkpoint: Checkpoint) -> tuple[dict | None, Checkpoint]:
    """The config's fields without those of the quantisation, and the checkpoint with values in place of its weights.

    Both are as they were where nothing is quantised.

    Raises:
        CheckpointError: what is quantised otherwise, or does not fit the config.
    """
    names = [name.removesuffix(SCALES) for name in checkpoint if name.endswith(SCALES)]
    # Other libraries have scales too.
    names = [
        name for name in names if name + WEIGHT in checkpoint and checkpoint.header(name + WEIGHT).dtype == "uint32"
    ]
    settings = next((fields[name] for name in FIELDS if isinstance(fields.get(name), dict)), None) if fields else None
    if not names:
        return fields, checkpoint
    if settings is None:
        raise CheckpointError(
            f"{path}: has quantised tensors, such as {names[0] + WEIGHT!r}, but its config.json has no quantization; "
            "expected an object with group_size and bits"
        )
    try:
        quantised = {name + WEIGHT: _quantised(name, settings, checkpoint) for name in names}
    except ValueError as fault:
        raise CheckpointError(f"{path}: {fault}") from None
    rest = {name: value for name, value in (fields or {}).items() if name not in FIELDS}
    return rest, Dequantised(checkpoint, quantised)


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """The whole numbers in rows of words: (rows, w) uint32 -> (rows, 32 * w / bits) uint8."""
    runs = np.ascontiguousarray(words).view(np.uint8).reshape(-1, bits)
    joined = np.zeros(len(runs), np.uint64)
    for byte in range(bits):
        joined |= runs[:, byte].astype(np.uint64) << np.uint64(8 * byte)
    shifts = (bits * np.arange(_RUN)).astype(np.uint64)
    numbers = (joined[:, None] >> shifts) & np.uint64(2**bits - 1)
    return numbers.astype(np.uint8).reshape(len(words), -1)


def _quantised(name: str, settings: Mapping[str, Any], checkpoint: Checkpoint) -> _Quantised:
    own = settings.get(name)
    own = own if isinstance(own, Mapping) else settings
    bits, group, mode = own.get("bits"), own.get("group_size"), own.get("mode", MODE)
    if mode != MODE:
        raise ValueError(f"{name} is quantised in mode {mode!r}; this version reads {MODE!r} only; {_ADVICE}")
    if type(bits) is not int or bits not in BITS:
        raise ValueError(
            f"{name} is quantised in {bits!r} bits; expected one of {', '.join(map(str, BITS))}; {_ADVICE}"
        )
    if type(group) is not int or group < 1:
        raise ValueError(f"{name} is quantised in groups of {group!r}; expected a positive integer")
    if name + BIASES not in checkpoint:
        raise ValueError(f"{name} is quantised without biases; this version reads mode {MODE!r} only; {_ADVICE}")
    words, scales, biases = (checkpoint.tensors[name + end] for end in (WEIGHT, SCALES, BIASES))
    if scales.dtype not in FLOATS or biases.dtype != scales.dtype or biases.shape != scales.shape:
        found = f"{scales.dtype} {scales.shape} and {biases.dtype} {biases.shape}"
        raise ValueError(f"{name} has scales and biases {found}; expected floats of one shape")
    columns = scales.shape[-1] * group if scales.shape else 0
    if (
        words.shape != (*scales.shape[:-1], columns * bits // 32)
        or columns * bits % 32
        or columns % _RUN
        or not columns
    ):
        raise ValueError(
            f"{name} has words {words.shape} and scales {scales.shape}, which are not {bits} bits in groups of {group}"
        )
    return _Quantised(words, scales, biases, (*scales.shape[:-1], columns), bits, group)


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.tobytes() == other.tobytes()
