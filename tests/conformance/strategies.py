"""What the conformance suite draws: arguments of the ops, masks, segments and how arrays lie, all as NumPy."""

import functools
import inspect
import os
from typing import NamedTuple

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_core.spec import ops

# Where off-by-one faults live: nothing, shorter than the convolution's window, and on either side of a kernel's chunk.
EDGES = (0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 255, 256, 257)
SHORT = (0, 1, 2, 3, 15, 16, 17, 33)


def law(test):
    """A property of drawn data, tried on a fifth of the examples where every new shape is compiled.

    $EXAMPLES, where it is set, is the number on every backend.
    """
    many = settings.default.max_examples
    few = many if "EXAMPLES" in os.environ else max(3, many // 5)
    tried = {count: settings(max_examples=count)(given(data=st.data())(test)) for count in (many, few)}

    @functools.wraps(test)
    def run(**fixtures):
        return tried[few if fixtures["backend"].name == "jax" else many](**fixtures)

    signature = inspect.signature(test)
    drawn = [parameter for name, parameter in signature.parameters.items() if name != "data"]
    run.__signature__ = signature.replace(parameters=drawn)
    return run


class Case(NamedTuple):
    """The arguments of an op: arrays are differentiated, positions (mask, segment_ids) and options are not.

    strides: name -> how its array lies in memory, as `laid_out` takes it. dtype: the compute dtype.
    """

    arrays: dict[str, np.ndarray]
    positions: dict[str, np.ndarray]
    options: dict
    strides: dict[str, str]
    dtype: str = "float32"

    @property
    def shape(self) -> tuple[int, int]:
        """(b, l)."""
        whole = self.arrays.get("x", self.arrays.get("inputs_embeds", self.options.get("input_ids")))
        return whole.shape[:2]


def lengths(longest: int = 300) -> st.SearchStrategy[int]:
    return st.sampled_from([edge for edge in EDGES if edge <= longest]) | st.integers(0, longest)


@st.composite
def op_cases(draw, op: str, lengths=lengths()) -> Case:  # noqa: B008 (a strategy is a value)
    """Arguments of an op, as its file draws them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    b, l = draw(st.sampled_from((1, 2, 3))), draw(lengths)
    arrays, options = ops.public()[op].draw(rng, chooser(draw), b, l)
    arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
    return Case(arrays, draw(positions(b, l)), options, draw(strides(arrays)))


def chooser(draw):
    """A function that picks one of some values, as the files of ops and of cases want it."""
    return lambda values: draw(st.sampled_from(values))


def strides(arrays) -> st.SearchStrategy[dict[str, str]]:
    return st.fixed_dictionaries({name: st.sampled_from(("plain", "every second", "swapped")) for name in arrays})


@st.composite
def positions(draw, b: int, l: int) -> dict[str, np.ndarray]:
    """A mask and segment ids, each present or not. Masks pad on the left, the right or both, or have holes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    drawn = {}
    if draw(st.booleans()):
        drawn["mask"] = draw(st.sampled_from((_padding, _holes)))(rng, b, l)
    if draw(st.booleans()):
        drawn["segment_ids"] = np.cumsum(rng.random((b, l)) < 0.15, axis=1).astype(np.int32)
    return drawn


def tokens(config, b: int, l: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (b, l)).astype(np.int32)


def laid_out(backend, value: np.ndarray, strides: str, dtype: str | None = None):
    """The value as an array of the backend that lies in memory as `strides` says, where the framework has strides."""
    if strides == "every second":
        return backend.from_numpy(np.repeat(value, 2, axis=-1), dtype=dtype)[..., ::2]
    if strides == "swapped" and value.ndim > 1:
        return backend.from_numpy(np.ascontiguousarray(value.swapaxes(0, 1)), dtype=dtype).swapaxes(0, 1)
    return backend.from_numpy(value, dtype=dtype)


def _padding(rng, b, l):
    left = rng.integers(0, l + 1, b)
    right = rng.integers(0, l + 1, b) if rng.random() < 0.5 else np.full(b, l)
    at = np.arange(l)
    return (at >= np.minimum(left, right)[:, None]) & (at < np.maximum(left, right)[:, None])


def _holes(rng, b, l):
    return rng.random((b, l)) < 0.7
