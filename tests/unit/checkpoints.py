"""What the tests of checkpoint files share: arrays of every dtype, and how they and faults are compared."""

import ml_dtypes
import numpy as np
import pytest

from mamba_core.weights.formats import DTYPES, CheckpointError, sources_of, write_safetensors_file, write_torch
from mamba_core.weights.io import open_checkpoint


def example_arrays() -> dict[str, np.ndarray]:
    """Every dtype, a scalar, an empty tensor, a transposed view, and an odd size before a wide element."""
    arrays = {name: np.arange(6).reshape(2, 3).astype(dtype.numpy) for name, dtype in DTYPES.items()}
    return arrays | {
        "odd": np.arange(3, dtype=np.int8),
        "scalar": np.array(-1.5, np.float32),
        "empty": np.zeros((0, 3), ml_dtypes.bfloat16),
        "transposed": np.arange(6.0).reshape(2, 3).T,
        "block.ä\n": np.arange(4, dtype=np.int64),
    }


def write(path, arrays) -> None:
    writer = write_safetensors_file if path.suffix == ".safetensors" else write_torch
    writer(path, sources_of(arrays))


def assert_same(found, expected) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def assert_fault(path, *words: str) -> None:
    """Opening fails with one line that names the path and has every word."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    for word in words:
        assert word in message
