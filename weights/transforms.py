"""How a layout stores a tensor: changes of its axes, each with its inverse. A table names them, no shape does."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]


class Transform(NamedTuple):
    """A change of a tensor's axes.

    name: for reports; None where nothing is changed.
    read, write: the stored array -> the canonical one, and back, bit for bit. `read` raises ValueError for an array
        that is not of this form.
    stored_shape, canonical_shape: the same for shapes. The latter raises ValueError for another number of axes.
    """

    name: str | None
    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]
    stored_shape: Callable[[Shape], Shape]
    canonical_shape: Callable[[Shape], Shape]


def _same(value):
    return value


def _swap_last(array: np.ndarray) -> np.ndarray:
    return np.swapaxes(array, 1, 2)


def _swap_last_sizes(shape: Shape) -> Shape:
    first, second, third = shape
    return first, third, second


def _read_dense(dense: np.ndarray) -> np.ndarray:
    """(e, k, e) -> (e, 1, k). Raises ValueError where a channel's filter reads another channel."""
    channels, width, _ = dense.shape
    depthwise = np.empty((channels, 1, width), dense.dtype)
    largest = 0.0
    for channel in range(channels):  # one filter at a time: the whole is e times the size of what it holds
        depthwise[channel, 0] = dense[channel, :, channel]
        others = np.abs(dense[channel].astype(np.float64))
        others[:, channel] = 0
        largest = float(np.maximum(largest, others.max()))  # NaN stays NaN
    if largest != 0:
        raise ValueError(
            f"not a depthwise convolution: its filters read other channels, with weights of up to {largest:.3g}; "
            "expected zeros off the diagonal"
        )
    return depthwise


def _write_dense(depthwise: np.ndarray) -> np.ndarray:
    """(e, 1, k) -> (e, k, e)."""
    channels, _, width = depthwise.shape
    dense = np.zeros((channels, width, channels), depthwise.dtype)
    index = np.arange(channels)
    dense[index, :, index] = depthwise[:, 0]
    return dense


def _dense_shape(shape: Shape) -> Shape:
    channels, _, width = shape
    return channels, width, channels


def _depthwise_shape(shape: Shape) -> Shape:
    channels, width, _ = shape
    return channels, 1, width


def _turn_halves(array: np.ndarray) -> np.ndarray:
    half = len(array) // 2
    return np.concatenate((array[half:], array[:half]))


SAME = Transform(None, _same, _same, _same, _same)
CHANNELS_LAST = Transform("(e,1,k) as (e,k,1)", _swap_last, _swap_last, _swap_last_sizes, _swap_last_sizes)
DENSE = Transform("(e,1,k) as dense (e,k,e)", _read_dense, _write_dense, _dense_shape, _depthwise_shape)
HALVES = Transform("second half before the first", _turn_halves, _turn_halves, _same, _same)
